"""Object stores through pyarrow's file systems: paths into them, patience with them, their errors in one line.

An object becomes visible whole when its upload ends, so one put replaces temporary name, fsync and rename.

Credentials, endpoint and region are facts of the machine. They come from where the vendors' tools take them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ...) and are never written anywhere.
"""

import contextlib
import datetime
import fnmatch
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stillroom.errors import ConfigError, DataError, StillroomError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMES = ("s3", "gs", "az")
STREAM_BYTES = 8 << 20
"""Bytes per request of a sequential read or write."""
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
PROBE_ATTEMPTS = 2
"""A wrong endpoint is reported at once."""
PATIENT_ATTEMPTS = 6
"""A store that answered before may be unavailable for some seconds without ending a run."""

_REFUSED = re.compile(
    r"ACCESS_DENIED|AccessKeyId|SIGNATURE|privileges|Forbidden|Unauthorized|credential|access token", re.I
)
# obstore ends each error with its own settings, among them retry_timeout.
_UNREACHED = re.compile(
    r"NETWORK_CONNECTION|curlCode|(?<!retry_)timed? ?out|error sending request|new connection", re.I
)
_WITHOUT_CONDITIONS = re.compile(r"NotImplemented|501 Not Implemented|not supported", re.I)
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
    """An object or a prefix of a store, with those methods of pathlib.Path that stillroom uses.

    Folders need not be created. Methods that access the store raise DataError if it refuses access, StillroomError if
    it cannot be reached.
    """

    scheme: str
    key: str
    """`bucket/prefix/name` without leading or trailing slash."""

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
        return bool(self._info().type.name != "NotFound")

    def is_file(self) -> bool:
        return bool(self._info().type.name == "File")

    def is_dir(self) -> bool:
        return bool(self._info().type.name == "Directory")

    def stat(self) -> ObjectStat:
        """Raises FileNotFoundError if there is no such object."""
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(f"{self} does not exist")
        return ObjectStat(info.size, info.mtime_ns / 1e9 if info.mtime_ns is not None else 0.0)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and prefixes directly below; empty if there are none."""
        yield from self._below(recursive=False)

    def modified(self) -> dict["ObjectPath", float]:
        """Objects directly below, with the time of their last change by the store's clock; one request."""
        found = self._listed(recursive=False)
        return {
            ObjectPath(self.scheme, info.path): (info.mtime_ns or 0) / 1e9 for info in found if info.type.name == "File"
        }

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """Objects and prefixes directly below whose name matches; the pattern has no slash."""
        assert "/" not in pattern
        # fnmatchcase: keys of a store have case on every machine.
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
        """The whole object. Raises FileNotFoundError if there is none."""
        try:
            return b"".join(self.parts())
        except StillroomError:
            # SeaweedFS breaks a stream off when its object is replaced meanwhile: the second read gets the new one.
            return b"".join(self.parts())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes | bytearray) -> None:
        """Puts the whole object; readers see the old one or the new one."""
        with self.explained(), self._store().open_output_stream(self.key) as stream:
            stream.write(content)

    def create(self, content: bytes) -> bool:
        """Puts the object unless there is one, and says whether it did; the store decides among several writers."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        bucket, _, name = self.key.partition("/")
        try:
            # pyarrow has no conditional put.
            obstore.put(_conditional_store(self.scheme, bucket, _facts()), name, content, mode="create")
        except AlreadyExistsError:
            return False
        except BaseError as error:
            if _WITHOUT_CONDITIONS.search(str(error)):
                raise DataError(
                    f"{self}: {endpoint_of(self.scheme)} refuses conditional puts, without which workers cannot share "
                    "a cache: use one that has them (S3, Google Cloud Storage, Azure, MinIO, SeaweedFS), or a folder"
                ) from error
            raise explained(error, str(self), self.scheme) from error
        return True

    def upload(self, local: Path) -> None:
        """Uploads a local file; a process that dies meanwhile leaves nothing visible.

        Raises OSError if the file cannot be read.
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
                # pyarrow cannot abort an upload: closing may make a partial object visible, which is then deleted.
                with contextlib.suppress(OSError, StillroomError):
                    stream.close()
                    self.unlink(missing_ok=True)
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object. Raises FileNotFoundError if there is none, unless `missing_ok`."""
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
        # An answer of the store, not a failure.
        except FileNotFoundError:
            raise
        except OSError as error:
            raise explained(error, str(self), self.scheme) from error

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a prefix exists as soon as an object has it."""

    def _store(self) -> Any:
        return file_system(self.scheme)

    def _info(self) -> Any:
        with self.explained():
            return self._store().get_file_info(self.key)

    def _below(self, recursive: bool) -> list["ObjectPath"]:
        found = self._listed(recursive)
        return sorted(ObjectPath(self.scheme, info.path) for info in found if not recursive or info.type.name == "File")

    def _listed(self, recursive: bool) -> Sequence[Any]:
        from pyarrow.fs import FileSelector

        with self.explained():
            found: Sequence[Any] = self._store().get_file_info(
                FileSelector(self.key, allow_not_found=True, recursive=recursive)
            )
        return found


def file_system(scheme: str, max_attempts: int | None = None) -> Any:
    """pyarrow's file system of a scheme, as configured by the environment. Raises ConfigError if that is incomplete."""
    return _file_system(scheme, max_attempts or PATIENT_ATTEMPTS, _facts())


def delta_options(scheme: str) -> dict[str, str]:
    """Storage options for deltalake beyond what it reads from the environment itself."""
    options = {
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        # deltalake counts retries, pyarrow attempts.
        "max_retries": str(PATIENT_ATTEMPTS - 1),
        "retry_timeout": "60s",
    }
    if scheme == "s3":
        # A commit is a put that fails if another came first; without this two workers could both create a version.
        options["aws_conditional_put"] = "etag"
        if (endpoint := _s3_endpoint()) is not None:
            options["aws_endpoint_url"] = endpoint
            options["allow_http"] = str(endpoint.startswith("http://")).lower()
    return options


def is_store_error(error: BaseException) -> bool:
    """Whether a read failed because of the store or the network, which says nothing about the stored bytes."""
    # pyarrow raises a plain OSError for disks and stores alike: only its text tells which.
    text = str(error)
    return "AWS Error" in text or "Azure" in text or "google::cloud" in text


def explained(error: BaseException, where: str, scheme: str) -> StillroomError:
    """A store's error as one line for the user, without anything that was sent to the store."""
    text = one_line(error)
    if _UNREACHED.search(text):
        reason = text.rpartition("Details: ")[2].rpartition("operation: ")[2]
        return StillroomError(f"{where}: {endpoint_of(scheme)} cannot be reached: {reason[:200]}")
    if _ELSEWHERE.search(text):
        return DataError(f"{where}: the bucket is in another region: set AWS_REGION to it")
    if _REFUSED.search(text):
        keys = _KEYS_OF_SCHEME[scheme]
        return DataError(f"{where}: {endpoint_of(scheme)} refuses access: check the key in the environment ({keys})")
    return StillroomError(f"{where}: the store failed: {text.rpartition('operation: ')[2][:200]}")


def endpoint_of(scheme: str) -> str:
    """The store's name for messages, without a password that its URL might contain."""
    if scheme != "s3":
        return {"gs": "Google Cloud Storage", "az": "Azure"}[scheme]
    endpoint = _s3_endpoint()
    return "AWS (AWS_ENDPOINT_URL names another store)" if endpoint is None else re.sub("//[^/@]*@", "//", endpoint)


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _facts() -> tuple[str | None, ...]:
    """What the constructors below take from the environment."""
    # pyarrow finds the keys of S3 and Google by itself.
    names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
    return (_s3_endpoint(), *(os.environ.get(name) for name in names))


@functools.cache
def _conditional_store(scheme: str, bucket: str, facts: tuple[str | None, ...]) -> Any:
    """A client with conditional puts, configured by the environment like deltalake's, which is the same library."""
    from obstore.store import from_url

    client = {
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        "allow_http": (facts[0] or "").startswith("http://"),
    }
    config = {"aws_endpoint": facts[0]} if scheme == "s3" and facts[0] is not None else {}
    retry = {"max_retries": PATIENT_ATTEMPTS - 1, "retry_timeout": datetime.timedelta(seconds=60)}
    # As one mapping, because the types of `from_url` differ by store.
    options: dict[str, Any] = {"config": config, "client_options": client, "retry_config": retry}
    return from_url(f"{scheme}://{bucket}", **options)


@functools.cache
def _file_system(scheme: str, max_attempts: int, facts: tuple[str | None, ...]) -> Any:
    """`facts` is part of the key, so that a changed environment makes a new file system."""
    from pyarrow import fs

    if scheme == "s3":
        return fs.S3FileSystem(
            endpoint_override=facts[0],
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts),
        )
    # pyarrow's client for Google counts patience in seconds, not attempts.
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=CONNECT_TIMEOUT_S * max_attempts))
    # pyarrow takes Azure's account as arguments, not from the environment.
    account, key, token = facts[1:]
    if account is None:
        raise ConfigError("az:// needs AZURE_STORAGE_ACCOUNT_NAME in the environment")
    return fs.AzureFileSystem(account, account_key=key, sas_token=token)
