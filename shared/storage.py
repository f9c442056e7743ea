"""Where a cache lies: a folder, or a prefix in an object store. The code that reads and writes caches takes either.

A folder is a `pathlib.Path` and stays exactly that. `s3://bucket/prefix`, `gs://bucket/prefix` and
`az://container/prefix` are an ObjectPath, which answers those of Path's questions that the project asks, through the
file systems of pyarrow. An object appears whole or not at all when its upload ends: one put takes the place of
temporary name, fsync and rename.

Credentials, endpoint and region are facts of the machine and come from where the vendors' tools take them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ...); they are never written anywhere.
"""

import contextlib
import datetime
import fnmatch
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from shared.errors import ConfigError, DataError, StillroomError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SCHEMES = ("s3", "gs", "az")
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
PROBE_ATTEMPTS = 2
"""A wrong endpoint is told at once."""
PATIENT_ATTEMPTS = 6
"""A store that answered before may rest for some seconds: a run goes on."""
STREAM_BYTES = 8 << 20
"""What one request of a sequential read or write carries."""

_URL = re.compile(rf"^({'|'.join(SCHEMES)})://(.*)$")
_OTHER_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*://")
_REFUSED = re.compile(
    r"ACCESS_DENIED|AccessKeyId|SIGNATURE|privileges|Forbidden|Unauthorized|credential|access token", re.I
)
_UNREACHED = re.compile(r"NETWORK_CONNECTION|curlCode|timed? ?out|error sending request|new connection", re.I)
_ELSEWHERE = re.compile(r"HTTP status 30[17]|PermanentRedirect|AuthorizationHeaderMalformed", re.I)
_KEYS_OF_SCHEME = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


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
        return bool(self._info().type != _file_type().NotFound)

    def is_file(self) -> bool:
        return bool(self._info().type == _file_type().File)

    def is_dir(self) -> bool:
        return bool(self._info().type == _file_type().Directory)

    def stat(self) -> ObjectStat:
        """Raises FileNotFoundError where there is no such object."""
        info = self._info()
        if info.type != _file_type().File:
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
        with _explained(self), self._store().open_input_stream(self.key) as stream:
            while part := stream.read(STREAM_BYTES):
                yield part

    def open_file(self) -> "pa.NativeFile":
        """The object for random access. Each read is a request."""
        with _explained(self):
            return self._store().open_input_file(self.key)

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError where there is none."""
        with _explained(self), self._store().open_input_stream(self.key) as stream:
            content: bytes = stream.read()
            return content

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes | bytearray) -> None:
        """Puts the whole object; readers see the old one or the new one."""
        with _explained(self), self._store().open_output_stream(self.key) as stream:
            stream.write(content)

    def upload(self, local: Path) -> None:
        """Puts a local file. A process that dies on the way leaves nothing that anybody sees.

        Raises OSError where the file cannot be read.
        """
        with local.open("rb") as source:
            with _explained(self):
                stream = self._store().open_output_stream(self.key)
            try:
                while part := source.read(STREAM_BYTES):
                    with _explained(self):
                        stream.write(part)
                with _explained(self):
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
            with _explained(self):
                self._store().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a prefix exists as soon as an object has it."""

    def _store(self) -> Any:
        return _file_system(self.scheme, PATIENT_ATTEMPTS, _facts())

    def _info(self) -> Any:
        with _explained(self):
            return self._store().get_file_info(self.key)

    def _below(self, recursive: bool) -> list["ObjectPath"]:
        from pyarrow.fs import FileSelector

        with _explained(self):
            found = self._store().get_file_info(FileSelector(self.key, allow_not_found=True, recursive=recursive))
        return sorted(
            ObjectPath(self.scheme, info.path) for info in found if not recursive or info.type == _file_type().File
        )


Location = Path | ObjectPath
"""Where a cache, or a file of it, lies."""


def location(text: str | Path | ObjectPath) -> Location:
    """A folder's path, or the URL of a store. Raises ConfigError for a URL that is neither s3, gs nor az."""
    if not isinstance(text, str):
        return text
    match = _URL.match(text)
    if match is None:
        if _OTHER_URL.match(text):
            raise ConfigError(f"{text} is no place for a cache: name a folder, or s3://, gs:// or az://BUCKET/PREFIX")
        return Path(text)
    bucket, _, prefix = match[2].partition("/")
    parts = [part for part in prefix.split("/") if part]
    if not bucket or not parts or {".", ".."} & set(parts):
        raise ConfigError(f"{text} names no prefix of a bucket: write {match[1]}://BUCKET/PREFIX")
    return ObjectPath(match[1], "/".join([bucket, *parts]))


def _validated(value: Any) -> Location:
    if not isinstance(value, (str, Path, ObjectPath)):
        raise ValueError("a cache is named by a path or a URL")
    try:
        return location(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


CacheRoot = Annotated[
    Path | ObjectPath, PlainValidator(_validated), PlainSerializer(str, return_type=str, when_used="json")
]
"""Where a cache lies, as a field of a configuration: a path or a URL."""


def matching(folder: Location, pattern: str) -> list[Location]:
    """What lies directly in `folder` under a name that matches, in order."""
    if isinstance(folder, Path):
        return [*sorted(folder.glob(pattern))]
    return [*sorted(folder.glob(pattern))]


def files_below(folder: Location) -> list[Location]:
    """Every file below `folder`, in order."""
    if isinstance(folder, Path):
        return [*sorted(path for path in folder.rglob("*") if path.is_file())]
    return [*sorted(folder.rglob("*"))]


def parts_of(path: Location) -> Iterator[bytes]:
    """A file's bytes in order, STREAM_BYTES at a time. Raises FileNotFoundError where there is none."""
    if not isinstance(path, Path):
        yield from path.parts()
        return
    with path.open("rb") as stream:
        while part := stream.read(STREAM_BYTES):
            yield part


def relative_name(path: Location, folder: Location) -> str:
    """`path` as seen from `folder`, with slashes. Example: runs/r0.json."""
    if isinstance(path, Path) and isinstance(folder, Path):
        return path.relative_to(folder).as_posix()
    return str(path).removeprefix(f"{folder}/")


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A small file as one of this machine: itself in a folder, else a copy that is gone afterwards."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stillroom-get-") as folder:
        local = Path(folder) / path.name
        local.write_bytes(path.read_bytes())
        yield local


def spool(folder: Location) -> Path:
    """Where what will lie in `folder` is written first: there, or for a store in a folder of ours below TMPDIR.

    Raises DataError where that folder is another user's.
    """
    if isinstance(folder, Path):
        return folder
    name = f"stillroom-{os.getuid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    local = Path(tempfile.gettempdir()) / name
    local.mkdir(mode=0o700, exist_ok=True)
    if local.stat().st_uid != os.getuid():
        raise DataError(f"{local} belongs to another user: set TMPDIR to a folder of your own")
    return local


def check_reachable(root: Location) -> None:
    """Asks the store of `root` whether it is there and knows us, without patience; a folder is not asked.

    Raises DataError where there is no such bucket or it refuses access, StillroomError where it cannot be reached.
    """
    if isinstance(root, Path):
        return
    bucket = root.key.partition("/")[0]
    probe = _file_system(root.scheme, PROBE_ATTEMPTS, _facts())
    with _explained(root):
        # A key may be allowed the prefix and not the bucket, so that is asked only where there is no prefix.
        missing = all(probe.get_file_info(key).type == _file_type().NotFound for key in (root.key, bucket))
    if missing:
        raise DataError(f"{root}: there is no bucket {bucket!r} at {_endpoint(root.scheme)}: make it, or mend the name")


def open_parquet(path: Location, **options: Any) -> "pq.ParquetFile":
    """A Parquet file with page checksums verified; of an object the columns of a row group are fetched side by side.

    `options` are those of pyarrow.parquet.ParquetFile. Raises FileNotFoundError, pa.ArrowException, or what ObjectPath
    raises.
    """
    import pyarrow.parquet as pq

    if isinstance(path, Path):
        return pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, **options)
    with _explained(path):
        return pq.ParquetFile(
            path.key, filesystem=path._store(), page_checksum_verification=True, pre_buffer=True, **options
        )


def delta_options(root: Location) -> dict[str, str] | None:
    """What deltalake must be told besides what it takes from the environment itself; None for a folder."""
    if isinstance(root, Path):
        return None
    options = {
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        "max_retries": str(PATIENT_ATTEMPTS - 1),
        "retry_timeout": "60s",
    }
    if root.scheme == "s3":
        # A commit is a put that fails where another came first: without it two workers could both make one version.
        options["aws_conditional_put"] = "etag"
        if (endpoint := _s3_endpoint()) is not None:
            options["aws_endpoint_url"] = endpoint
            options["allow_http"] = str(endpoint.startswith("http://")).lower()
    return options


def is_store_error(error: BaseException) -> bool:
    """Whether reading failed because of the store or the way to it, so that nothing is said of the bytes."""
    text = str(error)
    return "AWS Error" in text or "Azure" in text or "google::cloud" in text


def _endpoint(scheme: str) -> str:
    """What to call the store in a message, without a password that its URL might hold."""
    if scheme != "s3":
        return {"gs": "Google Cloud Storage", "az": "Azure"}[scheme]
    endpoint = _s3_endpoint()
    return "AWS (AWS_ENDPOINT_URL names another store)" if endpoint is None else re.sub("//[^/@]*@", "//", endpoint)


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _facts() -> tuple[str | None, ...]:
    """Of the environment, what the constructors below are told by us."""
    names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
    return (_s3_endpoint(), *(os.environ.get(name) for name in names))


@functools.cache
def _file_system(scheme: str, max_attempts: int, facts: tuple[str | None, ...]) -> Any:
    """pyarrow's file system of the scheme; `facts` tells apart what the environment said when it was made."""
    from pyarrow import fs

    if scheme == "s3":
        return fs.S3FileSystem(
            endpoint_override=facts[0],
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts),
        )
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=CONNECT_TIMEOUT_S * max_attempts))
    account, key, token = facts[1:]
    if account is None:
        raise ConfigError("az:// needs AZURE_STORAGE_ACCOUNT_NAME in the environment")
    return fs.AzureFileSystem(account, account_key=key, sas_token=token)


def _file_type() -> Any:
    from pyarrow.fs import FileType

    return FileType


@contextlib.contextmanager
def _explained(path: ObjectPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise explained(error, path) from error


def explained(error: BaseException, path: Location) -> StillroomError:
    """The error of a store as one line for the user, without anything that was sent to it."""
    text = one_line(error)
    scheme = "s3" if isinstance(path, Path) else path.scheme
    if _UNREACHED.search(text):
        reason = text.rpartition("Details: ")[2].rpartition("operation: ")[2]
        return StillroomError(f"{path}: {_endpoint(scheme)} cannot be reached: {reason[:200]}")
    if _ELSEWHERE.search(text):
        return DataError(f"{path}: the bucket lies in another region: set AWS_REGION to it")
    if _REFUSED.search(text):
        return DataError(
            f"{path}: {_endpoint(scheme)} refuses access: check the key in the environment ({_KEYS_OF_SCHEME[scheme]})"
        )
    return StillroomError(f"{path}: the store failed: {text.rpartition('operation: ')[2][:200]}")
