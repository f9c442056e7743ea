"""An engine of a small torch model, for benchmarks whose caches the builder makes as it would for vLLM.

B requests of a batch, P prompt tokens, T completion tokens, V vocabulary
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.building.build import Build
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import EngineInfo, Failure, Finished, Outcome, Request
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows
from teacher_cache.engine.teacher import IdentifiedTeacher


@dataclass(frozen=True)
class Written:
    """What a batch comes to: prompts [B, P] and completions [B, T], int64, how many tokens count, why each ended."""

    prompts_BP: Tensor
    completions_BT: Tensor
    lengths: Sequence[int]
    finish_reasons: Sequence[str]


class TorchEngine:
    """Captures what `write` gives for a batch of requests, with the sampler's own functions. An api.Engine."""

    def __init__(
        self, model: Any, layout: Layout, write: Callable[[list[Request]], Written], batch: int, info: EngineInfo
    ) -> None:
        self._model, self._layout, self._write, self._batch = model, layout, write, batch
        self._waiting: list[Request] = []
        self._num_tokens = 0
        self.info = info

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
        return len(self._waiting) < self._batch

    def submit(self, request: Request) -> None:
        """Takes a request."""
        self._waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Answers what waits."""
        requests, self._waiting = self._waiting, []
        if not requests:
            return []
        written = self._write(requests)
        ids_BL = torch.cat([written.prompts_BP, written.completions_BT], dim=1)
        # The last prompt token predicts the first completion token.
        logits_BTV = self._model(input_ids=ids_BL).logits[:, written.prompts_BP.shape[1] - 1 : -1]
        self._num_tokens += sum(written.lengths)
        rows = zip(requests, logits_BTV, written.completions_BT, written.lengths, written.finish_reasons, strict=True)
        return [
            self._finished(request, logits_TV[:length], ids_T[:length], reason)
            for request, logits_TV, ids_T, length, reason in rows
        ]

    def _finished(self, request: Request, logits_TV: Tensor, ids_T: Tensor, reason: str) -> Finished:
        seeds_T = torch.full((len(ids_T),), request.seed or 0)
        captured = signal_rows(logits_TV, ids_T, self._layout, seeds_T, torch.arange(len(ids_T)))
        capture = capture_of_rows(
            captured.ids.numpy(),
            captured.logprobs.numpy(),
            captured.ranks.numpy().astype(np.int32),
            ids_T.tolist(),
            self._layout.top,
            self._layout,
        )
        return Finished(request, capture, reason)

    def close(self) -> None:
        """Nothing to stop."""


def info_of(kind: str, vocab_size: int, max_model_len: int) -> EngineInfo:
    """What a manifest says of such an engine."""
    return EngineInfo(
        vocab_size=vocab_size, max_model_len=max_model_len, entropy="exact", software={}, settings={"kind": kind}
    )


def fill(
    config: BuildConfig | ScoreConfig,
    teacher: IdentifiedTeacher,
    requests: Iterable[Request | Failure],
    num_requests: int,
    start_engine: Callable[[], TorchEngine],
) -> None:
    """Fills the cache of `config` through the builder."""
    with contextlib.closing(Build(config, teacher, "w0")) as build:
        build.run(requests, num_requests, start_engine)
