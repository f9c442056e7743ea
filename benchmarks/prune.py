"""What a student of half the parameters should keep, and what quantisation-aware training saves of a 4-bit one.

    make demo && python -m benchmarks.prune [--json] [--demo runs/demo] [--folder runs/prune] [--seeds 3] [--steps 24]

The demo's teacher (SmolLM2-135M) is cut to half its parameters, embeddings included (28M of 135M, tied to the head):

    depth    by layers alone
    both     by layers and MLP channels at one ratio

Layers stay evenly spaced, channels by what they pass on. Both students train from the demo's cache for the same
steps, thus the same tokens, with three seeds (order of chains; paired). Then one trains on as w4a16
(4-bit weights in groups of 32), beside the same steps in float, and both are rounded. Figures are held-out KL to the
cached teacher in nats per token. The last line is one JSON object, the only one with --json.

Everything is kept in --folder: the same command continues where it was stopped, so that it can be run in parts.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.students import quiet
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from stillroom.storage.paths import write_text_atomic
from student_train.assess.evaluating import evaluate_config
from student_train.config.run import InitConfig, TrainConfig
from student_train.config.stage import QuantiseConfig
from student_train.exporting import export
from student_train.model.importance import init_calibration
from student_train.model.prune import init_student
from student_train.model.student import use_cpu_where_there_is_no_gpu
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks, joined_ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train

PACK_TOKENS = 512
CALIBRATION_TOKENS = 1600
SHAPES: dict[str, list[Literal["layers", "mlp_channels"]]] = {"depth": ["layers"], "both": ["layers", "mlp_channels"]}
QUANTISED_STEPS = 16


def main() -> None:
    """Measures what is not measured yet and prints the table."""
    arguments = _arguments()
    use_cpu_where_there_is_no_gpu()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with joined_ranks() as ranks:
        rows = []
        for shape in SHAPES:
            cut = _cut(arguments.demo, folder, shape)
            for seed in range(arguments.seeds):
                rows.append({"shape": shape, "seed": seed, **_heal(arguments, folder, shape, seed, cut, ranks)})
                _say(arguments, f"{json.dumps(rows[-1])}  [{time.monotonic() - started_s:.0f} s]")
        rounded = _kept(folder / "rounded.json", lambda: _rounded(arguments, folder, ranks))
    result = {**_summary(rows), "quantised": rounded, "steps": arguments.steps, "pack_tokens": PACK_TOKENS}
    if not arguments.json:
        for row in result["shapes"].values():
            print(row)
    print(json.dumps(result))


def _kept(path: Path, measure: Callable[[], Json]) -> Json:
    """The JSON at `path`, measured first where there is none."""
    if not path.exists():
        write_text_atomic(path, json.dumps(measure(), indent=2) + "\n")
    kept: Json = json.loads(path.read_text(encoding="utf-8"))
    return kept


def _config(demo: Path, run: Path, student: str, seed: int, steps: int, **stage: Any) -> TrainConfig:
    given = {
        "run": str(run),
        "seed": seed,
        "student": {"model": student},
        "data": {"caches": [str(demo / "cache")], "where": "split = 'train' and correct", "pack_tokens": PACK_TOKENS},
        "stages": [
            {"max_steps": steps, "batch_tokens": PACK_TOKENS, "learning_rate": 5e-4, "warmup_frac": 0.1, **stage}
        ],
        "engine": {"precision": "float32", "zero_stage": 0},
        "checkpoint": {"every_steps": 1_000_000, "keep_last": 1},
    }
    return validate_config(given, TrainConfig, "benchmarks.prune")


def _cut(demo: Path, folder: Path, shape: str) -> Json:
    asked = InitConfig(
        teacher=str(demo / "teacher"),
        parameters=0.5,
        along=[*SHAPES[shape]],
        # By depth alone there are no channels to rank.
        rank_width="activations" if "mlp_channels" in SHAPES[shape] else "weights",
        calibration_tokens=CALIBRATION_TOKENS,
    )
    config = _config(demo, folder, asked.teacher, 0, 1)
    with quiet(folder / f"{shape}.log"):
        return init_student(asked, folder / shape, lambda: init_calibration(config, asked))


def _heal(arguments: argparse.Namespace, folder: Path, shape: str, seed: int, cut: Json, ranks: Ranks) -> Json:
    run = folder / f"{shape}-{seed}"
    config = _config(arguments.demo, run, str(folder / shape), seed, arguments.steps)
    with quiet(run.with_name(f"{run.name}.log")):
        summary = train(config, ranks, StopRequest())
    before, after = summary["heldout_before"], summary["heldout_after"]
    return {
        "num_parameters": cut["num_parameters"],
        "layers": cut["num_layers"],
        "kl_before": before["forward_kl"],
        "kl": after["forward_kl"],
        "top1_agreement": after["top1_agreement"],
        "num_tokens": summary["num_tokens"],
        "train_s": summary["train_s"],
    }


def _rounded(arguments: argparse.Namespace, folder: Path, ranks: Ranks) -> Json:
    """The student `both` of seed 0: trained on in float or as w4a16, and how near each is once rounded."""
    first = _config(arguments.demo, folder / "both-0", str(folder / "both"), 0, arguments.steps)
    healed, found = folder / "healed", {}
    with quiet(folder / "rounded.log"):
        if not healed.exists():
            state = find_state(RunFolder(first.run).checkpoints, "last")
            export(first, state, healed, adapter_only=False, tokenizer=str(arguments.demo / "teacher"))
        stages: dict[str, Json] = {"float": {}, "w4a16": {"quantise": {"format": "w4a16"}}}
        for name, stage in stages.items():
            run = folder / f"quantised-{name}"
            config = _config(arguments.demo, run, str(healed), 1, QUANTISED_STEPS, **stage)
            train(config, ranks, StopRequest())
            kinds: tuple[Literal["w4a16", "w8a8"], ...] = ("w4a16", "w8a8") if name == "float" else ("w4a16",)
            for kind in kinds:
                result = evaluate_config(config, None, "last", None, QuantiseConfig(format=kind))
                found[f"{name} steps, rounded to {kind}"] = _closeness(result)
            if name == "float":
                found["float steps, not rounded"] = _closeness(evaluate_config(config, None, "last"))
    return found


def _closeness(result: Json) -> Json:
    return {"kl": result["forward_kl"], "top1_agreement": result["top1_agreement"]}


def _summary(rows: list[Json]) -> Json:
    shapes = {}
    for shape in SHAPES:
        own = [row for row in rows if row["shape"] == shape]
        values = [row["kl"] for row in own]
        shapes[shape] = {
            "num_parameters": own[0]["num_parameters"],
            "layers": own[0]["layers"],
            "num_tokens": own[0]["num_tokens"],
            "kl_before": own[0]["kl_before"],
            "kl": statistics.mean(values),
            "kl_of_seeds": values,
            "top1_agreement": statistics.mean(row["top1_agreement"] for row in own),
        }
    pairs = zip(shapes["depth"]["kl_of_seeds"], shapes["both"]["kl_of_seeds"], strict=True)
    differences = [both - depth for depth, both in pairs]
    return {"shapes": shapes, "both_minus_depth": statistics.mean(differences), "differences": differences}


def _say(arguments: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object on stdout")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    parser.add_argument("--folder", type=Path, default=Path("runs/prune"), help="where everything is kept")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each student")
    parser.add_argument("--steps", type=int, default=24, help=f"steps of {PACK_TOKENS} tokens")
    return parser.parse_args()


if __name__ == "__main__":
    main()
