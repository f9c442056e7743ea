"""Where a cache is stored: a folder, or a prefix in an object store. Code that reads and writes caches accepts both.

A folder is an ordinary `pathlib.Path`. `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix` are an
ObjectPath with the same methods. Files become visible whole: temporary name, fsync, rename; or one put.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from stillroom.errors import ConfigError, DataError
from stillroom.storage import objects
from stillroom.storage.objects import STREAM_BYTES, ObjectPath

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TEMP_SUFFIX = ".tmp"
_URL = re.compile(rf"^({'|'.join(objects.SCHEMES)})://(.*)$")
_OTHER_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*://")

Location = Path | ObjectPath
"""Where a cache, or one of its files, is stored."""


def location(text: str | Path | ObjectPath) -> Location:
    """A folder's path or a store's URL. Raises ConfigError for a URL that is not s3, gs or az."""
    if not isinstance(text, str):
        return text
    match = _URL.match(text)
    if match is None:
        if _OTHER_URL.match(text):
            raise ConfigError(f"{text} is not supported: use a folder, or s3://, gs:// or az://BUCKET/PREFIX")
        return Path(text)
    bucket, _, prefix = match[2].partition("/")
    # Doubled and trailing slashes go, so that one prefix has one spelling.
    parts = [part for part in prefix.split("/") if part]
    if not bucket or not parts or {".", ".."} & set(parts):
        raise ConfigError(f"{text} is not a prefix in a bucket: write {match[1]}://BUCKET/PREFIX")
    return ObjectPath(match[1], "/".join([bucket, *parts]))


def _validated(value: Any) -> Location:
    if not isinstance(value, (str, Path, ObjectPath)):
        raise ValueError("must be a path or a URL")
    try:
        return location(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


CacheRoot = Annotated[
    Path | ObjectPath, PlainValidator(_validated), PlainSerializer(str, return_type=str, when_used="json")
]
"""A cache's path or URL as a field of a configuration."""


def matching(folder: Location, pattern: str) -> list[Location]:
    """Entries directly in `folder` whose name matches, sorted."""
    # Twice the same for mypy: a sorted mixture of both types has no order.
    if isinstance(folder, Path):
        return [*sorted(folder.glob(pattern))]
    return [*sorted(folder.glob(pattern))]


def modified(folder: Location) -> dict[Location, float]:
    """Files directly in `folder`, with the time of their last change by the storage's clock; one request to a store."""
    if not isinstance(folder, Path):
        return dict(folder.modified().items())
    found: dict[Location, float] = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime
    return found


def files_below(folder: Location) -> list[Location]:
    """Every file below `folder`, sorted."""
    if isinstance(folder, Path):
        return [*sorted(path for path in folder.rglob("*") if path.is_file())]
    return [*sorted(folder.rglob("*"))]


def parts_of(path: Location) -> Iterator[bytes]:
    """A file's bytes, STREAM_BYTES at a time. Raises FileNotFoundError if there is none."""
    if not isinstance(path, Path):
        yield from path.parts()
        return
    with path.open("rb") as stream:
        while part := stream.read(STREAM_BYTES):
            yield part


def relative_name(path: Location, folder: Location) -> str:
    """`path` relative to `folder`, with slashes. Example: runs/r0.json."""
    if isinstance(path, Path) and isinstance(folder, Path):
        return path.relative_to(folder).as_posix()
    return str(path).removeprefix(f"{folder}/")


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A small file as a local one: the file itself, or a temporary copy of an object."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stillroom-get-") as folder:
        local = Path(folder) / path.name
        local.write_bytes(path.read_bytes())
        yield local


def spool(folder: Location) -> Path:
    """The local folder in which files for `folder` are written first: itself, or for a store one below TMPDIR.

    Raises DataError if that folder belongs to another user.
    """
    if isinstance(folder, Path):
        return folder
    # The same in every process of this user: a restarted worker finds and sweeps what it left there.
    name = f"stillroom-{os.getuid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    local = Path(tempfile.gettempdir()) / name
    local.mkdir(mode=0o700, exist_ok=True)
    # TMPDIR may be shared: whoever made the folder first could read and replace what is written there.
    if local.stat().st_uid != os.getuid():
        raise DataError(f"{local} belongs to another user: set TMPDIR to a folder of your own")
    return local


def check_reachable(root: Location) -> None:
    """Checks with few retries that the store of `root` answers and grants access; a folder need not exist yet.

    Raises DataError if `root` is a file, there is no such bucket or access is refused; StillroomError if the store
    cannot be reached.
    """
    if isinstance(root, Path):
        if root.is_file():
            raise DataError(f"{root} is a file: use a folder, which need not exist yet")
        return
    bucket = root.key.partition("/")[0]
    probe = objects.file_system(root.scheme, objects.PROBE_ATTEMPTS)
    with root.explained():
        # Credentials may allow the prefix but not the bucket, so the bucket is checked only if there is no prefix.
        missing = all(probe.get_file_info(key).type.name == "NotFound" for key in (root.key, bucket))
    if missing:
        raise DataError(
            f"{root}: there is no bucket {bucket!r} at {objects.endpoint_of(root.scheme)}: create it, or fix the name"
        )


def require_cache(root: Location) -> None:
    """Raises DataError if there is no cache at `root`, naming one up to two folders below or above it, or the one that
    a configuration names; and the errors of `check_reachable`.
    """
    if isinstance(root, Path) and root.is_file():
        named = _cache_named_in(root)
        if named is None:
            raise DataError(f"{root} is a file: use the folder of a cache")
        raise DataError(f"{root} is a configuration file: use the cache that it names, {named}")
    check_reachable(root)
    if (root / "chains" / "_delta_log").is_dir():
        return
    problem = f"{root} is not a cache"
    if not root.exists() and isinstance(root, Path):
        raise DataError(f"{problem}: it does not exist (build one with `teacher-cache build`)")
    if isinstance(root, Path):
        for pattern in ("*", "*/*"):
            found = sorted(path.parent.parent for path in root.glob(f"{pattern}/chains/_delta_log"))
            if found:
                raise DataError(f"{problem}: did you mean {found[0]}?")
        for parent in list(root.parents)[:2]:
            if (parent / "chains" / "_delta_log").is_dir():
                raise DataError(f"{problem}: did you mean {parent}?")
    raise DataError(f"{problem}: it has no chains/_delta_log (build one with `teacher-cache build`)")


def _cache_named_in(path: Path) -> str | None:
    import yaml

    if path.suffix not in (".yaml", ".yml"):
        return None
    try:
        data = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = data.get("cache") if isinstance(data, dict) else None
    return named if isinstance(named, str) else None


def open_parquet(path: Location, **options: Any) -> "pq.ParquetFile":
    """Opens a Parquet file with page checksums verified; columns of an object's row group are fetched in parallel.

    `options` go to pyarrow.parquet.ParquetFile. Raises FileNotFoundError, pa.ArrowException or what ObjectPath raises.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if isinstance(path, Path):
            # Checksums are pyarrow's opt-in, and without them a flipped bit is decoded as if it had been written.
            return pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, **options)
        return pq.ParquetFile(
            path.key,
            filesystem=objects.file_system(path.scheme),
            page_checksum_verification=True,
            # Column chunks become a few large requests at once instead of one round trip each.
            pre_buffer=True,
            **options,
        )
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"the footer names columns in bytes that are not text: {error}") from error
    except OSError as error:
        # A damaged footer is an OSError too.
        if isinstance(path, Path) or not objects.is_store_error(error):
            raise
        raise objects.explained(error, str(path), path.scheme) from error


def delta_options(root: Location) -> dict[str, str] | None:
    """Storage options with which deltalake opens a table in `root`; None for a folder."""
    return None if isinstance(root, Path) else objects.delta_options(root.scheme)


@contextlib.contextmanager
def atomic_path(path: Location) -> Iterator[Path]:
    """Yields a temporary sibling to write to. On success it is fsynced and renamed to `path`, on error removed.

    For an object store it is a local file, uploaded on success.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="stillroom-put-") as folder:
            local = Path(folder) / path.name
            yield local
            path.upload(local)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only within one file system; random, because workers share folders.
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        yield temp
        sync_file(temp)
        temp.replace(path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def check_out(flag: str, out: Path, caches: Sequence[Location] = ()) -> None:
    """Raises ConfigError if the file that `flag` names would be inside a cache, DataError if it cannot be written."""
    for root in caches:
        if isinstance(root, Path) and out.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{flag} {out} is inside the cache {root}, which is read-only here: write elsewhere")
    if out.is_dir():
        raise DataError(f"{flag} {out} is a folder: use the path of a file")
    # Not created: a missing folder is more often a typo than intended.
    if not out.absolute().parent.is_dir():
        raise DataError(f"{flag} {out}: there is no folder {out.parent}: create it, or use an existing one")
    # Tried, as the rights of a folder say nothing of /proc or of a read-only disk.
    probe = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{flag} {out} cannot be written ({error.strerror}): use a folder you can write to") from error


def write_text_atomic(path: Location, text: str) -> None:
    """Writes UTF-8 text so that readers see the old file or the new one, never a partial one."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding="utf-8")


def create_file(path: Location, content: bytes) -> bool:
    """Creates a file with this content unless there is one, and says whether it did. Of several that try at once,
    wherever they run, one succeeds.
    """
    if not isinstance(path, Path):
        return path.create(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    temp.write_bytes(content)
    try:
        # A link appears with its content, unlike a file opened exclusively, and fails if the name is taken.
        path.hardlink_to(temp)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # Some network file systems have no hard links.
        try:
            with path.open("xb") as stream:
                stream.write(content)
        except FileExistsError:
            return False
    finally:
        temp.unlink(missing_ok=True)
    return True


def sync_file(path: Path) -> None:
    """Flushes a written file to the disk."""
    # fsync takes any descriptor of the file, and only a read-only one can be had of a folder.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries, so that a rename survives a power cut."""
    sync_file(path)


def file_clock_s(folder: Location) -> float:
    """The time now by the clock of the storage, so that ages of files do not depend on this machine's clock."""
    # Named like a temporary file, so that gc sweeps it if a kill leaves it behind.
    probe = folder / f".clock.{secrets.token_hex(4)}{TEMP_SUFFIX}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sha256_of(path: Location) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    for part in parts_of(path):
        digest.update(part)
    return digest.hexdigest()
