"""Whether a student's answers survive a prompt that says the same less neatly: perturb.py's changes, asked and judged.

In: prompts with the student's answers to them. Out: for each change, accuracy before and after on the same prompts with
the paired difference, and agreement: how often the answer stays what it was, right or wrong. Costs one more answer a
prompt and change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from stillroom.config import Json
from stillroom.judging.marked import find_answer
from stillroom.judging.process import JudgeProcess
from stillroom.judging.texts import choice_letter
from student_train.answers import AskedPrompt, GenerateConfig, Given, answer_and_judge
from student_train.assess.perturb import KINDS, Perturbed, perturb
from student_train.compare.statistics import DIFFERENCE, Interval, mean_interval, sign_test

BY_REFERENCE = ("exact", "math")
"""Judges that can compare two answers. For others an answer stays where its verdict does."""


class Robustness(BaseModel):
    """Results on the prompts that a change applies to. Accuracies are of those judged both times; agreement is of all
    where two answers can be compared.
    """

    model_config = ConfigDict(frozen=True)

    num_prompts: int
    num_judged: int
    accuracy_clean: float | None
    accuracy: float | None
    accuracy_difference: Interval | None
    p_value: float | None
    """McNemar's exact test."""
    num_compared: int
    agreement: float | None
    example: str | None
    """A changed prompt, as it was asked."""


def robustness(
    model: Any,
    tokenizer: Any,
    clean: Sequence[Given],
    config: GenerateConfig,
    render: Callable[[AskedPrompt], list[int]],
) -> dict[str, Robustness]:
    """By change. `render` gives a prompt's messages the token ids that the student reads."""
    found = {}
    for kind in KINDS:
        pairs = [
            (given, changed) for given in clean if (changed := perturb(kind, given.prompt, config.seed)) is not None
        ]
        prompts = [_rendered(changed.prompt, render) for _, changed in pairs]
        asked = answer_and_judge(model, tokenizer, prompts, config, label=f"generate {kind}") if prompts else []
        found[kind] = _summary([given for given, _ in pairs], [changed for _, changed in pairs], asked)
    return found


def _rendered(prompt: AskedPrompt, render: Callable[[AskedPrompt], list[int]]) -> AskedPrompt:
    return replace(prompt, token_ids=render(prompt))


def _summary(clean: Sequence[Given], changes: Sequence[Perturbed], noisy: Sequence[Given]) -> Robustness:
    scored = [
        (float(before.verdict.correct), float(after.verdict.correct))
        for before, after in zip(clean, noisy, strict=True)
        if before.verdict.correct is not None and after.verdict.correct is not None
    ]
    with JudgeProcess() as judge:
        compared = [
            same
            for before, change, after in zip(clean, changes, noisy, strict=True)
            if (same := _is_same(judge, before, after, change.letters)) is not None
        ]
    wins = sum(after > before for before, after in scored)
    losses = sum(after < before for before, after in scored)
    return Robustness(
        num_prompts=len(clean),
        num_judged=len(scored),
        accuracy_clean=_mean([before for before, _ in scored]),
        accuracy=_mean([after for _, after in scored]),
        accuracy_difference=mean_interval([after - before for before, after in scored], DIFFERENCE),
        p_value=sign_test(losses, wins) if scored else None,
        num_compared=len(compared),
        agreement=_mean([float(same) for same in compared]),
        example=next((str(one.prompt.messages[-1]["content"]) for one in changes), None),
    )


def _is_same(judge: JudgeProcess, before: Given, after: Given, letters: Mapping[str, str]) -> bool | None:
    """Whether both answers say the same; None where nothing can tell."""
    kind = before.prompt.judge
    if kind not in BY_REFERENCE:
        one, other = before.verdict.correct, after.verdict.correct
        return None if one is None or other is None else one == other
    first, second = _taken(before), _taken(after)
    if first is None or second is None:
        # Neither said anything: the same, as far as anybody can see.
        return first is second
    letter = choice_letter(first, with_option=True)
    if letter is not None and letter in letters:
        first = letters[letter]
    return judge.judge(kind, after.answer, first, {}, after.is_cut).correct


def _taken(given: Given) -> str | None:
    """What a judge takes for the answer."""
    if given.answer is None:
        return None
    found = find_answer(given.answer, given.is_cut)
    return found.candidates[0].text if found.candidates else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def as_json(found: Mapping[str, Robustness]) -> Json:
    """For the result of `eval`."""
    return {kind: one.model_dump() for kind, one in found.items()}
