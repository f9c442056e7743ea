"""Outcomes to visible rows, in a thread beside generation: rows, shards, commits; answers to their judges.

The engine's thread puts outcomes into a bounded queue and goes on; here they become rows, a shard that closes by size
or by time, a commit. Judges work beside this (teacher_cache.judging). Whatever fails here is raised in the engine's
thread at its next call. A crash costs what the open shard held, at most `shard.max_minutes` of work, and the verdicts
that were not committed: `teacher-cache judge` makes up for those.

A worker's figures as JSON lines, for those who watch many workers: `runs/<run_id>.<worker>.metrics.jsonl`.
"""

import contextlib
import datetime
import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.errors import StillroomError, one_line
from stillroom.log import note, warn
from stillroom.program import StopRequest
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.tables import FAILURE_SCHEMA
from stillroom.storage.paths import Location, spool
from teacher_cache.config import JudgingConfig, ShardConfig
from teacher_cache.engine.api import Failed, Finished
from teacher_cache.judging import JudgeQueue, commit_verdicts
from teacher_cache.prompts.sources import LoadFailure
from teacher_cache.writer.commit import Committer, VisibleSamples
from teacher_cache.writer.rows import RowMaker
from teacher_cache.writer.shard import ShardFile

MAX_QUEUED_TOKENS = 1 << 18
"""Completion tokens that may wait, 140 MB at k=64: a writer that cannot keep up slows the engine down rather than
filling the memory.
"""
WAKE_S = 1.0
"""How often a shard's age is looked at while nothing comes."""

Recordable = Finished | Failed | LoadFailure


@dataclass(slots=True)
class Recorded:
    """Counts of this process. Committed rows are visible; the others are in the open shard or its queue. `num_unjudged`
    chains have a judge and were left to `teacher-cache judge`.
    """

    num_chains: int = 0
    num_tokens: int = 0
    num_failures: int = 0
    num_committed: int = 0
    num_shards: int = 0
    committed_bytes: int = 0
    committed_tokens: int = 0
    num_unjudged: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        """Shard bytes over completion tokens of what was committed; None before the first commit."""
        return self.committed_bytes / self.committed_tokens if self.committed_tokens else None


class Recorder:
    """The thread and its queue, as a context manager: leaving it flushes, also after an error of the engine."""

    def __init__(
        self,
        catalog: Catalog,
        header: ShardHeader,
        config: ShardConfig,
        rows: RowMaker,
        chains: VisibleSamples,
        failures: VisibleSamples,
        judging: JudgingConfig,
    ) -> None:
        self.recorded = Recorded()
        self.closed_s: float | None = None
        """When the last shard was closed, by the monotonic clock; None until then."""
        self._catalog, self._header, self._config, self._rows = catalog, header, config, rows
        self._chains = Committer(catalog.chains, chains, header.run_id, header.worker)
        self._failures = Committer(catalog.failures, failures, header.run_id, header.worker)
        self._queue = _Queue(MAX_QUEUED_TOKENS)
        self._error: BaseException | None = None
        self._shard: ShardFile | None = None
        self._opened_s = 0.0
        self._failed: list[Failed | LoadFailure] = []
        self._judges = JudgeQueue(judging.processes)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.end()
        if error is not None:
            self._judges.hurry()
        self._thread.join()
        self._judges.close()
        if error is None:
            self._raise()

    def put(self, outcome: Recordable) -> None:
        """Hands over one outcome; waits while too many tokens are queued. Raises what the thread died of."""
        self._queue.put(outcome)
        self._raise()

    def finish(self, stop: StopRequest) -> None:
        """Waits until everything is visible and judged; with `stop` set, what is not judged by then is left to
        `teacher-cache judge`.
        """
        self._queue.end()
        told = False
        while self._thread.is_alive():
            if stop.is_set:
                self._judges.hurry()
            self._thread.join(WAKE_S)
            if self.closed_s is not None and self._thread.is_alive() and not told:
                note("all chains are visible; answers are being judged (Ctrl-C leaves them to `teacher-cache judge`)")
                told = True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._queue.is_over():
                outcome = self._queue.take(WAKE_S)
                if outcome is not None:
                    self._take(outcome)
                if self._is_due():
                    self._close_shard()
            self._close_shard()
            self.closed_s = time.monotonic()
            self._judges.wait()
            self._commit_verdicts()
            self.recorded.num_unjudged = self._judges.num_left
        except BaseException as error:  # noqa: BLE001 - it is raised again in the engine's thread
            self._error = explained(error)
            if self._shard is not None:
                self._shard.discard()
        finally:
            self._queue.abandon()

    def _take(self, outcome: Recordable) -> None:
        if self._shard is None and not self._failed:
            self._opened_s = time.monotonic()
        if not isinstance(outcome, Finished):
            self._failed.append(outcome)
            self.recorded.num_failures += 1
            return
        try:
            row = self._rows.row(outcome)
        except BaseException:
            # What is finished is good; only this outcome is not.
            self._close_shard()
            raise
        if self._shard is None:
            self._shard = ShardFile(self._chains.temp_path(), self._header, self._config.row_group_tokens)
        self._shard.add(row)
        self.recorded.num_chains += 1
        self.recorded.num_tokens += row.num_tokens
        self._judges.put(row.sample_id, outcome.request.prompt, row.columns["answer"])

    def _is_due(self) -> bool:
        if self._shard is None and not self._failed:
            return False
        is_old = time.monotonic() - self._opened_s >= 60 * self._config.max_minutes
        return is_old or (self._shard is not None and self._shard.num_bytes >= 1e6 * self._config.max_mb)

    def _close_shard(self) -> None:
        """Makes everything taken so far visible: chains, failures, and the verdicts that have come."""
        if self._shard is not None:
            self._shard.close()
            self.recorded.num_committed += self._chains.commit(self._shard.temp, self._shard.num_rows)
            self.recorded.num_shards += 1
            self.recorded.committed_bytes += self._shard.num_bytes
            self.recorded.committed_tokens += self._shard.num_tokens
            self._shard = None
        if self._failed:
            temp = self._failures.temp_path()
            temp.parent.mkdir(parents=True, exist_ok=True)
            table = failures_to_table(self._failed, self._header.run_id, self._header.worker)
            pq.write_table(table, temp, compression="zstd", write_page_checksum=True)
            self._failures.commit(temp, len(self._failed))
            self._failed = []
        self._commit_verdicts()

    def _commit_verdicts(self) -> None:
        while judged := self._judges.finished():
            commit_verdicts(self._catalog.verdicts, judged, self._header.run_id, self._header.worker)


class _Queue:
    """First in, first out between two threads, bounded by the completion tokens inside."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._items: deque[Recordable] = deque()
        self._num_tokens = 0
        self._ended = self._abandoned = False
        self._changed = threading.Condition()

    def put(self, outcome: Recordable) -> None:
        """Waits for room; one outcome may be larger than the bound. Does nothing once the taker is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_tokens < self._max_tokens or self._abandoned)
            if not self._abandoned:
                self._items.append(outcome)
                self._num_tokens += _num_tokens(outcome)
                self._changed.notify_all()

    def take(self, timeout_s: float) -> Recordable | None:
        """The next outcome; None when none came in time or none will come."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._ended, timeout_s)
            if not self._items:
                return None
            outcome = self._items.popleft()
            self._num_tokens -= _num_tokens(outcome)
            self._changed.notify_all()
            return outcome

    def end(self) -> None:
        """Says that nothing more will be put."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Says that nothing more will be taken."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def is_over(self) -> bool:
        """Whether everything was taken and nothing more will come."""
        with self._changed:
            return self._ended and not self._items


def failures_to_table(failures: Sequence[Failed | LoadFailure], run_id: str, worker: str) -> pa.Table:
    """Rows of the failures table."""
    now = datetime.datetime.now(datetime.UTC)
    rows = [
        {
            **_identity(failure),
            "reason": failure.reason,
            "message": failure.message,
            "run_id": run_id,
            "worker": worker,
            "failed_at": now,
        }
        for failure in failures
    ]
    return pa.Table.from_pylist(rows, schema=FAILURE_SCHEMA)


def _identity(failure: Failed | LoadFailure) -> dict[str, str | int]:
    if isinstance(failure, LoadFailure):
        return {
            "sample_id": failure.sample_id,
            "prompt_id": failure.prompt_id,
            "source": failure.source,
            "sample_index": failure.sample_index,
        }
    request = failure.request
    return {
        "sample_id": request.sample_id,
        "prompt_id": request.prompt.prompt_id,
        "source": request.prompt.source,
        "sample_index": request.sample_index,
    }


def _num_tokens(outcome: Recordable) -> int:
    return len(outcome.capture.token_ids_T) if isinstance(outcome, Finished) else 1


def explained(error: BaseException) -> BaseException:
    """A full disk or a vanished mount in one line; everything else as it is."""
    if isinstance(error, OSError) and not isinstance(error, StillroomError):
        problem = one_line(error)
        told = StillroomError(
            f"the cache cannot be written: {problem}: mend that and start the same command again, it goes on from the "
            "last closed shard"
        )
        told.__cause__ = error
        return told
    return error


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
