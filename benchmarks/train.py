"""Speed of training from a cache, against cross-entropy alone, online distillation, or another checkout.

    python -m benchmarks.train [--json] [--steps N] [--rounds N] [--vocab V] [--hidden H] [--layers L] ...
    python -m benchmarks.train --before CHECKOUT ...
    python -m benchmarks.train --busy ...

Each side is a real run of student_train on the same synthetic chains, in a fresh process; sides take turns.

    kd       the default losses on the default capture (up to 8 exact entries and 8 draws a token)
    ce       cross-entropy alone: only token ids are read
    online   kd with targets computed by a teacher in the same process: forward pass, logits by chunks, exact top 64
             and tail (the cheapest online distillation that loses as little)
    before   kd by the code of CHECKOUT; only this and kd run
    busy     kd beside two endless loops; only this and kd run, and 1 / kd_vs_busy is the speed that is kept

Speed is student tokens over the time of a step, median of all steps but the first; `..._cpu` counts CPU seconds of the
process, which other load disturbs less. `online_promise` is what arithmetic says of kd_vs_online: a student costs 6
floating point operations a token and parameter of its matrices, a teacher's forward pass 2. `online_measured` is the
online step over itself without its teacher, from its own times. Memory is the peak resident set, or the GPU
allocator's. The last line is one JSON object, the only one with --json.

    N loss tokens, V vocabulary, H hidden, K support, C tokens of a chunk
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch

from benchmarks.loss import Setting as LossSetting
from benchmarks.loss import hardware
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.data.pack import Pack, TargetView, TorchPack, to_torch
from student_train.losses.mix import DEFAULT_MIX
from student_train.losses.targets import SparseTargets
from student_train.model.packed_attention import hidden_states, keep_apart
from student_train.model.student import DTYPES, use_cpu_where_there_is_no_gpu
from student_train.runtime.metrics_log import MetricsLog, StepRecord
from student_train.runtime.ranks import joined_ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train
from tests.helpers.caches import CacheShape, write_cache
from tests.helpers.students import make_tokenizer

SIDES = ("kd", "ce", "online")
SUPPORT, DRAWS = 8, 8
ONLINE_SUPPORT = 64
CHUNK_TOKENS = 128
PRECISION = "bfloat16" if torch.cuda.is_available() else "float32"
KD_LOSSES = {term.name: term.weight for term in DEFAULT_MIX.terms}


@dataclass(frozen=True)
class Setting:
    """Sizes; the teacher has `teacher_scale` times the student's width and layers."""

    steps: int = 3
    rounds: int = 2
    vocab: int = 16_384
    hidden: int = 384
    layers: int = 4
    teacher_scale: int = 2
    pack_tokens: int = 1024
    packs: int = 8


def main() -> None:
    """Runs the sides and prints their ratios."""
    use_cpu_where_there_is_no_gpu()
    setting, arguments = _arguments()
    if arguments.side is not None:
        print(json.dumps(run_side(arguments.side, setting, arguments.folder)))
        return
    log = sys.stderr if arguments.json else sys.stdout
    sides = ("before", "kd") if arguments.before is not None else ("busy", "kd") if arguments.busy else SIDES
    with tempfile.TemporaryDirectory(prefix="stillroom-train-") as name:
        root = Path(name)
        sizes = prepare(root, setting)
        rounds = [{one: _measure(one, setting, root, arguments.before) for one in sides} for _ in range(setting.rounds)]
    result = ratios(rounds, sizes)
    for one in sides:
        speeds, cpu_speeds = (
            ", ".join(f"{turn[one][key]:.0f}" for turn in rounds) for key in ("tokens_per_s", "tokens_per_cpu_s")
        )
        print(f"{one:8} {speeds} tok/s, {cpu_speeds} tok/CPU s, {rounds[0][one]['peak_mib']:.0f} MiB", file=log)
    for key, value in result.items():
        print(f"{key:18} {value}", file=log)
    machine = hardware(LossSetting(device="cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps({**result, "rounds": rounds, "setting": asdict(setting), "hardware": machine}))


def prepare(root: Path, setting: Setting) -> dict[str, int]:
    """Writes cache, student and teacher; returns the matrix parameters of both models."""
    tokens = setting.steps * setting.packs * setting.pack_tokens
    write_cache(
        root / "cache",
        CacheShape(
            num_chains=2 + 2 * tokens // 500,
            codec="topk-u8",
            vocab_size=setting.vocab,
            max_support=SUPPORT,
            draws=DRAWS,
            min_tokens=200,
            max_tokens=800,
            max_prompt_tokens=100,
            rows_per_group=32,
            id_skew=4.0,
            heldout_frac=0.0,
        ),
    )
    scale = setting.teacher_scale
    return {
        "student": _write_model(root / "student", setting.vocab, setting.hidden, setting.layers),
        "teacher": _write_model(root / "teacher", setting.vocab, scale * setting.hidden, scale * setting.layers),
    }


def run_side(side: str, setting: Setting, root: Path) -> Json:
    """Runs one side in this process: tokens a second, stall share, peak memory."""
    config = _config(side, setting, root)
    start_cpu_s: list[float] = []
    ends_s: list[float] = []
    teacher_s: list[float] = []

    class TimedLog(MetricsLog):
        def __enter__(self) -> Self:
            start_cpu_s.append(time.process_time())
            return super().__enter__()

        def write(self, record: StepRecord) -> None:
            super().write(record)
            ends_s.append(time.process_time())
            teacher_s.append(teacher.take_cpu_s() if teacher is not None else 0.0)

    teacher: OnlineTeacher | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(mock.patch("student_train.training.stage.MetricsLog", TimedLog))
        stop, ranks = stack.enter_context(StopRequest()), stack.enter_context(joined_ranks())
        if side == "online":
            teacher = OnlineTeacher(root / "teacher", ranks.device)
            stack.enter_context(mock.patch("student_train.training.stage.to_torch", teacher.to_torch))
        train(config, ranks, stop)
    records = RunFolder(config.run).read_metrics()
    # The first step warms up: its end is where the second one's clock starts.
    cpu_s = [end_s - start_s for start_s, end_s in itertools.pairwise(ends_s)]
    later = list(zip(records[1:], cpu_s, strict=True))
    return {
        "start_cpu_s": start_cpu_s[0],
        "tokens_per_s": statistics.median(record["num_tokens"] / record["step_s"] for record, _ in later),
        "tokens_per_cpu_s": statistics.median(record["num_tokens"] / seconds for record, seconds in later),
        "teacher_frac": statistics.median(mine / whole for mine, whole in zip(teacher_s[1:], cpu_s, strict=True)),
        "stall_frac": sum(one["stall_frac"] * one["step_s"] for one in records) / sum(one["step_s"] for one in records),
        "peak_mib": 1024 * max(record["memory_gib"] for record in records),
    }


class OnlineTeacher:
    """Computes targets of packs with a teacher, replacing the cached ones."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[PRECISION])
        self._model = loaded.to(device).eval()
        self._apart = keep_apart(self._model)
        self._cpu_s = 0.0

    def take_cpu_s(self) -> float:
        """CPU seconds of the teacher since the last call."""
        taken_s, self._cpu_s = self._cpu_s, 0.0
        return taken_s

    @torch.no_grad()
    def to_torch(self, pack: Pack, device: torch.device, view: TargetView) -> TorchPack:
        """The pack with the teacher's own top 64 and tail as targets."""
        found = to_torch(pack, device, view)
        started_s = time.process_time()
        hidden_LH = hidden_states(
            self._model, self._apart, found.input_ids_1L, found.position_ids_1L, found.document_lengths
        )
        parts = [self._support(chunk) for chunk in hidden_LH[found.predict_positions_N].split(CHUNK_TOKENS)]
        ids_NK, logprobs_NK, tail_N = (torch.cat(part) for part in zip(*parts, strict=True))
        targets: SparseTargets = replace(
            found.targets, ids_NK=ids_NK, logprobs_NK=logprobs_NK, tail_logmass_N=tail_N, draws=None
        )
        self._cpu_s += time.process_time() - started_s
        return replace(found, targets=targets)

    def _support(self, hidden_CH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_CV = self._model.lm_head(hidden_CH).float()
        top_CK, ids_CK = logits_CV.topk(ONLINE_SUPPORT, dim=1)
        logsumexp_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
        tail_C = logits_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(dim=1) - logsumexp_C1.squeeze(1)
        return ids_CK, top_CK - logsumexp_C1, tail_C


def ratios(rounds: list[dict[str, Json]], sizes: dict[str, int]) -> Json:
    """Medians over rounds of kd over each other side, within a round."""

    def median(side: str, key: str) -> float:
        return round(float(statistics.median(turn[side][key] for turn in rounds)), 4)

    over = {
        f"kd_vs_{side}{suffix}": round(
            float(statistics.median(turn["kd"][key] / turn[side][key] for turn in rounds)), 3
        )
        for suffix, key in (("", "tokens_per_s"), ("_cpu", "tokens_per_cpu_s"))
        for side in rounds[0]
        if side != "kd"
    }
    if "online" not in rounds[0]:
        return over
    student, teacher = sizes["student"], sizes["teacher"]
    return {
        **over,
        "online_measured": round(1 / (1 - median("online", "teacher_frac")), 3),
        "online_promise": round((6 * student + 2 * teacher) / (6 * student), 3),
        "stall_frac": median("kd", "stall_frac"),
        **{f"{side}_peak_mib": round(median(side, "peak_mib")) for side in SIDES},
        "student_parameters": student,
        "teacher_parameters": teacher,
    }


def _measure(side: str, setting: Setting, root: Path, before: Path | None) -> Json:
    options = [word for name, value in asdict(setting).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    ran = "kd" if side in ("before", "busy") else side
    checkout = before if side == "before" else None
    command = [sys.executable, "-m", "benchmarks.train", "--side", ran, "--folder", str(root), *options]
    path = {} if checkout is None else {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'shared'}"}
    with _busy_loops(2 if side == "busy" else 0):
        ended = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=checkout, env={**os.environ, **path}
        )
    if ended.returncode:
        sys.exit(f"benchmarks.train: {side} failed:\n{ended.stderr[-2000:]}")
    measured: Json = json.loads(ended.stdout.splitlines()[-1])
    return measured


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


def _config(side: str, setting: Setting, root: Path) -> TrainConfig:
    run = tempfile.mkdtemp(dir=root, prefix=f"run-{side}-")
    given: Json = {
        "run": f"{run}/run",
        "student": {"model": str(root / "student")},
        "data": {"caches": [str(root / "cache")], "pack_tokens": setting.pack_tokens},
        "stages": [
            {
                "losses": {"cross_entropy": 1.0} if side == "ce" else KD_LOSSES,
                "max_steps": setting.steps,
                "epochs": 2,
                "batch_tokens": setting.packs * setting.pack_tokens,
                "learning_rate": 1e-4,
            }
        ],
        "engine": {"precision": PRECISION},
        "eval": None,
        "checkpoint": {"every_steps": 10_000},
    }
    return validate_config(given, TrainConfig, "benchmarks.train")


def _write_model(folder: Path, vocab: int, hidden: int, layers: int) -> int:
    """Writes a Llama with random weights and a tied head; returns its matrix parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    make_tokenizer(vocab).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)


def _arguments() -> tuple[Setting, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object on stdout")
    parser.add_argument("--busy", action="store_true", help="compare with a run beside two endless loops")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="compare with the code of another checkout")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return Setting(**{name: vars(arguments)[name] for name in asdict(Setting())}), arguments


if __name__ == "__main__":
    main()
