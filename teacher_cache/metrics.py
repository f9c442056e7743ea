"""A worker's figures as JSON lines, for those who watch many workers: `runs/<run_id>.<worker>.metrics.jsonl`."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Self

from shared.log import warn
from teacher_cache.recorder import Recorded

METRICS_INTERVAL_S = 10.0


class MetricsLog:
    """Appends one line every METRICS_INTERVAL_S and one at the end, as a context manager."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")
        self._started_s = time.monotonic()
        self._written_s = 0.0
        self._last: dict[str, object] | None = None
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._append(self._last)
        with contextlib.suppress(OSError):
            self._stream.close()

    def write(self, done: int, total: int, num_tokens: int, recorded: Recorded) -> None:
        """Takes the state; writes it when the interval is over."""
        seconds = time.monotonic() - self._started_s
        self._last = {
            "time": time.time(),
            "seconds": seconds,
            "num_done": done,
            "num_total": total,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds if seconds > 0 else 0.0,
            "bytes_per_token": recorded.bytes_per_token,
            **asdict(recorded),
        }
        if seconds - self._written_s >= METRICS_INTERVAL_S:
            self._append(self._last)
            self._written_s = seconds

    def _append(self, line: dict[str, object]) -> None:
        if self._broken:
            return
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            # Who watches sees less; what is generated matters more.
            self._broken = True
            warn(f"{self._stream.name} is not written any more: {error.strerror}")
