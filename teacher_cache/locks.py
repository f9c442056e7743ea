"""One process a worker: a lock on a file beside the run's manifest, gone with the process that holds it."""

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shared.errors import CacheConflict
from shared.log import warn
from shared.storage import Location, spool

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
