"""A worker's figures as JSON lines, for those who watch many workers: `runs/<run_id>.<worker>.metrics.jsonl`."""

import contextlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from shared.errors import StillroomError, one_line
from shared.log import warn
from shared.storage import Location, spool
from teacher_cache.recorder import Recorded

METRICS_INTERVAL_S = 10.0
STORE_INTERVAL_S = 60.0


class MetricsLog:
    """Appends one line every METRICS_INTERVAL_S and one at the end, as a context manager."""

    def __init__(self, path: Location) -> None:
        """A store takes no appended line: there the whole log is put again, at longer intervals."""
        self._path, self._local = path, spool(path.parent) / path.name
        if not isinstance(path, Path) and path.exists():
            self._local.write_text(path.read_text(), encoding="utf-8")
        self._stream = self._local.open("a", encoding="utf-8")
        if not _ends_whole(self._local):
            # A full disk cut the last line: the next one must not stand behind it.
            self._stream.write("\n")
        self._interval_s = METRICS_INTERVAL_S if isinstance(path, Path) else STORE_INTERVAL_S
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
        """Takes the state; writes it when the interval is over. `num_tokens`, those of unfinished chains included, give
        the rate; the line's counts are of finished chains.
        """
        seconds = time.monotonic() - self._started_s
        self._last = {
            "time": time.time(),
            "seconds": seconds,
            "num_done": done,
            "num_total": total,
            "tokens_per_s": num_tokens / seconds if seconds > 0 else 0.0,
            "bytes_per_token": recorded.bytes_per_token,
            **asdict(recorded),
        }
        if seconds - self._written_s >= self._interval_s:
            self._append(self._last)
            self._written_s = seconds

    def _append(self, line: dict[str, object]) -> None:
        if self._broken:
            return
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            if not isinstance(self._path, Path):
                self._path.upload(self._local)
        except (OSError, StillroomError) as error:
            # Who watches sees less; what is generated matters more.
            self._broken = True
            warn(f"{self._path} is not written any more: {one_line(error)}")


def last_metrics(path: Location) -> dict[str, Any] | None:
    """The newest line of a log that is whole; None where there is none."""
    for line in reversed(path.read_bytes().splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return None


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as stream:
        size_bytes = stream.seek(0, os.SEEK_END)
        if not size_bytes:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
