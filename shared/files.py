"""Files that become visible whole: temporary name, fsync, rename. Hashes of what was written."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMP_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on success it is fsynced and renamed to `path`, on error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        yield temp
        sync_file(temp)
        temp.replace(path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
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


def file_clock_s(folder: Path) -> float:
    """What the file system of `folder` takes for now: ages of files must not depend on this machine's clock."""
    probe = folder / f".clock.{secrets.token_hex(4)}{TEMP_SUFFIX}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
