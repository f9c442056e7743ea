"""Which student token begins where the teacher's next tokens spell a given byte string, counted from aligned chains.

N entries of a batch, P pairs of strings and student tokens
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Int64
from student_train.data.vocabulary.pieces import lengths_of

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
FirstTokens = Callable[[list[bytes]], list[tuple[int, int]]]
"""For each byte string, the first token that the student's tokenizer makes of it and that token's bytes, or (-1, 0)."""

MIN_PROB = 1e-4
MIN_MERGED = 1 << 16
MAX_PATH = 8
"""Teacher tokens that are followed from the start of one student token."""


class Strings:
    """Byte strings that successive teacher tokens spell, numbered; number 0 is the empty one.

    A teacher token without bytes (the end of the chain) makes a string of its own: what came before and then the end.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], special_tokens: Mapping[int, int], first_tokens: FirstTokens, joins: Bool
    ) -> None:
        """`token_bytes` by teacher id; `special_tokens`: the student's token for a teacher token that has no bytes;
        `joins`: see joins_of().
        """
        self._token_bytes = token_bytes
        self._heads_V2 = _heads_of(token_bytes)
        self._token_lengths_V = lengths_of(list(token_bytes))
        self._special_tokens = special_tokens
        self._first_tokens = first_tokens
        self._joins = joins.tolist()
        self._bytes: list[bytes] = []
        self._number_of: dict[bytes | tuple[int, int], int] = {}
        self._by_key: dict[int, int] = {}
        self._by_rest: dict[int, int] = {}
        self._of_token_V: Int64 = np.full(len(token_bytes), -1, np.int64)
        self._facts: Int64 = np.zeros((3, 1024), np.int64)
        self._append(b"", b"", -1, is_settled=False)

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def lengths(self) -> Int64:
        """int64 by number: bytes."""
        return self._facts[0, : len(self)]

    @property
    def first(self) -> Int64:
        """int64 by number: the student's first token of the string, -1 where it has none."""
        return self._facts[1, : len(self)]

    @property
    def is_settled(self) -> Int64:
        """int64 by number: 1 where that token is shorter than the string, so that no continuation can change it."""
        return self._facts[2, : len(self)]

    def extend(self, strings_N: Int64, tokens_N: Int64) -> Int64:
        """int64 [N]: the numbers of each string followed by a teacher token."""
        assert tokens_N.max(initial=0) < len(self._token_bytes)
        keys_U, place_N = np.unique(strings_N * len(self._token_bytes) + tokens_N, return_inverse=True)
        keys = keys_U.tolist()
        new = [key for key in keys if key not in self._by_key]
        if new:
            self._add(new)
        return np.array([self._by_key[key] for key in keys], np.int64)[place_N]

    def begin(self, tokens_N: Int64, skipped_N: Int64) -> Int64:
        """int64 [N]: the numbers of what each teacher token spells after its first `skipped_N` bytes."""
        found_N = self._of_token_V[tokens_N]
        is_whole_N = skipped_N == 0
        new_U = np.unique(tokens_N[is_whole_N & (found_N < 0)])
        if len(new_U):
            self._of_token_V[new_U] = self.extend(np.zeros(len(new_U), np.int64), new_U)
            found_N = self._of_token_V[tokens_N]
        if is_whole_N.all():
            return found_N
        width = int(self._token_lengths_V.max(initial=0)) + 1
        keys_U, place_N = np.unique((tokens_N * width + skipped_N)[~is_whole_N], return_inverse=True)
        new = [key for key in keys_U.tolist() if key not in self._by_rest]
        rests = [self._token_bytes[key // width][key % width :] for key in new]
        self._ask([self._append(rest, rest, -1, is_settled=False) for rest in dict.fromkeys(rests) if rest not in self])
        self._by_rest.update(zip(new, (self._number_of[rest] for rest in rests), strict=True))
        found_N[~is_whole_N] = np.array([self._by_rest[key] for key in keys_U.tolist()], np.int64)[place_N]
        return found_N

    def begin_alike(self, tokens_N: Int64, others_N: Int64, num_bytes_N: Int64) -> Bool:
        """Whether the teacher tokens `others_N` begin with the same bytes as `tokens_N`, and are longer than those."""
        same_N = self._token_lengths_V[others_N] > num_bytes_N
        same_N &= num_bytes_N <= 8 * self._heads_V2.shape[1]
        differs_N2 = self._heads_V2[tokens_N] ^ self._heads_V2[others_N]
        for word in range(differs_N2.shape[1]):
            # Bits of the first bytes of this word: 0 to 64, and a shift by 64 would be none.
            num_bits_N = np.clip(8 * (num_bytes_N - 8 * word), 0, 64).astype(np.uint64)
            differs_N = (differs_N2[:, word] >> np.minimum(np.uint64(64) - num_bits_N, np.uint64(63))) != 0
            same_N &= ~(differs_N & (num_bits_N > 0))
        return same_N

    def __contains__(self, text: bytes) -> bool:
        return text in self._number_of

    def forget_from(self, number: int) -> None:
        """Drops the strings from `number` on, so that memory stays bounded; their numbers become invalid."""
        del self._bytes[number:]
        self._number_of = {name: one for name, one in self._number_of.items() if one < number}
        self._by_key = {key: one for key, one in self._by_key.items() if one < number}
        self._by_rest = {key: one for key, one in self._by_rest.items() if one < number}
        self._of_token_V[self._of_token_V >= number] = -1

    def _add(self, keys: list[int]) -> None:
        asked: list[int] = []
        for key in keys:
            string, token = divmod(key, len(self._token_bytes))
            text = self._bytes[string] + self._token_bytes[token]
            if self._token_bytes[token]:
                if text not in self._number_of:
                    first, before = int(self._facts[1, string]), self._bytes[string]
                    # The student's token has ended where nothing can join the two. Asking its tokenizer is what takes
                    # the time.
                    if before and first >= 0 and not self._joins[before[-1]][text[len(before)]]:
                        self._append(text, text, first, is_settled=True)
                    else:
                        asked.append(self._append(text, text, -1, is_settled=False))
                self._by_key[key] = self._number_of[text]
            else:
                # What came before the end is whole, so its first token stands.
                first = int(self.first[string]) if text else self._special_tokens.get(token, -1)
                self._by_key[key] = self._append((string, token), text, first, is_settled=bool(text))
        self._ask(asked)

    def _ask(self, numbers: list[int]) -> None:
        if numbers:
            found = np.array(self._first_tokens([self._bytes[number] for number in numbers]), np.int64)
            self._facts[1, numbers] = found[:, 0]
            self._facts[2, numbers] = (found[:, 0] >= 0) & (found[:, 1] < self._facts[0, numbers])

    def _append(self, name: bytes | tuple[int, int], text: bytes, first: int, *, is_settled: bool) -> int:
        number = self._number_of[name] = len(self._bytes)
        self._bytes.append(text)
        if number == self._facts.shape[1]:
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        self._facts[:, number] = len(text), first, is_settled
        return number


@dataclass(frozen=True)
class Aligned:
    """Aligned chains, one after another: T teacher tokens, S student tokens of the same bytes.

    teacher_ids_T int64; ends_T int64, the index after the last token of each token's chain; student_ids_S int64;
    student_bytes_S int64, bytes of each; places_S int64, the teacher token that a student token starts in, or -1;
    skipped_S int64, the bytes of it before that start; before_S int64, the student's token before each in its chain, or
    -1.
    """

    teacher_ids_T: Int64
    ends_T: Int64
    student_ids_S: Int64
    student_bytes_S: Int64
    places_S: Int64
    skipped_S: Int64
    before_S: Int64


class Transport:
    """Counted probabilities of the student's next token, given a string that the teacher's tokens spell.

    Where the teacher writes " distrib", the student's tokenizer may emit " distribution": only the chains
    themselves say how often. A string's own first token counts as seen once.
    """

    def __init__(self, strings: Strings, student_vocab_size: int) -> None:
        self._strings = strings
        self._vocab_size = student_vocab_size
        self._keys: Int64 = np.zeros(0, np.int64)
        self._counts: Int64 = np.zeros(0, np.int64)
        self._new: list[tuple[Int64, Int64]] = []
        self._starts = self._ends = np.zeros(0, np.int64)
        self._probs: Float64 = np.zeros(0)

    def add(self, chains: Aligned) -> None:
        """Counts the student tokens of `chains`; at any common boundary, one for each teacher token along the path."""
        # Inside a teacher token the same string goes on in other ways: counted too, it would blur the rows.
        index_N = np.flatnonzero((chains.places_S >= 0) & (chains.skipped_S == 0))
        strings_N = np.zeros(len(index_N), np.int64)
        for step in range(MAX_PATH):
            at_N = chains.places_S[index_N] + step
            is_inside_N = at_N < chains.ends_T[chains.places_S[index_N]]
            index_N, strings_N, at_N = index_N[is_inside_N], strings_N[is_inside_N], at_N[is_inside_N]
            strings_N = self._strings.extend(strings_N, chains.teacher_ids_T[at_N])
            keys = strings_N * self._vocab_size + chains.student_ids_S[index_N]
            self._new.append(np.unique(keys, return_counts=True))
            goes_on_N = self._strings.lengths[strings_N] < chains.student_bytes_S[index_N]
            index_N, strings_N = index_N[goes_on_N], strings_N[goes_on_N]
        # Merging the few of one call into the many of all would take longer than finding them.
        if sum(len(keys) for keys, _ in self._new) > len(self._keys) + MIN_MERGED:
            self._merge()

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._new]
        self._keys, place = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
        self._counts = np.bincount(place, np.concatenate([counts for _, counts in parts])).astype(np.int64)
        self._new.clear()

    @property
    def num_strings(self) -> int:
        """Strings that have rows, the first ones of all."""
        return len(self._starts)

    def finish(self) -> None:
        """Turns counts into probabilities; call it once, after the last `add`."""
        self._merge()
        strings_P = self._keys // self._vocab_size
        num_strings = len(self._strings)
        first = self._strings.first
        has_first = first >= 0
        # The prior: one more sighting of the string's own first token.
        seen = np.unique(strings_P)
        prior = seen[has_first[seen]] * self._vocab_size + first[seen[has_first[seen]]]
        keys, place = np.unique(np.concatenate([self._keys, prior]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([self._counts, np.ones(len(prior), np.int64)]))
        strings_P, tokens_P = keys // self._vocab_size, keys % self._vocab_size
        totals = np.bincount(strings_P, counts, num_strings)
        probs_P = counts / totals[strings_P]
        # After " " thousands of tokens came once: each alone is less than a target keeps, together they take time.
        is_kept_P = probs_P >= MIN_PROB
        strings_P, self._tokens, self._probs = strings_P[is_kept_P], tokens_P[is_kept_P], probs_P[is_kept_P]
        self._starts = np.searchsorted(strings_P, np.arange(num_strings))
        self._ends = np.searchsorted(strings_P, np.arange(num_strings), side="right")

    def expand(self, strings_N: Int64, is_settled_N: Bool) -> tuple[Int64, Int64, Float64]:
        """(entry, student token, probability) of the rows of `strings_N`, flat; rows without a token have none.

        `is_settled_N`: take the string's first token as certain. So is that of a string that was never counted.
        """
        num_counted = self.num_strings
        known_N = np.where(strings_N < num_counted, strings_N, 0)
        length_N = np.where(strings_N < num_counted, self._ends[known_N] - self._starts[known_N], 0)
        length_N[is_settled_N] = 0
        rows = np.repeat(np.arange(len(strings_N)), length_N)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
        at = self._starts[known_N[rows]] + offset
        single = np.flatnonzero(length_N == 0)
        first = self._strings.first[strings_N[single]]
        single, first = single[first >= 0], first[first >= 0]
        return (
            np.concatenate([rows, single]),
            np.concatenate([self._tokens[at], first]),
            np.concatenate([self._probs[at], np.ones(len(single))]),
        )


HEAD_WORDS = 2
"""Words of eight bytes by which beginnings of tokens are compared."""


def joins_of(token_bytes: Sequence[bytes]) -> Bool:
    """bool [256, 256]: whether some token holds these two bytes side by side. Nothing joins texts where none does."""
    joins = np.zeros((256, 256), np.bool_)
    for data in token_bytes:
        inside = np.frombuffer(data, np.uint8)
        joins[inside[:-1], inside[1:]] = True
    return joins


def _heads_of(token_bytes: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """uint64 [V, HEAD_WORDS]: the first bytes of each token, the first of them highest."""
    size = 8 * HEAD_WORDS
    padded = b"".join([data[:size].ljust(size, b"\0") for data in token_bytes])
    return np.frombuffer(padded, ">u8").reshape(-1, HEAD_WORDS).astype(np.uint64)
