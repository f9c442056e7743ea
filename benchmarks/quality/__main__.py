"""How much a student learns from what is stored of each token, against the bytes that it takes.

    python -m benchmarks.quality [--json] [--seeds N] [--targets NAME ...] [--student scratch|cut] [--epochs N]
                                 [--folder FOLDER] [--plot FILE.svg]

A small teacher (four layers of width 192, 1,024 ids, trained on documentation) writes 1,536 chains of 56 tokens to
learn from and 192 held-out ones. For each kind of target the same chains become a cache through the builder, with the
signals that vLLM's sampler plugin computes, and students are trained from it by student-train: of the same weights and
order for all targets, another for each seed. They are compared with the teacher's whole distribution on the held-out
chains. `bytes_per_token` counts the columns of signals; a real vocabulary takes more (benchmarks.codec measures that).
The last line is one JSON object; with --json it is the only one.
"""

import argparse
import dataclasses
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.arms import print_measured
from benchmarks.quality.caches import Chains, build_cache, kept_chains
from benchmarks.quality.students import make_student, train_student
from benchmarks.quality.teacher import VOCAB_SIZE, Training, ensure_teacher
from stillroom.config import Json
from student_train.runtime.ranks import joined_ranks

TAIL_BUCKET = {"forward_kl": {"tail": "bucket"}}
RENORMALISED = {"forward_kl": {"tail": "renormalise"}}
STORED_TAIL = {"forward_kl": 1.0}
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is captured, and the losses that read it."""

    name: str
    capture: Json
    losses: Json


def _top(k: int, losses: Json, label: str) -> Target:
    return Target(f"{label} {k}", {"max_support": k, "nucleus": None, "draws": 0}, losses)


def _hybrid(exact: int, draws: int) -> Target:
    capture = {"max_support": exact, "nucleus": 0.999, "draws": draws}
    return Target(f"hybrid {exact}+{draws}", capture, STORED_TAIL)


TOP_MASS_KS = (1, 4, 8, 16, 64)

TARGETS = (
    Target(DENSE, {"codec": "topk-f32", "max_support": VOCAB_SIZE, "nucleus": None, "draws": 0}, TAIL_BUCKET),
    Target("cross-entropy", {"max_support": 1, "nucleus": None, "draws": 0}, {"cross_entropy": 1.0}),
    *(_top(k, RENORMALISED, "renormalised") for k in (4, 8, 16, 64)),
    *(_top(k, TAIL_BUCKET, "tail bucket") for k in (4, 8, 16, 64)),
    Target("tail bucket nucleus 64", {"max_support": 64, "nucleus": 0.999, "draws": 0}, TAIL_BUCKET),
    *(_hybrid(m, n) for m, n in ((1, 8), (2, 2), (4, 4), (8, 8), (12, 4), (16, 16), (32, 16))),
)

SHORT = [
    "cross-entropy",
    "renormalised 8",
    "renormalised 64",
    "tail bucket 8",
    "tail bucket 16",
    "tail bucket 64",
    "tail bucket nucleus 64",
    "hybrid 1+8",
    "hybrid 4+4",
    "hybrid 8+8",
    "hybrid 16+16",
]
"""The grid that takes about ten minutes."""


def main() -> None:
    """Runs the grid and prints it."""
    arguments = _arguments()
    torch.set_num_threads(1)
    result = print_measured("quality", arguments, measure, _show)
    if arguments.plot is not None:
        from benchmarks.quality.plot import write_plot

        write_plot([result], arguments.plot)


def measure(folder: Path, arguments: argparse.Namespace) -> Json:
    """Teacher, caches, then every target with every seed; kept below `folder`, where a second call finds them."""
    teacher = ensure_teacher(folder / "teacher", Training(num_steps=arguments.teacher_steps))
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    chains = kept_chains(folder / "chains.npz", model, tokenizer)
    targets = [target for target in TARGETS if target.name in {DENSE, *arguments.targets}]
    sizes = {target.name: _cache(folder, target, teacher, model, chains) for target in targets}
    rows: list[Json] = []
    with joined_ranks() as ranks:
        for seed in range(arguments.seeds):
            for target in targets:
                student = make_student(
                    arguments.student, folder / f"student-{arguments.student}-{seed}", teacher, tokenizer, seed
                )
                run = folder / "runs" / f"{_slug(target.name)}-{arguments.student}-{arguments.epochs}-{seed}"
                shutil.rmtree(run, ignore_errors=True)
                run.parent.mkdir(exist_ok=True)
                score = train_student(
                    arguments.student,
                    student,
                    run,
                    folder / _slug(target.name),
                    folder / DENSE,
                    target.losses,
                    seed,
                    arguments.epochs,
                    ranks,
                )
                shutil.rmtree(run)
                rows.append({"targets": target.name, "seed": seed, **dataclasses.asdict(score)})
                print(f"{target.name} seed {seed}: KL {score.heldout_kl:.4f}", file=sys.stderr)
    return {
        "top_mass": _top_mass(model, chains),
        "student": arguments.student,
        "epochs": arguments.epochs,
        "rows": rows,
        "bytes_per_token": sizes,
        "summary": _summary(rows, sizes),
    }


@torch.no_grad()
def _top_mass(model: Any, chains: Chains) -> dict[str, float]:
    """Mean mass of the teacher's k most probable tokens on the held-out chains."""
    ids_RL = torch.cat([chains.prompts_RP, chains.completions_RT], dim=1)[-chains.num_heldout :]
    probs_RTV = model(input_ids=ids_RL).logits[:, chains.prompts_RP.shape[1] - 1 : -1].softmax(dim=-1)
    mass_RTV = probs_RTV.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return {str(k): round(float(mass_RTV[..., k - 1].mean()), 3) for k in TOP_MASS_KS}


def _cache(folder: Path, target: Target, teacher: Path, model: Any, chains: Chains) -> float:
    path = folder / _slug(target.name)
    return build_cache(path, teacher, model, chains, target.capture)


def _summary(rows: list[Json], sizes: dict[str, float]) -> list[Json]:
    """Mean and spread over the seeds; `kl_over_dense` is the mean of the differences, pair by pair."""
    dense = {row["seed"]: row["heldout_kl"] for row in rows if row["targets"] == DENSE}
    found = []
    for name in dict.fromkeys(row["targets"] for row in rows):
        own = [row for row in rows if row["targets"] == name]
        gaps = [row["heldout_kl"] - dense[row["seed"]] for row in own]
        means = {
            key: statistics.fmean(row[key] for row in own)
            for key in ("heldout_kl", "heldout_js", "agreement", "confidence_minus_accuracy")
        }
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        found.append(
            {
                "targets": name,
                **means,
                "kl_over_dense": statistics.fmean(gaps),
                "kl_over_dense_sd": spread,
                "bytes_per_token": sizes[name],
            }
        )
    return sorted(found, key=lambda row: float(row["heldout_kl"]))


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("+", "-and-")


def _show(result: Json) -> None:
    print(f"student {result['student']}, {result['epochs']} epochs; held-out, means over seeds")
    print(f"{'targets':24} {'KL':>7} {'over dense':>15} {'agree':>6} {'conf-acc':>9} {'B/token':>8}")
    for row in result["summary"]:
        gap = f"{row['kl_over_dense']:+.4f} ±{row['kl_over_dense_sd']:.4f}"
        print(
            f"{row['targets']:24} {row['heldout_kl']:7.4f} {gap:>15} {row['agreement']:6.3f} "
            f"{row['confidence_minus_accuracy']:+9.4f} {row['bytes_per_token']:8.1f}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    names = [target.name for target in TARGETS]
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--seeds", type=int, default=3, help="students per target")
    parser.add_argument("--targets", nargs="+", choices=names, default=SHORT, help="kinds of targets besides dense")
    parser.add_argument("--student", choices=("scratch", "cut"), default="scratch")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the same chains and draws")
    parser.add_argument("--teacher-steps", type=int, default=300, help="optimizer steps of the teacher")
    parser.add_argument("--folder", type=Path, help="keep the teacher and caches here for reuse")
    parser.add_argument("--plot", type=Path, help="also write quality against bytes as SVG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
