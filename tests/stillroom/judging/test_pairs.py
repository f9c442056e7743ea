"""Right and wrong answers in the forms in which models write them, as pairs of JSON Lines in the folder `pairs`.

`right` is true, false, or null where no judge can tell. A wrong answer may be undecided too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.judging.pairs import read_pairs
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


def test_a_file_of_pairs_is_read_as_a_build_would_judge_it(tmp_path: Path) -> None:
    answers = ["5\u2028\u0085", "<think>5</think>6", "5</think>6", "<think>5", "6 <think>"]
    rows = [json.dumps({"judge": "exact", "answer": one, "reference": "5"}, ensure_ascii=False) for one in answers]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    found = [pair.answer for pair in read_pairs(tmp_path / "a.jsonl")]
    assert found == ["5\u2028\u0085", "6", "6", None, "6 <think>"]
