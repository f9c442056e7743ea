"""Finds prompts that nearly repeat an earlier one.

Two prompts are compared by the sets of their n-grams of words: the Jaccard similarity, shared over all (Broder 1997).
MinHash (rensa) finds the pairs worth comparing, whose similarity is then computed exactly, so that nothing is removed
by chance; a pair at the threshold is missed with a probability below MISSED_FRAC.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.errors import StillroomError
from stillroom.schema.records import Message
from teacher_cache.prompts.config import DedupeConfig

NUM_PERMUTATIONS = 128
SEED = 0
MISSED_FRAC = 0.005
WITHOUT_SPACES = "぀-ヿ㐀-䶿一-鿿豈-﫿"
WORD = re.compile(rf"[{WITHOUT_SPACES}]|[^\W_{WITHOUT_SPACES}]+")
"""A word, or one character of a script that writes no spaces."""


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A prompt that was left out, the earlier one that it resembles, and how much."""

    where: str
    kept: str
    similarity: float

    def __str__(self) -> str:
        return f"{self.where} is {self.similarity:.0%} like {self.kept}"


class NearDuplicates:
    """Index of the prompts that were kept."""

    def __init__(self, config: DedupeConfig) -> None:
        """Raises StillroomError where the package is missing."""
        try:
            from rensa import RMinHash, RMinHashLSH
        except ImportError as error:
            raise StillroomError("prompts.dedupe needs the package rensa: pip install rensa") from error
        self._minhash, self._config = RMinHash, config
        self._index = RMinHashLSH(config.similarity, NUM_PERMUTATIONS, _num_bands(config.similarity))
        self._kept: list[tuple[str, Sequence[Message]]] = []

    def find(self, where: str, messages: Sequence[Message]) -> NearDuplicate | None:
        """The most similar earlier prompt above the threshold; without one this prompt is added."""
        ngrams = _ngrams(messages, self._config.ngram)
        if not ngrams:
            return None
        hashed = self._minhash(NUM_PERMUTATIONS, SEED)
        hashed.update(sorted(ngrams))
        # In the order in which they came, so that equally similar ones name the first.
        candidates = [self._kept[key] for key in sorted(self._index.query(hashed))]
        # N-grams of candidates are made again: candidates are few, and those of all prompts would fill the memory.
        alike = [(_jaccard(ngrams, _ngrams(one, self._config.ngram)), place) for place, one in candidates]
        similarity, kept = max(alike, key=lambda one: one[0], default=(0.0, ""))
        if similarity >= self._config.similarity:
            return NearDuplicate(where, kept, similarity)
        self._index.insert(len(self._kept), hashed)
        self._kept.append((where, messages))
        return None


def _num_bands(similarity: float) -> int:
    """The fewest bands that miss a pair at the threshold with a probability below MISSED_FRAC: (1 - s^rows)^bands."""
    rows = next(
        rows for rows in (32, 16, 8, 4, 2, 1) if (1 - similarity**rows) ** (NUM_PERMUTATIONS // rows) <= MISSED_FRAC
    )
    return NUM_PERMUTATIONS // rows


def _ngrams(messages: Sequence[Message], size: int) -> set[str]:
    text = " ".join(message.content for message in messages if message.role == "user")
    words = WORD.findall(text.casefold())
    # A shorter text counts whole.
    return {" ".join(words[start : start + size]) for start in range(max(len(words) - size, 0) + 1) if words}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
