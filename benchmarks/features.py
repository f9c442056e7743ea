"""What a student learns from states and attention of its teacher, against the bytes that they take.

    python -m benchmarks.features [--json] [--student scratch|cut|smollm2] [--seeds N] [--arms NAME ...]
                                  [--folder FOLDER]

`scratch` and `cut` are the setting of benchmarks.quality: a teacher of four layers, 1,536 chains to learn from, a
student of two layers of half the width with random weights, or of the teacher's first and last layer. `smollm2` is
SmolLM2-135M-Instruct with 192 chains, and a student of four of its thirty layers. Each arm reads one cache with the
default capture, or a feature set beside it, for one epoch: equal student tokens, weights and order for all arms of a
seed. Students are compared with the teacher's whole distribution on held-out chains. `bytes_per_token` counts what the
arm's losses read. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.quality.caches import Chains, build_cache
from benchmarks.quality.students import CHAINS_PER_STEP, LEARNING_RATES, make_student, quiet
from benchmarks.quality.teacher import NUM_COMPLETION_TOKENS, NUM_PROMPT_TOKENS, Training, ensure_teacher, write_chains
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config.run import InitConfig, TrainConfig
from student_train.exporting import trained_model
from student_train.model.prune import init_student
from student_train.runtime.checkpoint import find_state
from student_train.runtime.ranks import Ranks, joined_ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train
from teacher_cache.prompts.prompts import WHOLE
from teacher_cache.states.config import FeaturesConfig
from teacher_cache.states.passes import features_of_cache

PACK_TOKENS = CHAINS_PER_STEP * (NUM_PROMPT_TOKENS + NUM_COMPLETION_TOKENS)
ALIGN_FRAC = 0.25
BATCH_CHAINS = 16
OUTPUTS: Json = {"forward_kl": 1.0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A teacher, its chains, and how its student is made and trained."""

    name: str
    num_train: int
    num_heldout: int
    learning_rate: float
    ranks: tuple[int, int]
    """Coefficients of a last hidden state in a basis, and of a middle layer."""


SETTINGS = {
    "scratch": Setting("scratch", 1536, 192, LEARNING_RATES["scratch"], (48, 64)),
    "cut": Setting("cut", 1536, 192, LEARNING_RATES["cut"], (48, 64)),
    "smollm2": Setting("smollm2", 192, 32, 5e-4, (256, 64)),
}
SMOLLM2_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Arm:
    """Losses, the feature set that they read, and whether the cache's distributions are read too."""

    name: str
    losses: Json
    features: str | None = None
    reads_outputs: bool = True
    align: Json | None = None
    """Losses of a first stage that trains the body alone for ALIGN_FRAC of the steps."""


ARMS = (
    Arm("outputs", OUTPUTS),
    Arm("outputs + middle states", {**OUTPUTS, "hidden_mse": 0.3}, "middle"),
    Arm("outputs + relations", {**OUTPUTS, "hidden_relations": 0.3}, "middle"),
    Arm("outputs + attention", {**OUTPUTS, "attention_kl": 0.3}, "attention"),
    Arm("middle states, then outputs", OUTPUTS, "middle", align={"hidden_mse": 1.0}),
    Arm("exact", {"forward_kl": {"tail": "exact"}}, "hidden", reads_outputs=False),
    Arm("exact, low rank", {"forward_kl": {"tail": "exact"}}, "hidden_low", reads_outputs=False),
)
SHORT = ["outputs", "outputs + middle states", "outputs + attention", "exact"]
"""What the larger teacher is asked."""


def main() -> None:
    """Runs the arms and prints them."""
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="stillroom-features-") as temp:
        folder = arguments.folder or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, SETTINGS[arguments.student], arguments)
    if not arguments.json:
        _show(result)
    print(json.dumps(result))


def measure(folder: Path, setting: Setting, arguments: argparse.Namespace) -> Json:
    """Teacher, cache and feature sets, then every arm with every seed. All of it is kept below `folder`, rows too: a
    call that was stopped continues.
    """
    started_s = time.monotonic()
    place = folder / ("smollm2" if setting.name == "smollm2" else "quality")
    teacher = _teacher(place / "teacher", arguments.teacher_steps)
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    chains = _chains(place / "chains.npz", model, tokenizer, setting)
    arms = [arm for arm in ARMS if arm.name in (arguments.arms or (SHORT if setting.name == "smollm2" else _names()))]
    sizes = _sizes(place, teacher, model, chains, setting, arms)
    kept = place / f"rows-{setting.name}.json"
    rows: list[Json] = json.loads(kept.read_text()) if kept.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    with joined_ranks() as ranks:
        for seed in range(arguments.seeds):
            student = _student(setting, place, teacher, tokenizer, seed)
            for arm in arms:
                if (arm.name, seed) in done:
                    continue
                begun_s = time.monotonic()
                trained = _train(arm, setting, student, place, seed, ranks)
                train_s = time.monotonic() - begun_s
                row = {"arm": arm.name, "seed": seed, **_scores(trained, model, tokenizer, chains), "seconds": train_s}
                rows.append(row)
                kept.write_text(json.dumps(rows))
                print(f"{arm.name} seed {seed}: KL {row['heldout_kl']:.4f} in {train_s:.0f} s", file=sys.stderr)
    rows = [row for row in rows if row["arm"] in sizes and row["seed"] < arguments.seeds]
    return {
        "student": setting.name,
        "rows": rows,
        "bytes_per_token": sizes,
        "summary": summarise(rows, sizes),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def summarise(rows: list[Json], sizes: dict[str, float]) -> list[Json]:
    """Means over the seeds, best first; `kl_over_outputs` is the mean of the differences, seed by seed."""
    outputs = {row["seed"]: row["heldout_kl"] for row in rows if row["arm"] == "outputs"}
    found = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        gaps = [row["heldout_kl"] - outputs[row["seed"]] for row in own if row["seed"] in outputs]
        found.append(
            {
                "arm": name,
                "heldout_kl": round(statistics.fmean(row["heldout_kl"] for row in own), 4),
                "kl_over_outputs": round(statistics.fmean(gaps), 4) if gaps else None,
                "kl_over_outputs_sd": round(statistics.stdev(gaps), 4) if len(gaps) > 1 else None,
                "bits_per_byte": round(statistics.fmean(row["bits_per_byte"] for row in own), 4),
                "bytes_per_token": round(sizes[name], 1),
                "seconds": round(statistics.fmean(row["seconds"] for row in own), 1),
            }
        )
    return sorted(found, key=lambda row: float(row["heldout_kl"]))


def _teacher(folder: Path, num_steps: int) -> Path:
    folder.parent.mkdir(exist_ok=True)
    if folder.parent.name != "smollm2":
        return ensure_teacher(folder, Training(num_steps=num_steps))
    from benchmarks.demo.smollm2 import ensure_teacher as ensure_smollm2

    return ensure_smollm2(folder)


def _chains(path: Path, model: Any, tokenizer: Any, setting: Setting) -> Chains:
    """What the teacher writes, kept, as its prompts come from packages that may change until the next call."""
    if not path.exists():
        prompts_RP, completions_RT = write_chains(model, tokenizer, setting.num_train + setting.num_heldout, seed=1)
        np.savez(path, prompts=prompts_RP.numpy(), completions=completions_RT.numpy())
    with np.load(path) as kept:
        return Chains(torch.from_numpy(kept["prompts"]), torch.from_numpy(kept["completions"]), setting.num_heldout)


def _student(setting: Setting, place: Path, teacher: Path, tokenizer: Any, seed: int) -> Path:
    folder = place / f"student-{setting.name}-{seed}"
    if setting.name != "smollm2":
        return make_student(setting.name, folder, teacher, tokenizer, seed)
    init_student(InitConfig(teacher=str(teacher), layers=SMOLLM2_LAYERS), folder)
    return folder


def _sizes(
    place: Path, teacher: Path, model: Any, chains: Chains, setting: Setting, arms: list[Arm]
) -> dict[str, float]:
    """Bytes a token that each arm reads, by its name; writes the cache and the feature sets that are missing."""
    path = place / "sizes.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if "outputs" not in known:
        known["outputs"] = build_cache(place / "cache", teacher, model, chains, {})
    hidden_rank, layer_rank = setting.ranks
    blocks: dict[str, Json] = {
        "hidden": {"last_hidden": {}},
        "hidden_low": {"last_hidden": {"rank": hidden_rank}},
        "middle": {"layers": {"at": [0.25, 0.5, 0.75], "rank": layer_rank}},
        "attention": {"attention": {"layers": [0.25, 0.5, 0.75], "keys": 8}},
    }
    for name in dict.fromkeys(arm.features for arm in arms if arm.features is not None):
        if name not in known:
            known[name] = _add_features(place / "cache", teacher, name, blocks[name])
    path.write_text(json.dumps(known))
    return {
        arm.name: (known["outputs"] if arm.reads_outputs else 0.0) + (known[arm.features] if arm.features else 0.0)
        for arm in arms
    }


def _add_features(cache: Path, teacher: Path, name: str, blocks: Json) -> float:
    """Runs the pass; bytes of its files over the tokens in them."""
    given = {
        "cache": str(cache),
        "name": name,
        "teacher": {"model": str(teacher)},
        "engine": {"kind": "transformers", "dtype": "float32", "batch_tokens": 2048},
        "chains": {"where": "split = 'train'"},
        **blocks,
    }
    with quiet(cache.with_name(f"{name}.log")):
        result = features_of_cache(validate_config(given, FeaturesConfig, "benchmark"), WHOLE)
    return result.size_bytes / result.num_tokens


def _train(arm: Arm, setting: Setting, student: Path, place: Path, seed: int, ranks: Ranks) -> Any:
    """The trained model."""
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = _config(arm, setting, student, place, run, seed)
    with quiet(place / "run.log"):
        train(config, ranks, StopRequest())
        model = trained_model(config, find_state(RunFolder(run).checkpoints, "last"), merged=True)
    shutil.rmtree(run)
    return model


def _config(arm: Arm, setting: Setting, student: Path, place: Path, run: Path, seed: int) -> TrainConfig:
    stage: Json = {
        "batch_tokens": PACK_TOKENS,
        "learning_rate": setting.learning_rate,
        "warmup_frac": 0.1,
        "weight_decay": 0.1,
    }
    stages = [{**stage, "losses": arm.losses}]
    if arm.align is not None:
        num_steps = setting.num_train // CHAINS_PER_STEP
        num_aligned = round(ALIGN_FRAC * num_steps)
        stages[0]["max_steps"] = num_steps - num_aligned
        first = {"name": "align", "trainable": "body", "losses": arm.align, "max_steps": num_aligned}
        stages.insert(0, {**stage, **first})
    cache = {"path": str(place / "cache"), "features": arm.features}
    given = {
        "run": str(run),
        "seed": seed,
        "student": {"model": str(student)},
        "data": {"caches": [cache], "where": "split = 'train'", "pack_tokens": PACK_TOKENS},
        "stages": stages,
        "engine": {"precision": "float32", "zero_stage": 0, "chunk_tokens": PACK_TOKENS},
        "eval": None,
        "checkpoint": {"every_steps": 1_000_000, "keep_last": 1},
    }
    return validate_config(given, TrainConfig, "benchmark")


@torch.no_grad()
def _scores(student: Any, teacher: Any, tokenizer: Any, chains: Chains) -> Json:
    """Nats of KL(teacher, student) a held-out token over the whole vocabulary, and the student's bits a byte."""
    ids_RL = torch.cat([chains.prompts_RP, chains.completions_RT], dim=1)[-chains.num_heldout :]
    num_prompt = chains.prompts_RP.shape[1]
    kl_sum = nats_sum = 0.0
    for ids_BL in ids_RL.split(BATCH_CHAINS):
        log_p, log_q = (
            model(input_ids=ids_BL).logits[:, num_prompt - 1 : -1].log_softmax(dim=-1) for model in (teacher, student)
        )
        kl_sum += float((log_p.exp() * (log_p - log_q)).sum())
        nats_sum -= float(log_q.gather(2, ids_BL[:, num_prompt:, None]).sum())
    completions = ids_RL[:, num_prompt:]
    num_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in completions.tolist())
    return {"heldout_kl": kl_sum / completions.numel(), "bits_per_byte": nats_sum / math.log(2.0) / num_bytes}


def _show(result: Json) -> None:
    print(f"student {result['student']}; held-out, means over seeds")
    print(f"{'arm':28} {'KL':>7} {'over outputs':>17} {'bits/byte':>9} {'B/token':>8} {'seconds':>8}")
    for row in result["summary"]:
        gap, spread = row["kl_over_outputs"], row["kl_over_outputs_sd"]
        over = "-" if gap is None else f"{gap:+.4f}" + ("" if spread is None else f" ±{spread:.4f}")
        print(
            f"{row['arm']:28} {row['heldout_kl']:7.4f} {over:>17} {row['bits_per_byte']:9.4f} "
            f"{row['bytes_per_token']:8.1f} {row['seconds']:8.1f}"
        )


def _names() -> list[str]:
    return [arm.name for arm in ARMS]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--student", choices=tuple(SETTINGS), default="scratch")
    parser.add_argument("--seeds", type=int, default=3, help="students per arm")
    parser.add_argument("--arms", nargs="+", choices=_names(), help="only these")
    parser.add_argument("--teacher-steps", type=int, default=300, help="optimizer steps of the small teacher")
    parser.add_argument("--folder", type=Path, help="keep teacher, cache and feature sets here for reuse")
    return parser.parse_args()


if __name__ == "__main__":
    main()
