"""Writes rows to one Parquet file under a temporary name, one row group in memory at a time.

In: ChainRows. Out: a file that `stillroom.cache.catalog.publish` gives its final name.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.codec import encode, num_elements
from stillroom.schema.manifest import SHARD_METADATA_KEY, ShardHeader
from stillroom.schema.tables import CHAIN_FIELDS, SCALAR_FIELDS, TOKEN_FIELDS, chain_schema
from teacher_cache.writer.rows import ChainRow

PAGE_BYTES = 8 << 20
"""Usually one page per column and row group: zstd then sees the whole column (5% smaller than with 1 MB pages)."""
MAX_GROUP_ELEMENTS = 1 << 28
"""List elements after which a row group closes before its tokens: prompts may be a thousand times as long as answers,
and a column's lists and texts have 32-bit offsets."""
MIN_DICTIONARY_BYTES = 1 << 20
ZSTD_LEVEL = 9
"""3% fewer bytes than level 3."""
ZSTD_LEVEL_OF_IDS = 17
"""The first level with zstd's optimal parser: 4% fewer bytes for the ids, which are three quarters of a shard. Encoding
runs at a quarter of the speed, still far faster than teachers generate."""

_TEXT_DICTIONARY = ["run_id", "worker", "source", "split", "finish_reason"]
_STATISTICS = [field.name for field in SCALAR_FIELDS] + ["sample_id", "prompt_id", "source", "split", "created_at"]


class ShardFile:
    """One open shard. Not thread-safe."""

    def __init__(self, temp: Path, header: ShardHeader, row_group_tokens: int) -> None:
        """Creates `temp`; the file is readable only after `close`."""
        self.temp = temp
        self.sample_ids: list[str] = []
        self.num_tokens = 0
        self._codec = header.codec
        self._row_group_tokens = row_group_tokens
        self._pending: list[ChainRow] = []
        self._pending_tokens = self._pending_elements = 0
        self._closed_bytes: int | None = None
        metadata = {SHARD_METADATA_KEY: header.model_dump_json()}
        self._schema = chain_schema(header.codec).with_metadata(metadata)
        temp.parent.mkdir(parents=True, exist_ok=True)
        # A stream of our own tells how large the file is so far.
        self._stream = temp.open("wb")
        self._writer = pq.ParquetWriter(self._stream, self._schema, **parquet_options(self._schema, header.vocab_size))

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, without the open row group."""
        return self._stream.tell() if self._closed_bytes is None else self._closed_bytes

    def add(self, row: ChainRow) -> None:
        """Adds a row; writes a row group once it holds `row_group_tokens` tokens, or MAX_GROUP_ELEMENTS before that."""
        num_new = max(row.num_prompt_tokens, num_elements(row.signals))
        if self._pending_elements + num_new > MAX_GROUP_ELEMENTS:
            self._flush()
        self._pending.append(row)
        self._pending_tokens += row.num_tokens
        self._pending_elements += num_new
        self.sample_ids.append(row.sample_id)
        self.num_tokens += row.num_tokens
        if self._pending_tokens >= self._row_group_tokens:
            self._flush()

    def close(self) -> None:
        """Writes the last row group and the footer."""
        self._flush()
        self._writer.close()
        # Kept because a closed stream has no position to ask for.
        self._closed_bytes = self._stream.tell()
        self._stream.close()

    def discard(self) -> None:
        """Removes the unfinished file, even if the disk refuses its last bytes."""
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._stream.close()
        self.temp.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(rows_to_table(self._codec, self._pending, self._schema))
            self._pending, self._pending_tokens, self._pending_elements = [], 0, 0


def rows_to_table(codec: str, rows: Sequence[ChainRow], schema: pa.Schema) -> pa.Table:
    """Rows as the columns of a shard."""
    coded = encode(codec, [row.signals for row in rows])
    plain = {
        field.name: pa.array(map(operator.attrgetter(field.name), rows), field.type)
        for field in CHAIN_FIELDS
        if field not in TOKEN_FIELDS
    }
    return pa.table({name: coded[name] if name in coded else plain[name] for name in schema.names}, schema=schema)


def parquet_options(schema: pa.Schema, vocab_size: int) -> dict[str, Any]:
    """Options for pq.ParquetWriter: column encodings as FORMAT.md specifies them."""
    lists = [field for field in schema if pa.types.is_list(field.type)]
    floats = [_path(field) for field in lists if pa.types.is_floating(field.type.value_type)]
    integers = [_path(field) for field in lists if pa.types.is_integer(field.type.value_type)]
    return {
        "compression": "zstd",
        "compression_level": {
            name: ZSTD_LEVEL_OF_IDS if name == _leaf("topk_ids") else ZSTD_LEVEL for name in _leaves(schema)
        },
        # List columns need the path of their leaf; pyarrow ignores a bare column name without an error.
        "use_dictionary": [*integers, *_TEXT_DICTIONARY],
        "column_encoding": dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        # Past it a writer falls back to plain values; a dictionary of all ids as int32 must fit.
        "dictionary_pagesize_limit": max(MIN_DICTIONARY_BYTES, 4 * vocab_size),
        "data_page_size": PAGE_BYTES,
        # Only of columns that SQL filters by: minima of token lists exclude no row group.
        "write_statistics": _STATISTICS,
        "write_page_checksum": True,
    }


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[str]:
    """Paths of all leaf columns as Parquet names them, including those inside lists and structs."""
    for field in fields:
        kind, path = field.type, prefix + field.name
        if pa.types.is_list(kind):
            yield from _leaves([kind.value_field], f"{path}.list.")
        elif pa.types.is_struct(kind):
            yield from _leaves(kind.fields, f"{path}.")
        else:
            yield path


def _path(field: pa.Field) -> str:
    return _leaf(field.name) if pa.types.is_list(field.type) else str(field.name)


def _leaf(name: str) -> str:
    return f"{name}.list.element"
