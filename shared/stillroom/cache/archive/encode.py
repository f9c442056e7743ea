"""Candidates to streams of the `archive` codec: compiled by numba on first use.

Two passes: `walk` goes through a block as the decoder will and writes down each symbol with its context; when the model
has been fitted to them, `pack_rows` makes the words, from the last symbol of a row to its first.

Shape legend: T tokens, E entries (supports and draws) of all tokens, Q symbols, R rows, C contexts, S symbols of the
alphabet, D ids of the model, K candidates of one token.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stillroom.cache.archive.decode import LOWEST_STATE, Candidates, Columns, UInt32
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
    EXACT_BELOW,
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

HEAD_SYMBOLS = 9
"""Symbols of a token besides three for each candidate and one for the end of a list."""


class Symbols(NamedTuple):
    """What `walk` found to code: context, symbol, and the plain bits behind it."""

    context_Q: UInt8
    symbol_Q: UInt8
    num_bits_Q: UInt8
    bits_Q: Int32


class Pending(NamedTuple):
    """The token being walked: by rank of id its code (-1: not there, or coded already) and how often it was drawn;
    which ranks its support holds; ranks in the order of coding and their codes; those that are in no list.
    """

    code_D: Int32
    times_D: Int32
    taken_D: npt.NDArray[np.bool_]
    rank_K: Int64
    code_K: Int64
    rest_K: Int64


def room_for(num_tokens: int, num_entries: int) -> Symbols:
    """Arrays that hold the symbols of any block of this size."""
    room = num_tokens * (HEAD_SYMBOLS + 1) + 3 * num_entries
    contexts_Q, symbols_Q, num_bits_Q = (np.zeros(room, np.uint8) for _ in range(3))
    return Symbols(contexts_Q, symbols_Q, num_bits_Q, np.zeros(room, np.int32))


@njit(nogil=True, cache=True)
def walk(
    candidates: Candidates,
    rank_E: Int64,
    tokens_R: Int64,
    max_support: int,
    max_draws: int,
    num_ids: int,
    columns: Columns,
    lists: Lists,
    out: Symbols,
    ends_R: Int64,
) -> int:
    """Writes the symbols of all tokens, those of row r up to ends_R[r]. `rank_E` are ranks of the entries' ids in a
    model of `num_ids`.

    Returns the first token whose support holds an id twice, or -1.
    """
    num_candidates = max_support + max_draws
    pending = Pending(
        np.full(num_ids, -1, np.int32),
        np.zeros(num_ids, np.int32),
        np.zeros(num_ids, np.bool_),
        np.zeros(num_candidates, np.int64),
        np.zeros(num_candidates, np.int64),
        np.zeros(num_candidates, np.int64),
    )
    start, q = 0, 0
    for row in range(len(tokens_R) - 1):
        was_full = 0
        for t in range(tokens_R[row], tokens_R[row + 1]):
            stop = start + candidates.size_T[t]
            last = stop + candidates.num_draws_T[t]
            rank_K, code_K = rank_E[start:stop], candidates.code_E[start:stop]
            floor = _note_support(rank_K, code_K, pending)
            if floor < 0:
                return t
            q = _walk_head(candidates, t, max_support, max_draws, floor, was_full, out, q)
            was_full = 1 if len(rank_K) == max_support else 0
            q = _walk_support(rank_K, np.int64(code_K[0]), floor, t, columns, lists, pending, out, q)
            if last > stop:
                codes_M = candidates.code_E[stop:last]
                q = _walk_draws(rank_K, rank_E[stop:last], codes_M, floor, t, columns, lists, pending, out, q)
            lists.visits_P[columns.list_T[t]] += 1
            start = last
        ends_R[row] = q
    return -1


@njit(nogil=True, cache=True)
def _note_support(rank_K: Int64, code_K: UInt8, pending: Pending) -> int:
    """Makes a support pending. Returns its highest code, or -1 if it holds an id twice."""
    floor = 0
    for i in range(len(rank_K)):
        if pending.code_D[rank_K[i]] >= 0:
            return -1
        pending.code_D[rank_K[i]] = code_K[i]
        floor = max(floor, np.int64(code_K[i]))
    return floor


@njit(nogil=True, cache=True)
def _walk_head(
    candidates: Candidates, t: int, max_support: int, max_draws: int, floor: int, was_full: int, out: Symbols, q: int
) -> int:
    missing = max_support - np.int64(candidates.size_T[t])
    full = 1 if missing == 0 else 0
    q = _put_number(out, q, SIZE + was_full, missing)
    q = _put(out, q, FLOOR + full, floor, 0, 0)
    q = _put(out, q, TAIL + (floor >> 5), np.int64(candidates.tail_T[t]), 0, 0)
    if max_draws > 0:
        q = _put_number(out, q, NUM_DRAWS + full, np.int64(candidates.num_draws_T[t]))
    return q


@njit(nogil=True, cache=True)
def _walk_support(
    rank_K: Int64,
    first_code: int,
    floor: int,
    t: int,
    columns: Columns,
    lists: Lists,
    pending: Pending,
    out: Symbols,
    q: int,
) -> int:
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    visits_P, log2_M, class_M = lists.visits_P, lists.log2_M, lists.class_M
    code_D = pending.code_D
    number, sampled, size = columns.list_T[t], columns.sampled_T[t], len(rank_K)
    context = MEMBER + (1 if columns.sampled_rank_T[t] > size else 0)
    done = 0
    if sampled >= 0 and pending.code_D[sampled] >= 0:
        q = _put(out, q, context, 0, 0, 0)
        difference = (np.int64(pending.code_D[sampled]) - columns.sampled_code_T[t]) & 255
        q = _put(out, q, SAMPLED_CODE, difference, 0, 0)
        done = _finish(pending, sampled, done)
    else:
        q = _put(out, q, context, 1, 0, 0)
    start = starts_P[number]
    place, stop = start, start + lengths_P[number]
    visits_log = np.int64(log2_M[visits_P[number]])
    while done < size and place < stop:
        context = SUPPORT + listed_context(log2_M, visits_log, entries_A[place])
        hit = place
        while hit < stop and code_D[entries_A[hit] & RANK_MASK] < 0:
            hit += 1
        if hit == stop:
            q = _put(out, q, context, END, 0, 0)
            break
        q = _put_number(out, q, context, hit - place)
        entry = entries_A[hit]
        depth = floor - pending.code_D[entry & RANK_MASK]
        q = _put(out, q, SUPPORT + listed_code_context(entry), depth, 0, 0)
        done = _finish(pending, entry & RANK_MASK, done)
        promote(entries_A, heads_PW, class_M, number, start, hit, depth)
        place = hit + 1
    q = _walk_unlisted_support(rank_K, floor, number, done, lists, pending, out, q)
    return _walk_pin(rank_K[0], first_code, size, pending, out, q)


@njit(nogil=True, cache=True)
def _walk_unlisted_support(
    rank_K: Int64, floor: int, number: int, done: int, lists: Lists, pending: Pending, out: Symbols, q: int
) -> int:
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    log2_M = lists.log2_M
    num_rest = 0
    for rank in rank_K:
        if pending.code_D[rank] >= 0:
            pending.rest_K[num_rest] = rank
            num_rest += 1
    rest_K = pending.rest_K[:num_rest]
    rest_K.sort()
    following = 0
    for i in range(num_rest):
        rank = rest_K[i]
        context = SUPPORT + unlisted_context(log2_M, following, num_rest - i)
        q = _put_number(out, q, context, rank - following)
        depth = floor - pending.code_D[rank]
        q = _put(out, q, SUPPORT + UNLISTED_CODE, depth, 0, 0)
        done = _finish(pending, rank, done)
        append(entries_A, starts_P, lengths_P, heads_PW, number, rank, depth)
        following = rank + 1
    return q


@njit(nogil=True, cache=True)
def _walk_pin(first_rank: int, lowest: int, size: int, pending: Pending, out: Symbols, q: int) -> int:
    """Which of the entries with the lowest code, in the order of coding, is the most probable one."""
    num_first, pin = 0, 0
    for i in range(size):
        if pending.code_K[i] == lowest:
            if pending.rank_K[i] == first_rank:
                pin = num_first
            num_first += 1
    return _put_number(out, q, PIN, pin) if num_first > 1 else q


@njit(nogil=True, cache=True)
def _walk_draws(
    rank_K: Int64,
    rank_M: Int64,
    code_M: UInt8,
    floor: int,
    t: int,
    columns: Columns,
    lists: Lists,
    pending: Pending,
    out: Symbols,
    q: int,
) -> int:
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    visits_P, log2_M, class_M = lists.visits_P, lists.log2_M, lists.class_M
    number, num_draws, done = columns.list_T[t], len(rank_M), 0
    pending.taken_D[rank_K] = True
    for i in range(num_draws):
        pending.code_D[rank_M[i]] = code_M[i]
        pending.times_D[rank_M[i]] += 1
    start = starts_P[number]
    place, stop = start, start + lengths_P[number]
    visits_log = np.int64(log2_M[visits_P[number]])
    while done < num_draws:
        while place < stop and pending.taken_D[entries_A[place] & RANK_MASK]:
            place += 1
        if place == stop:
            break
        context = DRAWN + listed_context(log2_M, visits_log, entries_A[place])
        hit, distance = place, 0
        while hit < stop:
            rank = entries_A[hit] & RANK_MASK
            if not pending.taken_D[rank]:
                if pending.times_D[rank] > 0:
                    break
                distance += 1
            hit += 1
        if hit == stop:
            q = _put(out, q, context, END, 0, 0)
            break
        q = _put_number(out, q, context, distance)
        entry = entries_A[hit]
        q = _put(out, q, DRAWN + listed_code_context(entry), (pending.code_D[rank] - floor) & 255, 0, 0)
        q, done = _put_times(rank, done, pending, out, q)
        promote(entries_A, heads_PW, class_M, number, start, hit, 0)
        place = hit + 1
    q = _walk_unlisted_draws(rank_M, floor, number, done, lists, pending, out, q)
    pending.taken_D[rank_K] = False
    pending.code_D[rank_M] = -1
    return q


@njit(nogil=True, cache=True)
def _walk_unlisted_draws(
    rank_M: Int64, floor: int, number: int, done: int, lists: Lists, pending: Pending, out: Symbols, q: int
) -> int:
    entries_A, starts_P, lengths_P, heads_PW = lists.entries_A, lists.starts_P, lists.lengths_P, lists.heads_PW
    log2_M = lists.log2_M
    num_rest = 0
    for rank in rank_M:
        if pending.times_D[rank] > 0:
            pending.rest_K[num_rest] = rank
            num_rest += 1
    rest_K = pending.rest_K[:num_rest]
    rest_K.sort()
    following = 0
    for rank in rest_K:
        # The others of a repeated draw were coded with it.
        if pending.times_D[rank] > 0:
            context = DRAWN + unlisted_context(log2_M, following, len(rank_M) - done)
            q = _put_number(out, q, context, rank - following)
            q = _put(out, q, DRAWN + UNLISTED_CODE, (pending.code_D[rank] - floor) & 255, 0, 0)
            q, done = _put_times(rank, done, pending, out, q)
            append(entries_A, starts_P, lengths_P, heads_PW, number, rank, 0)
            following = rank + 1
    return q


@njit(nogil=True, cache=True)
def _put_times(rank: int, done: int, pending: Pending, out: Symbols, q: int) -> tuple[int, int]:
    times = np.int64(pending.times_D[rank])
    pending.times_D[rank] = 0
    return _put_number(out, q, DRAW_TIMES, times - 1), done + times


@njit(nogil=True, cache=True)
def _finish(pending: Pending, rank: int, done: int) -> int:
    pending.rank_K[done], pending.code_K[done] = rank, pending.code_D[rank]
    pending.code_D[rank] = -1
    return done + 1


@njit(nogil=True, cache=True)
def _put(out: Symbols, q: int, context: int, symbol: int, num_bits: int, bits: int) -> int:
    out.context_Q[q], out.symbol_Q[q], out.num_bits_Q[q], out.bits_Q[q] = context, symbol, num_bits, bits
    return q + 1


@njit(nogil=True, cache=True)
def _put_number(out: Symbols, q: int, context: int, number: int) -> int:
    """Numbers below 8 are their own symbol; each octave above has four, with the lower bits plain."""
    if number < EXACT_BELOW:
        return _put(out, q, context, number, 0, 0)
    num_bits = 1
    while number >> num_bits >= EXACT_BELOW:
        num_bits += 1
    symbol = EXACT_BELOW + 4 * (num_bits - 1) + (number >> num_bits) - 4
    return _put(out, q, context, symbol, num_bits, number & ((1 << num_bits) - 1))


@njit(nogil=True, cache=True)
def pack_rows(symbols: Symbols, ends_R: Int64, weights_CS: Int64, words: UInt32, bounds_R: Int64) -> None:
    """Writes the stream of row r to words[bounds_R[r] : bounds_R[r + 1]], filling in the bounds after the first.

    `words` has room for all symbols with a word each for weight and plain bits, and two words a row.
    """
    starts_CS = np.zeros_like(weights_CS)
    for context in range(len(weights_CS)):
        starts_CS[context, 1:] = np.cumsum(weights_CS[context])[:-1]
    first = 0
    for row in range(len(ends_R)):
        x = LOWEST_STATE
        at = bounds_R[row]
        for q in range(ends_R[row] - 1, first - 1, -1):
            num_bits = np.int64(symbols.num_bits_Q[q])
            if x >> (63 - num_bits) > 0:
                words[at] = x & 0xFFFFFFFF
                at, x = at + 1, x >> 32
            x = x << num_bits | np.int64(symbols.bits_Q[q])
            weight = weights_CS[symbols.context_Q[q], symbols.symbol_Q[q]]
            if x >> (63 - PRECISION) >= weight:
                words[at] = x & 0xFFFFFFFF
                at, x = at + 1, x >> 32
            x = ((x // weight) << PRECISION) + x % weight + starts_CS[symbols.context_Q[q], symbols.symbol_Q[q]]
        words[at], words[at + 1] = x >> 32, x & 0xFFFFFFFF
        at += 2
        # Written from last to first, read from first to last.
        words[bounds_R[row] : at] = words[bounds_R[row] : at][::-1].copy()
        bounds_R[row + 1] = at
        first = ends_R[row]
