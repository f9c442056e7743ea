"""Several ranks of which one fails: who is blamed, what is shown of it, and the exit code. Real processes and gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillroom.errors import ConfigError
from student_train.runtime.launching import CONSOLE_VARIABLE, LOST_CODE, find_cause, launch
from student_train.runtime.ranks import RANK_VARIABLES
from tests.helpers import ROOT
from tests.helpers.programs import Program
from tests.helpers.rank_program import MESSAGE


def test_damage_that_one_rank_meets_is_shown_with_its_code(tmp_path: Path) -> None:
    code, said = _ended(tmp_path, "damage")
    assert code == 3
    assert "rank 1 of 2 ended with exit code 3" in said
    assert f"  student-train: {MESSAGE}" in said
    log = next(tmp_path.glob("student-train-ranks-*/rank-1.log"))
    assert f"{log} ends:" in said
    assert MESSAGE in log.read_text()


def test_traceback_of_the_rank_that_raised_is_shown(tmp_path: Path) -> None:
    code, said = _ended(tmp_path, "exception")
    assert code == 1
    assert f"ZeroDivisionError: {MESSAGE}" in said


def test_killed_rank_is_named(tmp_path: Path) -> None:
    code, said = _ended(tmp_path, "kill")
    assert code == 1
    assert "rank 1 of 2 was killed by SIGKILL: unless someone killed it, the machine ran out of memory" in said


def test_ranks_that_end_well_leave_nothing_behind(tmp_path: Path) -> None:
    code, said = _ended(tmp_path, "well")
    assert (code, said.strip()) == (0, "rank 0 is there")
    assert not list(tmp_path.iterdir())


def test_what_a_rank_tells_is_shown_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    telling = f"import os; os.write(int(os.environ.get('{CONSOLE_VARIABLE}', 2)), os.environ['RANK'].encode())"
    assert launch(2, [sys.executable, "-c", telling]) == 0
    assert sorted(capfd.readouterr().err) == ["0", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_ranks_wait_for_each_other(tmp_path: Path, number: signal.Signals) -> None:
    process = _start(tmp_path, "wait")
    while "rank 0 is there\n" not in process.stderr_so_far():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    code, _, said = process.communicate()
    assert code == 130
    assert "rank 1" not in said


def test_interrupted_before_the_ranks_have_loaded_anything(tmp_path: Path) -> None:
    """In interpreters of their own, which take seconds to load."""
    command = [sys.executable, "-m", "tests.helpers.rank_program", "wait"]
    process = subprocess.Popen(command, env=_environ(tmp_path), cwd=ROOT)
    while not list(tmp_path.glob("student-train-ranks-*/rank-1.log")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([(0, 0), (1, 0)], None),
        ([(0, LOST_CODE), (1, 1)], 1),
        ([(0, LOST_CODE), (1, -9)], 1),
        ([(0, 1), (2, -9), (1, 3)], 1),
        ([(1, 2), (0, 2)], 0),
        ([(0, -6), (1, 1)], 1),
        ([(0, 130), (1, LOST_CODE)], 0),
        ([(1, LOST_CODE), (0, LOST_CODE)], 1),
    ],
)
def test_the_one_to_blame(codes: list[tuple[int, int]], expected: int | None) -> None:
    assert find_cause(dict(codes)) == expected


def test_under_a_launcher_nproc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--nproc has no effect under a launcher"):
        launch(2, ["true"])


def _environ(tmp_path: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "TMPDIR": str(tmp_path)}


def _start(tmp_path: Path, manner: str) -> Program:
    return Program(["tests.helpers.rank_program", manner], environ=_environ(tmp_path))


def _ended(tmp_path: Path, manner: str) -> tuple[int, str]:
    code, _, said = _start(tmp_path, manner).communicate()
    return code, said
