"""What the rest of the recipe adds: variants of questions, chains split at their steps, disturbed prompts.

    python -m benchmarks.recipe [--json] [--seeds N] [--arms NAME ...] [--folder FOLDER]

A secret operation on digits is a table of a hundred entries. A prompt `3*7*2*5=` is worked from the left, one step a
line (`3*7=4`, `4*2=9`, `9*5=0`, `#0`); the answer is checked. The teacher, trained on the spot, knows the table and
ignores spaces in prompts. There are 60 questions to learn from; a student is smaller and reads equally many tokens in
every arm:

    plain        the teacher's chains of the 60 questions
    variants     beside them one chain each of 600 questions with other digits (a `template` source)
    steps        plain, the chains split at their lines (`data.steps`)
    adversarial  plain, half of the packs with disturbed prompts (`adversarial`); `strong` shifts them further
    both         variants and adversarial

Accuracy is the share of right answers on other questions, sampled at temperature 1; `noisy_accuracy` the same with two
spaces in each prompt, `agreement` the share of equal answers with and without them. KL(teacher | student) is in nats a
token of the teacher's chains on those questions. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from benchmarks.arms import measured_rows, print_measured
from benchmarks.quality.students import quiet
from benchmarks.tiny import END_ID, Language, jsonl_source
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.exporting import export
from student_train.model.student import use_cpu_where_there_is_no_gpu
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train

NUM_STEPS = 3
LANGUAGE = Language("0123456789*=# \n", 6 * NUM_STEPS + 3)
TEACHER_BATCH = 128
NUM_QUESTIONS, NUM_VARIANTS, NUM_HELDOUT = 60, 600, 500
STUDENT_WIDTH, BATCH_TOKENS, TRAIN_STEPS, LEARNING_RATE = 48, 1200, 400, 3e-3
KD = {"forward_kl": 0.9, "cross_entropy": 0.1}
ARMS = {
    "plain": ("questions",),
    "variants": ("questions", "variants"),
    "steps": ("questions",),
    "adversarial": ("questions",),
    "strong": ("questions",),
    "both": ("questions", "variants"),
}
ADVERSARIAL: dict[str, Json] = {
    "adversarial": {"epsilon": 0.05},
    "strong": {"epsilon": 0.3, "steps": 3},
    "both": {"epsilon": 0.05},
}
OPERATION = "(({0}) * ({1}) + 3 * ({0}) + 7 * ({1}) + 1) % 10"


def main() -> None:
    """Trains every arm and prints them."""
    print_measured("recipe", _arguments(), measure, _show)


def measure(folder: Path, arguments: argparse.Namespace) -> Json:
    """Every arm with every seed; what is in `folder` already is not made again."""
    logging.disable_progress_bar()
    use_cpu_where_there_is_no_gpu()
    torch.set_num_threads(1)
    teacher_folder = LANGUAGE.train_teacher(folder / "teacher", _shown(arguments.teacher_steps), TEACHER_BATCH)
    teacher = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    with quiet(folder / "teacher.log"):
        caches = _caches(folder, teacher_folder)
    questions = _questions(NUM_QUESTIONS, seed=1)
    heldout = [one for one in _questions(NUM_HELDOUT + NUM_QUESTIONS, seed=99) if one not in questions][:NUM_HELDOUT]

    def row_of(arm: str, seed: int, ranks: Ranks) -> tuple[Json, str]:
        student = _train(arm, seed, folder, [caches[name] for name in ARMS[arm]], ranks)
        model = LlamaForCausalLM.from_pretrained(student).eval()
        row = {"arm": arm, "seed": seed, **_scores(model, teacher, heldout, seed)}
        return row, json.dumps(row)

    rows = measured_rows(arguments.arms, range(arguments.seeds), row_of)
    return {"teacher": _scores(teacher, teacher, heldout, 0), "rows": rows, "summary": _summary(rows)}


def _questions(num: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < num:
        found["*".join(str(generator.randrange(10)) for _ in range(NUM_STEPS + 1)) + "="] = None
    return list(found)


def _chain(question: str) -> str:
    value, *digits = (int(digit) for digit in question[::2])
    lines = []
    for digit in digits:
        result = (value * digit + 3 * value + 7 * digit + 1) % 10
        lines.append(f"{value}*{digit}={result}\n")
        value = result
    return "".join(lines) + f"#{value}"


def _with_spaces(question: str, num: int, generator: random.Random) -> str:
    for _ in range(num):
        place = generator.randrange(len(question))
        question = f"{question[:place]} {question[place:]}"
    return question


def _shown(num_steps: int) -> list[tuple[str, str]]:
    """What the teacher is trained on: each batch has prompts of one length, with up to three spaces."""
    generator = random.Random(0)
    texts = []
    for step in range(num_steps):
        for question in _questions(TEACHER_BATCH, seed=1000 + step):
            texts.append((_with_spaces(question, step % 4, generator), _chain(question)))
    return texts


def _caches(folder: Path, teacher: Path) -> dict[str, Path]:
    """The teacher's chains of the questions, as many as of their variants."""
    path = folder / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": one, "answer": _chain(one)[-1]}) + "\n" for one in _questions(NUM_QUESTIONS, seed=1)
        )
    )
    names = "abcdefg"[: NUM_STEPS + 1]
    answer = names[0]
    for name in names[1:]:
        answer = OPERATION.format(answer, name)
    template = {
        "text": "*".join(f"{{{name}}}" for name in names) + "=",
        "variables": {name: {"min": 0, "max": 9} for name in names},
        "answer": answer,
    }
    variants = {"kind": "template", "name": "variants", "templates": [template], "size": NUM_VARIANTS, "judge": "exact"}
    samples = NUM_VARIANTS // NUM_QUESTIONS
    return {
        "questions": LANGUAGE.build(folder / "plain", teacher, [jsonl_source("questions", path)], 1, samples),
        "variants": LANGUAGE.build(folder / "variants", teacher, [variants], 2, 1),
    }


def _train(arm: str, seed: int, folder: Path, caches: list[Path], ranks: Ranks) -> Path:
    """The exported student of an arm."""
    run, out = folder / f"run-{arm}-{seed}", folder / f"student-{arm}-{seed}"
    if out.exists():
        return out
    student = LANGUAGE.make_model(folder / f"untrained-{seed}", layers=2, width=STUDENT_WIDTH, seed=10 + seed)
    stage: Json = {"losses": KD, "learning_rate": LEARNING_RATE, "max_steps": TRAIN_STEPS, "warmup_frac": 0.1}
    data: Json = {"pack_tokens": BATCH_TOKENS, "caches": [str(cache) for cache in caches]}
    if arm in ADVERSARIAL:
        stage["adversarial"] = ADVERSARIAL[arm]
    if arm == "steps":
        data["steps"] = {"at": ["lines"], "min_tokens": 1}
    given = {
        "run": str(run),
        "seed": seed,
        "student": {"model": str(student)},
        "data": data,
        "stages": [{"batch_tokens": BATCH_TOKENS, "epochs": 1000, **stage}],
        "engine": {"precision": "float32", "zero_stage": 0},
        "eval": None,
        "checkpoint": {"every_steps": 1_000_000, "keep_last": 1},
    }
    with quiet(folder / f"{arm}-{seed}.log"):
        config = validate_config(given, TrainConfig, "benchmark")
        train(config, ranks, StopRequest())
        export(config, find_state(RunFolder(run).checkpoints, "last"), out, adapter_only=False, tokenizer=None)
    return out


def _scores(model: Any, teacher: Any, heldout: list[str], seed: int) -> Json:
    generator = random.Random(seed)
    noisy = [_with_spaces(question, 2, generator) for question in heldout]
    clean, disturbed = (LANGUAGE.write(model, prompts, seed) for prompts in (heldout, noisy))
    right = [_chain(question)[-2:] for question in heldout]
    return {
        "accuracy": _share(zip(clean, right, strict=True)),
        "noisy_accuracy": _share(zip(disturbed, right, strict=True)),
        "agreement": _share((one[-2:], other[-2:]) for one, other in zip(clean, disturbed, strict=True)),
        "heldout_kl": round(_kl(model, teacher, heldout), 4),
    }


def _share(pairs: Any) -> float:
    found: list[bool] = [one.endswith(other) for one, other in pairs]
    return round(sum(found) / len(found), 4)


@torch.no_grad()
def _kl(model: Any, teacher: Any, heldout: list[str]) -> float:
    """KL(teacher | student), nats per token of right chains, ends included."""
    tokenizer = LANGUAGE.make_tokenizer()
    ids_BL = torch.tensor([[*tokenizer.encode(one + _chain(one)), END_ID] for one in heldout])
    num_prompt = len(heldout[0])
    logp_BTV, logq_BTV = (
        one(input_ids=ids_BL).logits[:, num_prompt - 1 : -1].log_softmax(dim=2) for one in (teacher, model)
    )
    return float((logp_BTV.exp() * (logp_BTV - logq_BTV)).sum(dim=2).double().mean())


def _summary(rows: list[Json]) -> list[Json]:
    """Means of each arm, and the mean and spread of what it gains over `plain` of the same seed."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    found = []
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            keys = ("accuracy", "noisy_accuracy", "agreement", "heldout_kl")
            gains = [
                row["accuracy"] - of["plain", row["seed"]]["accuracy"] for row in own if ("plain", row["seed"]) in of
            ]
            found.append(
                {
                    "arm": arm,
                    **{key: round(statistics.mean(row[key] for row in own), 4) for key in keys},
                    "accuracy_gains": [round(gain, 4) for gain in gains],
                }
            )
    return found


def _show(result: Json) -> None:
    print(f"teacher: {result['teacher']}")
    print(f"{'arm':<14}{'accuracy':>10}{'noisy':>10}{'agreement':>11}{'KL':>9}")
    for row in result["summary"]:
        values = (
            f"{row['accuracy']:>10.3f}{row['noisy_accuracy']:>10.3f}{row['agreement']:>11.3f}{row['heldout_kl']:>9.4f}"
        )
        print(f"{row['arm']:<14}{values}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="keep teacher, caches and students here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
