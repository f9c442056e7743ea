"""A polite end: the first Ctrl-C or SIGTERM asks for it, the second one stops at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = b"\nstopping: what is at hand is finished and saved first (again to stop at once)\n"
STDERR = 2
TOGETHER_S = 1.0
"""Signals so close are one: a scheduler signals all processes of a job, and a launcher among them passes it on."""


class StopRequest:
    """While entered, turns the first signal into `is_set`; the second raises KeyboardInterrupt. Main thread only.

    With `at_once` the first one raises already, until `finish_first` says that there is something to finish; whatever
    else goes wrong on the way out (a library left half imported) is then a KeyboardInterrupt too.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.is_set = False
        self._at_once = at_once
        self._asked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._on_signal) for one in SIGNALS}
            # A program may be started with them blocked, so that none arrives before this can answer it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        if self._at_once and self.is_set and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def finish_first(self) -> None:
        """From here on the first signal lets what is at hand be finished."""
        self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_set, now_s = self.is_set, time.monotonic()
        if was_set and now_s - self._asked_s < TOGETHER_S:
            return
        self.is_set, self._asked_s = True, now_s
        if was_set or self._at_once:
            raise KeyboardInterrupt
        try:
            # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
            os.write(STDERR, ANNOUNCEMENT)
        except OSError:
            # Nobody reads any more: that is no reason not to save.
            return
