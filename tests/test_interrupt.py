"""Ctrl-C once finishes, twice stops; what was there before is put back."""

import os
import signal

import pytest

from shared.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        states = [stop.is_set]
        os.kill(os.getpid(), number)
        states.append(stop.is_set)
        assert states == [False, True]
        assert "again to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
