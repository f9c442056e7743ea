"""Which of the student's tokens can follow which.

A place where the student's token ends says something about the text that comes. After "the", "re" cannot follow,
because the student would have written "there"; the teacher, whose tokens are others, still gives "re" its mass. A
sequence of BPE tokens is what the tokenizer makes of its text exactly where every pair of neighbours is (Vieira et al.
2025, arXiv 2506.07956), so two tokens are enough to tell.

P pairs
"""

from collections.abc import Callable, Sequence

import numpy as np

from stillroom.schema.records import Int64
from student_train.data.vocabulary.merges import UNKNOWN, Bool, Merges, Table
from student_train.data.vocabulary.transport import MIN_MERGED

IsWritten = Callable[[list[tuple[int, int]]], list[bool]]
"""For each pair of student ids, whether the tokenizer makes just these two of the bytes that both spell."""
MAX_PAIRS = 1_000_000


class Pairs:
    """Answers for pairs of the student's tokens, kept by pair. Pairs that chains hold are allowed whatever the test
    says: pre-tokenisers look further than two tokens.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        is_written: IsWritten,
        vocab_size: int,
        joins: Bool,
        merges: Merges | None = None,
    ) -> None:
        """`token_bytes` by student id, ids below `vocab_size`; `joins`: joins_of() them, which spares most tests;
        `merges` answers for `is_written` where it can.
        """
        self._is_written, self._vocab_size, self._merges = is_written, vocab_size, merges
        self._first_V = np.zeros(vocab_size, np.int64)
        self._last_V = np.zeros(vocab_size, np.int64)
        self._joins = joins
        for token_id, data in enumerate(token_bytes):
            if data:
                self._first_V[token_id], self._last_V[token_id] = data[0], data[-1]
        self._seen: Int64 = np.zeros(0, np.int64)
        self._new: list[Int64] = []
        self._answered = Table(1024)

    def add(self, before_P: Int64, after_P: Int64) -> None:
        """Allows pairs that stand in chains; `before_P` is -1 where a chain begins."""
        self._new.append(np.unique((before_P * self._vocab_size + after_P)[before_P >= 0]))
        if sum(map(len, self._new)) > len(self._seen) + MIN_MERGED:
            self._merge()

    def _merge(self) -> None:
        self._seen = np.unique(np.concatenate([self._seen, *self._new]))
        self._new.clear()

    def allowed(self, before_P: Int64, after_P: Int64) -> Bool:
        """bool [P]; where `before_P` is -1 all are."""
        allowed_P = np.ones(len(before_P), np.bool_)
        asked = np.flatnonzero(before_P >= 0)
        # Where no token holds both bytes side by side, nothing joins the two, and nobody has to ask.
        asked = asked[self._joins[self._last_V[before_P[asked]], self._first_V[after_P[asked]]]]
        allowed_P[asked] = self._answers(before_P[asked] * self._vocab_size + after_P[asked])
        return allowed_P

    def _answers(self, keys_P: Int64) -> Bool:
        found_P = self._answered.get(keys_P, -1)
        if (found_P < 0).any():
            # As a whole, because the table cannot drop single keys.
            if len(self._answered) > MAX_PAIRS:
                self._answered = Table(1024)
                found_P[:] = -1
            if self._new:
                self._merge()
            new = np.unique(keys_P[found_P < 0])
            is_allowed = self._is_seen(new)
            asked = np.flatnonzero(~is_allowed)
            is_allowed[asked] = self._test(*np.divmod(new[asked], self._vocab_size))
            self._answered.add(new, is_allowed.astype(np.int64))
            found_P = self._answered.get(keys_P, -1)
        return found_P > 0

    def _is_seen(self, keys: Int64) -> Bool:
        if not len(self._seen):
            return np.zeros(len(keys), np.bool_)
        # Much faster than np.isin, which would sort all that chains hold.
        is_seen: Bool = self._seen[np.minimum(np.searchsorted(self._seen, keys), len(self._seen) - 1)] == keys
        return is_seen

    def _test(self, before_P: Int64, after_P: Int64) -> Bool:
        found_P = np.full(len(before_P), UNKNOWN, np.int64)
        if self._merges is not None:
            found_P = self._merges.is_written(before_P, after_P)
        left = np.flatnonzero(found_P == UNKNOWN)
        if len(left):
            found_P[left] = self._is_written(list(zip(before_P[left].tolist(), after_P[left].tolist(), strict=True)))
        return found_P > 0
