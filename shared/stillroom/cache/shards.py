"""Reads chain shards: header, row groups, decoded signals. A reader configures itself from the shard alone."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.codec import decode, signal_columns
from stillroom.errors import CorruptError, DataError, StillroomError, first_line, require_version
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import SHARD_METADATA_KEY, ShardHeader
from stillroom.schema.records import Int64, Signals
from stillroom.schema.tables import SIGNAL_FIELDS
from stillroom.storage.objects import is_store_error
from stillroom.storage.paths import Location, open_parquet


def open_shard(path: Location) -> tuple[pq.ParquetFile, ShardHeader]:
    """Opens a shard with page checksums verified. Raises CorruptError, or DataError for a newer format."""
    file = open_registered(path)
    return file, header_of(file.schema_arrow.metadata, str(path))


def open_registered(path: Location) -> pq.ParquetFile:
    """Opens a Parquet file that a table lists, with page checksums verified. Raises CorruptError."""
    try:
        return open_parquet(path)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is registered but missing: `teacher-cache verify` lists what is wrong") from error
    except (pa.ArrowException, OSError) as error:
        raise CorruptError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def header_of(metadata: dict[bytes, bytes] | None, where: str) -> ShardHeader:
    """The shard's header, from the Parquet key-value metadata."""
    raw = (metadata or {}).get(SHARD_METADATA_KEY)
    if raw is None:
        raise CorruptError(f"{where} has no stillroom header: it is not a shard")
    try:
        header = ShardHeader.model_validate_json(raw)
    except ValueError as error:
        raise CorruptError(f"{where} has a header that cannot be read: {first_line(error)}") from error
    require_version(where, header.format_version, FORMAT_VERSION)
    if header.codec not in SIGNAL_FIELDS:
        raise DataError(f"{where} has codec {header.codec!r}, unknown to this program: upgrade it")
    return header


def read_row_group(file: pq.ParquetFile, index: int, columns: Sequence[str], where: str) -> pa.Table:
    """Columns of one row group. Raises CorruptError if one is missing, fails its checksum or cannot be decoded."""
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise CorruptError(f"{where}: column {missing[0]} is missing: the file does not match its header")
    try:
        # One thread: the training stream reads several row groups at once and needs the other cores.
        return file.read_row_group(index, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        problem = f"{where}: row group {index} cannot be read: {first_line(error)}"
        raise (StillroomError if is_store_error(error) else CorruptError)(problem) from error


def read_signals(
    file: pq.ParquetFile, header: ShardHeader, index: int, columns: Sequence[str], where: str
) -> tuple[pa.Table, Signals, Int64]:
    """Row group `index`: the requested columns, decoded signals, and row offsets [R+1] into the signals' tokens."""
    needed = list(dict.fromkeys([*columns, "token_ids", *signal_columns(header)]))
    table = read_row_group(file, index, needed, where)
    signals, offsets = decode(table, header, f"{where}: row group {index}")
    return table.select(list(columns)), signals, offsets
