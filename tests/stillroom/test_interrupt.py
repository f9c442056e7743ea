"""Ctrl-C once finishes, twice stops; what was there before is put back. A full disk is one line."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from stillroom.program import StopRequest, new_program, run_program


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.program.TOGETHER_S", 0.0)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        states = [stop.is_set]
        os.kill(os.getpid(), number)
        states.append(stop.is_set)
        assert states == [False, True]
        assert "again to stop immediately" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_by_two_ways_counts_once() -> None:
    """A scheduler's SIGTERM reaches a rank directly and through its launcher."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set


def test_at_once_until_there_is_something_to_finish() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest(at_once=True):
        os.kill(os.getpid(), signal.SIGINT)
    with StopRequest(at_once=True) as stop:
        stop.finish_first()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set


def test_what_breaks_on_the_way_out_is_the_interruption() -> None:
    """Libraries turn an interruption of their import into errors of their own."""

    def half_import() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("half imported") from error

    with pytest.raises(KeyboardInterrupt), StopRequest(at_once=True):
        half_import()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    app = new_program("program", "")

    @app.command()
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out.csv")

    monkeypatch.setattr(sys, "argv", ["program", "write"])
    with pytest.raises(SystemExit) as end:
        run_program(app, "program", ())
    assert end.value.code == 1
    said = "program: out.csv: No space left on device: free some space and run the same command again\n"
    assert capsys.readouterr().err == said


def test_a_program_leaves_with_its_code_once_it_has_cleaned_up() -> None:
    script = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
from stillroom.program import run_and_leave
atexit.register(print, "cleaned", end="")
def main():
    ThreadPoolExecutor().submit(lambda: time.sleep(0.2) or print("written, ", end=""))
    sys.exit(3)
run_and_leave(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "written, cleaned", "")


@pytest.mark.parametrize(
    ("stdout", "code", "said"),
    [(">/dev/full", 1, "<stdout> cannot be written: No space left on device\n"), (">&-", 0, ""), ("| true", 0, "")],
)
def test_a_result_that_cannot_be_written_is_a_failure(stdout: str, code: int, said: str) -> None:
    script = "import time; from stillroom.program import run_and_leave; run_and_leave(lambda: print(time.sleep(0.1)))"
    command = f"env -u PYTHONUNBUFFERED {sys.executable} -c '{script}' {stdout}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)
