"""Replaces a visible file with one that holds some of its rows, while builds and passes may run."""

from collections.abc import Callable, Collection, Sequence

import pyarrow as pa

from stillroom.cache.catalog import DataFile, Table
from stillroom.storage.paths import Location
from teacher_cache.writer.commit import (
    Committer,
    VisibleSamples,
    lock_path,
    remove_files,
    replace_file,
    rewrite,
    worker_lock,
)

# An older word for "repaired". FORMAT.md names such files, and readers know them by it, so it stays.
REPAIR_WORKER = "mended"
LOCK_WAIT_S = 20.0


def keep_rows(
    root: Location,
    table: Table,
    file: DataFile,
    keep: Callable[[pa.Table], Sequence[bool]] | None,
    groups: Collection[int] | None = None,
) -> int:
    """`replace_rows`, and removes the file if nothing of it is kept; None keeps nothing."""
    num_rows = 0 if keep is None else replace_rows(root, table, file, keep, groups)
    if not num_rows:
        remove_files(table, lambda one: one.path == file.path)
    return num_rows


def replace_rows(
    root: Location,
    table: Table,
    file: DataFile,
    keep: Callable[[pa.Table], Sequence[bool]],
    groups: Collection[int] | None,
) -> int:
    """Replaces `file` with one that holds the rows of `groups` (None: all) that `keep` selects; returns their number.

    Without any, or if `file` left the table meanwhile, nothing is replaced and the result is 0.
    """
    committer = Committer(table, VisibleSamples(table), file.owner, REPAIR_WORKER)
    # Without the lock, a process that starts now would take the new file for an orphan without new rows and delete it.
    with worker_lock(lock_path(root, file.owner, REPAIR_WORKER), LOCK_WAIT_S):
        temp = committer.temp_path()
        try:
            num_rows = rewrite(table.path_of(file), temp, keep, groups)
            is_replaced = num_rows > 0 and replace_file(table, committer, file, temp, num_rows)
        finally:
            temp.unlink(missing_ok=True)
    return num_rows if is_replaced else 0
