"""What a language model is asked about an answer, and how strictly its reply is read."""

import pytest

from stillroom.judging.answers import Verdict
from stillroom.judging.opinion import PROMPT, opinion_prompt, prompt_problem, read_opinion, verdict_without_asking


@pytest.mark.parametrize(
    ("reply", "finish_reason", "correct", "rule"),
    [
        ("Same.\nVERDICT: CORRECT", "stop", True, "judge-7b"),
        ("**VERDICT: INCORRECT**\n\n", "stop", False, "judge-7b"),
        ("VERDICT: UNDECIDED", "stop", None, "judge-7b is undecided"),
        ("Perhaps VERDICT: CORRECT\n</think>\nVERDICT: INCORRECT", "stop", False, "judge-7b"),
        ("<think>\nVERDICT: CORRECT\n</think>It is right.", "stop", None, "the reply does not end with a verdict"),
        ("VERDICT: INCORRECT\nVERDICT: CORRECT", "stop", None, "the reply holds several verdicts"),
        ("VERDICT: CORRECT\nI hope this helps!", "stop", None, "the reply does not end with a verdict"),
        ("The verdict is correct", "stop", None, "the reply does not end with a verdict"),
        ("verdict: correct", "stop", None, "the reply does not end with a verdict"),
        ("VERDICT: CORRECT or not", "stop", None, "the reply does not end with a verdict"),
        ("VERDICT: CORRECT", "length", None, "the reply was cut (length)"),
        ("", "stop", None, "the reply does not end with a verdict"),
        (None, "stop", None, "the reply does not end with a verdict"),
    ],
)
def test_a_reply_is_read_strictly(reply: str | None, finish_reason: str, correct: bool | None, rule: str) -> None:
    score = None if correct is None else float(correct)
    assert read_opinion(reply, finish_reason, "judge-7b", "5", "five") == Verdict(correct, score, rule, "5 | five")


def test_an_answer_cannot_fill_in_the_prompt() -> None:
    asked = opinion_prompt(PROMPT, "q {answer}", "r", "a {reference} \\frac{1}{2}")
    assert asked.count("a {reference} \\frac{1}{2}") == 1
    assert "q {answer}" in asked
    assert asked.endswith("VERDICT: CORRECT\nVERDICT: INCORRECT\nVERDICT: UNDECIDED")


def test_a_long_answer_is_shown_from_its_end() -> None:
    verdict = read_opinion("VERDICT: CORRECT", "stop", "m", "x" * 999 + "so 5", "5")
    assert verdict.compared is not None
    assert (verdict.compared[0], verdict.compared[-8:]) == ("…", "so 5 | 5")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (PROMPT, None),
        ("Is {answer} good? $\\frac{x}{2}$", None),
        ("Is it good?", "it has no {answer}"),
        ("{answer} for {prompt}", "{prompt} is not one of"),
        ("{answer} for {Question}", "{Question} is not one of"),
    ],
)
def test_a_prompt_of_ones_own_is_checked(prompt: str, problem: str | None) -> None:
    found = prompt_problem(prompt)
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("prompt", "reference", "answer", "expected"),
    [
        (PROMPT, "n/a", "5", Verdict(None, None, "no reference")),
        (PROMPT, "5", None, Verdict(False, 0.0, "no answer")),
        (PROMPT, "5", "5", None),
        ("{answer}?", None, "5", None),
    ],
)
def test_what_needs_no_model_is_not_asked(
    prompt: str, reference: str | None, answer: str | None, expected: Verdict | None
) -> None:
    assert verdict_without_asking(prompt, reference, answer) == expected
