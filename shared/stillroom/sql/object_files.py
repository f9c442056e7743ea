"""Object stores as DuckDB can read them: an fsspec file system over stillroom.storage.paths, read-only.

DuckDB's own extension for stores is not among Python's packages, and a session that is locked down must not fetch one.
A file system registered with the connection is asked for the very ranges that DuckDB wants: of a shard the footer and
the columns of the query. What may be opened is DuckDB's `allowed_paths`, as for files.
"""

import datetime
import threading
from typing import Any

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import location


class ObjectFiles(AbstractFileSystem):  # type: ignore[misc]
    """Opens, sizes and dates objects of one scheme (s3, gs or az). Each knows its own path and nothing is listed."""

    cachable = False

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.protocol = scheme

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> "ObjectFile":
        """The object for reading. Raises what stillroom.storage.paths.ObjectPath raises."""
        if mode != "rb":
            raise PermissionError(f"{path}: a cache is read-only")
        return ObjectFile(self._path(path))

    def exists(self, path: str, **_: Any) -> bool:
        return self._path(path).is_file()

    def isfile(self, path: str) -> bool:
        return self._path(path).is_file()

    def isdir(self, path: str) -> bool:
        return False

    def glob(self, path: str, *_: Any, **__: Any) -> list[str]:
        """The path alone: every file is named."""
        return [path]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        stat = self._path(path).stat()
        return {"name": path, "size": stat.st_size, "type": "file", "mtime": stat.st_mtime}

    def modified(self, path: str) -> datetime.datetime:
        # Shards never change under their name, so that DuckDB may keep what it has read.
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)

    def _path(self, path: str) -> ObjectPath:
        full = location(path if "://" in path else f"{self.protocol}://{path}")
        assert isinstance(full, ObjectPath)
        return full


class ObjectFile:
    """One object, open for reading. Threads that share it have a position each: DuckDB seeks and then reads."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._file: pa.NativeFile = path.open_file()
        self.size: int = self._file.size()
        self._place = threading.local()

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self.tell(), 2: self.size}[whence]
        self._place.offset = base + offset
        return base + offset

    def tell(self) -> int:
        return int(self._place.__dict__.get("offset", 0))

    def read(self, num_bytes: int = -1) -> bytes:
        offset = self.tell()
        wanted = self.size - offset if num_bytes < 0 else min(num_bytes, self.size - offset)
        with self._path.explained():
            content: bytes = self._file.read_at(wanted, offset)
        self._place.offset = offset + len(content)
        return content

    def close(self) -> None:
        self._file.close()
