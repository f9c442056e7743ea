"""The rows in which the sampler plugin hands over what it saw, in band: as if they were vLLM's own log probabilities.

A request asks for `logprobs = layout.width` and says in `extra_args` how its rows are laid out. A row, W + 1 columns of
an id and a log probability, is for this process

    [sampled | top candidates | draws outside the top | entropy | log-partitions | mark]

Scalars stand in the log-probability column under id 0. A server answers with a mapping of each row, {id: log
probability} in its order, which would merge what has one id. Rows that are `mapped` survive that:

    [sampled | top candidates | ids of draws | their log probabilities | entropy | log-partitions | rank | mark]

From the draws' ids on, numbers stand in the log-probability column (whole ones are exact in float32) under ids that
nothing else in the row has; so the sampled token alone may merge, with its own entry among the top. `rank` is the
sampled token's, which not every answer tells otherwise.

The mark is positive, which no log probability is: a worker without the plugin (or with one of another version) cannot
be taken for one that has it.

Shape legend: T completion tokens, W columns after the sampled token's, K top candidates, M draws, S temperatures.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import StillroomError
from stillroom.schema.records import Capture, Float32, Int32

MARK, MAPPED_MARK = 1.0, 2.0
"""Last column of every row: the form and version of its layout."""

TOP, DRAWS, TEMPERATURES, MAPPED = "stillroom_top", "stillroom_draws", "stillroom_temperatures", "stillroom_mapped"
"""Keys of `SamplingParams.extra_args` (`vllm_xargs` of /v1/completions). MAPPED holds the mark that is expected."""


class UnmarkedRows(StillroomError):
    """Rows of the plugin were requested, and others came."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a row holds: `top` exact candidates, `draws` from the rest, and beside the entropy the log-partition
    log sum_v p_v^(1/tau) at each of `temperatures`; `mapped` for answers that are mappings.
    """

    top: int
    draws: int = 0
    temperatures: tuple[float, ...] = ()
    mapped: bool = False

    def __post_init__(self) -> None:
        if self.top < 1 or self.draws < 0 or not all(0 < tau < float("inf") for tau in self.temperatures):
            raise ValueError(f"{self}: top must be at least 1, draws at least 0, temperatures positive and finite")

    @property
    def width(self) -> int:
        """The `logprobs` to ask vLLM for: columns besides the sampled token's."""
        # Behind top and draws: the entropy, the log-partitions, the mark.
        return self.top + self.num_numbers if self.mapped else self.top + self.draws + 1 + len(self.temperatures) + 1

    @property
    def num_numbers(self) -> int:
        """Columns of a mapped row that hold no token: all behind the top."""
        # Ids and log probabilities of the draws, the entropy, the log-partitions, the rank, the mark.
        return 2 * self.draws + 1 + len(self.temperatures) + 2

    @property
    def min_vocab_size(self) -> int:
        """Ids that a row needs: every column of a mapped row has one of its own."""
        return self.width + 1 if self.mapped else self.top

    @property
    def mark(self) -> float:
        """Value of the last column."""
        return MAPPED_MARK if self.mapped else MARK

    def unmapped(self) -> "Layout":
        """The same for this process."""
        return dataclasses.replace(self, mapped=False)

    def extra_args(self) -> dict[str, Any]:
        """What tells the plugin of this layout."""
        asked: dict[str, Any] = {TOP: self.top, DRAWS: self.draws, TEMPERATURES: list(self.temperatures)}
        return asked | {MAPPED: int(MAPPED_MARK)} if self.mapped else asked

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "Layout | None":
        """The layout that a request asks for, None where it asks for none. Raises ValueError when it makes no sense."""
        if not extra_args or TOP not in extra_args:
            return None
        mapped = extra_args.get(MAPPED)
        if mapped not in (None, MAPPED_MARK):
            raise ValueError(f"{MAPPED}={mapped} does not match version {MAPPED_MARK:g}")
        try:
            taus = tuple(float(tau) for tau in extra_args.get(TEMPERATURES) or ())
            return cls(int(extra_args[TOP]), int(extra_args.get(DRAWS) or 0), taus, mapped is not None)
        # OverflowError: a client may send infinity for a whole number.
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{TOP}, {DRAWS} or {TEMPERATURES} is not a number: {error}") from error


def capture_of_rows(
    ids: Int32, logprobs: Float32, ranks_T: Int32, token_ids: Sequence[int], k: int, layout: Layout | None
) -> Capture:
    """One completion's Capture out of its rows `ids` and `logprobs` [T, >= W + 1]; `layout` None means plain top k.

    `ranks_T` of mapped rows are not looked at: the rows hold them. Raises StillroomError where rows do not belong to
    the tokens, and its UnmarkedRows where the plugin of this layout did not make them: an engine that shifts rows, or
    cannot give what was asked, must not fill a cache.
    """
    token_ids_T = np.asarray(token_ids, np.int32)
    if len(ids) != len(token_ids_T):
        raise StillroomError(f"vLLM gave distributions of {len(ids)} tokens for a completion of {len(token_ids_T)}")
    # Column 0 is the sampled token: rows that are shifted by one would pass every other check.
    if not np.array_equal(ids[:, 0], token_ids_T):
        first = int(np.flatnonzero(ids[:, 0] != token_ids_T)[0])
        raise StillroomError(f"vLLM's distributions do not match its tokens: token {first} differs")
    top = slice(1, 1 + (k if layout is None else layout.top))
    plain = Capture(
        token_ids_T=token_ids_T,
        sampled_logprob_T=logprobs[:, 0],
        sampled_rank_T=ranks_T,
        topk_ids_TK=ids[:, top],
        topk_logprobs_TK=logprobs[:, top],
    )
    if layout is None:
        return plain
    if not is_marked(ids, logprobs, layout):
        raise UnmarkedRows("the engine's workers answered without the sampler plugin: start them where it is loaded")
    return _with_numbers(plain, logprobs, layout) if layout.mapped else _with_scalars(plain, ids, logprobs, layout)


def _with_scalars(plain: Capture, ids: Int32, logprobs: Float32, layout: Layout) -> Capture:
    draws = slice(1 + layout.top, 1 + layout.top + layout.draws)
    partitions = slice(draws.stop + 1, layout.width)
    return dataclasses.replace(
        plain,
        entropy_T=logprobs[:, draws.stop],
        draw_ids_TM=ids[:, draws] if layout.draws else None,
        draw_logprobs_TM=logprobs[:, draws] if layout.draws else None,
        log_partitions_TS=logprobs[:, partitions] if layout.temperatures else None,
    )


def _with_numbers(plain: Capture, values: Float32, layout: Layout) -> Capture:
    ids = slice(1 + layout.top, 1 + layout.top + layout.draws)
    draws = slice(ids.stop, ids.stop + layout.draws)
    partitions = slice(draws.stop + 1, layout.width - 1)
    ranks_T = values[:, layout.width - 1].astype(np.int32)
    return dataclasses.replace(
        plain,
        # Servers write NaN as -9999, as they write minus infinity; no finite log probability has rank 0.
        sampled_logprob_T=np.where(ranks_T == 0, np.float32(np.nan), plain.sampled_logprob_T),
        sampled_rank_T=ranks_T,
        entropy_T=values[:, draws.stop],
        draw_ids_TM=values[:, ids].astype(np.int32) if layout.draws else None,
        draw_logprobs_TM=values[:, draws] if layout.draws else None,
        log_partitions_TS=values[:, partitions] if layout.temperatures else None,
    )


def is_marked(ids: Int32, logprobs: Float32, layout: Layout) -> bool:
    """Whether every row was made by the plugin, with this layout."""
    marks_T = logprobs[:, layout.width]
    # Mapped rows carry their numbers under ids that are free, so there the id says nothing.
    return bool((marks_T == layout.mark).all() and (layout.mapped or (ids[:, layout.width] == 0).all()))
