"""Threads stop spinning while another program wants the cores, and spin again afterwards."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stillroom import cores
from stillroom.cores import WAIT_VARIABLES, CoreSharing


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CHECK_S", 0.01)
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def wait_for(is_true: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + 20
    while not is_true() and time.monotonic() < until_s:
        time.sleep(0.005)
    return is_true()


def num_teams() -> int:
    return sum(thread.name == "core-sharing-team" for thread in threading.enumerate())


def test_teams_are_held_only_while_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    is_busy = False

    def waited_s() -> Iterator[float]:
        total_s = 0.0
        while True:
            total_s += 100.0 * is_busy
            yield total_s

    waits = waited_s()
    monkeypatch.setattr(CoreSharing, "_waited_s", lambda self: next(waits))
    num_regions = 0

    def region() -> None:
        nonlocal num_regions
        num_regions += 1

    wanted = len(os.sched_getaffinity(0)) // 2
    with CoreSharing(2, region):
        assert num_teams() == 0
        is_busy = True
        assert wait_for(lambda: num_teams() == wanted and num_regions == wanted)
        is_busy = False
        assert wait_for(lambda: num_teams() == 0)
        is_busy = True
        assert wait_for(lambda: num_regions == 2 * wanted)
    assert wait_for(lambda: num_teams() == 0)


@pytest.mark.parametrize("variable", [None, *sorted(WAIT_VARIABLES)])
def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, "7")
    with CoreSharing(2, lambda: None):
        watched = any(thread.name == "core-sharing" for thread in threading.enumerate())
    assert watched == (variable is None and len(os.sched_getaffinity(0)) >= 2)
    with CoreSharing(1, lambda: None):
        assert not any(thread.name == "core-sharing" for thread in threading.enumerate())
