"""Caches of the rounds: a model's own chains, and a teacher's view of them, through the builder and its writer.

B requests of a batch, P prompt tokens, T completion tokens, V vocabulary
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.rounds.setting import NUM_COMPLETION_TOKENS, VOCAB_SIZE, sample
from stillroom.config import Json, validate_config
from teacher_cache.building import Build
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import load_prompts, num_requests, requests

BATCH = 512
# The vocabulary is small enough to keep whole distributions.
CAPTURE = {"codec": "topk-f32", "max_support": VOCAB_SIZE, "nucleus": None, "draws": 0}
LAYOUT = Layout(VOCAB_SIZE, 0)


class TorchEngine:
    """Samples at temperature 1 or scores, in batches of prompts of one length. A teacher_cache.engine.api.Engine."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model, self._generator = model, torch.Generator().manual_seed(seed)
        self._waiting: list[Request] = []
        self._num_tokens = 0
        self.info = EngineInfo(
            vocab_size=VOCAB_SIZE, max_model_len=64, entropy="exact", software={}, settings={"kind": "torch"}
        )

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far."""
        return self._num_tokens

    @property
    def num_unfinished(self) -> int:
        """Requests not yet answered."""
        return len(self._waiting)

    def has_room(self) -> bool:
        """Whether a batch is not full."""
        return len(self._waiting) < BATCH

    def submit(self, request: Request) -> None:
        """Takes a request."""
        self._waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Answers what waits."""
        batch, self._waiting = self._waiting, []
        if not batch:
            return []
        prompts_BP = torch.tensor([list(request.prompt_token_ids) for request in batch])
        given = [request.completion_token_ids for request in batch]
        if given[0] is None:
            ids_BT, lengths_B = sample(self._model, prompts_BP, self._generator)
        else:
            lengths_B = torch.tensor([len(ids or ()) for ids in given])
            ids_BT = torch.zeros(len(batch), int(lengths_B.max()), dtype=torch.int64)
            for row, ids in enumerate(given):
                ids_BT[row, : len(ids or ())] = torch.tensor(ids)
        first = prompts_BP.shape[1] - 1
        logits_BTV = self._model(input_ids=torch.cat([prompts_BP, ids_BT], dim=1)).logits[:, first:-1]
        self._num_tokens += int(lengths_B.sum())
        return [
            self._finished(request, logits_TV[:length], ids_T[:length])
            for request, logits_TV, ids_T, length in zip(batch, logits_BTV, ids_BT, lengths_B.tolist(), strict=True)
        ]

    def _finished(self, request: Request, logits_TV: torch.Tensor, ids_T: torch.Tensor) -> Finished:
        captured = signal_rows(logits_TV, ids_T, LAYOUT, None, None)
        ranks = captured.ranks.numpy().astype(np.int32)
        capture = capture_of_rows(
            captured.ids.numpy(), captured.logprobs.numpy(), ranks, ids_T.tolist(), LAYOUT.top, LAYOUT
        )
        if request.completion_token_ids is not None:
            return Finished(request, capture, "scored")
        return Finished(request, capture, "stop" if int(ids_T[-1]) == 0 else "length")

    def close(self) -> None:
        """Nothing to stop."""


def build(cache: Path, model: Path, prompts: Path, seed: int, *, heldout_frac: float) -> Path:
    """A cache of one chain for each prompt, sampled from the model at temperature 1; made where it is not there yet."""
    if cache.exists():
        return cache
    config = validate_config(
        {
            **_common(cache, model),
            "prompts": {"sources": [_source(prompts)], "heldout_frac": heldout_frac},
            "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": NUM_COMPLETION_TOKENS},
        },
        BuildConfig,
        "benchmark",
    )
    teacher = identify_teacher(config.teacher)
    found = load_prompts(config.prompts).prompts
    wanted = requests(config, found, teacher.tokenizer, teacher.record.fingerprint)
    with contextlib.closing(Build(config, teacher, "w0")) as made:
        made.run(wanted, num_requests(config, found), lambda: TorchEngine(_loaded(model), seed))
    return cache


def rescore(cache: Path, teacher_folder: Path, of: Path) -> Path:
    """A cache of the teacher's distributions on the chains of the cache `of`."""
    if cache.exists():
        return cache
    source = {"kind": "cache", "name": "own", "path": str(of)}
    config = validate_config(
        {**_common(cache, teacher_folder), "completions": {"sources": [source]}}, ScoreConfig, "benchmark"
    )
    teacher = identify_teacher(config.teacher)
    with Completions(config, teacher) as completions, contextlib.closing(Build(config, teacher, "w0")) as made:
        made.run(completions.requests(), completions.count(), lambda: TorchEngine(_loaded(teacher_folder), 0))
    return cache


def _common(cache: Path, model: Path) -> Json:
    return {"cache": str(cache), "run": "rounds", "teacher": {"model": str(model)}, "capture": CAPTURE}


def _source(prompts: Path) -> Json:
    return {
        "kind": "jsonl",
        "name": "sums",
        "path": str(prompts),
        "prompt_field": "question",
        "reference_field": "answer",
    }


def _loaded(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder).eval()
