"""Alignment between tokenizers that people use, where they were fetched (`python -m benchmarks.tokenizers --fetch`)."""

import pydoc_data.topics
from typing import Any

import pytest

from benchmarks.tokenizers import FOLDER, PAIRS, R1_STYLE, compare, load
from stillroom.errors import DataError

LEAST_COMMON = 0.75
"""Of the student's boundaries. DeepSeek keeps up to three digits together, the others one."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """By name."""
    try:
        return {name: load(FOLDER, name) for name in dict.fromkeys(one for pair in PAIRS for one in pair)}
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_common_boundaries_are_those_of_the_tokenizers_own_offsets(
    tokenizers: dict[str, Any], teacher: str, student: str
) -> None:
    texts = [text for text in list(pydoc_data.topics.topics.values())[:12] if text.isascii()]
    row = compare(teacher, student, tokenizers, texts)
    common = num_student = 0
    for text in texts:
        offsets = [
            tokenizers[name](text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
            for name in (teacher, student)
        ]
        starts = [{start for start, _ in one["offset_mapping"]} for one in offsets]
        common, num_student = common + len(starts[0] & starts[1]), num_student + len(starts[1])
    assert row["texts_common_of_student_frac"] == pytest.approx(common / num_student, abs=1e-9)
    assert row["texts_aligned_frac"] == 1.0
    assert row["r1_aligned_frac"] == 1.0
    assert row["r1_common_of_student_frac"] > LEAST_COMMON
    assert not R1_STYLE.isascii()
