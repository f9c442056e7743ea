"""Edits of a question's text: synonyms, insertions, other numbers. Pure functions of the text and a generator.

Each returns the new text and what was changed, or None where there is nothing to change. Formulas, code and links stay
as they are.
"""

import math
import re
from collections.abc import Sequence
from random import Random

from teacher_cache.prompts.lexicon import Lexicon

PROTECTED = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$(?=[^$\n]*[\\^_=])[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*"
    r"|https?://\S+",
    re.DOTALL,
)
"""Code, formulas and links. "$5 and $6" is money, not a formula."""
WORD = re.compile(r"(?<![\w\\'’-])[a-z]{3,}(?![\w'’-])")
NUMBER = re.compile(r"(?<![\w.,/\\^:-])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![\w/^:-]|[.,]\d)")
"""Not in names, fractions, dates, times and ranges."""
ARTICLE = re.compile(r"\b(an?)\s$", re.IGNORECASE)

MAX_NUMBER = 10**18

Edited = tuple[str, list[list[str]]]
"""The new text, and pairs of what was and what is there."""


def replace_synonyms(text: str, frac: float, lexicon: Lexicon, rng: Random) -> Edited | None:
    """`frac` of all words, among those that have synonyms, are replaced by one."""
    words = _words(text)
    usable = [(one, fitting) for one in words if (fitting := _fitting(text, one, lexicon))]
    if not usable:
        return None
    num_edits = min(len(usable), max(1, round(frac * len(words))))
    chosen = sorted(rng.sample(usable, num_edits), key=lambda one: one[0].start())
    pairs = [(found.span(), rng.choice(fitting)) for found, fitting in chosen]
    return _with(text, pairs), [[text[start:end], new] for (start, end), new in pairs]


def insert_synonyms(text: str, frac: float, lexicon: Lexicon, rng: Random) -> Edited | None:
    """Synonyms of `frac` of the words are inserted behind random words."""
    words = _words(text)
    usable = [found for one in words if (found := lexicon.synonyms(one[0]))]
    if not usable:
        return None
    num_edits = min(len(words), max(1, round(frac * len(words))))
    places = sorted(one.end() for one in rng.sample(words, num_edits))
    added = [rng.choice(rng.choice(usable)) for _ in places]
    pairs = [((place, place), f" {word}") for place, word in zip(places, added, strict=True)]
    return _with(text, pairs), [["", word] for word in added]


def change_numbers(text: str, spread: float, rng: Random) -> Edited | None:
    """Numbers above 1 become others near them, equal ones the same."""
    changed: dict[str, str] = {}
    pairs = []
    for found in _outside_protected(text, NUMBER):
        old = found[0]
        if old not in changed:
            is_percent = text[found.end() :].lstrip().startswith(("%", "percent"))
            changed[old] = _other_number(old, spread, 100 if is_percent else MAX_NUMBER, rng)
        pairs.append((found.span(), changed[old]))
    if all(old == new for old, new in changed.items()):
        return None
    return _with(text, pairs), [[old, new] for old, new in changed.items() if old != new]


def numbers_in(text: str) -> list[str]:
    """All numbers, sorted, without separators of thousands: what a paraphrase must keep."""
    return sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)))


def _other_number(old: str, spread: float, most: int, rng: Random) -> str:
    whole, _, decimals = old.replace(",", "").partition(".")
    # In units of the last decimal, so that 2.50 stays a price.
    unit = 10 ** len(decimals)
    value = int(whole + decimals)
    low, high = max(math.ceil(value * (1 - spread)), 1), math.floor(value * (1 + spread))
    if value <= most * unit:
        high = min(high, most * unit)
    if value <= unit or low == high:
        return old
    new = rng.randint(low, high - 1)
    # One of the others, all equally likely.
    front, back = divmod(new + (new >= value), unit)
    return (f"{front:,}" if "," in old else str(front)) + (f".{back:0{len(decimals)}d}" if decimals else "")


def _words(text: str) -> list[re.Match[str]]:
    return _outside_protected(text, WORD)


def _outside_protected(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    spans = [found.span() for found in PROTECTED.finditer(text)]
    return [one for one in pattern.finditer(text) if not any(start <= one.start() < end for start, end in spans)]


def _fitting(text: str, word: re.Match[str], lexicon: Lexicon) -> list[str]:
    """Synonyms that fit behind the article, if there is one."""
    found = lexicon.synonyms(word[0])
    if ARTICLE.search(text[: word.start()]) is None:
        return found
    return [one for one in found if (one[0] in "aeiou") == (word[0][0] in "aeiou")]


def _with(text: str, pairs: Sequence[tuple[tuple[int, int], str]]) -> str:
    """The text with spans, in order, replaced."""
    parts, done = [], 0
    for (start, end), new in pairs:
        parts += [text[done:start], new]
        done = end
    return "".join([*parts, text[done:]])
