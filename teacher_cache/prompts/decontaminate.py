"""Finds prompts that overlap an evaluation set.

A prompt is contaminated if any `ngram` consecutive words of its user messages appear in an evaluation text; case,
punctuation and spacing do not count. An evaluation text shorter than that contaminates only a prompt with exactly the
same words. This is the 13-gram overlap of GPT-3 (arXiv 2005.14165, appendix C), applied to the questions.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillroom.errors import DataError
from stillroom.schema.records import Message
from teacher_cache.prompts.config import DecontaminateConfig
from teacher_cache.prompts.sources import Draft, read_source

WORD = re.compile(r"\w+")

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contaminated:
    """A prompt that was left out, and the evaluation text that it overlaps."""

    where: str
    against: str


class EvaluationTexts:
    """Index of the evaluation sets' word n-grams."""

    def __init__(self, config: DecontaminateConfig) -> None:
        """Reads the sets. Raises DataError if one cannot be read, has a malformed row or is empty."""
        self._ngram = config.ngram
        self._places: dict[Words, str] = {}
        for source in config.against:
            num_texts = 0
            for row in read_source(source):
                if not isinstance(row, Draft):
                    raise DataError(f"prompts.decontaminate, source {row.source}: {row.message}")
                words = _words(row.messages)
                num_texts += bool(words)
                for run in self._runs(words):
                    self._places.setdefault(run, f"{source.name} {row.where}")
            if num_texts == 0:
                raise DataError(f"prompts.decontaminate: source {source.name} holds no text")

    def overlap(self, messages: Sequence[Message]) -> str | None:
        """The place of the first shared n-gram, None for a clean prompt."""
        return next((self._places[run] for run in self._runs(_words(messages)) if run in self._places), None)

    def _runs(self, words: Words) -> Iterator[Words]:
        # A text shorter than an n-gram counts whole: it matches only a text with exactly the same words.
        return (words[start : start + self._ngram] for start in range(max(len(words) - self._ngram, 0) + 1))


def _words(messages: Sequence[Message]) -> Words:
    text = " ".join(message.content for message in messages if message.role == "user")
    return tuple(WORD.findall(text.casefold()))
