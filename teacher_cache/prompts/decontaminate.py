"""Finds prompts that share a run of words with an evaluation set.

A prompt is contaminated when any `ngram` consecutive words of its user messages stand in the same order in an
evaluation text; case, punctuation and spacing do not count. An evaluation text shorter than that contaminates only a
prompt that says just the same. This is the 13-gram overlap of GPT-3 (arXiv 2005.14165, appendix C), applied to the
questions.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillroom.errors import DataError
from stillroom.schema.records import Message
from teacher_cache.config import DecontaminateConfig
from teacher_cache.prompts.sources import Draft, read_source

WORD = re.compile(r"\w+")

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contaminated:
    """A prompt that was left out, and the evaluation text it overlaps."""

    where: str
    against: str


class EvaluationTexts:
    """Runs of words of the evaluation sets, ready to be looked up."""

    def __init__(self, config: DecontaminateConfig) -> None:
        """Reads the sets. Raises DataError where one cannot be read, has a malformed row or is empty."""
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
        """Where the first shared run of words comes from, None for a clean prompt."""
        return next((self._places[run] for run in self._runs(_words(messages)) if run in self._places), None)

    def _runs(self, words: Words) -> Iterator[Words]:
        # A text shorter than a run is one run of its own length: it equals only a text with just these words.
        return (words[start : start + self._ngram] for start in range(max(len(words) - self._ngram, 0) + 1))


def _words(messages: Sequence[Message]) -> Words:
    text = " ".join(message.content for message in messages if message.role == "user")
    return tuple(WORD.findall(text.casefold()))
