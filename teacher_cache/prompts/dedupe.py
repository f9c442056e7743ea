"""Finds prompts that nearly repeat an earlier one.

Two prompts are compared by the sets of their n-grams of words: the Jaccard similarity, shared over all (Broder 1997).
MinHash (rensa) finds the pairs worth comparing, whose similarity is then computed exactly, so that nothing is removed
by chance; a pair at the threshold is missed with a probability below MISSED_FRAC. Under another system message nothing
is a repetition.

Time grows with the number of prompts, however alike they are: a prompt is compared with at most MAX_MEMBERS of those
that share a band of hashes with it, and exactly with MAX_COMPARED.

Shape legend: N prompts, P hashes, B bands.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.errors import StillroomError
from stillroom.schema.records import Message, stable_hash
from teacher_cache.prompts.config import DedupeConfig

NUM_PERMUTATIONS = 256
SEED = 0
MISSED_FRAC = 0.005
MARGIN = 0.125
"""Four standard errors of a similarity that is estimated from the hashes."""
MAX_MEMBERS, MAX_COMPARED = 64, 32
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


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt's place and messages. `system` is the text of all its system messages."""

    where: str
    messages: Sequence[Message]
    system: str = ""


def near_duplicates(config: DedupeConfig, prompts: Sequence[Compared]) -> Iterator[NearDuplicate | None]:
    """For each prompt the most similar earlier one that was kept, None where this one is kept. Raises StillroomError
    where the package is missing.
    """
    hashes_NP, has_words = _hashes(config, prompts)
    groups_NB = _groups(hashes_NP, _num_bands(config.similarity))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for number, one in enumerate(prompts):
        if not has_words[number]:
            yield None
            continue
        own = groups_NB[number][groups_NB[number] >= 0].tolist()
        candidates = np.array(sorted({other for group in own for other in members[group]}), np.int64)
        estimates = (hashes_NP[candidates] == hashes_NP[number]).mean(axis=1)
        likely = np.argsort(-estimates, kind="stable")[:MAX_COMPARED]
        likely = likely[estimates[likely] >= config.similarity - MARGIN]
        # N-grams are made again: those of all prompts would fill the memory.
        ngrams = _ngrams(one, config.ngram) if len(likely) else set()
        compared = candidates[likely].tolist()
        alike = [(_jaccard(ngrams, _ngrams(prompts[other], config.ngram)), -other) for other in compared]
        # Of equally similar ones the first.
        similarity, kept = max(alike, default=(0.0, 0))
        if similarity >= config.similarity:
            yield NearDuplicate(one.where, prompts[-kept].where, similarity)
            continue
        for group in own:
            if len(members[group]) < MAX_MEMBERS:
                members[group].append(number)
        yield None


def _hashes(config: DedupeConfig, prompts: Sequence[Compared]) -> tuple[npt.NDArray[np.uint32], list[bool]]:
    """MinHashes [N, P], and which prompts have words."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise StillroomError("prompts.dedupe needs the package rensa: pip install rensa") from error
    hashes_NP = np.zeros((len(prompts), NUM_PERMUTATIONS), np.uint32)
    has_words = []
    for number, one in enumerate(prompts):
        ngrams = sorted(_ngrams(one, config.ngram))
        has_words.append(bool(ngrams))
        hashed = RMinHash(NUM_PERMUTATIONS, SEED)
        hashed.update(ngrams)
        hashes_NP[number] = hashed.digest()
    return hashes_NP, has_words


def _groups(hashes_NP: npt.NDArray[np.uint32], num_bands: int) -> npt.NDArray[np.int32]:
    """For each prompt and band [N, B] the number of the group with the same hashes; -1 for a group of one."""
    num_rows = NUM_PERMUTATIONS // num_bands
    factors = np.random.default_rng(SEED).integers(1, 2**63, num_rows, dtype=np.uint64) * 2 + 1
    groups_NB = np.full((len(hashes_NP), num_bands), -1, np.int32)
    num_groups = 0
    for band in range(num_bands):
        rows = hashes_NP[:, band * num_rows : (band + 1) * num_rows].astype(np.uint64)
        # Two groups with one sum by chance only make more candidates.
        _, inverse, counts = np.unique((rows * factors).sum(axis=1), return_inverse=True, return_counts=True)
        is_shared = counts[inverse] > 1
        groups_NB[is_shared, band] = inverse[is_shared] + num_groups
        num_groups += len(counts)
    return groups_NB


def _num_bands(similarity: float) -> int:
    """The fewest bands that miss a pair at the threshold with a probability below MISSED_FRAC: (1 - s^rows)^bands."""
    rows = next(
        rows for rows in (32, 16, 8, 4, 2, 1) if (1 - similarity**rows) ** (NUM_PERMUTATIONS // rows) <= MISSED_FRAC
    )
    return NUM_PERMUTATIONS // rows


def _ngrams(one: Compared, size: int) -> set[str]:
    text = " ".join(message.content for message in one.messages if message.role == "user")
    words = WORD.findall(text.casefold())
    # N-grams of prompts with different system messages have nothing in common.
    mark = f"{stable_hash('system', one.system)[:16]} " if one.system else ""
    # A shorter text counts whole.
    starts = range(max(len(words) - size, 0) + 1)
    return {f"{mark}{' '.join(words[start : start + size])}" for start in starts if words}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
