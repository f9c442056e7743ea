"""Prompts that say the same less neatly: what changes, what must not, and that a seed gives the same."""

import re

import pytest

from student_train.answers import AskedPrompt
from student_train.assess.perturb import CHINESE, KINDS, OPTIONS, SENTENCES, perturb

WORDY = (
    "Maria buys seven crates with 12 apples. How many apples remain after she gives $n_{apples}$ of `given_apples` "
    "away? See https://example.org/apples for \\frac{apples}{crates}."
)
CHOICE = "Which planet is largest?\n\nA) Mars\nB) Jupiter\nC) Venus\nD) Earth\n\nAnswer with the letter."


def prompt_of(text: str, reference: str | None = None, judge: str = "exact", prompt_id: str = "p") -> AskedPrompt:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return AskedPrompt(prompt_id, [], judge, reference, {}, None, None, messages)


def changed(kind: str, text: str, seed: int = 0) -> str:
    found = perturb(kind, prompt_of(text), seed)
    assert found is not None
    assert found.prompt.messages[0]["content"] == "Be brief."
    return found.prompt.messages[1]["content"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_and_another_another(kind: str) -> None:
    text = CHOICE if kind == OPTIONS else WORDY
    assert changed(kind, text) == changed(kind, text)
    assert len({changed(kind, text, seed) for seed in range(12)}) > 1


@pytest.mark.parametrize("seed", range(20))
def test_typing_noise_leaves_numbers_names_and_formulas(seed: int) -> None:
    noisy = changed("typing", WORDY, seed)
    for kept in (
        "Maria",
        "12",
        "$n_{apples}$",
        "`given_apples`",
        "https://example.org/apples",
        "\\frac{apples}{crates}",
    ):
        assert kept in noisy
    before, after = WORDY.split(), noisy.split()
    different = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert 1 <= len(different) <= 2
    assert all(one[0] == other[0] and one[-1] == other[-1] for one, other in different)


def test_typing_noise_leaves_the_answer() -> None:
    prompts = [prompt_of("which one is heavier, stone or paper", "stone", prompt_id=str(n)) for n in range(20)]
    found = [one.prompt.messages[1]["content"] for prompt in prompts if (one := perturb("typing", prompt, 0))]
    assert len(set(found)) > 1
    assert all("stone" in text for text in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann has 3 hens. How many legs?", r"Ann has 3 hens\. (.+) How many legs\?"),
        ("How many legs?", r"(.+) How many legs\?"),
        ("小明有三只鸡。一共几条腿？", r"小明有三只鸡。(.+)一共几条腿？"),
    ],
)
def test_a_distractor_stands_between_sentences_in_their_language(text: str, expected: str) -> None:
    match = re.fullmatch(expected, changed("distractor", text))
    assert match is not None
    assert match[1] in (CHINESE if "。" in text else SENTENCES)
    assert not any(letter.isdigit() for letter in match[1])


@pytest.mark.parametrize(
    ("reference", "old", "shape"),
    [
        ("B", "B", "{}"),
        ("(B)", "B", "({})"),
        ("(b)", "B", "({})"),
        ("B) Jupiter", "B", "{}) Jupiter"),
        ("Jupiter", None, None),
    ],
)
def test_options_move_with_their_reference(reference: str, old: str | None, shape: str | None) -> None:
    found = perturb(OPTIONS, prompt_of(CHOICE, reference), 0)
    assert found is not None
    lines = dict(line.split(") ") for line in found.prompt.messages[1]["content"].splitlines()[2:6])
    assert sorted(lines.values()) == ["Earth", "Jupiter", "Mars", "Venus"]
    assert all(
        lines[new] == dict(zip("ABCD", ("Mars", "Jupiter", "Venus", "Earth"), strict=True))[one]
        for one, new in found.letters.items()
    )
    assert all(one != new for one, new in found.letters.items())
    expected = reference if old is None or shape is None else shape.format(found.letters[old])
    assert found.prompt.reference == expected


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("typing", prompt_of("2 + 2 = ?")),
        (OPTIONS, prompt_of("What is 2 + 2?", "4")),
        (OPTIONS, prompt_of("Pick.\nA) one\nB) All of the above", "A")),
        (OPTIONS, prompt_of("Steps:\nA. one\nC. three", "A")),
        (OPTIONS, prompt_of(CHOICE, "^B$", "regex")),
        (OPTIONS, prompt_of(CHOICE, "b")),
        ("distractor", AskedPrompt("p", [], "exact", "1", {}, None, None)),
    ],
)
def test_what_has_nothing_to_change_is_left_out(kind: str, prompt: AskedPrompt) -> None:
    assert perturb(kind, prompt, 0) is None
