"""The same question, asked less neatly: typing noise, an irrelevant sentence, options in another order.

In: a prompt, a seed. Out: the prompt with its last user message changed, and its reference too where options moved; or
None where this change does not apply. What decides the answer stays: digits, formulas, code, names of options and words
of an exact answer are never touched. Offline, and the same for the same seed.
"""

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from stillroom.judging.texts import choice_letter
from stillroom.schema.records import stable_hash
from student_train.answers import AskedPrompt

TYPING, DISTRACTOR, OPTIONS = "typing", "distractor", "options"
KINDS = (TYPING, DISTRACTOR, OPTIONS)

NOISY_SHARE = 0.15
"""Share of words with a typing mistake; at least one."""
MIN_LETTERS = 4
"""Shorter words become other words too easily."""

# Neighbours on a QWERTY keyboard, within a row.
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    letter: [row[place] for place in (number - 1, number + 1) if 0 <= place < len(row)]
    for row in ROWS
    for number, letter in enumerate(row)
}

PROTECTED = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*|<[^<>\s][^<>]*>"
    r"|https?://\S+|\S*[_@/\\]\S*",
    re.DOTALL,
)
"""Code, formulas, tags, addresses, identifiers."""
WORD = re.compile(rf"(?<![\w'’-])[a-z]{{{MIN_LETTERS},}}(?![\w'’-])")
"""Lower case only: names and abbreviations may be what is asked for."""

SENTENCES = (
    "The bakery on the corner opens at seven.",
    "My neighbour has painted the fence green.",
    "It rained for most of last Tuesday.",
    "The old clock in the hall has stopped again.",
    "A cousin of mine collects stamps from Iceland.",
    "The bus to the harbour was late this morning.",
    "Someone left an umbrella at the library.",
    "The museum shows Dutch paintings this month.",
)
CHINESE = (
    "街角的面包店早上七点开门。",
    "上周二几乎下了一整天的雨。",
    "邻居把篱笆刷成了绿色。",
    "有人把雨伞忘在了图书馆。",
)
"""They hold no digits, and nothing that a question would count."""
CJK = re.compile(r"[一-鿿]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])")

OPTION = re.compile(r"^[ \t]*[(\[]?(?P<letter>[A-Z])[)\].:、][ \t]*(?P<text>\S.*?)[ \t]*$", re.MULTILINE)
FIXED = re.compile(r"\b(?:all|none|both|neither|any) of (?:the|these)\b|\b[A-H] (?:and|or) [A-H]\b|以上", re.IGNORECASE)
"""Options that speak of others."""


@dataclass(frozen=True)
class Perturbed:
    """A changed prompt; `letters` maps each option's old letter to its new one."""

    prompt: AskedPrompt
    letters: Mapping[str, str] = field(default_factory=dict)


def perturb(kind: str, prompt: AskedPrompt, seed: int) -> Perturbed | None:
    """The prompt changed in one of KINDS; None where it has nothing to change. Token ids are the caller's to renew."""
    number = next((n for n in reversed(range(len(prompt.messages))) if prompt.messages[n]["role"] == "user"), None)
    if number is None:
        return None
    # Not hash(): that of a text differs from process to process.
    rng = random.Random(stable_hash("perturb", kind, seed, prompt.prompt_id))
    before, reference = str(prompt.messages[number]["content"]), prompt.reference
    letters: dict[str, str] = {}
    if kind == OPTIONS:
        # Other judges know the answer from elsewhere than the reference, where no letter can be changed. A bare small
        # letter names an option or is a variable.
        can_follow = prompt.judge in ("exact", "math") and re.fullmatch(r"\s*[a-z]\s*", reference or "") is None
        after, letters = reorder_options(before, rng) if can_follow else (before, {})
        reference = _with_letter(reference, letters)
    elif kind == TYPING:
        # A student that takes its answer from the prompt would copy a mistake in it.
        after = typing_noise(before, rng, WORD.findall(reference or "") if prompt.judge == "exact" else ())
    else:
        after = distract(before, rng)
    if after == before:
        return None
    messages = [*prompt.messages]
    messages[number] = {**messages[number], "content": after}
    return Perturbed(replace(prompt, messages=messages, reference=reference), letters)


def typing_noise(text: str, rng: random.Random, kept: Collection[str] = ()) -> str:
    """Some words besides `kept` with two letters swapped, one left out, doubled, or the key beside it."""
    protected = _spans(PROTECTED, text)
    words = [
        match for match in WORD.finditer(text) if not _is_inside(match.start(), protected) and match[0] not in kept
    ]
    chosen = rng.sample(words, min(len(words), max(1, round(NOISY_SHARE * len(words)))))
    # From the last one, so that the places of the others stay right.
    for match in sorted(chosen, key=lambda one: -one.start()):
        text = text[: match.start()] + _mistyped(match[0], rng) + text[match.end() :]
    return text


def distract(text: str, rng: random.Random) -> str:
    """An irrelevant sentence after the first one, or in front of a text of one sentence."""
    is_chinese = CJK.search(text) is not None
    sentence = rng.choice(CHINESE if is_chinese else SENTENCES)
    first = SENTENCE_END.search(text.partition("\n\n")[0])
    if first is None or first.end() == len(text) or _is_inside(first.start(), _spans(PROTECTED, text)):
        return f"{sentence}{'' if is_chinese else ' '}{text}"
    space = "" if is_chinese else " "
    return f"{text[: first.start()]}{space}{sentence}{space}{text[first.end() :]}"


def reorder_options(text: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Options on lines of their own (`A) ...`, `(B) ...`, `C. ...`) moved on in a circle, so that each one moves."""
    options = [*OPTION.finditer(text)]
    letters = [match["letter"] for match in options]
    if len(options) < 2 or letters != [chr(ord("A") + number) for number in range(len(letters))]:
        return text, {}
    if any(FIXED.search(match["text"]) for match in options):
        return text, {}
    shift = rng.randrange(1, len(options))
    for number in reversed(range(len(options))):
        here, there = options[number], options[number - shift]
        text = text[: here.start("text")] + there["text"] + text[here.end("text") :]
    return text, {letter: letters[(number + shift) % len(letters)] for number, letter in enumerate(letters)}


def _mistyped(word: str, rng: random.Random) -> str:
    # The first and last letter stay: people read such words without stopping.
    place = rng.randrange(1, len(word) - 2)
    letter, rest = word[place], word[place + 1 :]
    how = rng.choice(("swap", "drop", "double", "neighbour"))
    # Two equal letters swapped would change nothing.
    if how == "swap" and letter != rest[0]:
        return word[:place] + rest[0] + letter + rest[1:]
    if how == "drop":
        return word[:place] + rest
    if how == "double":
        return word[:place] + letter + letter + rest
    return word[:place] + rng.choice(NEIGHBOURS[letter]) + rest


def _with_letter(reference: str | None, letters: Mapping[str, str]) -> str | None:
    """The reference with its option's new letter; one that names no letter is the option's text, which stays."""
    old = None if reference is None else choice_letter(reference, with_option=True)
    if reference is None or old is None or old not in letters:
        return reference
    return re.sub(rf"(?<![A-Za-z]){old}(?![A-Za-z])", letters[old], reference, count=1, flags=re.IGNORECASE)


def _spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text)]


def _is_inside(place: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= place < end for start, end in spans)
