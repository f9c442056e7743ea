"""Progress in a log file: plain lines, honest rates."""

import io

import pytest
from rich.console import Console

from stillroom import log


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=text, width=200, highlight=False))
    return text


def test_a_log_file_gets_a_line_an_interval_and_one_at_the_end(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with log.Progress("build", 100, "chains", done_before=10) as progress:
        for second in range(1, 32):
            clock[0] = float(second)
            progress.update(10 + second, 50 * second, {"": "106 B/token", "failed": "2"})
    printed = lines.getvalue().splitlines()
    assert len(printed) == 4
    assert printed[0] == (
        "build  20/100 chains  20%  500 new tok  50 tok/s now  50 tok/s  106 B/token  failed 2  eta 1:20"
    )
    assert printed[-1].startswith("build  41/100 chains  41%  1.6k new tok")


def test_a_finished_loop_gets_its_last_line_once_and_its_clock_stands_still(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with log.Progress("train", 3, "steps") as progress:
        for step in range(1, 4):
            clock[0] = 11.0 * step
            progress.update(step, 110 * step)
        progress.print_now()
        clock[0] = 100.0
    assert lines.getvalue().splitlines() == [
        "train  1/3 steps  33%  110 tok  10 tok/s now  10 tok/s  eta 0:22",
        "train  2/3 steps  67%  220 tok  10 tok/s now  10 tok/s  eta 0:11",
        "train  3/3 steps  100%  330 tok  10 tok/s  in 0:33",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (4930, "1:22:10"), (360000, "100:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert log.format_duration(seconds) == text


def test_counts_and_bytes() -> None:
    assert [log.format_count(n) for n in (7, 1500, 2.5e6, 7e9)] == ["7", "1.5k", "2.5M", "7.0G"]
    assert [log.format_bytes(n) for n in (7, 1500, 2.5e6, 7e9, 3e12)] == ["7 B", "1.5 kB", "2.5 MB", "7.0 GB", "3.0 TB"]
