"""Right and wrong answers in the forms in which models write them, as pairs of JSON Lines in the folder `pairs`.

`right` is true, false, or null where no judge can tell. A wrong answer may be undecided too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.judging.process import JudgeProcess

PAIRS = Path(__file__).with_name("pairs")


def pairs_of(kind: str) -> list[Any]:
    rows = [json.loads(line) for line in (PAIRS / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row, id=row["id"]) for row in rows]


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeProcess]:
    with JudgeProcess() as process:
        yield process


@pytest.mark.parametrize("pair", [*pairs_of("math"), *pairs_of("exact"), *pairs_of("code")])
def test_pair(judge: JudgeProcess, pair: dict[str, Any]) -> None:
    verdict = judge.judge(
        pair["judge"], pair["answer"], pair["reference"], pair.get("metadata", {}), pair.get("truncated", False)
    )
    if pair["right"] is None:
        assert verdict.correct is None, verdict
    elif pair["right"]:
        assert verdict.correct is True, verdict
    else:
        assert verdict.correct is not True, verdict
    assert verdict.rule
