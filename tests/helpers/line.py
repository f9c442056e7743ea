"""The whole line on a tiny teacher, by the two programs themselves, once a test session: real vLLM, real DeepSpeed.

`run_line` leaves in its folder what `make demo` leaves in a checkout: benchmarks/demo/*.yaml and runs/demo/ with
teacher, cache, student, run and export. The teacher is tests.helpers.tiny's; everything else is the product.
"""

import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.programs import TIMEOUT_S, Program, run_with_vllm
from tests.helpers.tiny import make_tiny_teacher

RUN_VLLM = ("build", "score", "features")
NUM_CHAINS = 60
"""In the cache: two of each prompt."""


@dataclass
class Line:
    """A folder in which the line was run, and the JSON results of its commands by name."""

    folder: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def program(self, *command: str) -> str:
        """Runs one of the two programs in the folder and returns its stdout; fails with its stderr."""
        if command[1] in RUN_VLLM:
            return run_with_vllm(list(command), cwd=self.folder)
        return Program(list(command), cwd=self.folder).wait(expect=0)

    def interrupt(self, *command: str) -> None:
        """Runs a training until its first checkpoint is there, then asks it to stop: it must say how to go on."""
        process = Program(list(command), cwd=self.folder)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (self.folder / "runs/demo/run/checkpoints/latest.json").exists():
            assert process.poll() is None, "training ended before its first checkpoint"
            assert time.monotonic() < deadline_s, "no checkpoint came"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code, _, said = process.communicate()
        assert code == 130, said[-4000:]
        assert f"Resume with: {' '.join(command)}" in said

    def step(self, name: str, *command: str) -> dict[str, Any]:
        """Runs a command with --json and keeps its result."""
        self.results[name] = json.loads(self.program(*command, "--json"))
        return self.results[name]


def run_line(folder: Path) -> Line:
    """Plan, build twice, verify, cut, train on two ranks with an interruption, evaluate, export."""
    line = Line(folder)
    configs = folder / "benchmarks" / "demo"
    configs.mkdir(parents=True)
    (configs / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    (configs / "student.yaml").write_text(yaml.safe_dump(STUDENT))
    (configs / "score.yaml").write_text(yaml.safe_dump(SCORE))
    make_tiny_teacher(folder / "runs" / "demo" / "teacher")
    teacher, student = "benchmarks/demo/teacher.yaml", "benchmarks/demo/student.yaml"
    line.step("plan", "teacher-cache", "plan", teacher)
    line.step("build", "teacher-cache", "build", teacher)
    line.step("again", "teacher-cache", "build", teacher)
    line.step("verify", "teacher-cache", "verify", "runs/demo/cache")
    line.step("init", "student-train", "init", student)
    line.interrupt("student-train", "run", student, "--nproc", "2")
    line.step("train", "student-train", "run", student, "--nproc", "2")
    more = ("--robustness", "--price-per-hour", "2", "--out", "answers.html")
    line.step("answers", "student-train", "eval", student, "--generate", "5", "--max-new-tokens", "8", *more)
    line.step("export", "student-train", "export", student, "--out", "runs/demo/export")
    return line


TEACHER: dict[str, Any] = {
    "cache": "runs/demo/cache",
    "run": "demo",
    "teacher": {"model": "runs/demo/teacher"},
    "prompts": {
        "heldout_frac": 0.25,
        "sources": [
            {"kind": "reasoning_gym", "name": "sums", "task": "chain_sum", "size": 16},
            {"kind": "reasoning_gym", "name": "letters", "task": "letter_counting", "size": 16, "limit": 14},
        ],
    },
    "sampling": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 24, "samples": 2},
    "capture": {"codec": "topk-f32", "max_support": 64, "nucleus": None, "draws": 0},
    "engine": {"dtype": "float32", "max_num_seqs": 16, "enforce_eager": True, "kv_cache_gb": 0.25},
    "shard": {"row_group_tokens": 300},
}

SCORE: dict[str, Any] = {
    "cache": "runs/demo/scored",
    "run": "scored",
    "teacher": {"model": "runs/demo/teacher"},
    "completions": {"sources": [{"kind": "cache", "name": "demo", "path": "runs/demo/cache"}]},
    "capture": TEACHER["capture"],
    "engine": TEACHER["engine"],
    "shard": TEACHER["shard"],
}

STUDENT: dict[str, Any] = {
    "run": "runs/demo/run",
    "student": {
        "model": "runs/demo/student",
        "init": {"teacher": "runs/demo/teacher", "layers": 1},
    },
    "data": {"caches": ["runs/demo/cache"], "where": "split = 'train'", "pack_tokens": 512},
    "stages": [{"epochs": 6, "batch_tokens": 1024, "learning_rate": 2e-3}],
    "engine": {"precision": "float32", "zero_stage": 2},
    "checkpoint": {"every_steps": 2},
}
