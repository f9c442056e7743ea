"""Public tasks by lm-eval (EleutherAI's evaluation harness), in an environment of its own.

In: a Hugging Face folder, names of tasks. Out: their metrics with standard errors. Tasks of the hub download their
data; tasks of one's own (`include_path`) need no network.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import Json
from stillroom.errors import ConfigError, StillroomError
from stillroom.log import note
from student_train.compare.statistics import SHARE, constant_interval
from student_train.export.environments import python_of
from student_train.export.processes import Ended, run_noting
from student_train.export.worker import WORKERS

ENVIRONMENT = "lm_eval"
BATCH_SIZE = 8
NORMAL_95 = 1.96


@dataclass(frozen=True)
class HarnessConfig:
    """What to run. `limit` is documents a task, None all; `include_path` holds tasks of one's own; `chat` says whether
    prompts are written by the chat template, None where the tokenizer has one.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        bad = [name for name in self.tasks if not re.fullmatch(r"[\w.*/+-]+", name)]
        if not self.tasks or bad:
            raise ConfigError(f"--lm-eval {','.join(self.tasks)}: write task names separated by commas, e.g. a,b")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--lm-eval-path {self.include_path} is not a folder: name one with YAML task files")

    def uses_chat(self, tokenizer: Any) -> bool:
        """Raises ConfigError where a template is asked for that the tokenizer does not have."""
        has_template = tokenizer.chat_template is not None
        if self.chat and not has_template:
            raise ConfigError("--lm-eval-chat: the student's tokenizer has no chat template: remove it")
        return has_template if self.chat is None else self.chat


def require_tasks(config: HarnessConfig, model: str) -> None:
    """Loads the tasks and their data for a tokenizer like that of `model`, in an environment that is made if there is
    none: minutes, before hours of evaluation. Raises ConfigError, StillroomError where this fails.
    """
    python = python_of(ENVIRONMENT)
    names = ",".join(config.tasks)
    command = [str(python), str(WORKERS / "load_lm_eval.py"), model, names]
    command += [] if config.include_path is None else [str(config.include_path)]
    ended = _run(command, "lm-eval: loading tasks")
    if ended.code != 0:
        raise ConfigError(
            f"--lm-eval {names}: {ended.why()}: check the names (your own tasks need --lm-eval-path FOLDER) and, for "
            "tasks of the hub, the network"
        )


def run_harness(folder: Path | str, config: HarnessConfig, precision: str, *, is_chat: bool) -> Json:
    """The metrics of each task. Raises StillroomError with lm-eval's last words where it fails."""
    import torch

    python = python_of(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="student-train-lm-eval-") as temp:
        command = [str(python), "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={folder},dtype={precision}", "--tasks", ",".join(config.tasks)]
        command += ["--device", "cuda:0" if torch.cuda.is_available() else "cpu", "--batch_size", str(BATCH_SIZE)]
        command += ["--output_path", temp]
        command += ["--apply_chat_template"] if is_chat else []
        command += [] if config.include_path is None else ["--include_path", str(config.include_path)]
        command += [] if config.limit is None else ["--limit", str(config.limit)]
        note(f"lm-eval: {', '.join(config.tasks)}")
        started_s = time.monotonic()
        ended = _run(command, "lm-eval: running")
        if ended.code != 0:
            raise StillroomError(f"lm-eval failed: {ended.why()}")
        files = sorted(Path(temp).rglob("results_*.json"))
        if not files:
            raise StillroomError("lm-eval ended without results: run it by hand with the same tasks")
        found: Json = json.loads(files[-1].read_text(encoding="utf-8"))
    nums = {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()}
    return {
        "version": found.get("lm_eval_version"),
        "limit": config.limit,
        "chat_template": is_chat,
        "seconds": time.monotonic() - started_s,
        "tasks": {name: _metrics(values, nums.get(name)) for name, values in found["results"].items()},
        "num_samples": nums,
    }


def _metrics(values: Json, num: int | None) -> list[Json]:
    """Rows of lm-eval's `exact_match,strict-match: 0.5` and `exact_match_stderr,strict-match: 0.1`."""
    rows = []
    for key, value in values.items():
        name, comma, variant = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{variant}")
        known = error if isinstance(error, int | float) else None
        low, high = _interval(value, known, num)
        rows.append({"metric": name, "filter": variant, "value": value, "stderr": known, "low": low, "high": high})
    return rows


def _interval(value: float, error: float | None, num: int | None) -> tuple[float | None, float | None]:
    """At 95%. All or none of `num` documents have no spread, and a standard error of 0 that says nothing."""
    if error is None:
        return None, None
    if error == 0 and num and value in SHARE:
        exact = constant_interval(value, num, SHARE)
        return exact.low, exact.high
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def _run(command: list[str], doing: str) -> Ended:
    environ = {**os.environ, "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    # Packages on our path would come before those of lm-eval's environment.
    environ.pop("PYTHONPATH", None)
    return run_noting(command, environ, doing)
