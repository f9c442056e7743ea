"""The rows in which the sampler plugin hands over what it saw, in band: as if they were vLLM's own log probabilities.

A request asks for `logprobs = layout.width` and says in `extra_args` how its rows are laid out. A row, W + 1 columns of
an id and a log probability, is

    [sampled | top candidates | draws outside the top | entropy | log-partitions | mark]

Scalars stand in the log-probability column under id 0. The mark is positive, which no log probability is: a worker
without the plugin (or with one of another version) cannot be taken for one that has it.

Shape legend: T completion tokens, W columns after the sampled token's, K top candidates, M draws, S temperatures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.records import Capture, Float32, Int32
from shared.errors import StillroomError

MARK = 1.0
"""Last column of every row: the version of this layout."""

TOP, DRAWS, TEMPERATURES = "stillroom_top", "stillroom_draws", "stillroom_temperatures"
"""Keys of `SamplingParams.extra_args` (`vllm_xargs` over HTTP)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a row holds: `top` exact candidates, `draws` from the rest, and beside the entropy the log-partition
    log sum_v p_v^(1/tau) at each of `temperatures`.
    """

    top: int
    draws: int = 0
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.top < 1 or self.draws < 0 or not all(0 < tau < float("inf") for tau in self.temperatures):
            raise ValueError(f"{self}: top must be at least 1, draws at least 0, temperatures positive and finite")

    @property
    def width(self) -> int:
        """The `logprobs` to ask vLLM for: columns besides the sampled token's."""
        return self.top + self.draws + 1 + len(self.temperatures) + 1

    def extra_args(self) -> dict[str, Any]:
        """What tells the plugin of this layout."""
        return {TOP: self.top, DRAWS: self.draws, TEMPERATURES: list(self.temperatures)}

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "Layout | None":
        """The layout that a request asks for, None where it asks for none. Raises ValueError when it makes no sense."""
        if not extra_args or TOP not in extra_args:
            return None
        try:
            taus = tuple(float(tau) for tau in extra_args.get(TEMPERATURES) or ())
            return cls(int(extra_args[TOP]), int(extra_args.get(DRAWS) or 0), taus)
        except TypeError as error:
            raise ValueError(f"{TOP}, {DRAWS} or {TEMPERATURES} is no number: {error}") from error


def capture_of_rows(
    ids: Int32, logprobs: Float32, ranks_T: Int32, token_ids: Sequence[int], k: int, layout: Layout | None
) -> Capture:
    """One completion's Capture out of its rows `ids` and `logprobs` [T, >= W + 1]; `layout` None means plain top k.

    Raises StillroomError where rows do not belong to the tokens, or were not made by the plugin of this layout: an
    engine that shifts them, or cannot give what was asked, must not fill a cache.
    """
    token_ids_T = np.asarray(token_ids, np.int32)
    if len(ids) != len(token_ids_T):
        raise StillroomError(f"vLLM gave distributions of {len(ids)} tokens for a completion of {len(token_ids_T)}")
    if not np.array_equal(ids[:, 0], token_ids_T):
        first = int(np.flatnonzero(ids[:, 0] != token_ids_T)[0])
        raise StillroomError(f"vLLM's distributions do not belong to its tokens: token {first} differs")
    top = slice(1, 1 + (k if layout is None else layout.top))
    plain = Capture(
        token_ids_T=token_ids_T,
        sampled_logprob_T=logprobs[:, 0],
        sampled_rank_T=ranks_T,
        topk_ids_TK=ids[:, top],
        topk_logprobs_TK=logprobs[:, top],
    )
    return plain if layout is None else _with_scalars(plain, ids, logprobs, layout)


def _with_scalars(plain: Capture, ids: Int32, logprobs: Float32, layout: Layout) -> Capture:
    if not is_marked(ids, logprobs, layout):
        raise StillroomError("the engine's workers answered without the sampler plugin: start them where it is loaded")
    draws = slice(1 + layout.top, 1 + layout.top + layout.draws)
    partitions = slice(draws.stop + 1, layout.width)
    return Capture(
        token_ids_T=plain.token_ids_T,
        sampled_logprob_T=plain.sampled_logprob_T,
        sampled_rank_T=plain.sampled_rank_T,
        topk_ids_TK=plain.topk_ids_TK,
        topk_logprobs_TK=plain.topk_logprobs_TK,
        entropy_T=logprobs[:, draws.stop],
        draw_ids_TM=ids[:, draws] if layout.draws else None,
        draw_logprobs_TM=logprobs[:, draws] if layout.draws else None,
        log_partitions_TS=logprobs[:, partitions] if layout.temperatures else None,
    )


def is_marked(ids: Int32, logprobs: Float32, layout: Layout) -> bool:
    """Whether every row was made by the plugin, with this layout."""
    marks_T = logprobs[:, layout.width]
    return bool((marks_T == MARK).all() and (ids[:, layout.width] == 0).all())
