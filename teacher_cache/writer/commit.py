"""The commit protocol: every sample visible at most once, whoever else writes, wherever this process died.

A shard is published (renamed) before it is committed. To commit: read the log anew; drop from the shard the rows whose
sample is visible by now; commit on exactly that version; if another commit came first, begin again. What was published
and never committed is found by its worker's next start and adopted, or removed when its bytes are not what its name
says.

One process a worker: a lock on a file beside the run's manifest, gone with the process that holds it.
"""

import contextlib
import errno
import fcntl
import os
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import SHARD_NAME, DataFile, Table, check_hash, publish
from stillroom.cache.shards import header_of
from stillroom.errors import CacheConflict, CorruptError, StillroomError
from stillroom.log import warn
from stillroom.schema.manifest import SHARD_METADATA_KEY
from stillroom.storage.objects import is_store_error
from stillroom.storage.paths import TEMP_SUFFIX, Location, file_clock_s, matching, open_parquet, relative_name, spool
from teacher_cache.writer.shard import parquet_options

CARE_APPLICATION = "stillroom/care/removals"
MAX_ATTEMPTS = 200
MAX_PAUSE_S = 0.5

T = TypeVar("T")


class VisibleSamples:
    """Ids of all samples of a table that are visible, kept up to date file by file: about 100 bytes a sample."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._read: set[str] = set()
        self._ids: set[bytes] = set()

    def refresh(self) -> None:
        """Reads the log, and the ids of files that are new in it. Raises CorruptError naming one that is damaged."""
        self._table.refresh()
        for file in self._table.files():
            if file.path not in self._read:
                self._ids.update(_key(sample_id) for sample_id in read_sample_ids(self._table.path_of(file)))
                self._read.add(file.path)

    def __contains__(self, sample_id: str) -> bool:
        return _key(sample_id) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def holds(self, path: str) -> bool:
        """Whether the file is registered, as of the last refresh."""
        return path in self._read


class Committer:
    """Commits one worker's files to one table. Its process must hold the worker's lock. Not thread-safe."""

    def __init__(self, table: Table, visible: VisibleSamples, run_id: str, worker: str) -> None:
        self._table = table
        self._visible = visible
        self._run_id, self._worker = run_id, worker
        self.application = f"stillroom/{run_id}/{worker}"

    @property
    def next_sequence(self) -> int:
        """Number of the next transaction."""
        return next_sequence(self._table, self.application)

    def temp_path(self) -> Path:
        """Where the next file is written until it is finished."""
        # The token keeps two processes apart that are the same worker where the file system has no locks.
        return spool(self._folder) / f".{self._worker}-{self.next_sequence:06d}.{secrets.token_hex(4)}{TEMP_SUFFIX}"

    def commit(self, temp: Path, num_rows: int) -> int:
        """Publishes a finished file and makes its rows visible, except those that are already. Returns how many were
        new.

        Raises CacheConflict when others commit without a pause for minutes.
        """
        return self._commit(self.publish(temp, num_rows))

    def publish(self, temp: Path, num_rows: int) -> DataFile:
        """Gives a finished file its name; it is visible only once it is committed."""
        return publish(temp, self._table.folder, self._stem(), num_rows)

    def recover(self, abandoned_s: float = 0.0) -> int:
        """Adopts files of this worker that were published but not committed, sweeps temporary ones; rows adopted.

        Files younger than `abandoned_s` seconds are left alone. A file whose transaction is over and that is not
        visible was taken out of the table on purpose: it stays.
        """
        self._table.refresh()
        for temp in spool(self._folder).glob(f".{self._worker}-*{TEMP_SUFFIX}"):
            if self._is_abandoned(temp, abandoned_s):
                temp.unlink(missing_ok=True)
        known = {file.path for file in self._table.files()}
        first_open = self.next_sequence
        num_adopted = 0
        for path in matching(self._folder, f"{self._worker}-*.parquet"):
            name = SHARD_NAME.match(path.name)
            relative = relative_name(path, self._table.folder)
            if name is None or name["worker"] != self._worker or relative in known:
                continue
            if int(name["sequence"]) >= first_open and self._is_abandoned(path, abandoned_s):
                num_adopted += self.adopt(path)
        return num_adopted

    def adopt(self, path: Location) -> int:
        """Makes the rows of a published file visible that are not yet; removes it where it is damaged. How many rows
        were new.
        """
        relative = relative_name(path, self._table.folder)
        try:
            check_hash(path)
            with open_parquet(path) as file:
                num_rows = file.metadata.num_rows
        except (CorruptError, pa.ArrowException) as error:
            warn(f"{path} is damaged and was never visible, its chains are generated again ({error})")
            path.unlink()
            return 0
        return self._commit(DataFile(relative, path.stat().st_size, num_rows))

    def _is_abandoned(self, path: Location, abandoned_s: float) -> bool:
        return not abandoned_s or file_clock_s(path.parent) - path.stat().st_mtime >= abandoned_s

    @property
    def _folder(self) -> Location:
        return self._table.folder / self._run_id

    def _stem(self) -> str:
        return f"{self._run_id}/{self._worker}-{self.next_sequence:06d}"

    def _commit(self, file: DataFile) -> int:
        left = file

        def attempt() -> int:
            nonlocal left
            self._visible.refresh()
            if self._visible.holds(left.path):
                # The log took an earlier attempt after all.
                return left.num_rows
            reduced = self._without_visible(left)
            if reduced is None:
                return 0
            left = reduced
            self._table.commit([left], self.application, self.next_sequence)
            return left.num_rows

        return until_first(self._table, attempt)

    def _without_visible(self, file: DataFile) -> DataFile | None:
        """The file, a smaller one without rows that are visible already, or None where none is left."""
        path = self._table.path_of(file)
        fresh = [sample_id not in self._visible for sample_id in read_sample_ids(path)]
        if all(fresh):
            return file
        smaller = self._rewrite(path) if any(fresh) else None
        path.unlink()
        return smaller

    def _rewrite(self, path: Location) -> DataFile:
        def is_fresh(rows: pa.Table) -> list[bool]:
            return [sample_id not in self._visible for sample_id in rows.column("sample_id").to_pylist()]

        temp = self.temp_path()
        num_rows = rewrite(path, temp, is_fresh)
        return self.publish(temp, num_rows)


def rewrite(
    path: Location, temp: Path, keep: Callable[[pa.Table], Sequence[bool]], groups: Collection[int] | None = None
) -> int:
    """Writes the rows that `keep` wants of each row group to `temp`, encoded as the format says; how many there were.

    `groups` None reads all row groups; others are not even looked at. Page checksums are verified on the way.
    """
    num_rows = 0
    with open_parquet(path) as file:
        schema = file.schema_arrow
        is_shard = SHARD_METADATA_KEY in (schema.metadata or {})
        vocab_size = header_of(schema.metadata, str(path)).vocab_size if is_shard else 0
        with pq.ParquetWriter(temp, schema, **parquet_options(schema, vocab_size)) as writer:
            for index in range(file.num_row_groups):
                if groups is not None and index not in groups:
                    continue
                group = file.read_row_group(index)
                kept = group.filter(pa.array(keep(group), pa.bool_()))
                num_rows += kept.num_rows
                if kept.num_rows:
                    writer.write_table(kept)
    return num_rows


def replace_file(table: Table, committer: "Committer", old: DataFile, temp: Path, num_rows: int) -> bool:
    """Puts a finished file in the place of `old` in one transaction; False where `old` is no longer visible.

    The caller makes sure that the file's rows are among those of `old`. `old` stays on the disk for older versions.
    """
    new = committer.publish(temp, num_rows)

    def attempt() -> bool:
        table.refresh()
        files = table.files()
        if any(file.path == new.path for file in files):
            # The log took an earlier attempt after all.
            return True
        if old not in files:
            table.path_of(new).unlink()
            return False
        table.commit([new], committer.application, committer.next_sequence, [old])
        return True

    return until_first(table, attempt)


def take_out(table: Table, choose: Callable[[DataFile], bool]) -> list[DataFile]:
    """Takes the visible files that `choose` wants out of the latest version, in one transaction; returns them.

    They stay on the disk, where older versions find them. Raises CacheConflict when others commit without a pause.
    """

    def attempt() -> list[DataFile]:
        table.refresh()
        chosen = [file for file in table.files() if choose(file)]
        if chosen:
            table.commit([], CARE_APPLICATION, next_sequence(table, CARE_APPLICATION), chosen)
        return chosen

    return until_first(table, attempt)


def until_first(table: Table, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, which reads the log anew and commits; again and again while another commit comes first.

    Raises CacheConflict when others commit without a pause for minutes.
    """
    jitter = random.Random(f"{table.folder} {os.getpid()}")
    for number in range(MAX_ATTEMPTS):
        try:
            return attempt()
        except CacheConflict:
            # Many workers that retry in step would collide again.
            time.sleep(jitter.uniform(0, min(MAX_PAUSE_S, 0.01 * 2**number)))
    raise CacheConflict(f"{table.folder} is being written to by others without a pause: try again later")


def next_sequence(table: Table, application: str) -> int:
    """Number of the application's next transaction, as of the last refresh."""
    last = table.last_sequence(application)
    return 0 if last is None else last + 1


def read_sample_ids(path: Location) -> list[str]:
    """The `sample_id` column of a file of any table. Raises CorruptError where it cannot be read."""
    try:
        with open_parquet(path) as file:
            ids: list[str] = file.read(columns=["sample_id"], use_threads=False).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        problem = f"{path} cannot be read, `teacher-cache verify` lists what is wrong: {str(error).splitlines()[0]}"
        raise (StillroomError if is_store_error(error) else CorruptError)(problem) from error
    return ids


def _key(sample_id: str) -> bytes:
    # Half the memory of the text: ids are hex. Other text is kept as it is.
    try:
        return bytes.fromhex(sample_id)
    except ValueError:
        return sample_id.encode()


NO_LOCKS_GRACE_S = 86400.0
"""Where nothing says whether a worker is at work, its unfinished files count as abandoned after so long."""


def lock_path(cache: Location, run_id: str, worker: str) -> Location:
    """The file that a worker of a run keeps locked."""
    return cache / "runs" / f"{run_id}.{worker}.lock"


@contextlib.contextmanager
def worker_lock(path: Location, wait_s: float) -> Iterator[float]:
    """Holds an exclusive lock that ends with the process. Raises CacheConflict when another keeps it over `wait_s`.

    Yields the age in seconds from which on the worker's unfinished files are nobody's: 0 under a lock, and
    NO_LOCKS_GRACE_S where the file system or the store has none, so that a second process as this worker leaves the
    first one's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A store has no locks: there this one keeps apart the processes of one machine.
    with (spool(path.parent) / path.name).open("a") as stream:
        deadline_s = time.monotonic() + wait_s
        while (abandoned_s := _try_lock(stream, path)) is None:
            if time.monotonic() >= deadline_s:
                raise CacheConflict(
                    f"another process builds as this worker ({path} is locked): wait for it, or give each process its "
                    "own share with --worker I/N"
                )
            time.sleep(0.1)
        yield abandoned_s if isinstance(path, Path) else NO_LOCKS_GRACE_S


def is_at_work(path: Location) -> bool:
    """Whether a process holds this lock. Writes nothing, so it works on a cache that is read-only."""
    try:
        with (spool(path.parent) / path.name).open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # No such worker ever, or no locks on this file system.
        return False
    return False


def _try_lock(stream: IO[str], path: Location) -> float | None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # Some network file systems have no locks. The commit protocol still keeps every row single.
        warn(f"{path.parent} cannot be locked ({error.strerror}): make sure that no two processes are the same worker")
        return NO_LOCKS_GRACE_S
    return 0.0
