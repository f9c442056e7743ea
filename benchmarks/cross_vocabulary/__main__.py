"""What a teacher with one vocabulary teaches students with another, in held-out bits per byte.

    python -m benchmarks.cross_vocabulary [--json] [--quick] [--seeds N] [--methods NAME ...] [--folder FOLDER]

The teacher of benchmarks.quality writes 1,536 chains to learn from and 192 held-out ones; one cache holds them with the
default capture. Students of another vocabulary learn from the text alone, by methods that need the teacher in memory
(ULD, and a hybrid like GOLD's), and by what student_train makes of the cache; the same student in the teacher's
vocabulary learns by cross-entropy and from its distributions. One epoch each, of equal steps, from the same weights for
all methods of a seed.

`gain_recovered_frac` is the best method's gain over text alone, as a share of what distributions gain over
cross-entropy in the teacher's own vocabulary. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import dataclasses
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import measured_rows, print_measured
from benchmarks.cross_vocabulary.online import ChainLoss, Gold, train_online, uld
from benchmarks.cross_vocabulary.setting import Setting, bits_per_byte, encoded, make_student, open_setting
from benchmarks.quality.students import LEARNING_RATES, PACK_TOKENS, quiet, run_config
from stillroom.config import Json
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.data.open import open_data, plan_spec, train_request
from student_train.exporting import trained_model
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train


@dataclasses.dataclass(frozen=True)
class Method:
    """How a student learns: from `data` of a configuration with `losses`, or by `online` with the teacher in memory."""

    name: str
    data: Json
    losses: Json
    online: Callable[[Setting], ChainLoss] | None = None
    same_vocabulary: bool = False


TEXT, ULD, GOLD = "text", "uld", "gold"
SAME_CE, SAME_KD = "same-vocabulary ce", "same-vocabulary kd"
REFERENCES = (TEXT, SAME_CE, SAME_KD)
TEXT_DATA, PROJECTED, CROSS_ENTROPY = {"kind": "text"}, {"kind": "projected"}, {"cross_entropy": 1.0}

METHODS = (
    Method(SAME_CE, {}, CROSS_ENTROPY, same_vocabulary=True),
    Method(SAME_KD, {}, {"forward_kl": 0.9, "cross_entropy": 0.1}, same_vocabulary=True),
    Method(TEXT, TEXT_DATA, CROSS_ENTROPY),
    # Weights of the best of a few: 0.1, 0.3 and 1.5 (the paper's) for ULD; cross-entropy at 0, 0.2, 0.5 and 1, KL or
    # JSD, for GOLD.
    Method(ULD, TEXT_DATA, CROSS_ENTROPY, lambda setting: uld(0.1)),
    Method(GOLD, TEXT_DATA, CROSS_ENTROPY, lambda setting: Gold(setting, 1.0, 0.0)),
    Method("chunks", PROJECTED, {"chunk_likelihood": 0.5, "cross_entropy": 0.5}),
    Method("projected", PROJECTED, {"forward_kl": 0.9, "cross_entropy": 0.1}),
    Method("projected and chunks", PROJECTED, {"forward_kl": 0.9, "cross_entropy": 0.1, "chunk_likelihood": 0.1}),
)
QUICK = [SAME_CE, SAME_KD, TEXT, "projected"]


def main() -> None:
    """Runs the methods and prints them."""
    print_measured("cross-vocabulary", _arguments(), measure, _show)


def measure(folder: Path, arguments: argparse.Namespace) -> Json:
    """Every method with every seed; teacher, chains and cache are kept in `folder`, where a second call finds them."""
    # A teacher that is trained for less time writes the same few words; the students' threads are those of quality.
    torch.set_num_threads(2)
    setting = open_setting(folder, arguments.teacher_steps)
    torch.set_num_threads(1)

    def row_of(method: Method, seed: int, ranks: Ranks) -> tuple[Json, str]:
        model = _trained(setting, method, seed, ranks)
        found = bits_per_byte(setting, model, same_vocabulary=method.same_vocabulary)
        row = {"method": method.name, "seed": seed, "bits_per_byte": round(found, 4)}
        return row, f"{method.name} seed {seed}: {found:.4f} bits a byte,"

    methods = [method for method in METHODS if method.name in arguments.methods]
    rows = measured_rows(methods, range(arguments.seeds), row_of)
    return {
        "teacher_bits_per_byte": round(bits_per_byte(setting, setting.model, same_vocabulary=True), 4),
        "rows": rows,
        **_summary(rows),
    }


def _trained(setting: Setting, method: Method, seed: int, ranks: Ranks) -> Any:
    run = setting.folder / "runs" / f"{method.name.replace(' ', '-')}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    student = make_student(setting, seed, same_vocabulary=method.same_vocabulary)
    config = _config(setting, method, student, run, seed)
    with quiet(run.with_name(f"{run.name}.log")):
        if method.online is None:
            train(config, ranks, StopRequest())
            state = find_state(RunFolder(run).checkpoints, "last")
            model = trained_model(config, state, merged=True)
        else:
            stage = config.stages[0]
            path, request = RunFolder(run).selection_path(stage.name), train_request(config.data, 0, stage)
            selection = open_data(path, request, config.data, config.student)
            model = train_online(setting, student, selection, plan_spec(config, 0), stage, method.online(setting))
    shutil.rmtree(run)
    return model


def _config(setting: Setting, method: Method, student: Path, run: Path, seed: int) -> TrainConfig:
    pack_tokens = PACK_TOKENS if method.same_vocabulary else round(PACK_TOKENS * _relative_length(setting))
    data = {"caches": [str(setting.cache)], **method.data}
    stage = {"losses": method.losses, "learning_rate": LEARNING_RATES["scratch"]}
    return run_config(run, student, data, seed, stage, pack_tokens)


def _relative_length(setting: Setting) -> float:
    """Tokens of the other vocabulary for one of the teacher's: packs of as many chains make equal numbers of steps."""
    counts = []
    for same_vocabulary in (True, False):
        prompts, completions = encoded(setting, same_vocabulary=same_vocabulary)
        counts.append(sum(map(len, prompts)) + sum(map(len, completions)))
    return counts[1] / counts[0]


def _summary(rows: list[Json]) -> Json:
    """Means over the seeds by method, and what of the gain of distributions each one recovers between vocabularies."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    values = {name: [float(row["bits_per_byte"]) for row in rows if row["method"] == name] for name in names}
    mean = {name: statistics.fmean(found) for name, found in values.items()}
    # Comparisons with the teacher in memory do not compete.
    candidates = [m.name for m in METHODS if m.name in mean and m.online is None and m.name not in REFERENCES]
    best = min(candidates, key=mean.__getitem__, default=None)
    recovered: dict[str, float] = {}
    by_seed: list[float] = []
    if set(REFERENCES) <= set(mean):
        others = [name for name in names if name not in REFERENCES]
        recovered = {name: round(_recovered(mean, mean[name]), 3) for name in others}
        for seed in range(len(values[TEXT])):
            here = {name: found[seed] for name, found in values.items()}
            by_seed += [round(_recovered(here, here[best]), 3)] if best is not None else []
    return {
        "bits_per_byte": {name: round(value, 4) for name, value in mean.items()},
        "spread": {
            name: round(statistics.stdev(found), 4) if len(found) > 1 else 0.0 for name, found in values.items()
        },
        "recovered_frac": recovered,
        "text_bits_per_byte": mean.get(TEXT),
        "uld_bits_per_byte": mean.get(ULD),
        "gold_bits_per_byte": mean.get(GOLD),
        "best_bits_per_byte": None if best is None else mean[best],
        "best_method": best,
        "same_vocab_ce_bits_per_byte": mean.get(SAME_CE),
        "same_vocab_kd_bits_per_byte": mean.get(SAME_KD),
        "gain_recovered_frac": None if best is None else recovered.get(best),
        "gain_recovered_frac_by_seed": by_seed,
    }


def _recovered(bits: dict[str, float], method: float) -> float:
    """`method`'s gain over text alone as a share of what distributions gain in the teacher's own vocabulary."""
    return (bits[TEXT] - method) / (bits[SAME_CE] - bits[SAME_KD])


def _show(result: Json) -> None:
    teacher = result["teacher_bits_per_byte"]
    print(f"held-out bits per byte, means over seeds; the teacher's own {teacher}")
    for name, value in sorted(result["bits_per_byte"].items(), key=lambda item: float(item[1])):
        gain = result["recovered_frac"].get(name)
        recovered = "" if gain is None else f"  gain recovered {gain:.2f}"
        spread = f"±{result['spread'][name]:.4f}"
        print(f"{name:24} {value:.4f} {spread}  over the teacher {value - teacher:.4f}{recovered}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cross_vocabulary", description=__doc__)
    names = [method.name for method in METHODS]
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--seeds", type=int, default=3, help="students a method")
    parser.add_argument("--methods", nargs="+", choices=names, help="only these")
    parser.add_argument("--quick", action="store_true", help="one seed of a few methods, in under three minutes")
    parser.add_argument("--teacher-steps", type=int, default=300, help="optimizer steps of the teacher")
    parser.add_argument("--folder", type=Path, help="keep teacher and cache here, and find them again")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = 1
    arguments.methods = arguments.methods or (QUICK if arguments.quick else names)
    return arguments


if __name__ == "__main__":
    main()
