"""Time and peak memory of the fused distillation loss against materialised cross-entropy and dense KL.

    python -m benchmarks.loss [--json] [--tokens N] [--vocab V] [--hidden H] [--support K] [--chunk C] [--threads T] ...

One step is loss and backward of N tokens from hidden states and head weight, for five sides in one run:

    fused            0.9 forward KL with a tail bucket + 0.1 cross-entropy on top-k targets, losses.fused_head
    ce               F.cross_entropy of materialised logits [N, V]
    dense_kl         F.kl_div of materialised log-softmax against the teacher's dense distribution [N, V], which a cache
                     would have to hold; building it is not counted
    fused_frozen, ce_frozen    the same with a head that is not trained (LoRA elsewhere): no weight gradient

Times are wall clock, the sides taking turns; a ratio is the median over repeats of the two sides' times in the same
repeat. `cpu_time_vs_ce` is the same from this process's CPU seconds, which a busy machine disturbs less.

Memory is what one step adds at its peak to hidden states, weight and targets, gradients included: on a CPU the resident
set of a fresh process for each side (its high-water mark reset by Linux just before the step), on a GPU the allocator's
peak. Ratios below 1 favour the fused loss. The last line is one JSON object, the only one with --json.

    N loss tokens, V vocabulary, H hidden, K support
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import DEFAULT_MIX
from student_train.losses.targets import SparseTargets

SIDES = ("fused", "ce", "dense_kl", "fused_frozen", "ce_frozen")
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What is measured; `chunk` None is the loss's own default for the device."""

    tokens: int = 2048
    vocab: int = 49152
    hidden: int = 576
    support: int = 64
    chunk: int | None = None
    repeats: int = 7
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"


def main() -> None:
    setting, json_only, memory_side = parse_arguments()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    if memory_side is not None:
        print(peak_bytes_here(setting, memory_side))
        return
    log = sys.stderr if json_only else sys.stdout
    print(hardware(setting), file=log)
    times, cpu_times = measure_times(setting)
    memory = {side: measure_memory(setting, side) for side in SIDES}
    if min(memory.values()) < MIB:
        sys.exit(f"benchmarks.loss: a peak of less than 1 MiB cannot be told from noise: raise --vocab={setting.vocab}")
    print(f"\n{'side':14}{'median ms':>11}{'peak MiB':>11}", file=log)
    for side in SIDES:
        print(f"{side:14}{1e3 * statistics.median(times[side]):11.0f}{memory[side] / MIB:11.1f}", file=log)
    result = ratios(times, memory)
    for name, value in result.items():
        print(f"{name:24}{value:7.3f}", file=log)
    details = {
        "median_ms": {side: round(1e3 * statistics.median(times[side]), 1) for side in SIDES},
        "peak_mib": {side: round(memory[side] / MIB, 1) for side in SIDES},
        "cpu_time_vs_ce": round(paired_ratio(cpu_times["fused"], cpu_times["ce"]), 3),
        "frozen_cpu_time_vs_ce": round(paired_ratio(cpu_times["fused_frozen"], cpu_times["ce_frozen"]), 3),
        "time_vs_ce_range": ratio_range(times["fused"], times["ce"]),
        "frozen_time_vs_ce_range": ratio_range(times["fused_frozen"], times["ce_frozen"]),
    }
    rounded = {name: round(value, 3) for name, value in result.items()}
    print(json.dumps(rounded | details | {"setting": asdict(setting), "hardware": hardware(setting)}))


def parse_arguments() -> tuple[Setting, bool, str | None]:
    """(setting, whether to print JSON alone, the side whose memory this process is to measure)."""
    default = Setting(device="cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object on stdout")
    for name in ("tokens", "vocab", "hidden", "support", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=asdict(default)[name], help="default: %(default)s")
    parser.add_argument("--chunk", type=int, help="tokens a chunk; default: 256 on CPU, 1024 on GPU")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = Setting(**{name: vars(arguments)[name] for name in asdict(default)})
    return setting, arguments.json, arguments.memory_of


def step_of(setting: Setting, side: str) -> Callable[[], None]:
    """A closure that computes loss and gradients once; its inputs exist before it is called."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if setting.dtype == "float32" else torch.bfloat16
    hidden_NH = torch.randn(setting.tokens, setting.hidden, generator=generator).to(setting.device, dtype)
    weight_VH = 0.05 * torch.randn(setting.vocab, setting.hidden, generator=generator).to(setting.device, dtype)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_(not side.endswith("frozen"))
    if side == "dense_kl":
        teacher_NV = teacher_chunk(generator, setting.tokens, setting.vocab).to(setting.device)
        return run(lambda: dense_kl(hidden_NH, weight_VH, teacher_NV), hidden_NH, weight_VH)
    targets = sparse_targets(generator, setting)
    if side.startswith("ce"):
        return run(lambda: cross_entropy(hidden_NH, weight_VH, targets.sampled_ids_N), hidden_NH, weight_VH)
    return run(
        lambda: fused_loss(hidden_NH, weight_VH, targets, DEFAULT_MIX, chunk_tokens=setting.chunk).loss_sum,
        hidden_NH,
        weight_VH,
    )


def run(loss: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], None]:
    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss().backward()
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize()

    return step


def cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_NH, weight_VH).float(), ids_N, reduction="sum")


def dense_kl(hidden_NH: Tensor, weight_VH: Tensor, teacher_NV: Tensor) -> Tensor:
    student_NV = torch.log_softmax(F.linear(hidden_NH, weight_VH).float(), dim=1)
    return F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)


def teacher_chunk(generator: torch.Generator, num_tokens: int, num_vocab: int) -> Tensor:
    """Dense float32 log probabilities [N, V] whose top 64 hold most of the mass, as a language model's do."""
    logits_NV = torch.randn(num_tokens, num_vocab, generator=generator).mul_(3.5)
    return torch.log_softmax(logits_NV, dim=1)


def sparse_targets(generator: torch.Generator, setting: Setting) -> SparseTargets:
    """Top-k targets, made a few tokens at a time so that no [N, V] teacher raises the process's memory."""
    parts = []
    for start in range(0, setting.tokens, 64):
        dense_NV = teacher_chunk(generator, min(64, setting.tokens - start), setting.vocab)
        logprobs_NK, ids_NK = dense_NV.topk(setting.support, dim=1)
        parts.append((ids_NK, logprobs_NK, torch.log1p(-logprobs_NK.exp().sum(dim=1))))
    ids_NK, logprobs_NK, tail_N = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return SparseTargets(ids_NK, logprobs_NK, tail_N, ids_NK[:, 0].clone()).to(setting.device)


def measure_times(setting: Setting) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(wall, CPU) seconds of each side in each repeat; the sides take turns, after one round of warming up."""
    steps = {side: step_of(setting, side) for side in SIDES}
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(setting.repeats + 1):
        for side, step in steps.items():
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            step()
            if repeat > 0:
                wall[side].append(time.perf_counter() - started_s)
                cpu[side].append(time.process_time() - started_cpu_s)
    return wall, cpu


def measure_memory(setting: Setting, side: str) -> int:
    """Bytes that one step of `side` adds at its peak, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loss", "--memory-of", side]
    for name, value in asdict(setting).items():
        if value is not None:
            command += [f"--{name}", str(value)]
    # Every block of 1 MiB and more goes back to the system when it is freed: none is left over from making the inputs
    # for the step to use unseen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def peak_bytes_here(setting: Setting, side: str) -> int:
    """One step in this process, after a tiny one that pays for libraries and thread pools."""
    step_of(replace(setting, tokens=8, vocab=max(512, setting.support)), side)()
    step = step_of(setting, side)
    if setting.device == "cuda":
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before_bytes
    if not sys.platform.startswith("linux"):
        sys.exit("benchmarks.loss: peak memory on a CPU is read from /proc/self, which needs Linux")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark, proc(5)
    before_bytes = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before_bytes


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def ratios(times: dict[str, list[float]], memory: dict[str, int]) -> dict[str, float]:
    return {
        "time_vs_ce": paired_ratio(times["fused"], times["ce"]),
        "memory_vs_ce": memory["fused"] / memory["ce"],
        "frozen_time_vs_ce": paired_ratio(times["fused_frozen"], times["ce_frozen"]),
        "frozen_memory_vs_ce": memory["fused_frozen"] / memory["ce_frozen"],
        "time_vs_dense_kl": paired_ratio(times["fused"], times["dense_kl"]),
        "memory_vs_dense_kl": memory["fused"] / memory["dense_kl"],
    }


def paired_ratio(left: list[float], right: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def ratio_range(left: list[float], right: list[float]) -> list[float]:
    """[smallest, largest] of the repeats' ratios."""
    each = [a / b for a, b in zip(left, right, strict=True)]
    return [round(min(each), 3), round(max(each), 3)]


def hardware(setting: Setting) -> str:
    if setting.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        f"{os.cpu_count()}-core CPU {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
