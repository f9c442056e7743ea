"""Chains in a student's own tokens, made once and kept with the run: what `data.kind: text` and `projected` read.

In: a selection of any caches, and what makes rows of them. Out: a folder of Parquet files (same row groups, same
order) and a selection over them, which plans, streams and resumes like any other. Memory: one row group at a time. A
file that exists is reused, so an interrupted call continues where it stopped; so is one that another stage of the run,
or `plan` before it, has made of the same chains.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stillroom.cache.codec import signal_columns
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import ConfigError, CorruptError, first_line
from stillroom.log import Progress
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int64, stable_hash
from stillroom.sql.conditions import shown
from stillroom.storage.paths import Location, atomic_path, location
from student_train.data.selection import (
    SCHEMA,
    Selection,
    SelectionHeader,
    changes,
    keys_of,
    totals_of,
    write_selection,
)

TEXT_METADATA_KEY = b"stillroom-text"
COUNTS_METADATA_KEY = b"stillroom-counts"
SPACE_METADATA_KEY = b"stillroom-leading-space"
PLAN_FOLDER = "plan"
"""Beside the selections of a run: what `student-train plan` has made before it began."""
IS_COMMON, CHUNK_LOGPROB = "is_common", "chunk_logprob"
"""Columns of projected chains besides the signals: see RowBlock."""
DOCUMENTS = "documents"
"""Column of pairs of chains: see RowBlock."""
Counts = dict[str, float]
"""What a file's rows came to, added up over files."""


class Rows(Protocol):
    """Makes rows of chains."""

    verb: str
    """What is done to them, for the progress line."""
    folder_suffix: str
    with_signals: bool
    """Whether a chain's distributions are read."""

    @property
    def columns(self) -> Sequence[str]:
        """What else is read of a chain."""

    @property
    def identity(self) -> Sequence[object]:
        """What the rows depend on besides the chains, ready for JSON."""

    def prepare(self) -> None:
        """Called before the first of `make`; not where all files are there already."""

    def metadata(self, header: ShardHeader) -> dict[bytes, bytes]:
        """Of a file whose chains come from a shard."""

    def schema(self, header: ShardHeader) -> pa.Schema:
        """Of the rows: sample_id, prompt_token_ids, token_ids first."""

    def make(self, table: pa.Table, header: ShardHeader, where: str) -> tuple[pa.Table, Counts]:
        """Rows of some chains of one row group, which may be fewer, and their counts."""


@dataclass(frozen=True)
class Retokenised:
    """Rows of a selection (SCHEMA) and the counts of all of them."""

    rows: pa.Table
    counts: Counts
    folder: Path


def retokenise(path: Path, source: Selection, maker: Rows) -> Retokenised:
    """Makes the rows of the chains of `source`, in a folder beside `path`. Chains that come to no row are left out.

    Raises CorruptError for a shard that cannot be read.
    """
    folder = path.parent / f"{path.stem}-{maker.folder_suffix}"
    others = [
        *path.parent.glob(f"*-{maker.folder_suffix}"),
        *(path.parent / PLAN_FOLDER).glob(f"*-{maker.folder_suffix}"),
    ]
    parts, done, num_tokens = [], 0, 0
    counts: Counts = {}
    files = [_file(folder, source, groups, maker) for groups in _groups_by_file(source)]
    is_made = [_is_made(file, others) for file in files]
    if not all(is_made):
        maker.prepare()
    with Progress(maker.verb, source.num_chains, "chains") as progress:
        for file, is_there in zip(files, is_made, strict=True):
            if not is_there:
                _write_file(file, source, maker)
            part = _rows_of(file.target, source, file.rows)
            parts.append(part)
            add_counts(counts, json.loads(_metadata_of(file.target).get(COUNTS_METADATA_KEY, b"{}")))
            done, num_tokens = done + len(file.rows), num_tokens + int(part.column("num_tokens").to_numpy().sum())
            progress.update(done, num_tokens)
    return Retokenised(pa.concat_tables(parts), counts, folder)


def write_retokenised(
    path: Path,
    source: Selection,
    made: Retokenised,
    header: Mapping[str, Any],
    missing: str,
    remedy: str = "select others (`teacher-cache sql` shows the columns reference and text)",
) -> Selection:
    """The selection over `made` at `path`. `header`: what differs from the source's; `missing`: what chains lack.

    Raises ConfigError where no chain is left.
    """
    if not made.rows.num_rows:
        raise ConfigError(
            f"none of the {source.num_chains} chains of {shown(source.header.where)} has {missing}: {remedy}"
        )
    common = {
        "text": made.folder.name,
        "num_empty": source.header.num_empty + source.num_chains - made.rows.num_rows,
        "template_fingerprints": [],
        "draws": 0,
        "temperatures": [],
        **totals_of(made.rows),
    }
    changed: SelectionHeader = source.header.model_copy(update={**common, **header})
    return write_selection(path, made.rows, changed)


def read_groups(source: Selection, groups: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The selected chains of row groups of one file, a group at a time. Raises CorruptError."""
    path = source.path_of(groups[0])
    shard, _ = open_shard(path)
    with shard:
        for group in groups:
            table = read_row_group(shard, int(source.row_group_G[group]), columns, str(path))
            rows = np.flatnonzero(source.group_R == group)
            table = table.take(pa.array(source.row_in_group_R[rows]))
            if not (keys_of(table.column("sample_id"), source.where(group)) == source.key_R[rows]).all():
                raise CorruptError(
                    f"{source.where(group)} holds a different chain than was selected (sample_id differs)"
                )
            yield group, table


def vocab_beside(folder: Location) -> Location:
    """Where the student's vocabulary lies, in the form of a cache's, for retokenised files in `folder`."""
    return folder.parent / f"{folder.name}.vocab.parquet"


def vocab_path_of(selection: Selection, folder: Location) -> Location:
    """The vocabulary of a selection's ids; `folder` is one of its folders."""
    if selection.is_retokenised:
        return vocab_beside(folder)
    if selection.header.prepared is not None:
        # The rows lie in the run's folder, their vocabulary in the cache.
        folder = location(selection.header.caches[0].root) / "chains"
    return folder.parent / "vocab" / f"{selection.header.tokenizer_fingerprints[0]}.parquet"


def has_leading_space(selection: Selection) -> bool:
    """Whether the student's tokenizer began each text with a space of its own."""
    path = selection.path_of(0)
    return isinstance(path, Path) and SPACE_METADATA_KEY in _metadata_of(path)


def add_counts(counts: Counts, more: Mapping[str, float]) -> None:
    """Adds `more` to `counts`, by name."""
    for name, value in more.items():
        counts[name] = counts.get(name, 0) + value


@dataclass(frozen=True)
class _File:
    """One file to make: of which row groups and rows of the source, and the hash of all that it depends on."""

    target: Path
    groups: Int64
    rows: Int64
    request_hash: str


def _file(folder: Path, source: Selection, groups: Int64, maker: Rows) -> _File:
    # Row groups of a file have consecutive numbers, so their rows are those in between.
    rows = np.flatnonzero((source.group_R >= groups[0]) & (source.group_R <= groups[-1]))
    target = folder / f"{source.cache_G[groups[0]]}-{source.path_of(groups[0]).stem}.parquet"
    return _File(target, groups, rows, stable_hash(*maker.identity, source.key_R[rows].tolist()))


def _is_made(file: _File, others: Sequence[Path]) -> bool:
    """Whether the file is there; a link to one of the same content in a folder of `others` counts."""
    # A finished file says what it was made of: it is kept if that still holds, else made again.
    if _metadata_of(file.target).get(TEXT_METADATA_KEY) == file.request_hash.encode():
        return True
    for other in (folder / file.target.name for folder in others if folder != file.target.parent):
        try:
            is_equal = _metadata_of(other).get(TEXT_METADATA_KEY) == file.request_hash.encode()
        except CorruptError:
            continue
        if is_equal:
            with atomic_path(file.target) as temp:
                _link(other, temp)
            return True
    return False


def _link(source: Path, target: Path) -> None:
    """Finished files are replaced and never changed, so that two names may share one. Not every file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_file(file: _File, source: Selection, maker: Rows) -> None:
    shard, header = open_shard(source.path_of(file.groups[0]))
    # Opened for the header alone, which says what signal columns there are to read.
    shard.close()
    columns = list(dict.fromkeys([*maker.columns, *(signal_columns(header) if maker.with_signals else [])]))
    metadata = {TEXT_METADATA_KEY: file.request_hash.encode(), **maker.metadata(header)}
    counts: Counts = {}
    # In this order: the writer ends its file before that gets its name.
    with (
        atomic_path(file.target) as temp,
        pq.ParquetWriter(
            temp, maker.schema(header).with_metadata(metadata), compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        for group, table in read_groups(source, file.groups.tolist(), columns):
            made, more = maker.make(table, header, source.where(group))
            add_counts(counts, more)
            # An empty row group keeps the numbering of groups that is the source's.
            writer.write_table(made, row_group_size=max(made.num_rows, 1))
        writer.add_key_value_metadata({COUNTS_METADATA_KEY: json.dumps(counts)})


def _rows_of(target: Path, source: Selection, rows: Int64) -> pa.Table:
    """Rows of a selection (SCHEMA) for the chains in `target`; `rows` are those of `source` it was made from."""
    try:
        # With checksums, because the file may come from an earlier call.
        with pq.ParquetFile(target, page_checksum_verification=True) as file:
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            table = file.read(columns=["sample_id", "prompt_token_ids", "token_ids"])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(target, error) from error
    keys = keys_of(table.column("sample_id"), str(target))
    # Chains that came to no row are missing from the file; the others are in the order of the source.
    kept = rows[np.isin(source.key_R[rows], keys)]
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = {
        "cache": pa.array(source.cache_G[source.group_R[kept]].astype(np.int16)),
        "file": pa.array([target.name] * len(kept), pa.string()),
        "row_group": pa.array(group),
        "row_in_group": pa.array((np.arange(len(kept)) - first).astype(np.int32)),
        "sample_id": table.column("sample_id"),
        "num_prompt_tokens": pc.list_value_length(table.column("prompt_token_ids")),
        "num_tokens": pc.list_value_length(table.column("token_ids")),
        "weight": pa.array(source.weight_R[kept]),
    }
    return pa.Table.from_pydict(columns).cast(SCHEMA)


def _metadata_of(target: Path) -> dict[bytes, bytes]:
    """Of a finished file; empty where there is none."""
    if not target.exists():
        return {}
    try:
        with pq.ParquetFile(target) as file:
            return dict(file.metadata.metadata or {})
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(target, error) from error


def _unreadable(target: Path, error: Exception) -> CorruptError:
    return CorruptError(f"{target} cannot be read: {first_line(error)}: delete it to rebuild it")


def _groups_by_file(source: Selection) -> list[Int64]:
    """The groups of each file that the selection reads."""
    # Row groups of a file stand together, and files of two caches may have equal numbers.
    changes_G = changes(source.file_G) | changes(source.cache_G)
    return np.split(np.arange(len(changes_G)), np.flatnonzero(changes_G)[1:])
