"""Writes rows of a feature set to one Parquet file under a temporary name, one row group in memory at a time."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.columns import list_column
from stillroom.schema.features import FEATURE_SCHEMA, FEATURES_METADATA_KEY, FeatureHeader
from stillroom.schema.records import Int32

ROW_GROUP_BYTES = 64 << 20
"""A row group ends with the row that brings its payloads to this size, or with its chains' row group."""
POSITIONS = "positions.list.element"


@dataclass(frozen=True, slots=True)
class FeatureValues:
    """One row as it is stored."""

    sample_id: str
    chain_id: str
    num_context: int
    positions_P: Int32
    hidden: bytes | None
    layers: bytes | None
    attention: bytes | None

    @property
    def num_bytes(self) -> int:
        """Size of the payloads."""
        return sum(len(one) for one in (self.hidden, self.layers, self.attention) if one is not None)


class FeatureFile:
    """One open file. Not thread-safe."""

    def __init__(self, temp: Path, header: FeatureHeader) -> None:
        """Creates `temp`; the file is readable only after `close`."""
        self.temp, self.chains_file = temp, header.chains_file
        self.sample_ids: list[str] = []
        self.num_bytes = self.num_positions = 0
        self._pending: list[FeatureValues] = []
        self._pending_bytes = 0
        self._schema = FEATURE_SCHEMA.with_metadata({FEATURES_METADATA_KEY: header.model_dump_json()})
        temp.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(temp, self._schema, **feature_options())

    def add(self, row: FeatureValues) -> None:
        """Adds a row; writes a row group once it is large enough."""
        self._pending.append(row)
        self._pending_bytes += row.num_bytes
        self.sample_ids.append(row.sample_id)
        self.num_positions += len(row.positions_P)
        self.num_bytes += row.num_bytes
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self.end_group()

    def end_group(self) -> None:
        """Ends the open row group, so that the next row begins another."""
        if self._pending:
            self._writer.write_table(_table(self._pending, self._schema))
            self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Writes the last row group and the footer."""
        self.end_group()
        self._writer.close()

    def discard(self) -> None:
        """Removes the unfinished file, even if the disk refuses its last bytes."""
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()
        self.temp.unlink(missing_ok=True)


def feature_options() -> dict[str, Any]:
    """Options for pq.ParquetWriter: what FORMAT.md specifies for features."""
    return {
        # Codes look like noise to zstd: it saves a few percent of them and costs half of the reading speed.
        "compression": {
            name: "none" if name in ("hidden", "layers", "attention") else "zstd"
            for name in (*(one.name for one in FEATURE_SCHEMA if one.name != "positions"), POSITIONS)
        },
        "use_dictionary": False,
        # All positions of a chain in a row take no byte this way.
        "column_encoding": {POSITIONS: "DELTA_BINARY_PACKED"},
        "write_statistics": ["sample_id"],
        "write_page_checksum": True,
    }


def _table(rows: Sequence[FeatureValues], schema: pa.Schema) -> pa.Table:
    lengths_R = np.array([len(row.positions_P) for row in rows], np.int64)
    columns = {
        "sample_id": pa.array([row.sample_id for row in rows], pa.string()),
        "chain_id": pa.array([row.chain_id for row in rows], pa.string()),
        "num_context": pa.array([row.num_context for row in rows], pa.int32()),
        "positions": list_column(np.concatenate([row.positions_P for row in rows]), lengths_R),
        "hidden": pa.array([row.hidden for row in rows], pa.binary()),
        "layers": pa.array([row.layers for row in rows], pa.binary()),
        "attention": pa.array([row.attention for row in rows], pa.binary()),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)
