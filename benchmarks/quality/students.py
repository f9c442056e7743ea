"""Students trained from a cache by student_train itself, and how near each comes to the teacher."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.quality.teacher import NUM_COMPLETION_TOKENS, NUM_PROMPT_TOKENS, model_config
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.assess.evaluating import evaluate_config
from student_train.config.run import InitConfig, TrainConfig
from student_train.model.folder import atomic_folder, save_model
from student_train.model.prune import init_student
from student_train.runtime.ranks import Ranks
from student_train.training.loop import train

CHAINS_PER_STEP = 6
PACK_TOKENS = CHAINS_PER_STEP * (NUM_PROMPT_TOKENS + NUM_COMPLETION_TOKENS)
LEARNING_RATES = {"scratch": 3e-3, "cut": 2e-3}


@dataclass(frozen=True)
class Score:
    """A student on held-out chains, against the teacher's whole distributions; nats per token."""

    heldout_kl: float
    heldout_js: float
    agreement: float
    confidence_minus_accuracy: float
    cross_entropy: float


def make_student(kind: str, folder: Path, teacher: Path, tokenizer: Any, seed: int) -> Path:
    """`scratch`: two layers of width 96 with random weights; `cut`: the teacher's first and last layer."""
    if folder.exists():
        return folder
    if kind == "cut":
        init_student(InitConfig(teacher=str(teacher), layers=2), folder)
        return folder
    return make_small(folder, tokenizer, seed)


def make_small(folder: Path, tokenizer: Any, seed: int, vocab_size: int | None = None) -> Path:
    """Two layers of width 96 with random weights, in a folder with its tokenizer; `vocab_size`: not the teacher's."""
    if folder.exists():
        return folder
    torch.manual_seed(seed)
    config = model_config(num_layers=2, width=96, tied=True)
    config.vocab_size = vocab_size or config.vocab_size
    with atomic_folder(folder) as temp:
        save_model(LlamaForCausalLM(config), tokenizer, temp)
    return folder


def run_config(
    run: Path, student: Path, data: Json, seed: int, stage: Json, pack_tokens: int = PACK_TOKENS
) -> TrainConfig:
    """A run of one stage on the chains to learn from; `data` and `stage` say what differs between runs."""
    given = {
        "run": str(run),
        "seed": seed,
        "student": {"model": str(student)},
        "data": {"where": "split = 'train'", "pack_tokens": pack_tokens, **data},
        "stages": [{"batch_tokens": pack_tokens, "warmup_frac": 0.1, "weight_decay": 0.1, **stage}],
        "engine": {"precision": "float32", "zero_stage": 0, "chunk_tokens": pack_tokens},
        "eval": None,
        "checkpoint": {"every_steps": 1_000_000, "keep_last": 1},
    }
    return validate_config(given, TrainConfig, "benchmark")


def train_student(
    kind: str,
    student: Path,
    run: Path,
    cache: Path,
    reference: Path,
    losses: Json,
    seed: int,
    epochs: int,
    ranks: Ranks,
) -> Score:
    """Trains on the chains of `cache` and evaluates on the held-out ones of `reference`, which holds everything."""
    stage = {"losses": losses, "epochs": epochs, "learning_rate": LEARNING_RATES[kind]}

    def config(data: Path) -> TrainConfig:
        return run_config(run, student, {"caches": [str(data)]}, seed, stage)

    with quiet(run.with_name(f"{run.name}.log")):
        train(config(cache), ranks, StopRequest())
        found = evaluate_config(config(reference), "split = 'heldout'", "last")
    return Score(
        heldout_kl=found["forward_kl"],
        heldout_js=found["js"],
        agreement=found["top1_agreement"],
        confidence_minus_accuracy=found["confidence_minus_accuracy"],
        cross_entropy=found["cross_entropy"],
    )


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends stderr to a file: sixty progress bars tell nothing."""
    saved = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
