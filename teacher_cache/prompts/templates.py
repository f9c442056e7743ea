"""Prompts from templates: one question with other values each time, and its answer by an expression.

In: templates of the configuration. Out: `size` distinct variants of each. Variant i depends on the seed, the template
and the variants before it, so a larger `size` keeps those that exist.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from stillroom.errors import DataError
from stillroom.schema.records import stable_hash
from teacher_cache.prompts.config import (
    NAME_IN_TEMPLATE,
    ChoiceVariable,
    ExpressionVariable,
    RangeVariable,
    Template,
    TemplateSource,
)
from teacher_cache.prompts.expressions import Value, evaluate, exact, whole, written

MAX_DRAWS = 2000
"""After this many draws without a new variant, all variants count as found."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A question with values filled in. `values` as they are written in the question."""

    template: int
    number: int
    question: str
    answer: str | None
    values: Mapping[str, str]


def variants(source: TemplateSource) -> Iterator[Variant]:
    """All variants, template by template. Raises DataError if a template has too few, or an expression has no value."""
    try:
        for number, template in enumerate(source.templates):
            yield from _of_template(source, number, template)
    except ImportError as error:
        raise DataError(f"source {source.name} needs the package simpleeval: pip install simpleeval") from error


def _of_template(source: TemplateSource, number: int, template: Template) -> Iterator[Variant]:
    where = f"source {source.name}, template {number}"
    # Of the template itself, so that another template before it changes nothing.
    rng = random.Random(stable_hash("template", source.seed, template.model_dump(mode="json")))
    seen: set[str] = set()
    for index in range(source.size):
        for _ in range(MAX_DRAWS):
            values = _drawn(template, rng, where)
            question = _filled(template.text, values)
            if question not in seen and all(_value(one, values, where) for one in template.conditions):
                break
        else:
            raise DataError(
                f"{where}: only {index} distinct variants found, and size is {source.size}: widen its variables, relax "
                "its conditions or lower size"
            )
        seen.add(question)
        answer = None if template.answer is None else written(_value(template.answer, values, where))
        yield Variant(number, index, question, answer, {name: written(value) for name, value in values.items()})


def _drawn(template: Template, rng: random.Random, where: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, variable in template.variables.items():
        match variable:
            case RangeVariable():
                step = Fraction(exact(variable.step))
                values[name] = whole(Fraction(exact(variable.min)) + step * rng.randrange(variable.count))
            case ChoiceVariable():
                values[name] = exact(rng.choice(variable.choices))
            case ExpressionVariable():
                values[name] = _value(variable.expression, values, where)
    return values


def _value(expression: str, values: Mapping[str, Value], where: str) -> Value:
    try:
        return evaluate(expression, values)
    except ValueError as error:
        given = ", ".join(f"{name}={written(value)}" for name, value in values.items())
        raise DataError(
            f"{where}: {expression!r} has no value at {given}: {error}: exclude it in conditions"
        ) from error


def _filled(text: str, values: Mapping[str, Value]) -> str:
    def value(found: re.Match[str]) -> str:
        return written(values[found[1]]) if found[1] in values else found[0]

    return NAME_IN_TEMPLATE.sub(value, text)
