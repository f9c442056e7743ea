"""Object stores for DuckDB: a read-only fsspec file system over the stores of stillroom.storage.objects.

DuckDB's own extension for stores is not on PyPI, and a locked session must not download one. Through a registered file
system DuckDB requests exactly the ranges it wants: a shard's footer and the columns of the query. What may be opened is
restricted by DuckDB's `allowed_paths`, as for local files.
"""

import datetime
import threading
from typing import Any

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import location

# Shards never change under their name, so that DuckDB may keep what it has read.
_MODIFIED = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


class ObjectFiles(AbstractFileSystem):  # type: ignore[misc]
    """Objects of one scheme (s3, gs or az), with the methods that DuckDB calls. Nothing is listed."""

    cachable = False

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.protocol = scheme
        self._sizes: dict[str, int] = {}

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> "ObjectFile":
        """The object for reading. Raises what stillroom.storage.objects.ObjectPath raises."""
        if mode != "rb":
            raise PermissionError(f"{path}: a cache is read-only")
        return ObjectFile(self._path(path))

    def glob(self, path: str, *_: Any, **__: Any) -> list[str]:
        """The path itself: views name every file, and a `[` in a bucket's keys is not a pattern."""
        return [path]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        # DuckDB asks at every open, and each answer is a request.
        if path not in self._sizes:
            self._sizes[path] = self._path(path).stat().st_size
        return {"name": path, "size": self._sizes[path], "type": "file"}

    def modified(self, path: str) -> datetime.datetime:
        return _MODIFIED

    def _path(self, path: str) -> ObjectPath:
        full = location(path if "://" in path else f"{self.protocol}://{path}")
        assert isinstance(full, ObjectPath)
        return full


class ObjectFile:
    """An object open for reading, with a position for each thread that reads it.

    DuckDB's threads share a file, and each seeks and then reads. fsspec's ArrowFSWrapper keeps one position for all:
    with eight threads it handed DuckDB pages from the wrong place.
    """

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._file: pa.NativeFile = path.open_file()
        self.size: int = self._file.size()
        self._place = threading.local()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place.offset = offset + {0: 0, 1: self.tell(), 2: self.size}[whence]
        return self.tell()

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
