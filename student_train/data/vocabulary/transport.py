"""Which student token begins where the teacher's next tokens spell a given byte string, counted from aligned chains.

N entries of a batch, P pairs of strings and student tokens
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Int64
from student_train.data.vocabulary.merges import MAX_BYTES, UNKNOWN, Bool, Merges, Table, Words, append, mixed, pack
from student_train.data.vocabulary.pieces import lengths_of

Float64 = npt.NDArray[np.float64]
FirstTokens = Callable[[list[bytes]], list[tuple[int, int]]]
"""For each byte string, the first token that the student's tokenizer makes of it and that token's bytes, or (-1, 0)."""

MIN_PROB = 1e-4
MIN_MERGED = 1 << 16
MAX_PATH = 8
"""Teacher tokens that are followed from the start of one student token."""
MAX_AHEAD = 1_000_000
"""Strings looked up ahead that are remembered, in some 70 MB."""


class Strings:
    """Byte strings that successive teacher tokens spell, numbered; number 0 is the empty one.

    A teacher token without bytes (the end of the chain) makes a string of its own: what came before and then the end.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[int, int],
        first_tokens: FirstTokens,
        joins: Bool,
        merges: Merges | None = None,
    ) -> None:
        """`token_bytes` by teacher id; `special_tokens`: the student's token for a teacher token that has no bytes;
        `joins`: see joins_of(); `merges` answers for `first_tokens` where it can.
        """
        self._token_bytes = token_bytes
        self._words_VW = pack(token_bytes)
        self._token_lengths_V = lengths_of(list(token_bytes))
        self._special_tokens = special_tokens
        self._first_tokens, self._merges = first_tokens, merges
        self._joins = joins
        self._first_byte_V = (self._words_VW[:, 0] >> np.uint64(56)).astype(np.uint8)
        self._bytes: list[bytes] = []
        self._number_of: dict[bytes | tuple[int, int], int] = {}
        self._by_key = Table(1024)
        self._by_rest: dict[int, int] = {}
        self._of_token_V: Int64 = np.full(len(token_bytes), -1, np.int64)
        # Lengths, first tokens, whether they are settled, last bytes.
        self._facts: Int64 = np.zeros((4, 1024), np.int64)
        self._words: Words = np.zeros((1024, self._words_VW.shape[1]), np.uint64)
        # Of the first strings: short ones by their bytes, and how long ones begin.
        self._numbers, self._long, self._num_numbered = Table(1024), Table(1024), 0
        self._ahead = Table(1024)
        self._append([b""], [b""])

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
        keys_N = strings_N * len(self._token_bytes) + tokens_N
        found_N = self._by_key.get(keys_N, -1)
        if (found_N < 0).any():
            self._add(np.unique(keys_N[found_N < 0]))
            found_N = self._by_key.get(keys_N, -1)
        return found_N

    def look_ahead(self, strings_N: Int64, tokens_N: Int64) -> tuple[Int64, Int64, Bool]:
        """What extend() would give, for strings that are not kept: number, or -1 for a new string, first token, and
        whether it is settled. The strings have bytes.
        """
        keys_N = strings_N * len(self._token_bytes) + tokens_N
        facts_N = self._ahead.get(keys_N, -1)
        if (facts_N < 0).any():
            if len(self._ahead) > MAX_AHEAD:
                self._ahead = Table(1024)
                facts_N[:] = -1
            new = np.unique(keys_N[facts_N < 0])
            self._ahead.add(new, self._facts_ahead(new))
            facts_N = self._ahead.get(keys_N, -1)
        numbers_N = np.where(facts_N & 1, facts_N >> 2, -1)
        first_N = np.where(facts_N & 1, self._facts[1, numbers_N], (facts_N >> 2) - 1)
        return numbers_N, first_N, (facts_N & 2) > 0

    def _facts_ahead(self, keys_N: Int64) -> Int64:
        """For new keys, number and 1, or first token + 1 and 0, in the lowest bit; then whether it is settled."""
        strings_N, tokens_N = np.divmod(keys_N, len(self._token_bytes))
        before_N, more_N = self._facts[0, strings_N], self._token_lengths_V[tokens_N]
        lengths_N = before_N + more_N
        first_N = self._facts[1, strings_N]
        # The student's token has ended where nothing can join the two. Asking its tokenizer is what takes the time.
        joins_N = (more_N > 0) & (self._joins[self._facts[3, strings_N], self._first_byte_V[tokens_N]] | (first_N < 0))
        is_settled_N = ~joins_N
        words_NW = append(self._words[strings_N], before_N, self._words_VW[tokens_N])
        is_short_N = lengths_N <= MAX_BYTES
        numbers_N = self._numbers_of(words_NW, lengths_N, is_short_N & (more_N > 0))
        asked = np.flatnonzero(joins_N & is_short_N & (numbers_N < 0))
        first_N[joins_N] = UNKNOWN
        if self._merges is not None and len(asked):
            first_N[asked], num_bytes = self._merges.first_tokens(words_NW[asked], lengths_N[asked])
            is_settled_N[asked] = (first_N[asked] >= 0) & (num_bytes < lengths_N[asked])
        # A long string may be numbered only where another of its length begins like it.
        is_like_N = np.zeros(len(keys_N), np.bool_)
        is_like_N[~is_short_N] = self._long.get(mixed(words_NW[~is_short_N], lengths_N[~is_short_N]), -1) >= 0
        left = np.flatnonzero((first_N == UNKNOWN) & (numbers_N < 0) | is_like_N)
        names = [
            self._bytes[string] + self._token_bytes[token]
            for string, token in zip(strings_N[left].tolist(), tokens_N[left].tolist(), strict=True)
        ]
        known = [self._number_of.get(name, -1) for name in names]
        numbers_N[left] = [number if number < self._num_numbered else -1 for number in known]
        is_left = (first_N[left] == UNKNOWN) & (numbers_N[left] < 0)
        left, names = left[is_left], [name for name, is_one in zip(names, is_left.tolist(), strict=True) if is_one]
        if names:
            found = np.array(self._first_tokens(names), np.int64)
            first_N[left] = found[:, 0]
            is_settled_N[left] = (found[:, 0] >= 0) & (found[:, 1] < lengths_N[left])
        is_numbered_N = numbers_N >= 0
        is_settled_N[is_numbered_N] = self.is_settled[numbers_N[is_numbered_N]] > 0
        # -1 stands for a key that is not there, so facts are 0 or more: hence the first token + 1.
        facts_N: Int64 = np.where(is_numbered_N, numbers_N << 2 | 1, (first_N + 1) << 2) | (is_settled_N << 1)
        return facts_N

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
        unknown = [rest for rest in dict.fromkeys(rests) if rest not in self._number_of]
        self._ask(self._append(unknown, unknown))
        self._by_rest.update(zip(new, (self._number_of[rest] for rest in rests), strict=True))
        found_N[~is_whole_N] = np.array([self._by_rest[key] for key in keys_U.tolist()], np.int64)[place_N]
        return found_N

    def begin_alike(self, tokens_N: Int64, others_N: Int64, num_bytes_N: Int64) -> Bool:
        """Whether the teacher tokens `others_N` begin with the same bytes as `tokens_N`, and are longer than those."""
        same_N = self._token_lengths_V[others_N] > num_bytes_N
        same_N &= num_bytes_N <= MAX_BYTES
        differs_N2 = self._words_VW[tokens_N] ^ self._words_VW[others_N]
        for word in range(differs_N2.shape[1]):
            # Bits of the first bytes of this word: 0 to 64, and a shift by 64 would be none.
            num_bits_N = np.clip(8 * (num_bytes_N - 8 * word), 0, 64).astype(np.uint64)
            differs_N = (differs_N2[:, word] >> np.minimum(np.uint64(64) - num_bits_N, np.uint64(63))) != 0
            same_N &= ~(differs_N & (num_bits_N > 0))
        return same_N

    def settle(self) -> None:
        """Makes look_ahead() know the numbers of the strings so far; call it once."""
        self._num_numbered = len(self)
        # What ends with the end of a chain spells what another string does.
        named = np.array(
            sorted(number for name, number in self._number_of.items() if isinstance(name, bytes)), np.int64
        )
        lengths = self._facts[0, named]
        keys = mixed(self._words[named], lengths)
        is_short = lengths <= MAX_BYTES
        short, first = np.unique(keys[is_short], return_index=True)
        self._numbers.add(short, named[is_short][first])
        long = np.unique(keys[~is_short])
        self._long.add(long, np.zeros(len(long), np.int64))

    def forget_from(self, number: int) -> None:
        """Drops the strings from `number` on, so that memory stays bounded; their numbers become invalid."""
        del self._bytes[number:]
        self._number_of = {name: one for name, one in self._number_of.items() if one < number}
        self._by_key.keep_below(number)
        self._by_rest = {key: one for key, one in self._by_rest.items() if one < number}
        self._of_token_V[self._of_token_V >= number] = -1
        self._ahead = Table(1024)

    def _numbers_of(self, words_NW: Words, lengths_N: Int64, is_wanted_N: Bool) -> Int64:
        found_N = np.full(len(lengths_N), -1, np.int64)
        wanted = np.flatnonzero(is_wanted_N)
        numbers = self._numbers.get(mixed(words_NW[wanted], lengths_N[wanted]), -1)
        is_equal = (self._words[numbers] == words_NW[wanted]).all(axis=1) & (
            self._facts[0, numbers] == lengths_N[wanted]
        )
        found_N[wanted] = np.where(is_equal & (numbers >= 0), numbers, -1)
        return found_N

    def _add(self, keys_U: Int64) -> None:
        strings_U, tokens_U = np.divmod(keys_U, len(self._token_bytes))
        names: list[bytes | tuple[int, int]] = []
        texts: list[bytes] = []
        numbers, places = [], []
        next_number = len(self)
        for place, (string, token) in enumerate(zip(strings_U.tolist(), tokens_U.tolist(), strict=True)):
            data = self._token_bytes[token]
            text = self._bytes[string] + data
            name: bytes | tuple[int, int] = text if data else (string, token)
            number = self._number_of.get(name)
            if number is None:
                number = self._number_of[name] = next_number
                next_number += 1
                names.append(name)
                texts.append(text)
                places.append(place)
            numbers.append(number)
        self._by_key.add(keys_U, np.array(numbers, np.int64))
        new_N = self._append(names, texts)
        strings_N, tokens_N = strings_U[places], tokens_U[places]
        first_N = self._facts[1, strings_N]
        has_bytes_N, is_end_N = self._facts[0, strings_N] > 0, self._token_lengths_V[tokens_N] == 0
        # The student's token has ended where nothing can join the two. Asking its tokenizer is what takes the time.
        joins_N = self._joins[self._facts[3, strings_N], self._first_byte_V[tokens_N]]
        is_known_N = has_bytes_N & (is_end_N | ((first_N >= 0) & ~joins_N))
        self._facts[1, new_N[is_known_N]], self._facts[2, new_N[is_known_N]] = first_N[is_known_N], 1
        # What came before the end is whole, so its first token stands; with nothing before, the end is all.
        alone = np.flatnonzero(is_end_N & ~has_bytes_N)
        self._facts[1, new_N[alone]] = [self._special_tokens.get(token, -1) for token in tokens_N[alone].tolist()]
        self._ask(new_N[~is_known_N & ~is_end_N])

    def _ask(self, numbers: Int64) -> None:
        first, num_bytes = np.full(len(numbers), UNKNOWN, np.int64), np.zeros(len(numbers), np.int64)
        if self._merges is not None:
            first, num_bytes = self._merges.first_tokens(self._words[numbers], self._facts[0, numbers])
        left = np.flatnonzero(first == UNKNOWN)
        if len(left):
            found = np.array(self._first_tokens([self._bytes[number] for number in numbers[left].tolist()]), np.int64)
            first[left], num_bytes[left] = found[:, 0], found[:, 1]
        self._facts[1, numbers] = first
        self._facts[2, numbers] = (first >= 0) & (num_bytes < self._facts[0, numbers])

    def _append(self, names: Sequence[bytes | tuple[int, int]], texts: Sequence[bytes]) -> Int64:
        """The numbers of new strings, of which nothing is known yet."""
        first, end = len(self._bytes), len(self._bytes) + len(texts)
        self._bytes += texts
        self._number_of.update(zip(names, range(first, end), strict=True))
        if end > self._facts.shape[1]:
            # At least doubled, so that appending one by one stays linear over all.
            more = max(end - self._facts.shape[1], self._facts.shape[1])
            self._facts = np.pad(self._facts, ((0, 0), (0, more)))
            self._words = np.pad(self._words, ((0, more), (0, 0)))
        self._facts[0, first:end] = lengths_of(list(texts))
        self._facts[1:3, first:end] = [[-1], [0]]
        self._facts[3, first:end] = [text[-1] if text else 0 for text in texts]
        self._words[first:end] = pack(texts)
        return np.arange(first, end)


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
        # Inside a teacher token the same string continues in other ways: counted too, it would blur the rows.
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
        self._strings.settle()
        self._starts = np.searchsorted(strings_P, np.arange(num_strings))
        self._ends = np.searchsorted(strings_P, np.arange(num_strings), side="right")

    def expand(self, strings_N: Int64, is_settled_N: Bool, first_N: Int64) -> tuple[Int64, Int64, Float64]:
        """(entry, student token, probability) of the rows of `strings_N`, flat; rows without a token have none.

        `is_settled_N`: take the string's first token as certain, which is `first_N`. So is that of a string that was
        never counted, -1 among them.
        """
        num_counted = self.num_strings
        known_N = np.where(strings_N < num_counted, strings_N, -1)
        length_N = np.where(known_N >= 0, self._ends[known_N] - self._starts[known_N], 0)
        length_N[is_settled_N] = 0
        rows = np.repeat(np.arange(len(strings_N)), length_N)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
        at = self._starts[known_N[rows]] + offset
        single = np.flatnonzero((length_N == 0) & (first_N >= 0))
        return (
            np.concatenate([rows, single]),
            np.concatenate([self._tokens[at], first_N[single]]),
            np.concatenate([self._probs[at], np.ones(len(single))]),
        )


def joins_of(token_bytes: Sequence[bytes]) -> Bool:
    """bool [256, 256]: whether some token holds these two bytes side by side. Nothing joins texts where none does."""
    joins = np.zeros((256, 256), np.bool_)
    inside = np.frombuffer(b"".join(token_bytes), np.uint8)
    ends = np.cumsum(lengths_of(list(token_bytes)))
    is_joined = np.ones(max(len(inside) - 1, 0), np.bool_)
    # The last byte of a token and the first of the next one stand side by side here alone.
    is_joined[ends[(ends > 0) & (ends < len(inside))] - 1] = False
    joins[inside[:-1][is_joined], inside[1:][is_joined]] = True
    return joins
