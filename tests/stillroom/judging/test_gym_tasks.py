"""reasoning-gym: right answers in any dress are right, and tasks are the same in every process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.judging.gym_tasks import make_entries
from stillroom.judging.process import JudgeProcess

DRESSES = {
    "plain": "{}",
    "stop": "{}.",
    "bold": "**{}**",
    "box": "\\boxed{{{}}}",
    "fence": "Here it is:\n\n```text\n{}\n```\n\nI hope this helps!",
    "sentence": "The answer is {}.",
    "below": "Here is the grid:\n\n{}",
    "colon": "Here is the grid:\n{}",
    "tag": "Done.\n<answer>\n{}\n</answer>",
    "final": "Steps 1 and 2.\n\n**Final Answer:** {}",
}
TASKS = ["chain_sum", "prime_factorization", "n_queens", "mini_sudoku", "sentence_reordering", "game_of_life_halting"]


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeProcess]:
    with JudgeProcess() as process:
        yield process


def task_of(task: str, seed: int = 5, **options: Any) -> tuple[str | None, dict[str, Any]]:
    """Right answer and metadata of one task."""
    entry = next(make_entries(task, seed, 1, options))
    base = {"task": task, "seed": seed, "size": 1, "index": 0, "options": options}
    return entry["answer"], {**base, "entry": entry["metadata"]}


@pytest.mark.parametrize("task", TASKS)
def test_a_right_answer_is_right_in_any_dress(judge: JudgeProcess, task: str) -> None:
    right, metadata = task_of(task)
    assert right is not None
    for name, dress in DRESSES.items():
        verdict = judge.judge("reasoning_gym", dress.format(right), right, metadata)
        assert verdict.correct is True, (name, verdict)
    for wrong in ("no idea", "I think it is 17.", "<answer>x</answer>"):
        assert judge.judge("reasoning_gym", wrong, right, metadata).correct is False


def test_checkers_that_accept_anything_have_rules_of_their_own(judge: JudgeProcess) -> None:
    right, metadata = task_of("puzzle24")
    assert right is not None
    assert judge.judge("reasoning_gym", right, right, metadata).correct is True
    assert judge.judge("reasoning_gym", f"<answer>{right} = 24</answer>", right, metadata).correct is True
    # Four numbers in range that make 24, but not the puzzle's.
    assert judge.judge("reasoning_gym", "6*4*1*1", right, metadata).correct is False
    right, metadata = task_of("game_of_life_halting")
    other = {"True": "False", "False": "True"}[str(right)]
    assert judge.judge("reasoning_gym", other, right, metadata).correct is False
    assert "own rule" in str(judge.judge("reasoning_gym", other, right, metadata).rule)


def test_text_that_would_be_run_reaches_no_checker(judge: JudgeProcess, tmp_path: Path) -> None:
    """Several checkers parse with sympy, which evaluates Python: here it would write a file."""
    right, metadata = task_of("simple_integration")
    marker = tmp_path / "marker"
    verdict = judge.judge("reasoning_gym", f"<answer>open({str(marker)!r}, 'w')</answer>", right, metadata)
    assert verdict.correct is False
    assert not marker.exists()


def test_tasks_are_the_same_in_every_process() -> None:
    program = (
        "import json; from stillroom.judging.gym_tasks import make_entries;"
        "print(json.dumps([one['question'] for one in make_entries('ransom_note', 5, 2, {})]))"
    )
    # This process has another order of sets: its own hash seed is random, or set to something else.
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(there.stdout) == [one["question"] for one in make_entries("ransom_note", 5, 2, {})]
