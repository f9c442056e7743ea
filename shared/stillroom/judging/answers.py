"""The math and exact judges: the marked answer, found and compared with a reference."""

import json
import re
from dataclasses import dataclass

from stillroom.judging.marked import Candidate, Found, boxes, fenced_blocks, find_answer, plain
from stillroom.judging.texts import choice_letter, number_of, same_answer

MAX_SHOWN = 200
"""Characters of each side that a verdict keeps."""
NO_REFERENCE = re.compile(r"(?:nan|none|null|n/?a|n\.a\.|nil|undefined reference|-|<na>|\[\s*\])?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`score` is 0 to 1. Both are None where nothing can be said: no reference, or the check itself gave up.

    `rule` names what decided, `compared` the two texts: what was taken as the answer, and the reference.
    """

    correct: bool | None
    score: float | None
    rule: str | None = None
    compared: str | None = None


def decided(correct: bool, rule: str, compared: str | None = None) -> Verdict:
    """A verdict of right or wrong."""
    return Verdict(correct, float(correct), rule, compared)


def undecided(rule: str, compared: str | None = None) -> Verdict:
    """A verdict that says nothing, and why."""
    return Verdict(None, None, rule, compared)


def reference_problem(reference: str | None, kind: str) -> str | None:
    """Why a reference is none: missing, NaN, "n/a", or an object where this kind of judge needs a text."""
    if reference is None or NO_REFERENCE.fullmatch(reference.strip()):
        return "no reference"
    if kind in ("math", "exact") and re.fullmatch(r"\s*\{\s*\"[^\"]+\"\s*:.*\}\s*", reference, re.DOTALL):
        return "the reference is a struct"
    return None


def final_reference(reference: str) -> str:
    r"""What a worked solution comes to: behind `####`, in its last box; a list's only text; another one is whole."""
    text = reference.strip()
    if only := re.fullmatch(r'\[\s*("(?:[^"\\]|\\.)*")\s*\]', text):
        # Not strict: data sets leave raw line breaks in JSON strings.
        text = str(json.loads(only[1], strict=False)).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    found = boxes(text)
    if found and plain(text) != found[-1][2]:
        return found[-1][2]
    tag = re.fullmatch(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return tag[1].strip() if tag else text


def judge_exact(answer: str, reference: str, truncated: bool) -> Verdict:
    """Any of the candidates must say the same as the reference to a person."""
    wanted = final_reference(reference)
    whole = same_answer(wanted, answer) if not truncated else None
    if whole:
        return decided(True, f"whole, {whole}", shown(answer, wanted))
    found = find_answer(answer, truncated)
    if found.problem:
        return decided(False, found.problem, shown("", wanted))
    candidates = found.candidates
    if not any(one.mark in ("tag", "box", "line") for one in candidates):
        candidates += tuple(Candidate(block, "fence") for block in fenced_blocks(answer)[-1:])
        candidates += _leading(answer, wanted)
    for one in candidates:
        rule = _same_exact(wanted, one)
        if rule:
            return decided(True, f"{one.mark}, {rule}", shown(one.text, wanted))
    return decided(False, f"{candidates[0].mark}, text", shown(candidates[0].text, wanted))


def _same_exact(wanted: str, one: Candidate) -> str | None:
    rule = same_answer(wanted, one.text)
    # A number out of a sentence stands for a number, not for a letter or a date.
    return None if one.mark == "number" and number_of(wanted) is None else rule


def _leading(answer: str, wanted: str) -> tuple[Candidate, ...]:
    """`B) Paris` on a line of its own, the only such line; `Yes, it is.`"""
    if match := re.match(r"\W*(yes|no|true|false)\s*[,.:;!—]", answer, re.IGNORECASE):
        return (Candidate(match[1], "first word"),)
    if choice_letter(wanted) is None:
        return ()
    named = {match.upper() for match in re.findall(r"\b(?:option|choice)\s+[(*]*([A-Za-z])\b", answer, re.IGNORECASE)}
    if len(named) == 1:
        return (Candidate(named.pop(), "option"),)
    lines = [line for line in answer.splitlines() if re.match(r"\W*[A-Za-z][).:]\s", line)]
    return (Candidate(lines[0], "option"),) if len(lines) == 1 else ()


def judge_math(answer: str, reference: str, truncated: bool) -> Verdict:
    """The first candidate that has a value of its own decides."""
    # sympy and the LaTeX parser take a second to load: only where mathematics is judged.
    from stillroom.judging.values import Group, Words, parse_value

    wanted_text = final_reference(reference)
    letter = choice_letter(wanted_text)
    wanted = parse_value(wanted_text)
    if wanted is None:
        return undecided("no reference")
    found = find_answer(answer, truncated)
    if found.problem:
        return decided(False, found.problem, shown("", wanted_text))
    if letter is not None:
        return _judge_choice(found, letter, answer, wanted_text)
    if isinstance(wanted, Words):
        exact = judge_exact(answer, wanted_text, truncated)
        return exact if exact.correct else _first_value(found.candidates, wanted, wanted_text)
    candidates = found.candidates
    if isinstance(wanted, Group):
        # Several boxes are a list only if they are as many as the reference has items.
        several = [
            one for one in candidates if one.mark == "all boxes" and one.text.count(", ") + 1 == len(wanted.items)
        ]
        candidates = (*several, *(one for one in candidates if one.mark != "all boxes"))
    return _first_value(candidates, wanted, wanted_text)


def _first_value(candidates: tuple[Candidate, ...], wanted: object, wanted_text: str) -> Verdict:
    from stillroom.judging.equality import equal
    from stillroom.judging.values import parse_value

    first: Verdict | None = None
    for one in candidates:
        if one.mark == "all boxes" and candidates[0] is not one:
            continue
        if plain(one.text) == plain(wanted_text):
            return decided(True, f"{one.mark}, text", shown(one.text, wanted_text))
        given = parse_value(one.text)
        if given is None:
            continue
        correct, rule = equal(wanted, given)  # type: ignore[arg-type]
        verdict = Verdict(
            correct, None if correct is None else float(correct), f"{one.mark}, {rule}", shown(one.text, wanted_text)
        )
        # A sentence is not a value; its conclusion follows it.
        if correct or not _is_prose(given):
            return verdict
        first = first or verdict
    if first is None:
        return decided(False, "no answer found", shown("", wanted_text))
    return first


def _is_prose(value: object) -> bool:
    from stillroom.judging.values import Group, Raw, Words

    if isinstance(value, Group):
        return any(map(_is_prose, value.items))
    return isinstance(value, Words | Raw)


def _judge_choice(found: Found, letter: str, answer: str, wanted: str) -> Verdict:
    candidates = found.candidates
    if not any(one.mark in ("tag", "box", "line") for one in candidates):
        candidates += _leading(answer, wanted)
    for one in candidates:
        given = choice_letter(one.text, with_option=True)
        if given is not None:
            return decided(given == letter, f"{one.mark}, choice", shown(one.text, wanted))
    return decided(False, f"{candidates[0].mark}, no choice", shown(candidates[0].text, wanted))


def shown(answer: str, reference: str) -> str:
    """The two sides of a comparison as one line each would show them."""
    left, right = (one if len(one) <= MAX_SHOWN else one[: MAX_SHOWN - 1] + "…" for one in (answer, reference))
    return f"{left} | {right}"
