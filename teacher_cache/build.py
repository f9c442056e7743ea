"""`teacher-cache build`: requests through an engine into a cache; the same command resumes.

What is visible is skipped, what was published but not committed is adopted, the rest is generated. One process a
worker; workers meet only in the Delta log. SIGINT and SIGTERM finish nothing new, make visible what is finished, and
return.
"""

import contextlib
import errno
import fcntl
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from schemas.manifest import RunManifest, ShardHeader, Teacher
from schemas.records import stable_hash
from shared.catalog import SHARD_NAME, Catalog
from shared.config import plain
from shared.errors import CacheConflict, DataError, StillroomError
from shared.log import Progress, note, warn
from shared.tokens import write_vocab
from teacher_cache.commits import Committer, VisibleSamples
from teacher_cache.config import BuildConfig
from teacher_cache.recorder import Recorded, Recorder
from teacher_cache.requests import Engine, EngineInfo, Failed, Outcome, Request
from teacher_cache.rows import RowMaker
from teacher_cache.sources import LoadFailure
from teacher_cache.teacher import IdentifiedTeacher

METRICS_INTERVAL_S = 10.0
SHOW_INTERVAL_S = 0.25
OWN_LOCK_WAIT_S = 20.0
"""Another worker holds this one's lock for a moment while it adopts what a crash left; a living worker keeps it."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one process did. `seconds` is generation alone, without loading the model; `stopped` says why it ended
    early.
    """

    run_id: str
    worker: str
    num_total: int
    num_done_before: int
    num_adopted: int
    recorded: Recorded
    seconds: float
    stopped: str | None

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens a second of generation, None where nothing was generated."""
        return self.recorded.num_tokens / self.seconds if self.recorded.num_tokens else None


class Build:
    """One worker's build of one cache: open it, look at what is left, run it."""

    def __init__(self, config: BuildConfig, teacher: IdentifiedTeacher, worker: str) -> None:
        """Opens or makes the cache and takes this worker's lock until `close`; recovers what a crash left behind.

        Raises CacheConflict when another process works as this worker, DataError when the cache cannot be written,
        CorruptError when a registered file is damaged.
        """
        self.config, self.teacher, self.worker = config, teacher, worker
        self.run_id = run_id_of(config, teacher.record)
        with contextlib.ExitStack() as locks:
            try:
                self.catalog = Catalog.create(config.cache)
                locks.enter_context(_lock(self._lock_path(worker), OWN_LOCK_WAIT_S))
                self._chains = VisibleSamples(self.catalog.chains)
                self._failures = VisibleSamples(self.catalog.failures)
                self.num_adopted = self._recover()
                self._chains.refresh()
                self._failures.refresh()
            except OSError as error:
                problem = " ".join(str(error).split())
                raise DataError(f"{config.cache} cannot be opened for writing: {problem}") from error
            self._locks = locks.pop_all()

    def is_done(self, sample_id: str, *, retry_failures: bool) -> bool:
        """Whether this sample needs nothing more."""
        return sample_id in self._chains or (not retry_failures and sample_id in self._failures)

    def run(
        self,
        requests: Iterable[Request | LoadFailure],
        num_total: int,
        start_engine: Callable[[], Engine],
        *,
        retry_failures: bool = False,
    ) -> BuildResult:
        """Generates what is not done. The engine is started only when something is left.

        Raises StillroomError after making visible what is finished: when the engine dies, or after
        `failures.max_consecutive` failures in a row.
        """
        pending = _Pending(requests, lambda sample_id: self.is_done(sample_id, retry_failures=retry_failures))
        if pending.is_empty():
            return BuildResult(
                self.run_id, self.worker, num_total, pending.num_skipped, self.num_adopted, Recorded(), 0.0, None
            )
        engine = start_engine()
        try:
            with _stop_on_signals() as stop:
                return self._generate(engine, pending, num_total, stop)
        finally:
            engine.close()

    def close(self) -> None:
        """Gives the worker's lock back."""
        self._locks.close()

    def _generate(self, engine: Engine, pending: "_Pending", num_total: int, stop: threading.Event) -> BuildResult:
        self._describe_run(engine.info)
        rows = RowMaker(self.teacher.tokenizer, self.config.capture, self.config.reasoning, self.run_id, self.worker)
        header = self._header(engine.info)
        started_s = time.monotonic()
        with (
            Recorder(self.catalog, header, self.config.shard, rows, self._chains, self._failures) as recorder,
            Progress("build", num_total, "chains", done_before=pending.num_skipped) as progress,
            _Metrics(self.config.cache / "runs" / f"{self.run_id}.{self.worker}.metrics.jsonl") as metrics,
        ):
            loop = _Loop(engine, pending, recorder, self.config.failures.max_consecutive, stop)
            for _ in loop:
                done = pending.num_skipped + recorder.recorded.num_chains + recorder.recorded.num_failures
                progress.update(done, engine.num_tokens, _notes(recorder.recorded))
                metrics.write(done, num_total, engine.num_tokens, recorder.recorded)
            if loop.stopped is not None:
                note(f"{loop.stopped}: making visible what is finished")
        seconds = time.monotonic() - started_s
        if loop.stopped is not None and not stop.is_set():
            raise StillroomError(loop.stopped)
        return BuildResult(
            self.run_id,
            self.worker,
            num_total,
            pending.num_skipped,
            self.num_adopted,
            recorder.recorded,
            seconds,
            loop.stopped,
        )

    def _recover(self) -> int:
        """Adopts files that any worker of this run published and did not commit, if that worker is not at work."""
        num_rows = 0
        for worker in sorted({self.worker, *self._workers_with_files()}):
            with contextlib.ExitStack() as stack:
                if worker != self.worker:
                    try:
                        stack.enter_context(_lock(self._lock_path(worker), 0.0))
                    except CacheConflict:
                        continue
                for table, visible in ((self.catalog.chains, self._chains), (self.catalog.failures, self._failures)):
                    num_rows += Committer(table, visible, self.run_id, worker).recover()
        if num_rows:
            note(f"adopted {num_rows} rows that were written but not yet registered when the last process ended")
        return num_rows

    def _workers_with_files(self) -> set[str]:
        found = set()
        for table in (self.catalog.chains, self.catalog.failures):
            known = {file.path for file in table.files()}
            for path in (table.folder / self.run_id).glob("*.parquet"):
                name = SHARD_NAME.match(path.name)
                if name is not None and path.relative_to(table.folder).as_posix() not in known:
                    found.add(name["worker"])
        return found

    def _lock_path(self, worker: str) -> Path:
        return self.config.cache / "runs" / f"{self.run_id}.{worker}.lock"

    def _describe_run(self, info: EngineInfo) -> None:
        """Writes manifest and vocabulary, before the first row refers to them."""
        config, teacher = self.config, self.teacher.record
        known = self.catalog.runs().get(self.run_id)
        self.catalog.write_run(
            RunManifest(
                run_id=self.run_id,
                name=config.run,
                kind="generate",
                created_at=known.created_at if known else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                teacher=teacher.model_copy(update={"vocab_size": info.vocab_size}),
                sampling=plain(config.sampling),
                capture=plain(config.capture),
                engine={**plain(config.engine), **info.settings},
                prompts=plain(config.prompts),
                reasoning=plain(config.reasoning),
                software=dict(info.software),
            )
        )
        path = self.catalog.vocab_path(teacher.tokenizer_fingerprint)
        if not path.exists():
            write_vocab(path, self.teacher.tokenizer)

    def _header(self, info: EngineInfo) -> ShardHeader:
        capture, teacher = self.config.capture, self.teacher.record
        return ShardHeader(
            codec=capture.codec,
            max_support=min(capture.max_support, info.vocab_size),
            nucleus=capture.nucleus,
            entropy=info.entropy,
            vocab_size=info.vocab_size,
            run_id=self.run_id,
            worker=self.worker,
            teacher_fingerprint=teacher.fingerprint,
            tokenizer_fingerprint=teacher.tokenizer_fingerprint,
            template_fingerprint=teacher.template_fingerprint,
        )


def run_id_of(config: BuildConfig, teacher: Teacher) -> str:
    """`<run>_<8 hex>`: another teacher, capture, reasoning or sampling is another run; more prompts or samples are
    not.
    """
    sampling = {key: value for key, value in plain(config.sampling).items() if key != "samples"}
    meaning = [teacher.fingerprint, plain(config.capture), plain(config.reasoning), sampling]
    return f"{config.run}_{stable_hash('run', *meaning)[:8]}"


class _Pending:
    """Requests that are not done, read one ahead; load failures in between. Iterated once."""

    def __init__(self, requests: Iterable[Request | LoadFailure], is_done: Callable[[str], bool]) -> None:
        self.num_skipped = 0
        self._taken: set[str] = set()
        self._left = self._undone(iter(requests), is_done)
        self._next = next(self._left, None)

    def is_empty(self) -> bool:
        return self._next is None

    def take(self) -> Request | LoadFailure | None:
        """The next one, None at the end."""
        taken, self._next = self._next, next(self._left, None) if self._next is not None else None
        return taken

    def _undone(
        self, requests: Iterator[Request | LoadFailure], is_done: Callable[[str], bool]
    ) -> Iterator[Request | LoadFailure]:
        for request in requests:
            # The same request twice is one row: within a shard nobody would find the second.
            if is_done(request.sample_id) or request.sample_id in self._taken:
                self.num_skipped += 1
            else:
                self._taken.add(request.sample_id)
                yield request


class _Loop:
    """Keeps the engine full and hands over what it finishes; `stopped` says why it ended before its work was done."""

    def __init__(
        self,
        engine: Engine,
        pending: _Pending,
        recorder: Recorder,
        max_consecutive: int | None,
        stop: threading.Event,
    ) -> None:
        self.stopped: str | None = None
        self._engine, self._pending, self._recorder = engine, pending, recorder
        self._max_consecutive, self._stop = max_consecutive, stop
        self._consecutive = 0

    def __iter__(self) -> Iterator[None]:
        """Comes back SHOW_INTERVAL_S apart, for progress, and once at the end."""
        shown_s = 0.0
        while self.stopped is None and (self._fill() or self._engine.num_unfinished):
            for outcome in self._step():
                self._count(outcome)
                self._recorder.put(outcome)
            if time.monotonic() - shown_s >= SHOW_INTERVAL_S:
                yield
                shown_s = time.monotonic()
        yield

    def _fill(self) -> bool:
        """Submits while the engine has room; whether there is still something to submit."""
        while self._engine.has_room() and not self._pending.is_empty():
            request = self._pending.take()
            if isinstance(request, LoadFailure):
                self._recorder.put(request)
            elif request is not None:
                self._engine.submit(request)
        return not self._pending.is_empty()

    def _step(self) -> list[Outcome]:
        try:
            outcomes = self._engine.step()
        except StillroomError:
            # Ctrl-C reaches the engine's processes too: that they are gone is no news then.
            if not self._stop.is_set():
                raise
            outcomes = []
        if self._stop.is_set():
            self.stopped = "interrupted"
        return outcomes

    def _count(self, outcome: Outcome) -> None:
        self._consecutive = self._consecutive + 1 if isinstance(outcome, Failed) else 0
        limit = self._max_consecutive
        if isinstance(outcome, Failed) and limit is not None and self._consecutive >= limit and self.stopped is None:
            self.stopped = (
                f"{self._consecutive} prompts in a row failed, the last with: {outcome.message} "
                "(failures.max_consecutive is the limit; failed prompts are retried with --retry-failures)"
            )


class _Metrics:
    """Appends one JSON line every METRICS_INTERVAL_S and one at the end, for those who watch many workers."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")
        self._started_s = time.monotonic()
        self._written_s = 0.0
        self._last: dict[str, object] | None = None

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._append(self._last)
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
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def _notes(recorded: Recorded) -> dict[str, str]:
    notes = {"failed": str(recorded.num_failures)}
    if recorded.bytes_per_token is not None:
        return {"": f"{recorded.bytes_per_token:.0f} B/token", **notes}
    return notes


@contextlib.contextmanager
def _lock(path: Path, wait_s: float) -> Iterator[None]:
    """Holds an exclusive lock that ends with the process. Raises CacheConflict when another keeps it over `wait_s`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        deadline_s = time.monotonic() + wait_s
        while not _try_lock(stream, path):
            if time.monotonic() >= deadline_s:
                raise CacheConflict(
                    f"another process builds as this worker ({path} is locked): wait for it, or give each process its "
                    "own share with --worker I/N"
                )
            time.sleep(0.1)
        yield


def _try_lock(stream: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # Some network file systems have no locks. The commit protocol still keeps every row single.
        warn(f"{path.parent} cannot be locked ({error.strerror}): make sure that no two processes are the same worker")
    return True


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into an event; the second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Nothing is printed here: the signal may have come in the middle of a print.
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
