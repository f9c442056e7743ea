"""Replaces personal data in the texts of one row, with the same placeholder for the same person or number.

In: drafts of prompts, before ids are made of them: an id of a short text could be guessed back to it. Out: the same
with placeholders, and the number of replacements by kind as `scrubbed` in their metadata. Nothing here keeps an
original beyond its row.
"""

import contextlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stillroom.errors import DataError
from stillroom.schema.records import Message
from teacher_cache.engine.api import Failure
from teacher_cache.prompts.sources import Draft
from teacher_cache.scrub.config import KINDS, Kind, ScrubConfig
from teacher_cache.scrub.counts import METADATA_KEY, PLACEHOLDER, counted
from teacher_cache.scrub.recognisers import LETTERS, Finding, Recognisers, is_within, is_word

BATCH = 256
"""Rows whose texts the recognisers read together."""
NUMBER_KINDS = ("phone", "id", "bank")
MIN_LATIN_CHARS = 3
"""Shorter originals are not searched for in the rest of the row: they may be parts of anything."""
# A full stop and a space only behind an initial: elsewhere a sentence ends there.
SEPARATOR = re.compile(r"(?:(?:(?<=\b\w)\.)?\s+|[._\-])")
"""Between the words of a name, wherever it is written again."""
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
        while batch := self._batch(rows):
            texts = [_texts_of(one) for one in batch]
            scrubbed = iter(self.rows(texts))
            for one, own in zip(batch, texts, strict=True):
                new, counts = next(scrubbed)
                yield one if new == own else _with_texts(one, new, counts)

    def _batch(self, rows: Iterator[Draft | Failure]) -> list[Draft | Failure]:
        with self.errors():
            return list(itertools.islice(rows, BATCH))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Replaces personal data in errors of reading: libraries quote the value that they cannot convert."""
        try:
            yield
        except DataError as error:
            raise DataError(self.text(str(error))) from None

    def text(self, text: str) -> str:
        """One text on its own."""
        (((new,), _),) = self.rows([[text]])
        return new

    def completions(self, pairs: Sequence[tuple[Draft, str]]) -> list[tuple[Draft, str]]:
        """Prompts, each with the completion that follows it, of one row: turns of a conversation share placeholders,
        and what was found in one of them is replaced in all.
        """
        rows = [[*_texts_of(draft), text] for draft, text in pairs]
        # Each turn repeats those before it.
        texts = [*dict.fromkeys(text for row in rows for text in row)]
        replaced, counts = _replaced(texts, self.recognisers.find(texts, self.config.kinds), self.recognisers)
        new = dict(zip(texts, zip(replaced, counts, strict=True), strict=True))
        done = []
        for (draft, _), row in zip(pairs, rows, strict=True):
            own, num = [new[text][0] for text in row], sum((new[text][1] for text in row), Counter[Kind]())
            done.append((draft if own[:-1] == row[:-1] else _prompt_with(draft, own, num), own[-1]))
        return done

    def problem(self, draft: Draft, *texts: str) -> str | None:
        """What texts hold whose tokens cannot be replaced, for a person; None if there is nothing."""
        found = self.recognisers.find([*_texts_of(draft), *texts], self.config.kinds)
        counts = Counter(one.kind for own in found for one in own)
        return counted(counts) if counts else None

    def is_personal(self, texts: Sequence[str]) -> bool:
        """Whether texts hold personal data."""
        return any(self.recognisers.find(texts, self.config.kinds))

    def rows(self, rows: Sequence[Sequence[str]]) -> Iterator[tuple[list[str], Counter[Kind]]]:
        """The texts of each row with placeholders, and how many of each kind."""
        findings = iter(self.recognisers.find([text for row in rows for text in row], self.config.kinds))
        for row in rows:
            new, counts = _replaced(row, [next(findings) for _ in row], self.recognisers)
            yield new, sum(counts, Counter[Kind]())


@dataclass(slots=True)
class _Names:
    """Placeholders of one row by what they stand for."""

    numbers: Counter[Kind]
    known: dict[tuple[Kind, str], str] = field(default_factory=dict)
    _by_word: defaultdict[str, list[tuple[frozenset[str], str]]] = field(default_factory=lambda: defaultdict(list))
    """Full names of persons, and their placeholders, by each word of the name."""

    def of(self, kind: Kind, original: str) -> str:
        key = (kind, _key(kind, original))
        if key not in self.known:
            words = frozenset(key[1].split()) if kind == "person" else frozenset()
            name = self._of_same_person(key) or self._of_part(words) or self._new(kind)
            self.known[key] = name
            for word in words if len(words) > 1 else ():
                self._by_word[word].append((words, name))
        return self.known[key]

    def _of_same_person(self, key: tuple[Kind, str]) -> str | None:
        """The placeholder of "Smith" after "John Smith"."""
        kind, words = key[0], {*key[1].split()}
        if kind != "person" or not words:
            return None
        rarest = min((self._by_word.get(word, []) for word in words), key=len)
        return next((name for full, name in rarest if words < full), None)

    def _of_part(self, words: frozenset[str]) -> str | None:
        """The placeholder of "Smith" for "John Smith" behind it, unless another Smith has it."""
        taken = {name for word in words for _, name in self._by_word.get(word, ())}
        parts = (self.known.get(("person", word)) for word in sorted(words) if len(words) > 1)
        return next((name for name in parts if name is not None and name not in taken), None)

    def _new(self, kind: Kind) -> str:
        self.numbers[kind] += 1
        return f"<{kind.upper()}_{self.numbers[kind]}>"


def _replaced(
    texts: Sequence[str], findings: Sequence[Sequence[Finding]], recognisers: Recognisers
) -> tuple[list[str], list[Counter[Kind]]]:
    counts = [Counter[Kind]() for _ in texts]
    if not any(findings):
        return list(texts), counts
    numbers: Counter[Kind] = Counter()
    placeholders = (one.groups() for text in texts for one in PLACEHOLDER.finditer(text))
    for kind, number in ((kind, number) for name, number in placeholders for kind in KINDS if kind.upper() == name):
        # A row that was scrubbed before keeps its placeholders, and new ones get other numbers.
        numbers[kind] = max(numbers[kind], int(number))
    names = _Names(numbers)
    elsewhere = _Elsewhere()
    for text, own in zip(texts, findings, strict=True):
        for one in own:
            original = text[one.start : one.stop]
            names.of(one.kind, original)
            elsewhere.add(one.kind, original)
    elsewhere.compile()
    new = []
    for text, own, num in zip(texts, findings, counts, strict=True):
        allowed = recognisers.allowed_spans(text)
        spans = _apart([*own, *(one for one in elsewhere.find(text) if not is_within(one, allowed))])
        parts, place = [], 0
        for one in spans:
            parts += [text[place : one.start], names.of(one.kind, text[one.start : one.stop])]
            place = one.stop
            num[one.kind] += 1
        new.append("".join([*parts, text[place:]]))
    return new, counts


class _Elsewhere:
    """What was found once in a row is personal data in all of it, where no recogniser saw it too. Numbers count however
    their digits are grouped, mails and texts of several words in any case, and those also as kimberly.thornton.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, Kind] = {}
        self._folded: dict[str, Kind] = {}
        self._exact: dict[str, Kind] = {}
        self._pattern: re.Pattern[str] | None = None

    def add(self, kind: Kind, original: str) -> None:
        if kind in NUMBER_KINDS:
            self._add(self._numbers, _digits(original), kind)
            return
        folded = _lower(original) if kind == "email" else _folded(original)
        is_long = kind == "email" or " " in folded
        # As it is written too: "St. John" has a full stop and a space where names have one separator.
        for one in {folded, _lower(original)} if is_long else ():
            self._add(self._folded, one, kind)
        # A single name may be a word: in small letters it is left.
        for part in [*([] if is_long else [original]), *_parts_of_name(original, kind)]:
            for one in {part, part.upper()} if kind == "person" else {part}:
                self._add(self._exact, one, kind)

    def _add(self, known: dict[str, Kind], text: str, kind: Kind) -> None:
        if len(text) >= MIN_LATIN_CHARS or (text and not text.isascii()):
            known.setdefault(text, kind)

    def compile(self) -> None:
        """Once everything is added."""
        # As trees of common beginnings: trying thousands of names one by one at every place would take minutes.
        groups = [
            rf"({flags}:{_tree(sorted(own), between)})"
            for own, between, flags in (
                (self._folded, "", "?i"),
                (self._exact, "", "?"),
                (self._numbers, r"[ ().\-/]*", "?i"),
            )
            if own
        ]
        if groups:
            edges = rf"(?:(?<![{LETTERS}])|(?<=\\[nrt]))", rf"(?![{LETTERS}])"
            self._pattern = re.compile(rf"{edges[0]}(?:{'|'.join(groups)}){edges[1]}")

    def find(self, text: str) -> Iterator[Finding]:
        placeholders = [one.span() for one in PLACEHOLDER.finditer(text)]
        for one in self._pattern.finditer(text) if self._pattern is not None else ():
            found = one.group()
            kinds = (
                self._exact.get(found),
                self._folded.get(_lower(found)),
                self._folded.get(_folded(found)),
                self._numbers.get(_digits(found)),
            )
            # Equal but for case in more than one way, as with the Kelvin sign.
            finding = Finding(*one.span(), next((kind for kind in kinds if kind is not None), "person"))
            # "Bank" of "Ursula Bank" is no part of <BANK_1>.
            if not is_within(finding, placeholders):
                yield finding


def _tree(texts: Sequence[str], between: str) -> str:
    """A pattern of all texts, which are sorted, longer ones first. `between` may stand between two characters."""
    pairs = zip(texts[0], texts[-1], strict=False)
    start = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    rest = [one[len(start) :] for one in texts if len(one) > len(start)]
    written = between.join(SEPARATOR.pattern if one == " " else re.escape(one) for one in start)
    if not rest:
        return written
    branches = [_tree([*own], between) for _, own in itertools.groupby(rest, key=lambda one: one[0])]
    joint = between if start else ""
    return f"{written}(?:{joint}(?:{'|'.join(branches)})){'?' if len(rest) < len(texts) else ''}"


def _lower(text: str) -> str:
    # By itself lower() makes two characters of this one, which no pattern finds again.
    return text.replace("İ", "i").lower()


def _folded(text: str) -> str:
    return " ".join(filter(None, SEPARATOR.split(_lower(text))))


def _digits(number: str) -> str:
    return "".join(one for one in number.lower() if one.isalnum())


def _parts_of_name(original: str, kind: Kind) -> list[str]:
    """What a row may call "Kimberly Thornton" elsewhere."""
    words = original.split() if kind == "person" else []
    return [one for one in {*words[:1], *words[1:][-1:]} if len(one) > MIN_LATIN_CHARS and not is_word(one)]


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
    if kind == "email":
        return original.casefold()
    return " ".join(WORD.findall(_lower(original).casefold()))


def _texts_of(row: Draft | Failure) -> list[str]:
    """Every text of a row that would be stored, in an order that `_with_texts` follows."""
    if isinstance(row, Failure):
        return [row.message]
    # A role is "user" or the like, and in chat logs the speaker's name.
    spoken = (text for one in row.messages for text in (one.role, one.content))
    return [*spoken, row.reference or "", *_strings(row.metadata)]


def _with_texts(row: Draft | Failure, texts: Sequence[str], counts: Counter[Kind]) -> Draft | Failure:
    return replace(row, message=texts[0]) if isinstance(row, Failure) else _prompt_with(row, texts, counts)


def _prompt_with(row: Draft, texts: Sequence[str], counts: Counter[Kind]) -> Draft:
    left = iter(texts)
    messages = tuple(Message(next(left), next(left)) for _ in row.messages)
    reference = next(left)
    metadata = _replace_strings(row.metadata, left)
    return replace(
        row,
        messages=messages,
        reference=None if row.reference is None else reference,
        metadata={**metadata, METADATA_KEY: dict(sorted(counts.items()))},
    )


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Texts and numbers in JSON, and keys of objects in it; the outermost keys are the data set's own names."""
    if isinstance(value, dict):
        for key, one in value.items():
            if depth:
                yield key
            yield from _strings(one, depth + 1)
    elif isinstance(value, list):
        yield from (text for one in value for text in _strings(one, depth + 1))
    elif (text := _text_of(value)) is not None:
        yield text


def _replace_strings(value: Any, texts: Iterator[str], depth: int = 0) -> Any:
    if isinstance(value, dict):
        new: dict[str, Any] = {}
        for key, one in value.items():
            name = next(texts) if depth else key
            # Two keys may name one person.
            while name in new:
                name += "'"
            new[name] = _replace_strings(one, texts, depth + 1)
        return new
    if isinstance(value, list):
        return [_replace_strings(one, texts, depth + 1) for one in value]
    if (before := _text_of(value)) is not None:
        text = next(texts)
        # A number that is not personal data stays a number.
        return value if text == before else text
    return value


def _text_of(value: Any) -> str | None:
    # A column of phone numbers with gaps is one of floats in pandas.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
