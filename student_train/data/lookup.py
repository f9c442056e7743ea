"""Finds chains of a cache by what they are, not by where they lie: `chain_id`, the hash of prompt and completion.

In: a cache, ids of chains. Out: their rows, whatever shard holds them. Two caches that looked at the same tokens meet
here: the student that wrote a chain and the teacher that scored it, or two teachers. Cost: 24 bytes a chain in memory;
row groups are read when a chain of theirs is asked for, the last few are kept.

    R chains asked for, A chains of the cache
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int64
from stillroom.storage.paths import Location
from student_train.data.selection import Selection, UInt64, changes, keys_of

KEPT_GROUPS = 8
"""Row groups in memory: a cache that scored another has its order, so few are wanted at a time."""


@dataclass(frozen=True, slots=True)
class Found:
    """Some of the chains asked for, all of one shard: `rows` are their numbers in the question, in the table's order.

    `sample_keys` are those of their sample ids; `where` names the row group in an error.
    """

    rows: Int64
    table: pa.Table
    header: ShardHeader
    where: str


class ChainIndex:
    """Where every chain of a cache lies, by chain_id. Of chains that occur twice, the first."""

    def __init__(self, catalog: Catalog) -> None:
        """Reads the ids of all chains, checksums verified. Raises CorruptError."""
        self.root = catalog.root
        self._paths: list[Location] = []
        self._headers: list[ShardHeader] = []
        keys, files, groups, rows = [], [], [], []
        for file in catalog.chains.files():
            path = catalog.chains.path_of(file)
            shard, header = open_shard(path)
            with shard:
                for group in range(shard.num_row_groups):
                    table = read_row_group(shard, group, ["chain_id"], str(path))
                    keys.append(keys_of(table.column("chain_id"), f"{path}: row group {group}"))
                    files.append(np.full(table.num_rows, len(self._paths), np.int32))
                    groups.append(np.full(table.num_rows, group, np.int32))
                    rows.append(np.arange(table.num_rows, dtype=np.int32))
            self._paths.append(path)
            self._headers.append(header)
        all_keys = np.concatenate([np.zeros(0, np.uint64), *keys])
        # Stable, so that searching from the left finds the first of equal chains.
        order = np.argsort(all_keys, kind="stable")
        self._key_A: UInt64 = all_keys[order]
        self._file_A, self._group_A, self._row_A = (
            np.concatenate([np.zeros(0, np.int32), *parts])[order] for parts in (files, groups, rows)
        )
        # Weak: in a cycle with its cache this would outlive its last use.
        self._group = functools.lru_cache(KEPT_GROUPS)(functools.partial(type(self)._read_group, weakref.proxy(self)))

    def find(self, keys_R: UInt64) -> Int64:
        """int64 [R]: the place of each chain in this index, -1 where the cache does not hold it."""
        places_R = np.searchsorted(self._key_A, keys_R)
        if not len(self._key_A):
            return np.full(len(keys_R), -1, np.int64)
        # For a key above all others searchsorted gives a place past the end.
        held_R = self._key_A[np.minimum(places_R, len(self._key_A) - 1)] == keys_R
        return np.where(held_R, places_R, -1).astype(np.int64)

    def read(self, places_R: Int64, columns: Callable[[ShardHeader], Sequence[str]]) -> Iterator[Found]:
        """The rows of the places that are not -1, a row group at a time. Raises CorruptError."""
        asked = np.flatnonzero(places_R >= 0)
        at = places_R[asked]
        file_R, group_R = self._file_A[at], self._group_A[at]
        # By file and row group, so that each row group is read once in a call.
        order = np.lexsort((group_R, file_R))
        starts = np.flatnonzero(changes(file_R[order]) | changes(group_R[order]))
        for part in np.split(order, starts[1:]) if len(order) else []:
            file, group = int(file_R[part[0]]), int(group_R[part[0]])
            table = self._group(file, group, tuple(columns(self._headers[file])))
            rows = table.take(pa.array(self._row_A[at[part]]))
            yield Found(asked[part], rows, self._headers[file], f"{self._paths[file]}: row group {group}")

    def _read_group(self, file: int, group: int, names: tuple[str, ...]) -> pa.Table:
        shard, _ = open_shard(self._paths[file])
        with shard:
            return read_row_group(shard, group, names, str(self._paths[file]))


def chain_keys(selection: Selection) -> UInt64:
    """uint64 [R]: keys of the chain ids of a selection's rows, as the student reads them. Raises CorruptError."""
    return _row_keys(selection, "chain_id")


def prompt_keys(selection: Selection) -> UInt64:
    """uint64 [R]: keys of the prompts of a selection's rows. Raises CorruptError."""
    return _row_keys(selection, "prompt_id")


def _row_keys(selection: Selection, column: str) -> UInt64:
    keys_R = np.zeros(selection.num_chains, np.uint64)
    for group in range(len(selection.file_G)):
        path = selection.path_of(group)
        # One read of the column serves all selected rows of a group.
        rows = np.flatnonzero(selection.group_R == group)
        shard, _ = open_shard(path)
        with shard:
            table = read_row_group(shard, int(selection.row_group_G[group]), [column], str(path))
        keys_R[rows] = keys_of(table.column(column), selection.where(group))[selection.row_in_group_R[rows]]
    return keys_R
