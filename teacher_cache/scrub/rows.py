"""Replaces personal data in the texts of one row, with the same placeholder for the same person or number.

In: drafts of prompts, before ids are made of them: an id of a short text could be guessed back to it. Out: the same
with placeholders, and the number of replacements by kind as `scrubbed` in their metadata. Nothing here keeps an
original beyond its row.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillroom.schema.records import Message
from teacher_cache.engine.api import Failure
from teacher_cache.prompts.sources import Draft
from teacher_cache.scrub.config import KINDS, Kind, ScrubConfig
from teacher_cache.scrub.counts import METADATA_KEY, PLACEHOLDER, counted, is_made_up
from teacher_cache.scrub.recognisers import Finding, Recognisers, is_word

BATCH = 256
"""Rows whose texts the recognisers read together."""
NUMBER_KINDS = ("phone", "id", "bank")
MIN_LATIN_CHARS = 3
"""Shorter originals are not searched for in the rest of the row: they may be parts of anything."""
WORD = re.compile(r"[a-z0-9]+|[^\W\d_a-z]", re.IGNORECASE)


class Scrubber:
    """Replaces what the recognisers find. `recognisers` may be shared."""

    def __init__(self, config: ScrubConfig, recognisers: Recognisers | None = None) -> None:
        """Raises ConfigError naming a package or model that is missing."""
        self.config = config
        self.recognisers = Recognisers(config) if recognisers is None else recognisers

    def drafts(self, rows: Iterable[Draft | Failure]) -> Iterator[Draft | Failure]:
        """The rows with placeholders, in their order; messages about rows too, which may quote them."""
        rows = iter(rows)
        while batch := list(itertools.islice(rows, BATCH)):
            texts = [_texts_of(one) for one in batch]
            scrubbed = iter(self.rows(texts))
            for one, own in zip(batch, texts, strict=True):
                new, counts = next(scrubbed)
                yield one if new == own else _with_texts(one, new, counts)

    def text(self, text: str) -> str:
        """One text on its own."""
        (((new,), _),) = self.rows([[text]])
        return new

    def completion(self, draft: Draft, text: str) -> tuple[Draft, str]:
        """A prompt and the completion that follows it, which share their placeholders."""
        if is_made_up(draft.metadata):
            # Placeholders would not fit the prompt. What the completion adds to it is for the check of chains.
            return draft, text
        own = _texts_of(draft)
        ((new, counts),) = self.rows([[*own, text]])
        return (draft if new[:-1] == own else _prompt_with(draft, new, counts)), new[-1]

    def problem(self, draft: Draft, *texts: str) -> str | None:
        """What texts hold whose tokens cannot be replaced, for a person; None if there is nothing."""
        if is_made_up(draft.metadata):
            return None
        found = self.recognisers.find([*_texts_of(draft), *texts], self.config.kinds)
        counts = Counter(one.kind for own in found for one in own)
        return counted(counts) if counts else None

    def rows(self, rows: Sequence[Sequence[str]]) -> Iterator[tuple[list[str], Counter[Kind]]]:
        """The texts of each row with placeholders, and how many of each kind."""
        findings = iter(self.recognisers.find([text for row in rows for text in row], self.config.kinds))
        for row in rows:
            yield _replaced(row, [next(findings) for _ in row])


@dataclass(slots=True)
class _Names:
    """Placeholders of one row by what they stand for."""

    numbers: Counter[Kind]
    known: dict[tuple[Kind, str], str]

    def of(self, kind: Kind, original: str) -> str:
        key = (kind, _key(kind, original))
        if key not in self.known:
            self.known[key] = self._of_same_person(key) or self._new(kind)
        return self.known[key]

    def _of_same_person(self, key: tuple[Kind, str]) -> str | None:
        """The placeholder of "Smith" after "John Smith"."""
        kind, text = key
        if kind != "person":
            return None
        words = {*text.split()}
        return next(
            (name for (other, full), name in self.known.items() if other == kind and words < {*full.split()}), None
        )

    def _new(self, kind: Kind) -> str:
        self.numbers[kind] += 1
        return f"<{kind.upper()}_{self.numbers[kind]}>"


def _replaced(texts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> tuple[list[str], Counter[Kind]]:
    counts: Counter[Kind] = Counter()
    if not any(findings):
        return list(texts), counts
    numbers: Counter[Kind] = Counter()
    placeholders = (one.groups() for text in texts for one in PLACEHOLDER.finditer(text))
    for kind, number in ((kind, number) for name, number in placeholders for kind in KINDS if kind.upper() == name):
        # A row that was scrubbed before keeps its placeholders, and new ones get other numbers.
        numbers[kind] = max(numbers[kind], int(number))
    names = _Names(numbers, {})
    originals: dict[str, Kind] = {}
    for text, own in zip(texts, findings, strict=True):
        for one in own:
            original = text[one.start : one.stop]
            names.of(one.kind, original)
            for part in (original, *_parts_of_name(original, one.kind)):
                originals.setdefault(part, one.kind)
    elsewhere = _occurrences(originals)
    new = []
    for text, own in zip(texts, findings, strict=True):
        spans = _apart([*own, *_elsewhere(text, elsewhere)])
        parts, place = [], 0
        for one in spans:
            parts += [text[place : one.start], names.of(one.kind, text[one.start : one.stop])]
            place = one.stop
            counts[one.kind] += 1
        new.append("".join([*parts, text[place:]]))
    return new, counts


def _occurrences(originals: Mapping[str, Kind]) -> re.Pattern[str] | None:
    """What was found once in a row is personal data in all of it, where no recogniser saw it too. Numbers count
    however their digits are grouped.
    """
    longest_first = sorted(originals, key=len, reverse=True)
    texts = [one for one in longest_first if len(one) >= MIN_LATIN_CHARS or not one.isascii()]
    by_kind = {kind: [one for one in texts if originals[one] == kind] for kind in KINDS}
    groups = [
        f"(?P<{kind}>{'|'.join(_grouped_freely(one) if kind in NUMBER_KINDS else re.escape(one) for one in own)})"
        for kind, own in by_kind.items()
        if own
    ]
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(groups)})(?![A-Za-z0-9])") if groups else None


def _parts_of_name(original: str, kind: Kind) -> list[str]:
    """What a row may call "Kimberly Thornton" elsewhere."""
    words = original.split() if kind == "person" else []
    return [one for one in {*words[:1], *words[1:][-1:]} if len(one) > MIN_LATIN_CHARS and not is_word(one)]


def _grouped_freely(number: str) -> str:
    """A pattern of "(415) 555-2671" that finds "4155552671"."""
    return r"[ ().\-/]*".join(re.escape(one) for one in number if one.isalnum())


def _elsewhere(text: str, pattern: re.Pattern[str] | None) -> list[Finding]:
    if pattern is None:
        return []
    return [
        Finding(*one.span(), next(kind for kind in KINDS if kind == one.lastgroup)) for one in pattern.finditer(text)
    ]


def _apart(findings: Iterable[Finding]) -> list[Finding]:
    """Overlapping spans as one, of the longest one's kind: no end of an original may stay."""
    merged: list[Finding] = []
    longest = 0
    for one in sorted(findings):
        if merged and one.start < merged[-1].stop:
            last, size = merged[-1], one.stop - one.start
            merged[-1] = Finding(last.start, max(last.stop, one.stop), one.kind if size > longest else last.kind)
            longest = max(longest, size)
        else:
            merged.append(one)
            longest = one.stop - one.start
    return merged


def _key(kind: Kind, original: str) -> str:
    """Equal for two ways of writing the same."""
    if kind in NUMBER_KINDS:
        return re.sub(r"[^\dA-Z]", "", original.upper())
    return " ".join(WORD.findall(original.casefold()))


def _texts_of(row: Draft | Failure) -> list[str]:
    """Every text of a row that would be stored, in an order that `_with_texts` follows."""
    if isinstance(row, Failure):
        return [row.message]
    if is_made_up(row.metadata):
        return []
    return [*(one.content for one in row.messages), row.reference or "", *_strings(row.metadata)]


def _with_texts(row: Draft | Failure, texts: Sequence[str], counts: Counter[Kind]) -> Draft | Failure:
    return replace(row, message=texts[0]) if isinstance(row, Failure) else _prompt_with(row, texts, counts)


def _prompt_with(row: Draft, texts: Sequence[str], counts: Counter[Kind]) -> Draft:
    left = iter(texts)
    messages = tuple(Message(one.role, next(left)) for one in row.messages)
    reference = next(left)
    metadata = _replace_strings(row.metadata, left)
    return replace(
        row,
        messages=messages,
        reference=None if row.reference is None else reference,
        metadata={**metadata, METADATA_KEY: dict(sorted(counts.items()))},
    )


def _strings(value: Any) -> Iterator[str]:
    """Texts and numbers in JSON, keys left out: they are the data set's own names."""
    if isinstance(value, dict):
        yield from (text for one in value.values() for text in _strings(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in _strings(one))
    elif (text := _text_of(value)) is not None:
        yield text


def _replace_strings(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {name: _replace_strings(one, texts) for name, one in value.items()}
    if isinstance(value, list):
        return [_replace_strings(one, texts) for one in value]
    if (before := _text_of(value)) is not None:
        text = next(texts)
        # A number that is no personal data stays a number.
        return value if text == before else text
    return value


def _text_of(value: Any) -> str | None:
    # A column of phone numbers with gaps is one of floats in pandas.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
