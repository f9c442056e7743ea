"""The commit protocol: every sample is visible at most once, whoever else writes and wherever a process dies.

A shard is published (renamed) before it is committed. To commit: refresh the log; drop rows whose sample has become
visible; commit on exactly that version; if another commit came first, start over. A file that was published but never
committed is adopted at its worker's next start, or removed if its bytes do not match its name.

One process per worker: it holds a lock on a file beside the run's manifest, which the system releases when it dies.
"""

import contextlib
import errno
import fcntl
import os
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import SHARD_NAME, DataFile, Table, check_hash, publish
from stillroom.cache.shards import header_of
from stillroom.errors import CacheConflict, CorruptError, StillroomError, first_line
from stillroom.log import format_plural, note, warn
from stillroom.schema.features import FEATURES_METADATA_KEY
from stillroom.schema.manifest import SHARD_METADATA_KEY
from stillroom.storage.objects import is_store_error
from stillroom.storage.paths import TEMP_SUFFIX, Location, file_clock_s, matching, open_parquet, relative_name, spool
from teacher_cache.writer.feature_file import feature_options
from teacher_cache.writer.shard import parquet_options

# "care" is an older word for maintenance; logs and commit markers of existing caches carry it, so it stays.
REMOVAL_APPLICATION = "stillroom/care/removals"
MAX_ATTEMPTS = 200
MAX_PAUSE_S = 0.5
NO_LOCKS_GRACE_S = 86400.0
"""Age from which a worker's unfinished files count as abandoned if the file system has no locks."""
OWN_LOCK_WAIT_S = 20.0
"""Another worker holds this worker's lock briefly while it adopts what a crash left behind."""

T = TypeVar("T")
Wanted = Callable[[str, int, str], bool]
"""Whether a row is part of a configuration, by its prompt_id, sample_index and source."""


class VisibleSamples:
    """Ids of a table's visible samples, updated file by file; about 100 bytes per sample.

    With `within` only files of that folder count: a sample has features once per set. `wanted` is for `num_wanted`.
    """

    def __init__(self, table: Table, within: str | None = None, wanted: Wanted | None = None) -> None:
        self.table = table
        self._prefix = "" if within is None else f"{within}/"
        self._wanted = wanted
        self._num_wanted: dict[str, int] = {}
        self._read: set[str] = set()
        self._ids: set[bytes] = set()

    def refresh(self) -> None:
        """Reads the log and the ids of its new files. Raises CorruptError naming a damaged file."""
        self.table.refresh()
        files = self.table.files()
        if not self._read.issubset(file.path for file in files):
            # Another process quarantined or dropped a file, whose chains are to be generated again. That is rare, so
            # all files are read again rather than the ids of each kept by file.
            self._read.clear()
            self._ids.clear()
        for file in files:
            if file.path not in self._read and file.path.startswith(self._prefix):
                self.add(file.path, self._sample_ids(file))

    def num_wanted(self, file: DataFile) -> int:
        """Rows of a visible file that are wanted, or all."""
        return self._num_wanted.get(file.path, file.num_rows)

    def _sample_ids(self, file: DataFile) -> list[str]:
        path = self.table.path_of(file)
        if self._wanted is None:
            return read_sample_ids(path)
        columns = read_columns(path, ["sample_id", "prompt_id", "sample_index", "source"]).columns
        ids: list[str] = columns[0].to_pylist()
        self._num_wanted[file.path] = sum(map(self._wanted, *(column.to_pylist() for column in columns[1:])))
        return ids

    def add(self, path: str, sample_ids: Iterable[str]) -> None:
        """Adds the ids of a visible file that are known without reading it."""
        self._ids.update(map(_key, sample_ids))
        self._read.add(path)

    def __contains__(self, sample_id: str) -> bool:
        return _key(sample_id) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def holds(self, path: str) -> bool:
        """Whether the file is visible as of the last refresh."""
        return path in self._read


class Committer:
    """Commits one worker's files to one table. The process must hold the worker's lock. Not thread-safe."""

    def __init__(self, table: Table, visible: VisibleSamples, run_id: str, worker: str) -> None:
        self._table = table
        self._visible = visible
        self._run_id, self._worker = run_id, worker
        self.application = f"stillroom/{run_id}/{worker}"
        self.superseded: set[str] = set()
        """Samples of committed files whose rows were left out, because another worker's were visible first."""

    @property
    def next_sequence(self) -> int:
        """Number of the next transaction."""
        return next_sequence(self._table, self.application)

    def temp_path(self) -> Path:
        """Temporary path of the next file."""
        # Without file locks two processes may run as the same worker: the token separates their files.
        return spool(self._folder) / f".{self._worker}-{self.next_sequence:06d}.{secrets.token_hex(4)}{TEMP_SUFFIX}"

    def commit(self, temp: Path, sample_ids: Sequence[str]) -> int:
        """Publishes a finished file with these rows and makes those visible that are not yet; returns their number.

        Raises CacheConflict if others keep committing for minutes.
        """
        # Published first: a log that names a file which is not there yet would break every reader.
        return self._commit(self.publish(temp, len(sample_ids)), sample_ids)

    def publish(self, temp: Path, num_rows: int) -> DataFile:
        """Gives a finished file its final name; it becomes visible only with a commit."""
        stem = f"{self._run_id}/{self._worker}-{self.next_sequence:06d}"
        return publish(temp, self._table.folder, stem, num_rows)

    def recover(self, abandoned_s: float = 0.0) -> int:
        """Adopts published files of this worker and removes its temporary ones; returns the number of adopted rows.

        Files younger than `abandoned_s` seconds are left alone. A file whose transaction is committed but which is not
        visible was removed from the table on purpose, so it is not adopted.
        """
        self._table.refresh()
        for temp in spool(self._folder).glob(f".{self._worker}-*{TEMP_SUFFIX}"):
            if self._is_abandoned(temp, abandoned_s):
                # Without a footer nothing in it can be read, so there is nothing to save.
                temp.unlink(missing_ok=True)
        known = {file.path for file in self._table.files()}
        # Taken before the loop: each adoption commits, which raises the next sequence above files still to be adopted.
        first_open = self.next_sequence
        num_adopted = 0
        for path in matching(self._folder, f"{self._worker}-*.parquet"):
            name = SHARD_NAME.match(path.name)
            relative = relative_name(path, self._table.folder)
            if name is None or name["worker"] != self._worker or relative in known:
                continue
            # It is gone where its worker lives after all, or where another one adopts it too.
            with contextlib.suppress(FileNotFoundError):
                # Lower sequences are committed: such a file was dropped or quarantined, and must not come back.
                if int(name["sequence"]) >= first_open and self._is_abandoned(path, abandoned_s):
                    num_adopted += self.adopt(path)
        return num_adopted

    def adopt(self, path: Location) -> int:
        """Makes rows of a published file visible that are not yet; returns their number. Removes a damaged file.

        Raises FileNotFoundError if another process has removed it.
        """
        size_bytes = path.stat().st_size
        try:
            check_hash(path)
            sample_ids = read_sample_ids(path)
        except CorruptError as error:
            warn(f"{path} is damaged and was never visible: removed, its chains will be generated again ({error})")
            path.unlink()
            return 0
        file = DataFile(relative_name(path, self._table.folder), size_bytes, len(sample_ids))
        return self._commit(file, sample_ids)

    def _is_abandoned(self, path: Location, abandoned_s: float) -> bool:
        return not abandoned_s or file_clock_s(path.parent) - path.stat().st_mtime >= abandoned_s

    @property
    def _folder(self) -> Location:
        return self._table.folder / self._run_id

    def _commit(self, file: DataFile, sample_ids: Sequence[str]) -> int:
        def attempt() -> int:
            # After a lost race the next attempt starts from the rewritten file: the first one is gone by then.
            nonlocal file, sample_ids
            self._visible.refresh()
            if self._visible.holds(file.path):
                # The log took an earlier attempt although it seemed to fail.
                return file.num_rows
            fresh_ids = [sample_id for sample_id in sample_ids if sample_id not in self._visible]
            if len(fresh_ids) < len(sample_ids):
                self.superseded.update(set(sample_ids).difference(fresh_ids))
                path = self._table.path_of(file)
                if fresh_ids:
                    try:
                        file, sample_ids = self._rewrite(path), fresh_ids
                    except FileNotFoundError as error:
                        # Without locks, another worker may take this one for dead, and replace its file.
                        raise CacheConflict(f"{path} is being replaced by another worker") from error
                # After its replacement is published: a kill in between leaves both, and each row is adopted once.
                path.unlink(missing_ok=True)
            if fresh_ids:
                self._table.commit([file], self.application, self.next_sequence)
                # The next refresh need not read back from the store what was just written.
                self._visible.add(file.path, fresh_ids)
            return len(fresh_ids)

        return until_first(self._table, attempt)

    def _rewrite(self, path: Location) -> DataFile:
        def is_fresh(rows: pa.Table) -> list[bool]:
            return [sample_id not in self._visible for sample_id in rows.column("sample_id").to_pylist()]

        temp = self.temp_path()
        num_rows = rewrite(path, temp, is_fresh)
        return self.publish(temp, num_rows)


def rewrite(
    path: Location, temp: Path, keep: Callable[[pa.Table], Sequence[bool]], groups: Collection[int] | None = None
) -> int:
    """Writes the rows that `keep` selects in each row group to `temp`; returns their number.

    With `groups`, other row groups are not read at all. Page checksums are verified.
    """
    num_rows = 0
    with open_parquet(path) as file:
        schema = file.schema_arrow
        with pq.ParquetWriter(temp, schema, **_options_of(schema, path)) as writer:
            for index in range(file.num_row_groups):
                if groups is not None and index not in groups:
                    continue
                group = file.read_row_group(index)
                kept = group.filter(pa.array(keep(group), pa.bool_()))
                num_rows += kept.num_rows
                if kept.num_rows:
                    writer.write_table(kept)
    return num_rows


def replace_file(table: Table, committer: Committer, old: DataFile, temp: Path, num_rows: int) -> bool:
    """Replaces `old` with a finished file in one transaction; False if `old` is no longer visible.

    The file's rows must be among those of `old`, which stays on disk for older versions.
    """
    # Once, outside of the attempts: a lost race does not change which rows replace `old`.
    new = committer.publish(temp, num_rows)

    def attempt() -> bool:
        table.refresh()
        files = table.files()
        if any(file.path == new.path for file in files):
            # The log took an earlier attempt although it seemed to fail.
            return True
        # Whoever removed it decided about its rows: the new file would bring them back.
        if old not in files:
            table.path_of(new).unlink()
            return False
        table.commit([new], committer.application, committer.next_sequence, [old])
        return True

    return until_first(table, attempt)


def remove_files(table: Table, choose: Callable[[DataFile], bool]) -> list[DataFile]:
    """Removes the visible files that `choose` selects from the latest version, in one transaction; returns them.

    They stay on disk for older versions. Raises CacheConflict if others keep committing for minutes.
    """

    def attempt() -> list[DataFile]:
        table.refresh()
        chosen = [file for file in table.files() if choose(file)]
        if chosen:
            table.commit([], REMOVAL_APPLICATION, next_sequence(table, REMOVAL_APPLICATION), chosen)
        return chosen

    return until_first(table, attempt)


def until_first(table: Table, attempt: Callable[[], T]) -> T:
    """Calls `attempt`, which refreshes the log and commits, until no other commit comes first; returns its result.

    Raises CacheConflict if others keep committing for minutes.
    """
    jitter = random.Random(f"{table.folder} {os.getpid()}")
    for number in range(MAX_ATTEMPTS):
        try:
            return attempt()
        except CacheConflict:
            # Workers that retry in step would collide again.
            time.sleep(jitter.uniform(0, min(MAX_PAUSE_S, 0.01 * 2**number)))
    raise CacheConflict(f"{table.folder}: other processes keep committing: try again later")


def next_sequence(table: Table, application: str) -> int:
    """Number of the application's next transaction, as of the last refresh."""
    last = table.last_sequence(application)
    return 0 if last is None else last + 1


def read_sample_ids(path: Location) -> list[str]:
    """The `sample_id` column of a file of any table. Raises CorruptError if it cannot be read."""
    ids: list[str] = read_columns(path, ["sample_id"]).column(0).to_pylist()
    return ids


def read_columns(path: Location, names: Sequence[str]) -> pa.Table:
    """Some columns of a file of any table. Raises CorruptError if it cannot be read."""
    try:
        with open_parquet(path) as file:
            return file.read(columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        problem = f"{path} cannot be read, `teacher-cache verify` lists what is wrong: {first_line(error)}"
        raise (StillroomError if is_store_error(error) else CorruptError)(problem) from error


def lock_path(cache: Location, run_id: str, worker: str) -> Location:
    """The file that a running worker keeps locked."""
    return cache / "runs" / f"{run_id}.{worker}.lock"


@contextlib.contextmanager
def worker_lock(path: Location, wait_s: float) -> Iterator[float]:
    """Holds an exclusive lock that ends with the process. Raises CacheConflict if another holds it beyond `wait_s`.

    Yields the age in seconds from which the worker's unfinished files count as abandoned: 0 under a lock, and
    NO_LOCKS_GRACE_S without file locks, so that a second process of the same worker leaves the first one's files alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # An object store has no locks: a local file then separates at least the processes of one machine.
    # Never removed: a process that waits for a removed file would get a lock that nobody else can see.
    with (spool(path.parent) / path.name).open("a") as stream:
        deadline_s = time.monotonic() + wait_s
        while (abandoned_s := _try_lock(stream, path)) is None:
            if time.monotonic() >= deadline_s:
                raise CacheConflict(
                    f"another process builds as this worker ({path} is locked): wait for it, or start all of them with "
                    "--join"
                )
            # flock has no timeout, so waiting for it is polling.
            time.sleep(0.1)
        yield abandoned_s if isinstance(path, Path) else NO_LOCKS_GRACE_S


@contextlib.contextmanager
def recovered_worker(cache: Location, run_id: str, worker: str, visible: Sequence[VisibleSamples]) -> Iterator[int]:
    """Holds a worker's lock, after adopting what workers of this run or feature set published but did not commit.

    Yields the number of adopted rows, which count as done in `visible`. Files of running workers are left to them.
    """
    with worker_lock(lock_path(cache, run_id, worker), OWN_LOCK_WAIT_S) as own_abandoned_s:
        num_rows = 0
        # Other workers too: the next build may run with another N, in which a dead worker never comes back.
        for one in sorted({worker}.union(*(_workers_with_files(samples.table, run_id) for samples in visible))):
            with contextlib.ExitStack() as stack:
                abandoned_s = own_abandoned_s
                if one != worker:
                    try:
                        abandoned_s = stack.enter_context(worker_lock(lock_path(cache, run_id, one), 0.0))
                    except CacheConflict:
                        continue
                num_rows += sum(
                    Committer(samples.table, samples, run_id, one).recover(abandoned_s) for samples in visible
                )
        if num_rows:
            note(f"adopted {format_plural(num_rows, 'row')} that an interrupted run had written but not registered")
        for samples in visible:
            samples.refresh()
        yield num_rows


def is_locked(path: Location) -> bool:
    """Whether a process holds this lock. Writes nothing, so it works on a read-only cache."""
    try:
        with (spool(path.parent) / path.name).open("r") as stream:
            # A shared lock meets only a builder's exclusive one, and two programs that ask do not see each other.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # There was never such a worker, or the file system has no locks.
        return False
    return False


def _workers_with_files(table: Table, run_id: str) -> set[str]:
    """Workers with published files that are not visible."""
    known = {file.path for file in table.files()}
    return {
        name["worker"]
        for path in matching(table.folder / run_id, "*.parquet")
        if (name := SHARD_NAME.match(path.name)) and relative_name(path, table.folder) not in known
    }


def _options_of(schema: pa.Schema, path: Location) -> dict[str, Any]:
    """Encodings of a file of the table that its header belongs to."""
    metadata = schema.metadata or {}
    if FEATURES_METADATA_KEY in metadata:
        return feature_options()
    # Verdicts and failures have no header; vocab_size only sizes the dictionary of token ids.
    return parquet_options(schema, header_of(metadata, str(path)).vocab_size if SHARD_METADATA_KEY in metadata else 0)


def _try_lock(stream: IO[str], path: Location) -> float | None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # Some network file systems have no locks. The commit protocol still prevents duplicate rows.
        warn(
            f"{path.parent} cannot be locked ({error.strerror}): make sure that no two processes run as the same worker"
        )
        return NO_LOCKS_GRACE_S
    return 0.0


def _key(sample_id: str) -> bytes:
    # Ids are hex: bytes take half the memory.
    try:
        return bytes.fromhex(sample_id)
    except ValueError:
        return sample_id.encode()
