"""`teacher-cache judge --pairs`: verdicts on a file of pairs, without a cache."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.errors import ConfigError, DataError
from stillroom.judging.pairs import read_pairs
from teacher_cache.cli import app

PAIRS: list[dict[str, Any]] = [
    {"id": "a", "judge": "math", "reference": "[2,5)", "answer": "\\boxed{[2,5)}", "right": True},
    {"id": "b", "judge": "math", "reference": "[2,5)", "answer": "\\boxed{[2,5]}", "right": False},
    {"id": "c", "judge": "exact", "reference": None, "answer": "x"},
    {"judge": "code", "reference": ["assert f(1) == 2"], "answer": "```python\ndef f(x): return x + 1\n```"},
    {"judge": "exact", "reference": 5.0, "answer": "It is 5.", "right": True},
]


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_verdicts_come_as_json_lines_in_order(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["judge", "--pairs", str(written(tmp_path, PAIRS)), "--processes", "2"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["correct"] for row in rows] == [True, False, None, True, True]
    assert rows[1] == {
        "id": "b",
        "judge": "math",
        "correct": False,
        "score": 0.0,
        "rule": "box, interval",
        "compared": "[2,5] | [2,5)",
        "right": False,
    }
    assert rows[2]["rule"] == "no reference"
    assert "of 1 wrong answers 1 not judged right (100.0%)" in result.stderr


def test_the_agreement_is_one_json_object(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["judge", "--pairs", str(written(tmp_path, PAIRS[:2])), "--json"])
    assert json.loads(result.stdout)["math"] == {
        "num_pairs": 2,
        "num_undecided": 0,
        "num_right": 1,
        "num_right_judged_right": 1,
        "num_wrong": 1,
        "num_wrong_not_judged_right": 1,
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"reference": "1", "answer": "1"}, r"pairs.jsonl:1 names no judge"),
        ({"judge": "exact", "reference": "1"}, "has no field answer"),
        ({"judge": "exact", "answer": "1", "right": "yes"}, "right is 'yes'"),
        ([1], "a pair is a JSON object"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_pairs(written(tmp_path, [row]))


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="judge 'maths' is unknown"):
        read_pairs(written(tmp_path, [{"judge": "maths", "answer": "1", "reference": "1"}]))
    result = CliRunner().invoke(app, ["judge", "--pairs", str(written(tmp_path, PAIRS)), "--again"])
    assert isinstance(result.exception, ConfigError)
    assert isinstance(CliRunner().invoke(app, ["judge"]).exception, ConfigError)
