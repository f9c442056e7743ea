"""Streams of the `archive` codec to candidates: compiled by numba on first use.

Nothing is read or written that was not bounded before, whatever the words say: the streams end in a margin wider than
one token can reach, and are measured after each token. Words that contradict themselves end the decoding with the
number of their row.

Shape legend: T tokens, E entries (supports and draws) of all tokens, R rows, S symbols, C contexts, D ids of the model,
W words of 32 bits.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stillroom.cache.archive.lists import (
    RANK_MASK,
    Lists,
    append,
    listed_code_context,
    listed_context,
    promote,
    unlisted_context,
)
from stillroom.cache.archive.model import (
    DRAW_TIMES,
    DRAWN,
    END,
    FLOOR,
    MEMBER,
    NUM_DRAWS,
    PIN,
    PRECISION,
    SAMPLED_CODE,
    SIZE,
    SUPPORT,
    TAIL,
    UNLISTED_CODE,
    UInt8,
)
from stillroom.schema.records import Int32, Int64

LOWEST_STATE = 1 << 31
STATE_WORDS = 2
_SLOT_MASK = (1 << PRECISION) - 1

UInt32 = npt.NDArray[np.uint32]


class Tables(NamedTuple):
    """The model as the decoder wants it: `lookup` and number tables of stillroom.cache.archive.model, ids by rank."""

    lookup: UInt32
    base_S: Int64
    bits_S: Int64
    id_D: Int32
    max_support: int
    max_draws: int


class Columns(NamedTuple):
    """What the decoder knows of each token from other columns: number of the list of the token before, rank of the
    sampled id in the model (-1: none), code that its log probability rounds to, its rank in the vocabulary.
    """

    list_T: Int64
    sampled_T: Int64
    sampled_code_T: Int64
    sampled_rank_T: Int32


class Candidates(NamedTuple):
    """A block between columns and Signals: codes instead of log probabilities. A token's entries are its support by
    rising code, then its draws.
    """

    size_T: Int32
    num_draws_T: Int32
    tail_T: UInt8
    id_E: Int32
    code_E: UInt8


class Scratch(NamedTuple):
    """One token's candidates in the order of decoding, places by code, and which ranks are in the support."""

    rank_K: Int64
    code_K: Int64
    place_S: Int64
    taken_D: npt.NDArray[np.bool_]


def margin_words(max_support: int, max_draws: int) -> int:
    """How far beyond its row one token could read: five words a candidate, and its head."""
    return 5 * (max_support + max_draws) + 32


@njit(nogil=True, cache=True)
def decode_rows(
    words: UInt32,
    bounds_R: Int64,
    tokens_R: Int64,
    entries_R: Int64,
    columns: Columns,
    tables: Tables,
    lists: Lists,
    out: Candidates,
) -> int:
    """Decodes the rows of one block in order. Returns the row that contradicts itself, or -1.

    Row r lies in words[bounds_R[r] : bounds_R[r + 1]] and has tokens tokens_R[r]..tokens_R[r + 1] - 1 and entries
    entries_R[r]..entries_R[r + 1] - 1.
    """
    num_candidates = tables.max_support + tables.max_draws
    scratch = Scratch(
        np.zeros(num_candidates + 1, np.int64),
        np.zeros(num_candidates + 1, np.int64),
        np.zeros(256, np.int64),
        np.zeros(len(tables.id_D) + 1, np.bool_),
    )
    for row in range(len(bounds_R) - 1):
        cursor, end, at = bounds_R[row], bounds_R[row + 1], entries_R[row]
        was_full = 0
        x = np.int64(words[cursor]) | np.int64(words[cursor + 1]) << 32
        cursor += STATE_WORDS
        for t in range(tokens_R[row], tokens_R[row + 1]):
            size, num_draws, floor, x, cursor = _decode_head(words, x, cursor, was_full, t, tables, out)
            was_full = 1 if size == tables.max_support else 0
            if size < 1 or num_draws > tables.max_draws or at + size + num_draws > entries_R[row + 1]:
                return row
            x, cursor = _decode_support(words, x, cursor, t, size, floor, at, columns, tables, lists, scratch, out)
            if cursor < 0:
                return row
            at += size
            if num_draws > 0:
                x, cursor = _decode_draws(
                    words, x, cursor, t, num_draws, floor, at, columns, tables, lists, scratch, out
                )
                if cursor < 0:
                    return row
                at += num_draws
            lists.visits_P[columns.list_T[t]] += 1
            if cursor > end:
                return row
        if x != LOWEST_STATE or cursor != end or at != entries_R[row + 1]:
            return row
    return -1


@njit(nogil=True, cache=True)
def _decode_head(
    words: UInt32, x: int, cursor: int, was_full: int, t: int, tables: Tables, out: Candidates
) -> tuple[int, int, int, int, int]:
    """Size, draws, floor and tail of token t."""
    lookup, base_S, bits_S = tables.lookup, tables.base_S, tables.bits_S
    missing, x, cursor = _number(words, x, cursor, lookup, base_S, bits_S, SIZE + was_full)
    size = tables.max_support - missing
    full = 1 if missing == 0 else 0
    floor, x, cursor = _symbol(words, x, cursor, lookup, FLOOR + full)
    tail, x, cursor = _symbol(words, x, cursor, lookup, TAIL + (floor >> 5))
    num_draws = 0
    if tables.max_draws > 0:
        num_draws, x, cursor = _number(words, x, cursor, lookup, base_S, bits_S, NUM_DRAWS + full)
    out.size_T[t], out.num_draws_T[t], out.tail_T[t] = size, num_draws, tail
    return size, num_draws, floor, x, cursor


@njit(nogil=True, cache=True)
def _decode_support(
    words: UInt32,
    x: int,
    cursor: int,
    t: int,
    size: int,
    floor: int,
    at: int,
    columns: Columns,
    tables: Tables,
    lists: Lists,
    scratch: Scratch,
    out: Candidates,
) -> tuple[int, int]:
    """The support of token t, written to entries `at`..; the cursor is -1 for a contradiction."""
    lookup, base_S, bits_S, id_D = tables.lookup, tables.base_S, tables.bits_S, tables.id_D
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    visits_P, log2_M, class_M = lists.visits_P, lists.log2_M, lists.class_M
    id_E, code_E = out.id_E, out.code_E
    number = columns.list_T[t]
    rank_K, code_K, place_S = scratch.rank_K, scratch.code_K, scratch.place_S
    done = 0
    outside, x, cursor = _symbol(words, x, cursor, lookup, MEMBER + (1 if columns.sampled_rank_T[t] > size else 0))
    if outside == 0:
        difference, x, cursor = _symbol(words, x, cursor, lookup, SAMPLED_CODE)
        code = (columns.sampled_code_T[t] + difference) & 255
        if columns.sampled_T[t] < 0:
            return x, -1
        rank_K[0], code_K[0], done = columns.sampled_T[t], code, 1
        place_S[code] += 1
    start = starts_P[number]
    stop = start + lengths_P[number]
    visits_log = np.int64(log2_M[visits_P[number]])
    place = start
    while done < size and place < stop:
        context = SUPPORT + listed_context(log2_M, visits_log, entries_A[place])
        symbol, x, cursor = _symbol(words, x, cursor, lookup, context)
        if symbol == END:
            break
        distance, x, cursor = _plain(words, x, cursor, base_S, bits_S, symbol)
        place += distance
        if place >= stop:
            return x, -1
        entry = entries_A[place]
        depth, x, cursor = _symbol(words, x, cursor, lookup, SUPPORT + listed_code_context(entry))
        code = (floor - depth) & 255
        rank_K[done], code_K[done] = entry & RANK_MASK, code
        place_S[code] += 1
        done += 1
        promote(entries_A, heads_PW, class_M, number, start, place, depth)
        place += 1
    rank = 0
    while done < size:
        distance, x, cursor = _number(
            words, x, cursor, lookup, base_S, bits_S, SUPPORT + unlisted_context(log2_M, rank, size - done)
        )
        rank += distance
        if rank >= len(id_D):
            return x, -1
        depth, x, cursor = _symbol(words, x, cursor, lookup, SUPPORT + UNLISTED_CODE)
        code = (floor - depth) & 255
        rank_K[done], code_K[done] = rank, code
        place_S[code] += 1
        done += 1
        append(entries_A, starts_P, lengths_P, heads_PW, number, rank, depth)
        rank += 1
    num_first = _write_sorted(size, at, id_D, rank_K, code_K, place_S, id_E, code_E)
    if num_first > 1:
        pin, x, cursor = _number(words, x, cursor, lookup, base_S, bits_S, PIN)
        if pin >= num_first:
            return x, -1
        first = id_E[at + pin]
        for i in range(at + pin, at, -1):
            id_E[i] = id_E[i - 1]
        id_E[at] = first
    return x, cursor


@njit(nogil=True, cache=True)
def _write_sorted(
    size: int, at: int, id_D: Int32, rank_K: Int64, code_K: Int64, place_S: Int64, id_E: Int32, code_E: UInt8
) -> int:
    """Writes a support by rising code, equal codes in the order of decoding; how many have the lowest."""
    lowest = code_K[0]
    for i in range(1, size):
        lowest = min(lowest, code_K[i])
    num_first = place_S[lowest]
    following, code = at, lowest
    while following < at + size:
        count = place_S[code]
        place_S[code] = following
        following += count
        code += 1
    for i in range(size):
        to = place_S[code_K[i]]
        place_S[code_K[i]] = to + 1
        id_E[to] = id_D[rank_K[i]]
        code_E[to] = code_K[i]
    place_S[lowest:code] = 0
    return num_first


@njit(nogil=True, cache=True)
def _decode_draws(  # noqa: C901 (one walk, whose state would make ten arguments)
    words: UInt32,
    x: int,
    cursor: int,
    t: int,
    num_draws: int,
    floor: int,
    at: int,
    columns: Columns,
    tables: Tables,
    lists: Lists,
    scratch: Scratch,
    out: Candidates,
) -> tuple[int, int]:
    """The draws of token t, written to entries `at`..; repeats of an id stand together."""
    lookup, base_S, bits_S, id_D = tables.lookup, tables.base_S, tables.bits_S, tables.id_D
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    visits_P, log2_M, class_M = lists.visits_P, lists.log2_M, lists.class_M
    id_E, code_E = out.id_E, out.code_E
    number, size = columns.list_T[t], out.size_T[t]
    rank_K, taken_D = scratch.rank_K, scratch.taken_D
    for i in range(size):
        taken_D[rank_K[i]] = True
    start = starts_P[number]
    stop = start + lengths_P[number]
    visits_log = np.int64(log2_M[visits_P[number]])
    place, rank, done, in_list = start, 0, 0, True
    while done < num_draws:
        while in_list and place < stop and taken_D[entries_A[place] & RANK_MASK]:
            place += 1
        in_list = in_list and place < stop
        if in_list:
            context = DRAWN + listed_context(log2_M, visits_log, entries_A[place])
            symbol, x, cursor = _symbol(words, x, cursor, lookup, context)
            if symbol == END:
                in_list = False
                continue
            distance, x, cursor = _plain(words, x, cursor, base_S, bits_S, symbol)
            while distance > 0 and place < stop:
                place += 1
                if place < stop and not taken_D[entries_A[place] & RANK_MASK]:
                    distance -= 1
            if place >= stop:
                cursor = -1
                break
            entry = entries_A[place]
            drawn = entry & RANK_MASK
            beyond, x, cursor = _symbol(words, x, cursor, lookup, DRAWN + listed_code_context(entry))
            promote(entries_A, heads_PW, class_M, number, start, place, 0)
            place += 1
        else:
            context = DRAWN + unlisted_context(log2_M, rank, num_draws - done)
            distance, x, cursor = _number(words, x, cursor, lookup, base_S, bits_S, context)
            rank += distance
            if rank >= len(id_D):
                cursor = -1
                break
            drawn = rank
            beyond, x, cursor = _symbol(words, x, cursor, lookup, DRAWN + UNLISTED_CODE)
            append(entries_A, starts_P, lengths_P, heads_PW, number, rank, 0)
            rank += 1
        again, x, cursor = _number(words, x, cursor, lookup, base_S, bits_S, DRAW_TIMES)
        if done + again >= num_draws:
            cursor = -1
            break
        for i in range(at + done, at + done + again + 1):
            id_E[i] = id_D[drawn]
            code_E[i] = (floor + beyond) & 255
        done += again + 1
    for i in range(size):
        taken_D[rank_K[i]] = False
    return x, cursor


@njit(nogil=True, cache=True)
def _number(
    words: UInt32, x: int, cursor: int, lookup: UInt32, base_S: Int64, bits_S: Int64, context: int
) -> tuple[int, int, int]:
    symbol, x, cursor = _symbol(words, x, cursor, lookup, context)
    return _plain(words, x, cursor, base_S, bits_S, symbol)


@njit(nogil=True, cache=True)
def _symbol(words: UInt32, x: int, cursor: int, lookup: UInt32, context: int) -> tuple[int, int, int]:
    """One step of a range asymmetric numeral system (Duda 2013): state of 63 bits, words of 32, see FORMAT.md."""
    entry = np.int64(lookup[(context << PRECISION) + (x & _SLOT_MASK)])
    x = (((entry >> 8) & _SLOT_MASK) + 1) * (x >> PRECISION) + (entry >> (8 + PRECISION))
    low = x < LOWEST_STATE
    word = np.int64(words[cursor])
    x = (x << 32 | word) if low else x
    cursor = cursor + 1 if low else cursor
    return entry & 255, x, cursor


@njit(nogil=True, cache=True)
def _plain(words: UInt32, x: int, cursor: int, base_S: Int64, bits_S: Int64, symbol: int) -> tuple[int, int, int]:
    """The number that a symbol and the plain bits after it stand for."""
    num_bits = bits_S[symbol]
    number = base_S[symbol] + (x & ((1 << num_bits) - 1))
    x >>= num_bits
    low = x < LOWEST_STATE
    word = np.int64(words[cursor])
    x = (x << 32 | word) if low else x
    cursor = cursor + 1 if low else cursor
    return number, x, cursor
