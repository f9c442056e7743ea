"""An object or a prefix of a store, which answers those of pathlib.Path's questions that the project asks.

An object appears whole or not at all when its upload ends: one put takes the place of temporary name, fsync and rename.
"""

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from shared import stores
from shared.errors import StillroomError

if TYPE_CHECKING:
    import pyarrow as pa

STREAM_BYTES = 8 << 20
"""What one request of a sequential read or write carries."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """Size in bytes and time of the last change (seconds, the store's clock), named as os.stat names them."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """An object or a prefix of a store. Methods mean what those of pathlib.Path mean; folders need not be made.

    All that ask the store raise DataError where it refuses access, and StillroomError where it cannot be reached.
    """

    scheme: str
    key: str
    """`bucket/prefix/name`, without a slash at either end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, other: str | PurePosixPath) -> "ObjectPath":
        return ObjectPath(self.scheme, f"{self.key}/{other}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.scheme, str(PurePosixPath(self.key).parent))

    def relative_to(self, other: "ObjectPath") -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(other.key)

    def resolve(self) -> "ObjectPath":
        return self

    def absolute(self) -> "ObjectPath":
        return self

    def exists(self) -> bool:
        return bool(self._info().type != file_type().NotFound)

    def is_file(self) -> bool:
        return bool(self._info().type == file_type().File)

    def is_dir(self) -> bool:
        return bool(self._info().type == file_type().Directory)

    def stat(self) -> ObjectStat:
        """Raises FileNotFoundError where there is no such object."""
        info = self._info()
        if info.type != file_type().File:
            raise FileNotFoundError(f"{self} does not exist")
        return ObjectStat(info.size, info.mtime_ns / 1e9 if info.mtime_ns is not None else 0.0)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What lies directly below, objects and prefixes; nothing where there is nothing."""
        yield from self._below(recursive=False)

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Of what lies directly below, the names that match; the pattern holds no slash."""
        assert "/" not in pattern
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Every object below whose name matches."""
        yield from (path for path in self._below(recursive=True) if fnmatch.fnmatchcase(path.name, pattern))

    def parts(self) -> Iterator[bytes]:
        """The object's bytes in order, STREAM_BYTES at a time."""
        with self.explained(), self._store().open_input_stream(self.key) as stream:
            while part := stream.read(STREAM_BYTES):
                yield part

    def open_file(self) -> "pa.NativeFile":
        """The object for random access. Each read is a request."""
        with self.explained():
            return self._store().open_input_file(self.key)

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError where there is none."""
        with self.explained(), self._store().open_input_stream(self.key) as stream:
            content: bytes = stream.read()
            return content

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes | bytearray) -> None:
        """Puts the whole object; readers see the old one or the new one."""
        with self.explained(), self._store().open_output_stream(self.key) as stream:
            stream.write(content)

    def upload(self, local: Path) -> None:
        """Puts a local file. A process that dies on the way leaves nothing that anybody sees.

        Raises OSError where the file cannot be read.
        """
        with local.open("rb") as source:
            with self.explained():
                stream = self._store().open_output_stream(self.key)
            try:
                while part := source.read(STREAM_BYTES):
                    with self.explained():
                        stream.write(part)
                with self.explained():
                    stream.close()
            except BaseException:
                # Closing is the only way to let go of an upload, and it may make visible what there is of it.
                with contextlib.suppress(OSError, StillroomError):
                    stream.close()
                    self.unlink(missing_ok=True)
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object. Raises FileNotFoundError where there is none and that is not ok."""
        try:
            with self.explained():
                self._store().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises errors of the store as one line that names this path."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise stores.explained(error, str(self), self.scheme) from error

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a prefix exists as soon as an object has it."""

    def _store(self) -> Any:
        return stores.file_system(self.scheme)

    def _info(self) -> Any:
        with self.explained():
            return self._store().get_file_info(self.key)

    def _below(self, recursive: bool) -> list["ObjectPath"]:
        from pyarrow.fs import FileSelector

        with self.explained():
            found = self._store().get_file_info(FileSelector(self.key, allow_not_found=True, recursive=recursive))
        return sorted(
            ObjectPath(self.scheme, info.path) for info in found if not recursive or info.type == file_type().File
        )


def file_type() -> Any:
    """pyarrow.fs.FileType, loaded late."""
    from pyarrow.fs import FileType

    return FileType
