"""Everything that one shard can be asked: hash, header, page checksums, decoding, rows; and what of it is sound."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import ShardHeader
from schemas.tables import chain_schema
from shared.catalog import DataFile, Table, check_hash
from shared.errors import CorruptError, StillroomError
from shared.shards import open_shard, read_signals
from shared.storage import Location
from teacher_cache.care.row_checks import COLUMNS, SAMPLE_ID, check_rows

PackedIds = npt.NDArray[np.void]
"""Sample ids as 16 raw bytes each: 160 MB for ten million chains."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A registered file whose content is wrong, so that it may be taken out of its table.

    `good_groups` are the row groups that passed every check, where only the others are wrong, else empty; `repeated`
    counts, by sample id, rows that are visible elsewhere already.
    """

    table: str
    file: DataFile
    problems: Sequence[str]
    good_groups: Sequence[int] = ()
    repeated: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class ShardFindings:
    """What one shard holds and what is wrong with it."""

    file: DataFile
    header: ShardHeader | None = None
    num_chains: int = 0
    num_tokens: int = 0
    sample_ids: PackedIds = field(default_factory=lambda: packed([]))
    problems: list[str] = field(default_factory=list)
    num_groups: int = 0
    bad_groups: set[int] = field(default_factory=set)
    is_damaged: bool = True
    repeated: Counter[str] = field(default_factory=Counter)

    def damage(self) -> Damage | None:
        """None where nothing is wrong with the bytes: a newer format or a disk that refuses to read is no damage."""
        if not self.is_damaged or not (self.problems or self.repeated):
            return None
        # Damage that no row group shows lies in the footer, which has no checksum: then nothing of it is believed.
        is_local = bool(self.bad_groups) or not self.problems
        good = sorted(set(range(self.num_groups)) - self.bad_groups) if is_local else []
        return Damage("chains", self.file, tuple(self.problems), good, dict(self.repeated))


def verify_shard(table: Table, file: DataFile) -> ShardFindings:
    """Everything that one shard can be asked."""
    findings = ShardFindings(file)
    path = table.path_of(file)
    try:
        size_bytes = path.stat().st_size if path.exists() else None
        if size_bytes is not None and size_bytes != file.size_bytes:
            findings.problems.append(f"has {size_bytes} bytes, {file.size_bytes} were registered")
        check_hash(path)
    except StillroomError as error:
        _add_error(findings, error, path)
    if not path.exists():
        return findings
    try:
        _read_shard(path, findings)
    except StillroomError as error:
        _add_error(findings, error, path)
    return findings


def _add_error(findings: ShardFindings, error: StillroomError, path: Location) -> None:
    findings.problems.append(without_path(str(error), path))
    findings.is_damaged &= isinstance(error, CorruptError)


def _read_shard(path: Location, findings: ShardFindings) -> None:
    parquet, header = open_shard(path)
    with parquet:
        findings.header = header
        expected = chain_schema(header.codec, header.format_version)
        if not parquet.schema_arrow.equals(expected):
            findings.problems.append(f"has not the columns of codec {header.codec}: {_difference(parquet, expected)}")
            return
        if parquet.metadata.num_rows != findings.file.num_rows:
            findings.problems.append(f"has {parquet.metadata.num_rows} rows, {findings.file.num_rows} were registered")
        findings.num_groups = parquet.num_row_groups
        for index in range(parquet.num_row_groups):
            try:
                table, signals, offsets = read_signals(parquet, header, index, COLUMNS, "")
            except StillroomError as error:
                findings.problems.append(str(error).removeprefix(": "))
                findings.bad_groups.add(index)
                continue
            problems = [f"row group {index}: {one}" for one in check_rows(table, signals, offsets, header)]
            findings.problems += problems
            if problems:
                findings.bad_groups.add(index)
            ids = [one for one in table.column("sample_id").to_pylist() if SAMPLE_ID.match(one)]
            findings.sample_ids = np.concatenate([findings.sample_ids, packed(ids)])
            findings.num_tokens += len(signals.topk_n_T)
            findings.num_chains += table.num_rows


def packed(sample_ids: list[str]) -> PackedIds:
    """Ids of 32 hex digits as 16 bytes each."""
    return np.array([bytes.fromhex(sample_id) for sample_id in sample_ids], dtype="V16")


def without_path(message: str, path: Location) -> str:
    """An error's message without the file that it begins with."""
    return message.removeprefix(f"{path}").removeprefix(":").strip()


def _difference(parquet: pq.ParquetFile, expected: pa.Schema) -> str:
    for one in expected:
        place = parquet.schema_arrow.get_field_index(one.name)
        if place < 0:
            return f"{one.name} is missing"
        found = parquet.schema_arrow.field(place)
        if not found.equals(one):
            return f"{one.name} is {found.type}{'' if found.nullable else ' not null'}, not {one.type}"
    return "their order differs, or there are more"
