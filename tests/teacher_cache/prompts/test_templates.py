"""Templates: exact answers, variants that stay when more are asked for, and nothing but arithmetic."""

from fractions import Fraction
from typing import Any

import pytest

from stillroom.config import validate_config
from stillroom.errors import ConfigError, DataError
from stillroom.judging.judges import judge_answer
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.expressions import check_expression, evaluate, exact, written
from teacher_cache.prompts.prompts import LoadedPrompts, load_prompts

TRAIN = {
    "text": r"{who} rides {v} km/h for {hours} h, {km} km in all? Give \boxed{answer} in {unit}.",
    "variables": {
        "who": {"choices": ["Ann", "Bo"]},
        "v": {"min": 40, "max": 120, "step": 10},
        "hours": {"min": 0.5, "max": 4, "step": 0.5},
        "km": {"expression": "v * hours"},
    },
    "conditions": ["km % 3 == 0", "v > 50 or who == 'Ann'"],
    "answer": "km / 3",
}


def load(*templates: dict[str, Any], **more: Any) -> LoadedPrompts:
    source = {"kind": "template", "name": "rides", "templates": list(templates), "size": 12, **more}
    return load_prompts(validate_config({"sources": [source], "heldout_frac": 0.9}, PromptsConfig, "test"))


def test_variants_are_distinct_solved_and_never_held_out() -> None:
    prompts = load(TRAIN).prompts
    assert len({prompt.prompt_id for prompt in prompts}) == 12
    for prompt in prompts:
        how = prompt.metadata["augment"]
        values = how["values"]
        text = prompt.messages[0].content
        assert f"{values['who']} rides {values['v']} km/h for {values['hours']} h" in text
        assert r"\boxed{answer} in {unit}" in text, "other braces stand for themselves"
        assert Fraction(str(prompt.reference)) * 3 == Fraction(values["v"]) * Fraction(values["hours"])
        assert (prompt.split, prompt.metadata["judge"], how["template"]) == ("train", "math", 0)
        assert judge_answer("math", rf"\boxed{{{prompt.reference}}}", prompt.reference, prompt.metadata).correct
    more = {prompt.prompt_id for prompt in load(TRAIN, size=20).prompts}
    assert more > {prompt.prompt_id for prompt in prompts}
    behind = load({**TRAIN, "text": "other {v}, {km}"}, TRAIN).prompts
    assert {one.prompt_id for one in prompts} < {one.prompt_id for one in behind}


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("0.1 * 3", "0.3"),
        ("7 / 2 + a", "5"),
        ("1 / 3", "1/3"),
        ("-(a + 0.25)", "-1.75"),
        ("sqrt(a * 6)", "3"),
        ("sqrt(2)", "1.41421356237"),
        ("max(a, 2) ** -2", "0.25"),
        ("comb(5, 2) % 4 if a > 1 else 0", "2"),
        ("round(10 / 3, 2)", "3.33"),
        ("gcd(12, 18) + floor(7 / 2)", "9"),
        ("0.0005 * 2", "0.001"),
    ],
)
def test_answers_are_exact(expression: str, text: str) -> None:
    check_expression(expression, {"a"})
    assert written(evaluate(expression, {"a": exact(1.5)})) == text


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('x')",
        "a.__class__",
        "(lambda: 1)()",
        "[i for i in (1,)]",
        "a[0]",
        "f'{a}'",
        "open('x')",
        "max(a, key=abs)",
        "b + 1",
        "(a := 1)",
        "1 +",
        "a" * 2000,
    ],
)
def test_anything_but_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ConfigError, match=r"expression|uses|calls"):
        load({**TRAIN, "answer": expression})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "v / (who == 'Cy')"}, "has no value at who="),
        ({"answer": "v ** 9999"}, "is too large"),
        ({"conditions": ["v == 50", "who == 'Bo'"]}, "only 8 distinct variants found, and size is 12"),
    ],
)
def test_what_cannot_be_made_is_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load({**TRAIN, **change})


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"v": {"min": 3, "max": 2}}, "max=2 is below min=3"),
        ({"v": {"min": 3, "maxx": 4}}, "maxx"),
        ({"v": {"min": 3, "max": 4}, "w": {"choices": [1]}}, "variable 'w' has no effect"),
        ({"v": {"expression": "w + 1"}, "w": {"choices": [1]}}, "unknown name 'w'"),
    ],
)
def test_wrong_variables_are_refused(variables: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load({"text": "{v}", "variables": variables})
