"""A polite end: the first Ctrl-C or SIGTERM asks for it, the second one stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = b"\nstopping: what is at hand is finished and saved first (again to stop at once)\n"
STDERR = 2


class StopRequest:
    """While entered, turns the first signal into `is_set`; the second raises KeyboardInterrupt. Main thread only."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._on_signal) for one in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        try:
            # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
            os.write(STDERR, ANNOUNCEMENT)
        except OSError:
            # Nobody reads any more: that is no reason not to save.
            return
