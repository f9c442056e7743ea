"""Rows of candidates as servers answer them, to arrays. No I/O, and nothing of either API.

Candidates come as a mapping in this order: the sampled token, then the most probable ones by rank, the sampled one not
repeated. Values are float32 written out in full, -9999 stands for minus infinity and null for NaN. Where the server has
the sampler plugin, mapped rows of vllm_engine.wide_rows come in the same way, with what only the sampler sees.

Shape legend: T completion tokens, K candidates, W columns besides the sampled token's, n tokens of one message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.records import Capture, Float32, Int32
from teacher_cache.vllm_engine.wide_rows import Layout, UnmarkedRows, capture_of_rows

MINUS_INFINITY = -9999.0
"""What vLLM writes for it, JSON has no infinities."""

UNKNOWN_RANK = 0
"""Rank of a sampled token outside the candidates where the answer does not tell it."""


class BadAnswer(ValueError):
    """The answer is not what was asked for. The message is one line without the server's name."""


MALFORMED = (BadAnswer, UnmarkedRows, KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What reading an answer of another form raises."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is asked of every token: its K most probable candidates, or the plugin's rows of a mapped `layout`."""

    k: int
    vocab_size: int
    layout: Layout | None = None

    @property
    def width(self) -> int:
        """W, columns besides the sampled token's."""
        return self.k if self.layout is None else self.layout.width


class Rows:
    """Growing arrays of one completion, message by message."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.num_tokens = 0
        self._blocks: list[tuple[Int32, Float32, Int32, Int32, Float32]] = []

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        ranks: Sequence[int],
        ids: Sequence[int],
        values: Sequence[float | None],
    ) -> None:
        """Takes n tokens; `ids` and `values` hold n W entries, one token after the other."""
        num, width = len(token_ids), self.form.width
        if len(ids) != num * width:
            raise BadAnswer(f"{len(ids)} candidates came for {num} tokens, {width} a token were asked for")
        self.num_tokens += num
        self._blocks.append(
            (
                np.array(token_ids, np.int32)[:, None],
                _logprobs(logprobs)[:, None],
                np.array(ranks, np.int32),
                np.array(ids, np.int32).reshape(num, width),
                _logprobs(values).reshape(num, width),
            )
        )

    def capture(self) -> Capture:
        """All tokens. Raises BadAnswer where none came, UnmarkedRows where the plugin was asked and did not answer."""
        if not self.num_tokens:
            raise BadAnswer("the completion holds no token")
        token_ids_T1, logprob_T1, rank_T, ids_TW, values_TW = map(np.concatenate, zip(*self._blocks, strict=True))
        ids, values = np.hstack([token_ids_T1, ids_TW]), np.hstack([logprob_T1, values_TW])
        return capture_of_rows(ids, values, rank_T, token_ids_T1[:, 0].tolist(), self.form.k, self.form.layout)


def place_of(values: Sequence[float | None], rank: int | None, form: Form) -> int | None:
    """Which column is the sampled token's, whose entry comes first; None where it has none beside its own."""
    if form.layout is None:
        return rank if rank and rank <= form.k else None
    # Entries of a mapped row are one fewer where the sampled token is one of the top.
    return None if len(values) > form.width else rank_among(values[: form.layout.top])


def in_columns(entries: list[Any], place: int | None, form: Form) -> list[Any]:
    """W columns out of entries whose first is the sampled token: [s a b c], place 2, W 3 gives [a s b]."""
    if place is None:
        return entries[1 : form.width + 1]
    return entries[1:place] + entries[:1] + entries[place : form.width]


def rank_among(values: Sequence[float | None]) -> int:
    """Rank of the first among all, behind its equals as vLLM counts it; 1 where it is no number."""
    own = values[0]
    if own is None:
        return 1
    return sum(value is None or value >= own for value in values)


def _logprobs(values: Sequence[float | None]) -> Float32:
    # None becomes NaN.
    logprobs: Float32 = np.array(values, np.float32)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return logprobs
