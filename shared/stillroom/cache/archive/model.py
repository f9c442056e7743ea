"""What the `archive` codec knows of a block of rows before its first token: how common each id is, and how likely each
symbol in each of its contexts. FORMAT.md is normative.

A symbol is a number below 256; what it means depends on its context. Numbers without a bound are split into a symbol
and as many plain bits as it stands for.

Shape legend: V' vocabulary up to the largest id of the block, D distinct ids, C contexts, S symbols.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Int32, Int64

UInt8 = npt.NDArray[np.uint8]

NUM_SYMBOLS = 256
END = 127
"""Symbol of a listed context: no further candidate is in the list."""

# Contexts, by what they code. The comment says what the offset within a group is.
SIZE = 0  # 1 after a token with the largest support
FLOOR = 2  # 1 in a token with the largest support
TAIL = 4  # floor / 32
NUM_DRAWS = 12  # 1 in a token with the largest support
MEMBER = 14  # 1 where the rank is larger than the support
SAMPLED_CODE = 16
PIN = 17
DRAW_TIMES = 18
SUPPORT = 19  # + one of those below
DRAWN = 58  # + one of those below
NUM_CONTEXTS = 97
# Offsets in SUPPORT and DRAWN.
LISTED = 0  # how rare the next candidate of the list is, 0 to 7; 8 more where it was seen more than once
UNLISTED = 16  # 3 x size class of the place, 0 to 4, + size class of what is left
LISTED_CODE = 31  # the candidate's mean depth / 8, at most 6
UNLISTED_CODE = 38

PRECISION = 11
"""Bits of precision of a context's weights."""

EXACT_BELOW = 8

_HEAD = struct.Struct("<IHHHH")


class ModelError(ValueError):
    """The bytes are no model; the message says why, without a place."""


@dataclass(frozen=True)
class Model:
    """`class_V` uint8: how often an id occurs in the block, as floor(log2(count)) + 1 (0: never); `weights_CS` int64:
    frequencies of symbols, adding up to 2^PRECISION in contexts that occur; `max_support` and `max_draws` of a token.
    """

    class_V: UInt8
    weights_CS: Int64
    max_support: int
    max_draws: int

    def to_bytes(self) -> bytes:
        """What stands in the column `archive_model` of the block's first row, without its checksum."""
        head = _HEAD.pack(len(self.class_V), self.max_support, self.max_draws, NUM_CONTEXTS, PRECISION)
        return head + self.class_V.tobytes() + self.weights_CS.astype("<u2").tobytes()


def classes_of(ids_E: Int32) -> UInt8:
    """Class of each id up to the largest of `ids_E`."""
    counts_V = np.bincount(ids_E) if len(ids_E) else np.zeros(0, np.int64)
    return np.where(counts_V > 0, 1 + floor_log2(counts_V), 0).astype(np.uint8)


def ids_by_rank(class_V: UInt8) -> Int32:
    """The D ids that occur, commonest class first and by id within a class: int32."""
    order_V = np.argsort(-class_V.astype(np.int16), kind="stable")
    return order_V[: np.count_nonzero(class_V)].astype(np.int32)


def weights_of(counts_CS: Int64) -> Int64:
    """Counts of symbols by context scaled to add up to 2^PRECISION, at least 1 for what occurs."""
    return np.stack([_weights(counts_S) for counts_S in counts_CS])


def parse_model(data: bytes, vocab_size: int, max_support: int, max_draws: int) -> Model:
    """The inverse of `to_bytes`. Raises ModelError where the bytes contradict themselves or the shard's header."""
    if len(data) < _HEAD.size:
        raise ModelError("is cut off")
    num_classes, support, draws, num_contexts, precision = _HEAD.unpack_from(data)
    if (num_contexts, precision) != (NUM_CONTEXTS, PRECISION):
        raise ModelError(f"has {num_contexts} contexts of {precision} bits, not {NUM_CONTEXTS} of {PRECISION}")
    if len(data) != _HEAD.size + num_classes + 2 * NUM_CONTEXTS * NUM_SYMBOLS:
        raise ModelError("has not the length that it states")
    if num_classes > vocab_size:
        raise ModelError(f"counts ids outside the vocabulary of {vocab_size}")
    if support > max_support or draws > max_draws:
        raise ModelError(
            f"has {support} entries and {draws} draws a token, past the {max_support} and {max_draws} stated"
        )
    class_V = np.frombuffer(data, np.uint8, num_classes, _HEAD.size)
    weights_CS = np.frombuffer(data, "<u2", offset=_HEAD.size + num_classes).reshape(NUM_CONTEXTS, NUM_SYMBOLS)
    if not np.isin(weights_CS.sum(axis=1, dtype=np.int64), (0, 1 << PRECISION)).all():
        raise ModelError("has weights that do not add up")
    return Model(class_V, weights_CS.astype(np.int64), support, draws)


def lookup_table(weights_CS: Int64) -> npt.NDArray[np.uint32]:
    """For each of the 2^PRECISION slots of each context, flat: symbol, weight - 1 (from bit 8), slot - start of the
    symbol (from bit 8 + PRECISION). Contexts that do not occur decode to symbol 0 of full weight.
    """
    num_slots = 1 << PRECISION
    table_CL = np.zeros((NUM_CONTEXTS, num_slots), np.uint32)
    table_CL[:] = (num_slots - 1) << 8 | np.arange(num_slots) << (8 + PRECISION)
    for context, weights_S in enumerate(weights_CS):
        if weights_S.any():
            symbols_L = np.repeat(np.arange(NUM_SYMBOLS), weights_S)
            within_L = np.arange(num_slots) - (np.cumsum(weights_S) - weights_S)[symbols_L]
            table_CL[context] = symbols_L | (weights_S[symbols_L] - 1) << 8 | within_L << (8 + PRECISION)
    return table_CL.reshape(-1)


def number_tables() -> tuple[Int64, Int64]:
    """Of symbols that split numbers: the smallest number of each, and how many plain bits follow, [S] int64.

    Numbers below EXACT_BELOW are their own symbol; each octave above has four. Symbols past those of 2^20 stand for 0.
    """
    base_S, bits_S = np.zeros(NUM_SYMBOLS, np.int64), np.zeros(NUM_SYMBOLS, np.int64)
    base_S[:EXACT_BELOW] = np.arange(EXACT_BELOW)
    for octave in range(3, 21):
        symbol = EXACT_BELOW + 4 * (octave - 3)
        base_S[symbol : symbol + 4] = np.arange(4, 8) << (octave - 2)
        bits_S[symbol : symbol + 4] = octave - 2
    return base_S, bits_S


def floor_log2(x: npt.NDArray[Any]) -> Int64:
    """floor(log2(x)) of integers below 2^53, 0 for 0."""
    return np.asarray(np.frexp(np.maximum(x, 1).astype(np.float64))[1] - 1, np.int64)


def _weights(counts_S: Int64) -> Int64:
    """The largest remainders get what rounding down leaves; what raising to 1 took too much the commonest give back."""
    total = int(counts_S.sum())
    if total == 0:
        return np.zeros(NUM_SYMBOLS, np.int64)
    exact_S = counts_S * (1 << PRECISION) / total
    weights_S = np.where(counts_S > 0, np.maximum(np.floor(exact_S), 1), 0).astype(np.int64)
    left = (1 << PRECISION) - int(weights_S.sum())
    if left > 0:
        weights_S[np.argsort(weights_S - exact_S, kind="stable")[:left]] += 1
    for _ in range(-left):
        weights_S[int(np.argmax(np.where(weights_S > 1, weights_S - exact_S, -np.inf)))] -= 1
    return weights_S
