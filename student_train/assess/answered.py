"""A student's judged answers in groups: by source, by length of the prompt and of the teacher's chains; calibration."""

from collections.abc import Sequence

import numpy as np

from stillroom.config import Json
from student_train.answers import Given
from student_train.assess.breakdown import doubling_name, doublings
from student_train.assess.calibration import CalibrationSums
from student_train.compare.statistics import SHARE, mean_interval


def answer_groups(given: Sequence[Given]) -> Json:
    """Rows of accuracy by group with 95% intervals, and the calibration of the answers."""
    prompts = [one.prompt for one in given]
    # The teacher's length says how much work a prompt takes; the student's own length would be part of the outcome.
    by: dict[str, Sequence[str | int | None]] = {
        "source": [prompt.source for prompt in prompts],
        "prompt_tokens": _lengths([len(prompt.token_ids) for prompt in prompts]),
        "teacher_tokens": _lengths([prompt.teacher_tokens for prompt in prompts]),
    }
    return {"by": {name: _rows(groups, given) for name, groups in by.items()}, "calibration": _calibration(given)}


def _lengths(lengths: Sequence[float | None]) -> list[int | None]:
    return [None if length is None else int(doublings(np.array([length]))[0]) for length in lengths]


def _rows(groups: Sequence[str | int | None], given: Sequence[Given]) -> list[Json]:
    rows = []
    for group in sorted({one for one in groups if one is not None}, key=lambda one: (isinstance(one, str), one)):
        own = [one for one, of in zip(given, groups, strict=True) if of == group]
        scores = [float(one.verdict.correct) for one in own if one.verdict.correct is not None]
        known = [one.prompt.teacher_accuracy for one in own if one.prompt.teacher_accuracy is not None]
        accuracy = mean_interval(scores, SHARE)
        rows.append(
            {
                "group": group if isinstance(group, str) else doubling_name(group),
                "num_prompts": len(own),
                "num_judged": len(scores),
                "accuracy": None if accuracy is None else accuracy.model_dump(),
                "teacher_accuracy": sum(known) / len(known) if known else None,
            }
        )
    return rows


def _calibration(given: Sequence[Given]) -> Json | None:
    """Calibration of the answers that have a confidence and a verdict."""
    known = [
        (one.confidence, one.verdict.correct)
        for one in given
        if one.confidence is not None and one.verdict.correct is not None
    ]
    sums = CalibrationSums()
    if known:
        confidence_N, correct_N = (np.array(column, np.float64) for column in zip(*known, strict=True))
        sums.add(confidence_N, correct_N)
    found = sums.result()
    return None if found is None else found.model_dump()
