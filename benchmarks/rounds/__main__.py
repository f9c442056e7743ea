"""What on-policy rounds and wrong chains add to off-policy distillation, at equal student tokens.

    python -m benchmarks.rounds [--json] [--seeds N] [--arms NAME ...] [--folder FOLDER]

All arms of a seed share one student, distilled from the teacher's chains. Each arm then trains it twice more, as many
steps: on the teacher's chains again (`offpolicy`), on as many new ones of the teacher as the next arm
reads of the student (`fresh`), on chains that the student has just written and the teacher has scored (`rounds`, by
forward and reverse KL; `rounds_reverse`, by reverse KL alone; `rounds_pg`, by policy gradient, at a tenth of the rate),
on the teacher's chains and away from the student's wrong ones (`negatives`), or on the student's chains with its wrong
ones as negatives too (`both`).

`rounds_reverse_kl_ratio` is the reverse KL on the student's own states, `rounds` over `offpolicy`, `..._to_fresh` over
`fresh`. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from benchmarks.arms import measured_rows, print_measured
from benchmarks.quality.students import quiet
from benchmarks.rounds.setting import IS_RIGHT, LANGUAGE, ensure_teacher, score, write_prompts
from benchmarks.tiny import jsonl_source
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.exporting import export
from student_train.model.student import use_cpu_where_there_is_no_gpu
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train

STUDENT_WIDTH = 48
BATCH_TOKENS = 1200
START_STEPS, ROUND_STEPS, NUM_ROUNDS = 600, 60, 2
START_RATE, ROUND_RATE = 4e-3, 1e-3
OFF_POLICY_RATE = 3e-4
"""The best of 3e-4, 1e-3 and 2e-3 for chains that the student already knows."""
NUM_SAMPLES, NUM_NEW_SAMPLES = 4, 16
KD = {"forward_kl": 0.9, "cross_entropy": 0.1}
OWN = {"forward_kl": 0.5, "reverse_kl": 0.5}
TRAIN = "split = 'train'"


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a round trains: losses on the teacher's chains, on the student's own, or both; `negatives` if wrong ones
    count.
    """

    name: str
    losses: Json
    reads: tuple[str, ...] = ("teacher",)
    negatives: Json | None = None
    where: str = TRAIN
    learning_rate: float = ROUND_RATE


WRONG = f"{TRAIN} and source = 'own' and not {IS_RIGHT}"
ARMS = (
    Arm("offpolicy", KD, learning_rate=OFF_POLICY_RATE),
    Arm("fresh", KD, reads=("fresh",)),
    # What the teacher says and the student never would has no gradient under reverse KL alone.
    Arm("rounds", OWN, reads=("own",)),
    Arm("rounds_reverse", {"reverse_kl": 1.0}, reads=("own",)),
    # One sampled token instead of a distribution: at the rate of the others its noise destroys the student.
    Arm("rounds_pg", {"policy_gradient": 1.0}, reads=("own",), learning_rate=ROUND_RATE / 10),
    Arm(
        "negatives",
        {**KD, "unlikelihood": 0.1},
        reads=("teacher", "own"),
        negatives={"where": WRONG, "right": IS_RIGHT},
        where=f"{TRAIN} and source = 'walks'",
        learning_rate=OFF_POLICY_RATE,
    ),
    Arm(
        "both",
        {**OWN, "unlikelihood": 0.1},
        reads=("own",),
        negatives={"where": WRONG, "right": IS_RIGHT, "correct_by_teacher": True},
    ),
)


def main() -> None:
    """Trains every arm and prints them."""
    print_measured("rounds", _arguments(), measure, _show)


def measure(folder: Path, arguments: argparse.Namespace) -> Json:
    """Every arm with every seed; what is in `folder` already is not made again."""
    logging.disable_progress_bar()
    use_cpu_where_there_is_no_gpu()
    torch.set_num_threads(1)
    teacher_folder = ensure_teacher(folder / "teacher", arguments.teacher_steps)
    teacher = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    with quiet(folder / "teacher.log"):
        prompts = write_prompts(folder / "prompts.jsonl")
        off_policy = LANGUAGE.build(
            folder / "off-policy", teacher_folder, [jsonl_source("walks", prompts)], 1, NUM_SAMPLES
        )

    def row_of(arm: Arm, seed: int, ranks: Ranks) -> tuple[Json, str]:
        student, num_tokens = Runs(folder / f"seed-{seed}", teacher_folder, off_policy, seed, ranks).trained(arm)
        found = score(LlamaForCausalLM.from_pretrained(student).eval(), teacher, seed)
        row = {"arm": arm.name, "seed": seed, "num_tokens": num_tokens, **dataclasses.asdict(found)}
        row = {key: round(one, 4) if isinstance(one, float) else one for key, one in row.items()}
        return row, json.dumps(row)

    arms = [one for one in ARMS if one.name in arguments.arms]
    rows = measured_rows(arms, range(arguments.first_seed, arguments.first_seed + arguments.seeds), row_of)
    return {"teacher": dataclasses.asdict(score(teacher, teacher, 0)), "rows": rows, **_summary(rows)}


class Runs:
    """The trainings of one seed. Folders that are there are not made again."""

    def __init__(self, folder: Path, teacher: Path, off_policy: Path, seed: int, ranks: Ranks) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._teacher, self._off_policy, self._seed, self._ranks = (
            folder,
            teacher,
            off_policy,
            seed,
            ranks,
        )

    def trained(self, arm: Arm) -> tuple[Path, int]:
        """The student after all rounds of an arm, and the tokens that it read in them."""
        student, num_tokens = self._start(), 0
        for number in range(1, NUM_ROUNDS + 1):
            data: Json = {"caches": [str(self._off_policy)] if "teacher" in arm.reads else []}
            if "fresh" in arm.reads:
                data["caches"].append(str(self._fresh_chains(number)))
            if "own" in arm.reads:
                own, scored = self._own_chains(arm, number, student)
                data["caches"].append(str(scored))
                if "policy_gradient" in arm.losses:
                    data["behaviour"] = [str(own)]
            stage = {
                "losses": arm.losses,
                "where": arm.where,
                "negatives": arm.negatives,
                "learning_rate": arm.learning_rate,
            }
            name = f"{arm.name}-{number}"
            student, more = self._train(name, student, data, {**stage, "max_steps": ROUND_STEPS}, number)
            num_tokens += more
        return student, num_tokens

    def _start(self) -> Path:
        """The student that every arm starts from."""
        untrained = LANGUAGE.make_model(self._folder / "untrained", layers=2, width=STUDENT_WIDTH, seed=self._seed)
        stage = {"losses": KD, "where": TRAIN, "learning_rate": START_RATE, "max_steps": START_STEPS}
        return self._train("start", untrained, {"caches": [str(self._off_policy)]}, stage, 0)[0]

    def _fresh_chains(self, number: int) -> Path:
        """A cache of new chains of the teacher, as many as the student writes."""
        with quiet(self._folder / f"fresh-{number}.log"):
            return self._build(f"fresh-{number}", self._teacher, number)

    def _own_chains(self, arm: Arm, number: int, student: Path) -> tuple[Path, Path]:
        """Caches of what the student writes now, and of what the teacher says of it."""
        # The first round begins with the same student in all arms.
        name = "first" if number == 1 else arm.name
        with quiet(self._folder / f"own-{name}-{number}.log"):
            own = self._build(f"own-{name}-{number}", student, number)
            return own, LANGUAGE.rescore(self._folder / f"scored-{name}-{number}", self._teacher, own)

    def _build(self, name: str, model: Path, number: int) -> Path:
        sources = [jsonl_source("walks", self._folder.parent / "prompts.jsonl")]
        return LANGUAGE.build(self._folder / name, model, sources, 1000 * number + self._seed, NUM_NEW_SAMPLES)

    def _train(self, name: str, student: Path, data: Json, stage: Json, number: int) -> tuple[Path, int]:
        """The exported student after one stage, and the tokens that it read."""
        run, out = self._folder / f"run-{name}", self._folder / f"student-{name}"
        told = self._folder / f"tokens-{name}.json"
        if out.exists():
            return out, json.loads(told.read_text())
        given = {
            "run": str(run),
            "seed": 10 * self._seed + number,
            "student": {"model": str(student)},
            "data": {"pack_tokens": BATCH_TOKENS, **data},
            "stages": [{"batch_tokens": BATCH_TOKENS, "warmup_frac": 0.1, **stage}],
            "engine": {"precision": "float32", "zero_stage": 0},
            "eval": {"max_chains": 64},
            "checkpoint": {"every_steps": 1_000_000, "keep_last": 1},
        }
        shutil.rmtree(run, ignore_errors=True)
        with quiet(self._folder / f"{name}.log"):
            config = validate_config(given, TrainConfig, "benchmark")
            summary = train(config, self._ranks, StopRequest())
            state = find_state(RunFolder(run).checkpoints, "last")
            told.write_text(json.dumps(summary["num_tokens"]))
            export(config, state, out, adapter_only=False, tokenizer=None)
        shutil.rmtree(run / "checkpoints")
        return out, summary["num_tokens"]


def _summary(rows: Sequence[Json]) -> Json:
    """Means and spreads over seeds by arm, and the ratios that are asked for."""
    found: Json = {}
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm.name]
        if own:
            for key in ("accuracy", "reverse_kl"):
                values = [row[key] for row in own]
                found[f"{arm.name}_{key}"] = round(statistics.mean(values), 4)
                found[f"{arm.name}_{key}_spread"] = round(max(values) - min(values), 4)
    for other, name in (("offpolicy", "rounds_reverse_kl_ratio"), ("fresh", "rounds_reverse_kl_ratio_to_fresh")):
        if {"rounds_reverse_kl", f"{other}_reverse_kl"} <= set(found):
            found[name] = round(found["rounds_reverse_kl"] / found[f"{other}_reverse_kl"], 4)
    of = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
    for arm in ARMS:
        # Arms of a seed share their student: the gains differ less than the accuracies.
        gains = [of[key] - of["offpolicy", key[1]] for key in of if key[0] == arm.name and ("offpolicy", key[1]) in of]
        if gains and arm.name != "offpolicy":
            found[f"{arm.name}_accuracy_gains"] = [round(gain, 4) for gain in gains]
    return found


def _show(result: Json) -> None:
    print(f"teacher: accuracy {result['teacher']['accuracy']:.3f}")
    print(f"{'arm':<16}{'accuracy':>10}{'reverse KL':>12}")
    for arm in ARMS:
        if f"{arm.name}_accuracy" in result:
            values = [result[f"{arm.name}_{key}"] for key in ("accuracy", "reverse_kl")]
            print(f"{arm.name:<16}{values[0]:>10.3f}{values[1]:>12.4f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS])
    parser.add_argument("--teacher-steps", type=int, default=700)
    parser.add_argument("--folder", type=Path, help="keep teacher, caches and students here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
