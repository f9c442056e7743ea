"""Files that become visible whole: temporary name, fsync, rename. Hashes of what was written."""

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.errors import ConfigError, DataError
from shared.storage import Location, parts_of

TEMP_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_path(path: Location) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on success it is fsynced and renamed to `path`, on error removed.

    For an object store it is a local file, put whole on success.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="stillroom-put-") as folder:
            local = Path(folder) / path.name
            yield local
            path.upload(local)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        yield temp
        sync_file(temp)
        temp.replace(path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def check_out(flag: str, out: Path, caches: Sequence[Location] = ()) -> None:
    """Raises ConfigError where what `flag` names would be written into a cache, DataError where it cannot be written.

    No folder is made for it: one that is missing is a slip more often than a wish.
    """
    for root in caches:
        if isinstance(root, Path) and out.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{flag} {out} lies in the cache {root}, which is read-only here: write elsewhere")
    if out.is_dir():
        raise DataError(f"{flag} {out} is a folder: name a file")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{flag} {out}: there is no folder {out.parent}: make it, or name a file in one that exists")


def write_text_atomic(path: Location, text: str) -> None:
    """Writes UTF-8 text so that readers see the old file or the new one, never a part."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Flushes a written file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries, so that a rename survives a power cut."""
    sync_file(path)


def file_clock_s(folder: Location) -> float:
    """What the file system of `folder` takes for now: ages of files must not depend on this machine's clock."""
    if not isinstance(folder, Path):
        stamp = folder / f".clock.{secrets.token_hex(4)}{TEMP_SUFFIX}"
        try:
            stamp.write_bytes(b"")
            return stamp.stat().st_mtime
        finally:
            stamp.unlink(missing_ok=True)
    probe = folder / f".clock.{secrets.token_hex(4)}{TEMP_SUFFIX}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sha256_of(path: Location) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    for part in parts_of(path):
        digest.update(part)
    return digest.hexdigest()
