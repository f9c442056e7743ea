"""What the `archive` codec learns on its way through a block of rows, and the contexts that follow from it. Encoder and
decoder call these functions at the same moments with the same arguments; that is what makes them agree. Compiled by
numba on first use.

After each completion token id ("previous token") stands a list of the candidates that were stored after it, those seen
more often first (by class of their count). An entry is one int64: rank of the id in the model (20 bits), mean depth
(8), count (35).

Shape legend: P distinct previous tokens, A entries of all lists, W classes of counts, M small integers.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from stillroom.cache.archive.model import LISTED, LISTED_CODE, UNLISTED, UInt8, floor_log2
from stillroom.schema.records import Int32, Int64

LIST_LIMIT = 4096
"""A list takes no more entries than this; what else follows its token is coded as unlisted."""
NUM_CLASSES = 48
"""Classes of counts, by which lists are ordered: each count below 8, then two an octave."""

DEPTH_SHIFT = 20
COUNT_SHIFT = 28
RANK_MASK = (1 << DEPTH_SHIFT) - 1
DEPTH_MASK = 255


class Lists(NamedTuple):
    """All lists of a block. List p holds entries_A[starts_P[p] :][: lengths_P[p]]; heads_PW[p, w] of them have a count
    of a class above w; its token has come visits_P[p] times. log2_M and class_M are floor(log2(m)) and the class of 0,
    1, 2, ...
    """

    entries_A: Int64
    starts_P: Int64
    lengths_P: Int64
    heads_PW: Int32
    visits_P: Int64
    log2_M: UInt8
    class_M: UInt8


def empty_lists(list_T: Int64, max_entries: int) -> Lists:
    """Lists for a block whose tokens follow list numbers `list_T` and have up to `max_entries` entries."""
    visits_P = np.bincount(list_T)
    sizes_P = np.minimum(visits_P * max_entries, LIST_LIMIT)
    num_lists = len(visits_P)
    # A count grows to the number of tokens, what is left of a token to its entries.
    numbers_M = np.arange(len(list_T) + max_entries + 2)
    log2_M = floor_log2(numbers_M)
    class_M = np.where(numbers_M < 8, numbers_M, 2 * log2_M + 2 + (numbers_M >> np.maximum(log2_M - 1, 0) & 1))
    return Lists(
        entries_A=np.zeros(int(sizes_P.sum()), np.int64),
        starts_P=np.concatenate([[0], np.cumsum(sizes_P)]).astype(np.int64),
        lengths_P=np.zeros(num_lists, np.int64),
        heads_PW=np.zeros((num_lists, NUM_CLASSES), np.int32),
        visits_P=np.zeros(num_lists, np.int64),
        log2_M=log2_M.astype(np.uint8),
        class_M=np.minimum(class_M, NUM_CLASSES - 1).astype(np.uint8),
    )


@njit(nogil=True, cache=True)
def listed_context(log2_M: UInt8, visits_log: int, entry: int) -> int:
    """Context of the distance to the next candidate in a list, from the entry where the search begins."""
    count = entry >> COUNT_SHIFT
    rarity = min(visits_log - np.int64(log2_M[count]), 7)
    return LISTED + rarity + (8 if count > 1 else 0)


@njit(nogil=True, cache=True)
def unlisted_context(log2_M: UInt8, rank: int, left: int) -> int:
    """Context of the distance to the next candidate outside the list, from `rank`, with `left` still to come."""
    size = (rank >= 7) + (rank >= 127) + (rank >= 2047) + (rank >= 32767)
    return UNLISTED + 3 * size + min(np.int64(log2_M[left]) >> 1, 2)


@njit(nogil=True, cache=True)
def listed_code_context(entry: int) -> int:
    """Context of the depth of a candidate that was found in a list."""
    return LISTED_CODE + min((entry >> (DEPTH_SHIFT + 3)) & (DEPTH_MASK >> 3), 6)


@njit(nogil=True, cache=True)
def promote(entries_A: Int64, heads_PW: Int32, class_M: UInt8, number: int, start: int, at: int, depth: int) -> None:
    """Counts entry `at` of list `number`, which begins at `start`, once more, with the depth it had now; where that
    raises its class, moves it before those of its old class.
    """
    entry = entries_A[at]
    count = entry >> COUNT_SHIFT
    mean = (entry >> DEPTH_SHIFT) & DEPTH_MASK
    mean = (3 * mean + depth + 2) >> 2 if count > 1 else (mean + depth + 1) >> 1
    counted = (entry & RANK_MASK) | (mean << DEPTH_SHIFT) | ((count + 1) << COUNT_SHIFT)
    old = np.int64(class_M[count])
    first = at
    if np.int64(class_M[count + 1]) != old:
        head = np.int64(heads_PW[number, old])
        heads_PW[number, old] = head + 1
        first = start + head
        entries_A[at] = entries_A[first]
    entries_A[first] = counted


@njit(nogil=True, cache=True)
def append(
    entries_A: Int64, starts_P: Int64, lengths_P: Int64, heads_PW: Int32, number: int, rank: int, depth: int
) -> None:
    """Puts a candidate that was not in the list at its end, if there is room."""
    at = starts_P[number] + lengths_P[number]
    if at < starts_P[number + 1]:
        entries_A[at] = rank | (depth << DEPTH_SHIFT) | (1 << COUNT_SHIFT)
        lengths_P[number] += 1
        heads_PW[number, 0] += 1
