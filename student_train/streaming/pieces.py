"""Chains as the sequences that are trained: whole, or cut where they are longer than a limit.

R chains, P pieces
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from schemas.records import Int32, Int64

LongChains = Literal["truncate", "skip", "split"]

SPLIT_OVERLAP_FRAC = 1 / 8
"""Share of the limit that a later piece of a split chain repeats as context, without a loss on it."""


@dataclass(frozen=True, slots=True)
class LongChainCounts:
    """What the limit on sequence length did. Tokens are completion tokens that no loss will see."""

    num_long: int
    num_truncated: int
    num_skipped: int
    num_split: int
    num_tokens_lost: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of chains that are trained as one sequence; positions count from the first prompt token.

    Piece p reads tokens first_P[p]..stop_P[p]-1 of chain row_P[p] and has a loss on tokens loss_P[p]..stop_P[p]-1, all
    of them completion tokens, each in exactly one piece. int32 [P]; first < loss < stop.
    """

    row_P: Int32
    first_P: Int32
    loss_P: Int32
    stop_P: Int32
    counts: LongChainCounts

    @property
    def num_tokens_P(self) -> Int32:
        """int32 [P], tokens that a piece takes in a pack."""
        return self.stop_P - self.first_P


def cut_chains(num_prompt_R: Int32, num_tokens_R: Int32, limit: int, policy: LongChains) -> Pieces:
    """Pieces of chains with `num_prompt_R` (>= 1) and `num_tokens_R` (>= 1) tokens, in order of rows.

    A truncated chain keeps its beginning, and teaches no end that the teacher did not say. A prompt that leaves no
    room for a completion token drops the chain, except under `split`, where every completion token keeps a loss: later
    pieces begin with the tokens just before them, an eighth of the limit, as context.
    """
    prompt_R, total_R = num_prompt_R.astype(np.int64), num_prompt_R.astype(np.int64) + num_tokens_R
    long_R = total_R > limit
    if policy == "split":
        pieces = _split(prompt_R, total_R, limit)
        num_cut = int(long_R.sum())
        return _pieces(*pieces, LongChainCounts(num_cut, 0, 0, num_cut, 0))
    kept_R = ~long_R if policy == "skip" else prompt_R < limit
    row_P = np.flatnonzero(kept_R)
    stop_P = np.minimum(total_R, limit)[row_P]
    counts = LongChainCounts(
        num_long=int(long_R.sum()),
        num_truncated=int((long_R & kept_R).sum()),
        num_skipped=int((~kept_R).sum()),
        num_split=0,
        num_tokens_lost=int(num_tokens_R.sum(dtype=np.int64) - (stop_P - prompt_R[row_P]).sum()),
    )
    return _pieces(row_P, np.zeros_like(row_P), prompt_R[row_P], stop_P, counts)


def _split(prompt_R: Int64, total_R: Int64, limit: int) -> tuple[Int64, Int64, Int64, Int64]:
    overlap = max(1, int(limit * SPLIT_OVERLAP_FRAC))
    step = limit - overlap
    # Limit 8, overlap 1, prompt 3, 12 completion tokens: reads 0..7 with loss on 3..7, then reads 7..14 with loss on
    # 8..14.
    first_stop_R = np.minimum(total_R, np.where(prompt_R < limit, limit, prompt_R + step))
    num_later_R = -(-(total_R - first_stop_R) // step)
    row_P = np.repeat(np.arange(len(prompt_R)), 1 + num_later_R)
    ends_R = np.cumsum(1 + num_later_R)
    later_P = np.arange(len(row_P)) - (ends_R - 1 - num_later_R)[row_P]
    loss_P = np.where(later_P == 0, prompt_R[row_P], first_stop_R[row_P] + (later_P - 1) * step)
    stop_P = np.where(later_P == 0, first_stop_R[row_P], np.minimum(total_R[row_P], loss_P + step))
    whole_P = (later_P == 0) & (prompt_R[row_P] < limit)
    first_P = np.where(whole_P, 0, loss_P - overlap)
    return row_P, first_P, loss_P, stop_P


def _pieces(row_P: Int64, first_P: Int64, loss_P: Int64, stop_P: Int64, counts: LongChainCounts) -> Pieces:
    row, first, loss, stop = (values.astype(np.int32) for values in (row_P, first_P, loss_P, stop_P))
    return Pieces(row, first, loss, stop, counts)
