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


@contextlib.contextmanager
def worker_lock(path: Path, wait_s: float) -> Iterator[None]:
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
