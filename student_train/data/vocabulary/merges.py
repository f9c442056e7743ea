"""A byte-level BPE tokenizer as arrays: what it makes of many short strings at once.

In: strings of at most MAX_BYTES bytes, as packed words. Out: ids, or UNKNOWN where only the tokenizer itself can tell.
Calls of the tokenizer for strings that occur once are most of what a projection would cost; here a string takes a sixth
of that or less.

Only strings whose pre-tokens are certain are answered: printable ASCII in which nothing is spelled out that a pattern
of the pre-tokeniser could name. Such patterns look at classes of characters alone, so that "abc, 12" splits where
"aaa, 00" does, which the tokenizer's own pre-tokeniser is asked once.

N strings, W words of a string, L bytes of a string
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.models import byte_alphabet
from stillroom.schema.records import Int32, Int64

Words = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]
NUM_WORDS = 2
MAX_BYTES = 8 * NUM_WORDS
UNKNOWN = -2
NEVER = np.iinfo(np.int32).max
"""The rank of a pair that is not merged."""
BATCH = 1 << 12
"""Strings encoded together: their symbols stay in the processor's cache."""
MAX_SHAPES = 1 << 18
KEEP_ASCII = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that leave ASCII alone."""
SAFE_PARTS = re.compile(
    r"'\(\?i:\[sdmt\]\|ll\|ve\|re\)|'(?:[sdmt]|ll|ve|re)|\\[pP]\{\w+\}|\\[sSrnt]|\{\d+(,\d*)?\}|[aA]-[zZ]|0-9|\(\?i:"
)
"""Parts of a pattern that treat letters of one case alike and digits alike, in strings without an apostrophe."""


class Table:
    """Integers by integer key, for whole arrays: open addressing."""

    def __init__(self, num_keys: int) -> None:
        """Room for `num_keys`; more make it grow."""
        self._clear(max(num_keys, 256))

    def __len__(self) -> int:
        return self._num

    def _clear(self, num_keys: int) -> None:
        # At most a third of the places is taken: probes stay short, and a free place ends every search.
        bits = (3 * num_keys).bit_length()
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._keys: Int64 = np.full(1 << bits, -1, np.int64)
        self._values: Int64 = np.zeros(1 << bits, np.int64)
        self._num = 0

    def get(self, keys_N: Int64, default: int) -> Int64:
        """The values, `default` for keys that are not there. Keys are 0 or more."""
        at_N = self._home(keys_N)
        there_N = self._keys[at_N]
        found_N = np.where(there_N == keys_N, self._values[at_N], default)
        left = np.flatnonzero((there_N != keys_N) & (there_N >= 0))
        while len(left):
            at_N[left] = (at_N[left] + 1) & self._mask
            there = self._keys[at_N[left]]
            is_found = there == keys_N[left]
            found_N[left[is_found]] = self._values[at_N[left[is_found]]]
            left = left[~is_found & (there >= 0)]
        return found_N

    def add(self, keys_N: Int64, values_N: Int64) -> None:
        """Keys that are all different and not there."""
        if 3 * (self._num + len(keys_N)) > len(self._keys):
            is_used = self._keys >= 0
            keys, values = self._keys[is_used], self._values[is_used]
            self._clear(self._num + len(keys_N))
            self.add(keys, values)
        at_N, left = self._home(keys_N), np.arange(len(keys_N))
        while len(left):
            at = at_N[left]
            is_free = self._keys[at] < 0
            # Of several keys for one place the last that is written stays.
            self._keys[at[is_free]] = keys_N[left[is_free]]
            is_placed = self._keys[at] == keys_N[left]
            self._values[at[is_placed]] = values_N[left[is_placed]]
            left = left[~is_placed]
            at_N[left] = (at_N[left] + 1) & self._mask
        self._num += len(keys_N)

    def keep_below(self, value: int) -> None:
        """Drops the keys with values from `value` on."""
        is_kept = (self._keys >= 0) & (self._values < value)
        keys, values = self._keys[is_kept], self._values[is_kept]
        self._clear(max(len(keys), 256))
        self.add(keys, values)

    def _home(self, keys_N: Int64) -> Int64:
        mixed_N = keys_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed_N >> self._shift).astype(np.int64)


def pack(texts: Sequence[bytes]) -> Words:
    """uint64 [N, W]: the first MAX_BYTES bytes of each, the first of them highest, zeros after the end."""
    padded = b"".join([data[:MAX_BYTES].ljust(MAX_BYTES, b"\0") for data in texts])
    return np.frombuffer(padded, ">u8").reshape(-1, NUM_WORDS).astype(np.uint64)


def append(words_NW: Words, lengths_N: Int64, more_NW: Words) -> Words:
    """The packed strings with others behind them; what goes beyond MAX_BYTES is lost."""
    # One string of 128 bits is moved by whole words first, then by the bits that are left.
    num_bits_N = (8 * lengths_N).astype(np.uint64)
    high_N, low_N = more_NW[:, 0], more_NW[:, 1]
    is_far_N = num_bits_N >= 64
    bits_N = num_bits_N & np.uint64(63)
    carried_N = np.where(bits_N > 0, high_N << ((np.uint64(64) - bits_N) & np.uint64(63)), np.uint64(0))
    near_low_N = np.where(bits_N > 0, low_N >> bits_N, low_N) | carried_N
    found_NW = words_NW.copy()
    found_NW[:, 0] |= np.where(is_far_N, np.uint64(0), high_N >> bits_N)
    far_low_N = np.where(num_bits_N < 8 * MAX_BYTES, high_N >> bits_N, np.uint64(0))
    found_NW[:, 1] |= np.where(is_far_N, far_low_N, near_low_N)
    return found_NW


def mixed(words_NW: Words, lengths_N: Int64) -> Int64:
    """int64, 0 or more: a hash of packed strings."""
    mixed_N = words_NW[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ words_NW[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(29)) ^ lengths_N.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    found_N: Int64 = (mixed_N >> np.uint64(1)).astype(np.int64)
    return found_N


class _Shapes:
    """Where pre-tokens end, by shape of a string."""

    def __init__(self, pre_tokenizer: Any, class_B: npt.NDArray[np.uint8]) -> None:
        """`class_B`, by byte: the character that stands for its class, 0 where nothing is known of strings with it."""
        self._pre_tokenizer, self._class_B = pre_tokenizer, class_B
        self._forget()

    def _forget(self) -> None:
        self._numbers = Table(1024)
        self._shapes: Words = np.zeros((0, NUM_WORDS), np.uint64)
        self._ends: Int64 = np.zeros(0, np.int64)

    def ends(self, words_NW: Words, lengths_N: Int64) -> tuple[Int64, Bool]:
        """The mask of each packed string's ends of pre-tokens (bit i: one after i bytes), and whether it is certain."""
        shape_NL = self._class_B[_bytes_of(words_NW)]
        is_certain_N = (np.count_nonzero(shape_NL, axis=1) == lengths_N) & (lengths_N > 0)
        shape_NW = np.ascontiguousarray(shape_NL).view(">u8").astype(np.uint64)
        keys_N = mixed(shape_NW, lengths_N)
        number_N = self._numbers.get(keys_N, -1)
        new = np.flatnonzero(is_certain_N & (number_N < 0))
        if len(new):
            if len(self._ends) > MAX_SHAPES:
                self._forget()
                new = np.flatnonzero(is_certain_N)
            keys_U, first_U = np.unique(keys_N[new], return_index=True)
            self._numbers.add(keys_U, np.arange(len(self._ends), len(self._ends) + len(keys_U)))
            asked = new[first_U]
            names = [shape_NL[row, :length].tobytes() for row, length in zip(asked, lengths_N[asked], strict=True)]
            self._shapes = np.concatenate([self._shapes, shape_NW[asked]])
            self._ends = np.concatenate([self._ends, np.array([self._ends_of(name.decode()) for name in names])])
            number_N = self._numbers.get(keys_N, -1)
        if not len(self._ends):
            return np.zeros(len(lengths_N), np.int64), is_certain_N
        # Of two shapes with one hash, the first that came is known.
        is_certain_N &= (self._shapes[number_N] == shape_NW).all(axis=1)
        return self._ends[number_N], is_certain_N

    def _ends_of(self, shape: str) -> int:
        return sum(1 << end for _, (_, end) in self._pre_tokenizer.pre_tokenize_str(shape))


class Merges:
    """The merges of one tokenizer."""

    def __init__(self, backend: Mapping[str, Any], pre_tokenizer: Any, token_bytes: Sequence[bytes]) -> None:
        """`backend`: tokenizer.json; `token_bytes` by id. See merges_of()."""
        vocab, model, alphabet = backend["model"]["vocab"], backend["model"], byte_alphabet()
        self._num_ids = max(vocab.values()) + 1
        two = [one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"]]
        left = np.array([vocab[one] for one, _ in two], np.int64)
        right = np.array([vocab[other] for _, other in two], np.int64)
        made = np.array([vocab[one + other] for one, other in two], np.int64)
        # A pair that is named twice counts where it stands last.
        keys, last = np.unique((left * self._num_ids + right)[::-1], return_index=True)
        last = len(made) - 1 - last
        self._pairs = Table(len(keys))
        self._pairs.add(keys, last)
        self._made = made.astype(np.int32)
        self._token_lengths_V = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        self._words_VW = pack(token_bytes)
        # Not every vocabulary has every byte.
        self._id_of_byte = np.array([vocab.get(char, 0) for char in alphabet], np.int32)
        # The pairs of single bytes in one table: every string begins with these.
        size = 256
        ranks = self._rank(np.repeat(self._id_of_byte, size), np.tile(self._id_of_byte, size))
        self._rank_of_bytes = ranks.astype(np.int32)
        class_B = np.zeros(256, np.uint8)
        for byte in range(0x80):
            char = chr(byte)
            if alphabet[byte] in vocab and (char.isprintable() or char in "\n\t\r"):
                class_B[byte] = ord(
                    "A" if char.isupper() else "a" if char.islower() else "0" if char.isdigit() else char
                )
        # Patterns name what follows an apostrophe; what a text spells of added tokens is one token, unless special.
        added = [token["content"] for token in backend["added_tokens"] if not token["special"]]
        class_B[[ord("'"), *(one.encode()[0] for one in added)]] = 0
        self._shapes = _Shapes(pre_tokenizer, class_B)
        self._is_whole_V = np.full(len(token_bytes), UNKNOWN, np.int8)

    def first_tokens(self, words_NW: Words, lengths_N: Int64) -> tuple[Int64, Int64]:
        """(id, bytes) of the first token of each string; UNKNOWN ids, those of strings above MAX_BYTES among them."""
        ids_N, num_bytes_N = np.full(len(lengths_N), UNKNOWN, np.int64), np.zeros(len(lengths_N), np.int64)
        short = np.flatnonzero(lengths_N <= MAX_BYTES)
        ends, is_certain = self._shapes.ends(words_NW[short], lengths_N[short])
        short, ends = short[is_certain], ends[is_certain]
        # The lowest bit is where the first pre-token ends.
        length = np.round(np.log2(np.maximum(ends & -ends, 1))).astype(np.int64)
        ids_N[short] = self._encode(words_NW[short], length)[:, 0]
        num_bytes_N[short] = self._token_lengths_V[ids_N[short]]
        return ids_N, num_bytes_N

    def is_written(self, before_P: Int64, after_P: Int64) -> Int64:
        """For pairs of ids, whether the tokenizer makes just these of the bytes of both: 1, 0 or UNKNOWN."""
        found_P = np.full(len(before_P), UNKNOWN, np.int64)
        lengths_P = self._token_lengths_V[before_P] + self._token_lengths_V[after_P]
        short = np.flatnonzero(lengths_P <= MAX_BYTES)
        before, after, lengths = before_P[short], after_P[short], lengths_P[short]
        lengths_before = self._token_lengths_V[before]
        words = append(self._words_VW[before], lengths_before, self._words_VW[after])
        ends, is_certain = self._shapes.ends(words, lengths)
        short, before, after, words = short[is_certain], before[is_certain], after[is_certain], words[is_certain]
        lengths, lengths_before, ends = lengths[is_certain], lengths_before[is_certain], ends[is_certain]
        # Tokens end where pre-tokens do: at another place inside, the two are not written.
        middle, end = 1 << lengths_before, 1 << lengths
        found_P[short] = 0
        # What a merge joins does not stay apart.
        one = np.flatnonzero((ends == end) & (self._rank(before, after) == NEVER))
        ids = self._encode(words[one], lengths[one])
        found_P[short[one]] = (ids[:, 0] == before[one]) & (ids[:, 1] == after[one]) & (ids[:, 2] < 0)
        two = np.flatnonzero(ends == (middle | end))
        found_P[short[two]] = self._is_whole(before[two]) & self._is_whole(after[two])
        return found_P

    def _is_whole(self, ids_N: Int64) -> Bool:
        """Whether the merges make one token of the bytes of each, which is a pre-token."""
        new = np.unique(ids_N[self._is_whole_V[ids_N] == UNKNOWN])
        made = self._encode(self._words_VW[new], self._token_lengths_V[new])
        self._is_whole_V[new] = (made[:, 0] == new) & (made[:, 1] < 0)
        return self._is_whole_V[ids_N] > 0

    def _encode(self, words_NW: Words, lengths_N: Int64) -> Int64:
        """int64 [N, 3]: the first three ids of pre-tokens, the first bytes of each string; -1 after the last."""
        found_N3 = np.full((len(words_NW), 3), -1, np.int64)
        # By length, so that each batch is as narrow as its strings.
        # As int8, which numpy's stable sort orders by radix.
        order = np.argsort(lengths_N.astype(np.int8), kind="stable")
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            width = max(int(lengths_N[part[-1]]), 3)
            found_N3[part] = self._merged(words_NW[part], lengths_N[part], width)[:, :3]
        return found_N3

    def _merged(self, words_NW: Words, lengths_N: Int64, width: int) -> Int32:
        bytes_NL = _bytes_of(words_NW)[:, :width].astype(np.int32)
        is_there_NL = np.arange(width) < lengths_N[:, None]
        ids_NL = np.where(is_there_NL, self._id_of_byte[bytes_NL], -1)
        # The pair of a symbol and the next; the last two columns have none, so that there always is a next.
        ranks_NL = np.full((len(words_NW), width + 1), NEVER, np.int32)
        ranks_NL[:, : width - 1] = self._rank_of_bytes[256 * bytes_NL[:, :-1] + bytes_NL[:, 1:]]
        ranks_NL[:, : width - 1][~is_there_NL[:, 1:]] = NEVER
        found_NL = ids_NL.copy()
        rows, places_L = np.arange(len(words_NW)), np.arange(width)
        while len(rows):
            # The lowest rank first, from the left.
            at = ranks_NL.argmin(axis=1)
            rank = ranks_NL[np.arange(len(rows)), at]
            is_left = rank != NEVER
            if not is_left.all():
                found_NL[rows[~is_left]] = ids_NL[~is_left]
                rows, ids_NL, ranks_NL, at, rank = (
                    rows[is_left],
                    ids_NL[is_left],
                    ranks_NL[is_left],
                    at[is_left],
                    rank[is_left],
                )
            each = np.arange(len(rows))
            is_after_NL = places_L > at[:, None]
            # Copies, because source and target overlap.
            np.copyto(ranks_NL[:, :-1], ranks_NL[:, 1:].copy(), where=is_after_NL)
            np.copyto(ids_NL[:, :-1], ids_NL[:, 1:].copy(), where=is_after_NL[:, :-1])
            ids_NL[:, -1] = -1
            ids_NL[each, at] = here = self._made[rank]
            ranks_NL[each, at] = self._rank(here, ids_NL[each, np.minimum(at + 1, width - 1)])
            inside = np.flatnonzero(at > 0)
            ranks_NL[inside, at[inside] - 1] = self._rank(ids_NL[inside, at[inside] - 1], here[inside])
        return found_NL

    def _rank(self, left_N: Int32 | Int64, right_N: Int32 | Int64) -> Int64:
        """Ranks of pairs, NEVER of those that are not merged or have no right side (-1)."""
        keys_N = left_N.astype(np.int64) * self._num_ids + np.maximum(right_N, 0)
        return np.where(right_N < 0, NEVER, self._pairs.get(keys_N, NEVER))


def merges_of(tokenizer: Any, token_bytes: Sequence[bytes]) -> Merges | None:
    """The merges of a transformers tokenizer with `token_bytes` by id; None for one that is not known to act so."""
    if not tokenizer.is_fast:
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    is_plain = (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("ignore_merges")
        and all(one["type"] in KEEP_ASCII for one in _parts(backend["normalizer"], "normalizers"))
    )
    splits = _parts(backend["pre_tokenizer"], "pretokenizers")
    if not is_plain or not all(map(_looks_at_classes, splits)) or not any(one["type"] == "ByteLevel" for one in splits):
        return None
    return Merges(backend, tokenizer.backend_tokenizer.pre_tokenizer, token_bytes)


def _bytes_of(words_NW: Words) -> npt.NDArray[np.uint8]:
    """uint8 [N, MAX_BYTES]: packed strings byte by byte."""
    return words_NW.astype(">u8").view(np.uint8).reshape(len(words_NW), MAX_BYTES)


def _parts(one: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The members of nested sequences."""
    if one is None:
        return []
    return [part for inner in one[name] for part in _parts(inner, name)] if one["type"] == "Sequence" else [one]


def _looks_at_classes(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether it splits strings of one shape alike."""
    kind = pre_tokenizer["type"]
    if kind == "Split":
        ((_, pattern),) = pre_tokenizer["pattern"].items()
        return re.search(r"[A-Za-z0-9]", SAFE_PARTS.sub("", pattern)) is None
    return kind in ("Digits", "Punctuation") or (kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"])
