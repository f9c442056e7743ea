"""Turns outcomes into visible rows in a thread beside generation: rows, shards, commits; answers go to their judges.

The engine's thread puts outcomes into a bounded queue; here they become rows of a shard, which is committed when it is
large or old enough. Judges run beside this (teacher_cache.judging). An error here is raised in the engine's thread at
its next call. A crash loses the open shard, at most `shard.max_minutes` of work, and uncommitted verdicts, which
`teacher-cache judge` makes up for.

MetricsLog writes a worker's figures as JSON lines to `runs/<run_id>.<worker>.metrics.jsonl`.
"""

import contextlib
import datetime
import json
import os
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.errors import StillroomError, one_line
from stillroom.log import note, warn
from stillroom.program import StopRequest
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import CUT_REASONS
from stillroom.schema.tables import FAILURE_SCHEMA
from stillroom.storage.paths import Location, spool
from teacher_cache.building.until import UntilRight
from teacher_cache.config import JudgingConfig, ShardConfig
from teacher_cache.engine.api import Failure, Finished, Outcome
from teacher_cache.judging.queue import JudgeQueue
from teacher_cache.scrub.chains import ChainCheck
from teacher_cache.writer.commit import Committer, VisibleSamples
from teacher_cache.writer.rows import RowMaker
from teacher_cache.writer.shard import ShardFile
from teacher_cache.writer.verdicts import commit_verdicts
from teacher_cache.writer.watch import SampleWatch

MAX_QUEUED_TOKENS = 1 << 18
"""Completion tokens that may wait, 140 MB at k=64. Without a bound a stalled disk would fill the memory."""
WAKE_S = 1.0
"""How often a shard's age is checked while nothing arrives."""
METRICS_INTERVAL_S = 10.0
STORE_METRICS_INTERVAL_S = 60.0
"""A store cannot append, so each write uploads the whole log."""


@dataclass(slots=True)
class Recorded:
    """Counts of this process. Uncommitted rows are in the open shard; `num_unjudged` chains have a judge and were left
    to `teacher-cache judge`.
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
    def num_outcomes(self) -> int:
        """Chains and failures."""
        return self.num_chains + self.num_failures

    @property
    def bytes_per_token(self) -> float | None:
        """Shard bytes per committed completion token, None before the first commit."""
        return self.committed_bytes / self.committed_tokens if self.committed_tokens else None


class Recorder:
    """The thread and its queue, as a context manager: exit flushes, also after an engine error."""

    def __init__(
        self,
        catalog: Catalog,
        header: ShardHeader,
        config: ShardConfig,
        rows: RowMaker,
        chains: VisibleSamples,
        failures: VisibleSamples,
        judging: JudgingConfig,
        until: UntilRight | None = None,
        check: ChainCheck | None = None,
    ) -> None:
        """`until` hears of verdicts and failures."""
        self.recorded = Recorded()
        self._is_flushing = threading.Event()
        self.closed_s: float | None = None
        """When the last shard was closed (monotonic clock), None until then."""
        self._catalog, self._header, self._config, self._rows = catalog, header, config, rows
        self._check = check
        self._chains = Committer(catalog.chains, chains, header.run_id, header.worker)
        self._failures = Committer(catalog.failures, failures, header.run_id, header.worker)
        # Bounded, because a stalled disk would otherwise fill the memory.
        self._queue = _Queue(MAX_QUEUED_TOKENS)
        self._error: BaseException | None = None
        self._shard: ShardFile | None = None
        self._opened_s = 0.0
        self._failed: list[Failure] = []
        self._watch = SampleWatch(header.vocab_size)
        self._until = until
        self._judges = JudgeQueue(judging.processes, on_verdict=None if until is None else until.settle)
        # A thread, because a process would have to pickle the arrays.
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.end()
        if error is not None:
            # After an engine's error chains are still saved, but answers are left to `teacher-cache judge`.
            self._judges.hurry()
        self._thread.join()
        self._judges.close()
        # Otherwise the error under way is the one to report.
        if error is None:
            self.check()

    def put(self, outcome: Outcome) -> None:
        """Queues one outcome; blocks while too many tokens are queued. Raises the error that ended the thread."""
        # Returns at once when the thread has ended, so its error is raised here and not at the end of the build.
        self._queue.put(outcome)
        self.check()

    def finish(self, stop: StopRequest) -> None:
        """Waits until everything is visible and judged; once `stop` is set, pending answers are left to
        `teacher-cache judge`.
        """
        self._queue.end()
        noted = False
        while self._thread.is_alive():
            if stop.is_set:
                self._judges.hurry()
            self._thread.join(WAKE_S)
            if self.closed_s is not None and self._thread.is_alive() and not noted:
                note("All chains are saved. Judging answers; Ctrl-C leaves the rest to `teacher-cache judge`.")
                noted = True

    @property
    def has_superseded(self) -> bool:
        """Whether another worker's chains are visible in the place of some of these."""
        return bool(self._chains.superseded)

    def check(self) -> None:
        """Raises the error that ended the thread."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Makes everything recorded so far visible soon, however small the open shard is."""
        self._is_flushing.set()

    def _run(self) -> None:
        try:
            while not self._queue.is_over():
                outcome = self._queue.get(WAKE_S)
                if outcome is not None:
                    self._record(outcome)
                # A flush waits until the queue is empty: what is in it still fits the same shard.
                if self._is_due() or (outcome is None and self._is_flushing.is_set()):
                    self._is_flushing.clear()
                    self._close_shard()
            self._close_shard()
            self.closed_s = time.monotonic()
            self._judges.wait()
            self._commit_verdicts()
            self.recorded.num_unjudged = self._judges.num_left
        except BaseException as error:  # noqa: BLE001 - raised again in the engine's thread
            self._error = explained(error)
            if self._shard is not None:
                self._shard.discard()
        finally:
            self._queue.abandon()

    def _record(self, outcome: Outcome) -> None:
        if self._shard is None and not self._failed:
            self._opened_s = time.monotonic()
        if not isinstance(outcome, Finished):
            self._fail(outcome)
            return
        if (problem := self._watch.problem(outcome)) is not None:
            # The open shard is discarded: its chains are of the same kind.
            raise StillroomError(problem)
        try:
            row = self._rows.row(outcome) if self._check is None else self._check.row(outcome, self._rows)
        except BaseException:
            # The chains before this one are sound: save them before the build ends.
            self._close_shard()
            raise
        if isinstance(row, Failure):
            self._fail(row)
            return
        if self._shard is None:
            self._shard = ShardFile(self._chains.temp_path(), self._header, self._config.row_group_tokens)
        self._shard.add(row)
        self.recorded.num_chains += 1
        self.recorded.num_tokens += row.num_tokens
        self._judges.put(row.sample_id, outcome.request.prompt, row.answer, row.finish_reason in CUT_REASONS)

    def _fail(self, failure: Failure) -> None:
        self._failed.append(failure)
        self.recorded.num_failures += 1
        if self._until is not None:
            self._until.settle(failure.sample_id, False)

    def _is_due(self) -> bool:
        if self._shard is None and not self._failed:
            return False
        is_old = time.monotonic() - self._opened_s >= 60 * self._config.max_minutes
        return is_old or (self._shard is not None and self._shard.num_bytes >= 1e6 * self._config.max_mb)

    def _close_shard(self) -> None:
        """Makes everything recorded so far visible: chains, failures and finished verdicts."""
        if self._shard is not None:
            self._shard.close()
            # Fewer than the shard's rows if another worker has committed some of them.
            self.recorded.num_committed += self._chains.commit(self._shard.temp, self._shard.sample_ids)
            self.recorded.num_shards += 1
            self.recorded.committed_bytes += self._shard.num_bytes
            self.recorded.committed_tokens += self._shard.num_tokens
            self._shard = None
        if self._failed:
            temp = self._failures.temp_path()
            temp.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self._failure_rows(), temp, compression="zstd", write_page_checksum=True)
            self._failures.commit(temp, [failure.sample_id for failure in self._failed])
            self._failed = []
        # Last: every judged chain is in a shard committed by now, so no verdict appears before its chain.
        self._commit_verdicts()

    def _failure_rows(self) -> pa.Table:
        own = {
            "run_id": self._header.run_id,
            "worker": self._header.worker,
            "failed_at": datetime.datetime.now(datetime.UTC),
        }
        return pa.Table.from_pylist([asdict(failure) | own for failure in self._failed], schema=FAILURE_SCHEMA)

    def _commit_verdicts(self) -> None:
        while judged := self._judges.finished():
            # The visible chain of such a sample is another worker's, whose answer may differ from the one judged here.
            own = [one for one in judged if one.sample_id not in self._chains.superseded]
            commit_verdicts(self._catalog.verdicts, own, self._header.run_id, self._header.worker)


class MetricsLog:
    """Appends a line every METRICS_INTERVAL_S and at the end, as a context manager."""

    def __init__(self, path: Location) -> None:
        self._path, self._local = path, spool(path.parent) / path.name
        if not isinstance(path, Path) and path.exists():
            # An upload replaces the whole object, so it must begin with what earlier processes wrote.
            self._local.write_text(path.read_text(), encoding="utf-8")
        self._stream = self._local.open("a", encoding="utf-8")
        if not _ends_whole(self._local):
            # A full disk cut the last line short: start a new one.
            self._stream.write("\n")
        self._interval_s = METRICS_INTERVAL_S if isinstance(path, Path) else STORE_METRICS_INTERVAL_S
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
        """Updates the state and writes it when the interval is over. The rate counts `num_tokens`, which include
        unfinished chains; the other counts are of finished chains.
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
            # A build does not fail for want of metrics.
            self._broken = True
            warn(f"metrics are no longer logged: {self._path}: {one_line(error)}")


def last_metrics(path: Location) -> dict[str, Any] | None:
    """The newest complete line of a log, None if there is none."""
    # From the end, and on after a broken line: a kill may have cut the last one short.
    for line in reversed(path.read_bytes().splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return None


def explained(error: BaseException) -> BaseException:
    """A full disk or a lost mount as one line with its remedy; other errors unchanged."""
    if isinstance(error, OSError) and not isinstance(error, StillroomError):
        problem = StillroomError(
            f"the cache cannot be written: {one_line(error)}: fix that and run the same command again to resume from "
            "the last committed shard"
        )
        problem.__cause__ = error
        return problem
    return error


class _Queue:
    """A queue between two threads, bounded by the completion tokens in it rather than by the number of items."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._items: deque[Outcome] = deque()
        self._num_tokens = 0
        self._ended = self._abandoned = False
        self._changed = threading.Condition()

    def put(self, outcome: Outcome) -> None:
        """Waits for room; one outcome may exceed the bound. Does nothing once the reader is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_tokens < self._max_tokens or self._abandoned)
            if not self._abandoned:
                self._items.append(outcome)
                self._num_tokens += _num_tokens(outcome)
                self._changed.notify_all()

    def get(self, timeout_s: float) -> Outcome | None:
        """The next outcome, None after the timeout or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._ended, timeout_s)
            if not self._items:
                return None
            outcome = self._items.popleft()
            self._num_tokens -= _num_tokens(outcome)
            self._changed.notify_all()
            return outcome

    def end(self) -> None:
        """Nothing more will be put."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nothing more will be read, so writers must not wait."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def is_over(self) -> bool:
        """Whether everything was read and nothing more will come."""
        with self._changed:
            return self._ended and not self._items


def _num_tokens(outcome: Outcome) -> int:
    # A failure holds no arrays; counting it as 1 still bounds a flood of them.
    return len(outcome.capture.token_ids_T) if isinstance(outcome, Finished) else 1


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as stream:
        size_bytes = stream.seek(0, os.SEEK_END)
        if not size_bytes:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
