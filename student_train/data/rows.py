"""Rows of a selection, decoded from row groups, kept while they are needed and read before they are due.

In: rows in an order known beforehand. Out: each row as an index into a block of decoded rows. Cost: a row group is
read about once; memory is bounded by a budget plus what the reads in flight take.

Reading ahead never changes the result: a block holds the same rows whoever reads it, and a read error is raised where
the row group's first row is due. Only the waiting differs: on storage with round trips of 30 ms a row group takes
0.25 s, which eight concurrent reads hide (benchmarks/results/stream.md).

    R rows of a row group that were requested, T completion tokens of them, I rows requested in order ("places")
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.codec import decode, signal_columns
from stillroom.cache.columns import offsets_of, read_lists
from stillroom.cache.features import StoredRow
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import CorruptError, first_line
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Draws, Float32, Int32, Int64, Signals
from student_train.data.features import StageFeatures
from student_train.data.kept_ids import map_signals, map_text
from student_train.data.retokenised import CHUNK_LOGPROB, DOCUMENTS, IS_COMMON
from student_train.data.selection import Selection, keys_of

KEY_COLUMNS = ["sample_id", "prompt_token_ids", "token_ids"]


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Decoded rows of one row group.

    rows_R int64 numbers in the selection, ascending; prompt_ids int32 and prompt_offsets int64 [R+1] into it;
    token_ids_T int32 and token_offsets int64 [R+1]; signals of the same T tokens with entry_offsets_T int64 [T+1] into
    their flat arrays, both None where only the text is read; draw_offsets_T the same for the draws where there are any.
    The columns of log_partitions_TS are those of the selection's temperatures. Of projected chains: is_common_T bool,
    whether a token begins where a teacher token does, and chunk_logprob_T float32, the teacher's log probability of the
    text from one such place to the next, on its last token (nan elsewhere). Of pairs of chains: documents_R4 int32,
    tokens of the right chain's prompt and completion, then of the wrong one's, in each row.
    Where features are read: each row's, None for chains without.
    """

    rows_R: Int64
    prompt_ids: Int32
    prompt_offsets: Int64
    token_ids_T: Int32
    token_offsets: Int64
    signals: Signals | None
    entry_offsets_T: Int64 | None
    draw_offsets_T: Int64 | None = None
    is_common_T: npt.NDArray[np.bool_] | None = None
    chunk_logprob_T: Float32 | None = None
    documents_R4: Int32 | None = None
    features: list[StoredRow | None] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the block."""
        return _num_bytes(self)

    def prompt_of(self, index: int) -> Int32:
        """Prompt token ids of row rows_R[index]."""
        return self.prompt_ids[self.prompt_offsets[index] : self.prompt_offsets[index + 1]]

    def tokens_of(self, index: int) -> Int32:
        """Completion token ids of row rows_R[index]."""
        return self.token_ids_T[self.token_offsets[index] : self.token_offsets[index + 1]]

    def signals_of(self, index: int, start: int, stop: int) -> Signals | None:
        """Signals of completion tokens start..stop-1 of row rows_R[index]."""
        if self.signals is None or self.entry_offsets_T is None:
            return None
        first, last = int(self.token_offsets[index]) + start, int(self.token_offsets[index]) + stop
        tokens, entries = slice(first, last), slice(self.entry_offsets_T[first], self.entry_offsets_T[last])
        all_draws, draws, partitions_TS = self.signals.draws, None, self.signals.log_partitions_TS
        if all_draws is not None and self.draw_offsets_T is not None:
            drawn = slice(self.draw_offsets_T[first], self.draw_offsets_T[last])
            draws = Draws(all_draws.n_T[tokens], all_draws.ids_D[drawn], all_draws.logprobs_D[drawn])
        return Signals(
            topk_n_T=self.signals.topk_n_T[tokens],
            topk_ids_N=self.signals.topk_ids_N[entries],
            topk_logprobs_N=self.signals.topk_logprobs_N[entries],
            tail_logmass_T=self.signals.tail_logmass_T[tokens],
            sampled_logprob_T=self.signals.sampled_logprob_T[tokens],
            sampled_rank_T=self.signals.sampled_rank_T[tokens],
            entropy_T=self.signals.entropy_T[tokens],
            draws=draws,
            log_partitions_TS=None if partitions_TS is None else partitions_TS[tokens],
        )

    def chunks_of(self, index: int, start: int, stop: int) -> tuple[npt.NDArray[np.bool_], Float32] | None:
        """is_common and chunk_logprob of completion tokens start..stop-1 of row rows_R[index]."""
        if self.is_common_T is None or self.chunk_logprob_T is None:
            return None
        tokens = slice(int(self.token_offsets[index]) + start, int(self.token_offsets[index]) + stop)
        return self.is_common_T[tokens], self.chunk_logprob_T[tokens]


def read_rows(
    selection: Selection, group: int, rows_R: Int64, *, with_signals: bool, features: StageFeatures | None = None
) -> RowBlock:
    """Reads and decodes rows `rows_R` (ascending numbers in the selection) of row group `group` of the selection.

    Raises CorruptError naming shard and row group where a page fails its checksum, a value contradicts the format, or a
    row is not the one that the selection names; DataError for a shard of a newer format.
    """
    where = selection.where(group)
    with_signals = with_signals and not selection.is_text
    table, decode_signals = _read_table(selection, group, with_signals)
    # Before `take`, whose own error names neither shard nor row group.
    _require(int(selection.row_in_group_R[rows_R].max()) < table.num_rows, where, "has fewer rows than were selected")
    if len(rows_R) < table.num_rows:
        table = table.take(pa.array(selection.row_in_group_R[rows_R]))
    # By key, not only by position: another chain in this place would be trained on without an error.
    same_R = keys_of(table.column("sample_id"), where) == selection.key_R[rows_R]
    _require(bool(same_R.all()), where, "holds a different chain than was selected (sample_id differs)")
    ids, lengths = read_lists(table, ["prompt_token_ids", "token_ids"], where)
    prompt_ids, token_ids_T = ids["prompt_token_ids"], ids["token_ids"]
    same_R = (lengths["prompt_token_ids"] == selection.num_prompt_R[rows_R]) & (
        lengths["token_ids"] == selection.num_tokens_R[rows_R]
    )
    _require(bool(same_R.all()), where, "holds a chain of a different length than was selected")
    signals = decode_signals(table) if decode_signals is not None else None
    if (kept := selection.header.kept_ids) is not None:
        prompt_ids, token_ids_T = map_text(kept, prompt_ids, where), map_text(kept, token_ids_T, where)
        signals = None if signals is None else map_signals(kept, signals)
    entry_offsets_T = draw_offsets_T = None
    if signals is not None:
        entry_offsets_T = offsets_of(signals.topk_n_T)
        draw_offsets_T = None if signals.draws is None else offsets_of(signals.draws.n_T)
    is_common_T = chunk_logprob_T = None
    if signals is not None and selection.is_projected:
        is_common_T = table.column(IS_COMMON).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        # Nulls become nan.
        chunk_logprob_T = table.column(CHUNK_LOGPROB).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        same = len(is_common_T) == len(chunk_logprob_T) == len(token_ids_T)
        _require(same, where, f"does not have one entry per token in {IS_COMMON} and {CHUNK_LOGPROB}")
    documents_R4 = None
    if selection.has_pairs:
        documents_R4 = table.column(DOCUMENTS).combine_chunks().flatten().to_numpy().reshape(-1, 4)
    return RowBlock(
        rows_R,
        prompt_ids,
        offsets_of(lengths["prompt_token_ids"]),
        token_ids_T,
        offsets_of(lengths["token_ids"]),
        signals,
        entry_offsets_T,
        draw_offsets_T,
        is_common_T,
        chunk_logprob_T,
        documents_R4,
        None
        if features is None
        else features.read(int(selection.cache_G[group]), table.column("sample_id").to_pylist()),
    )


def _read_table(
    selection: Selection, group: int, with_signals: bool
) -> tuple[pa.Table, Callable[[pa.Table], Signals] | None]:
    """The needed columns of a row group and a decoder for some of its rows; nothing else opens a data file."""
    path, index, where = selection.path_of(group), int(selection.row_group_G[group]), selection.where(group)
    if selection.is_text:
        file = _open_text(selection, group)
        columns = KEY_COLUMNS
    else:
        file, header = open_shard(path)
        columns = [*KEY_COLUMNS, *(signal_columns(header) if with_signals else [])]
        if selection.is_projected and with_signals:
            columns += [IS_COMMON, CHUNK_LOGPROB]
        if selection.has_pairs:
            columns.append(DOCUMENTS)
    with file:
        _require(index < file.num_row_groups, where, "does not exist in this file")
        table = read_row_group(file, index, columns, str(path))
    if not with_signals:
        return table, None
    return table, lambda rows: _common(decode(rows, header, where)[0], header, selection)


def _common(signals: Signals, header: ShardHeader, selection: Selection) -> Signals:
    """Drops what not every shard of the selection has: draws, and log-partitions at other temperatures."""
    partitions_TS, temperatures = signals.log_partitions_TS, selection.header.temperatures
    columns = [header.temperatures.index(temperature) for temperature in temperatures]
    return replace(
        signals,
        draws=signals.draws if selection.header.draws else None,
        log_partitions_TS=None if partitions_TS is None or not columns else partitions_TS[:, columns],
    )


def _num_bytes(value: Any) -> int:
    """Of all arrays and bytes inside records, lists and dictionaries."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(_num_bytes, value))
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(_num_bytes(getattr(value, one.name)) for one in fields(value)) if is_dataclass(value) else 0


def _open_text(selection: Selection, group: int) -> pq.ParquetFile:
    path = selection.path_of(group)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise CorruptError(f"{path} cannot be read: {reason} (delete it and the selection to rebuild both)") from error


def _require(good: bool, where: str, problem: str) -> None:
    if not good:
        raise CorruptError(f"{where} {problem}")


FOLDER_AHEAD_GROUPS = 2
STORE_AHEAD_GROUPS = 8
"""Row groups in flight, or read and still unused. The lanes of a plan reach new row groups together, so an object store
needs one for each lane; in a folder reading is arithmetic, which more threads only slow down."""


class RowBuffer:
    """Yields rows in a known order while `pool` reads the next row groups. One consumer.

    A block is dropped after its last row, or when all blocks exceed the budget: the one whose next row is due last
    goes, and its remaining rows are read again. Reading ahead stops where the budget has no room.
    """

    def __init__(
        self,
        load: Callable[[int, Int64], RowBlock],
        rows_I: Int64,
        group_R: Int32,
        budget_bytes: int,
        pool: Executor | None = None,
        num_ahead: int = STORE_AHEAD_GROUPS,
    ) -> None:
        """`load(group, rows)` reads rows of a group; rows_I[i] is the i-th row to yield.

        Without a pool, a row group is read when its first row is due. The caller owns the pool.
        """
        self._load = load
        self._rows_I = rows_I
        self._group_I = group_R[rows_I]
        self._budget_bytes = budget_bytes
        self._pool, self._num_ahead = pool, num_ahead
        # Places sorted by group, ascending within one: a slice finds what is still due of a group.
        self._places_I = np.argsort(self._group_I, kind="stable")
        self._groups_sorted_I = self._group_I[self._places_I]
        self._blocks: dict[int, RowBlock] = {}
        self._unused: set[int] = set()
        self._loading: dict[int, Future[RowBlock]] = {}
        self._next = 0
        # Groups of all earlier places are loaded, loading, or used up.
        self._seen = 0
        self._largest_bytes = 0
        self.num_bytes = 0
        self.max_bytes = 0
        self.num_reads = 0
        self.waiting_for: int | None = None
        """The row group whose read holds up the next row, for other threads to see."""

    def next_row(self) -> tuple[RowBlock, int]:
        """The next row's block and its index in it. Raises what reading raised."""
        row, group = int(self._rows_I[self._next]), int(self._group_I[self._next])
        self._take_finished()
        if group not in self._blocks:
            self._keep(group, self._wait_for(group))
        block = self._blocks[group]
        self._unused.discard(group)
        self._next += 1
        # After its last row, so that memory falls before the next read starts.
        if not len(self._due_places(group)):
            self._drop(group)
        self._read_ahead()
        return block, int(np.searchsorted(block.rows_R, row))

    def _take_finished(self) -> None:
        for group, future in list(self._loading.items()):
            # A failed read stays here until its first row is due.
            if future.done() and future.exception() is None:
                self._keep(group, self._loading.pop(group).result())

    def _read_ahead(self) -> None:
        if self._pool is None:
            return
        self._seen = max(self._seen, self._next)
        while (
            self._seen < len(self._rows_I)
            and len(self._loading) + len(self._unused) < self._num_ahead
            and self._has_room()
        ):
            group = int(self._group_I[self._seen])
            if group not in self._blocks and group not in self._loading:
                self._loading[group] = self._pool.submit(self._load, group, self._due_rows(group))
            self._seen += 1

    def _has_room(self) -> bool:
        """Whether one more block fits; their size is known once the first one is loaded."""
        expected_bytes = self.num_bytes + (len(self._loading) + 1) * self._largest_bytes
        # Until a block is loaded its size is unknown, and nothing is read ahead.
        return self._largest_bytes > 0 and expected_bytes <= self._budget_bytes

    def _wait_for(self, group: int) -> RowBlock:
        future = self._loading.pop(group, None)
        self.waiting_for = group
        block = self._load(group, self._due_rows(group)) if future is None else future.result()
        self.waiting_for = None
        return block

    def _keep(self, group: int, block: RowBlock) -> None:
        self._blocks[group] = block
        self._unused.add(group)
        self.num_reads += 1
        self.num_bytes += block.num_bytes
        self.max_bytes = max(self.max_bytes, self.num_bytes)
        self._largest_bytes = max(self._largest_bytes, block.num_bytes)
        # The block that is due stays, even if it alone exceeds the budget.
        while self.num_bytes > self._budget_bytes and len(self._blocks) > 1:
            next_place = {other: int(self._due_places(other)[0]) for other in self._blocks if other != group}
            # The order is known, so the block that is needed last goes (Belady's rule).
            last = max(next_place, key=next_place.__getitem__)
            self._drop(last)
            # So that reading ahead finds the dropped group again.
            self._seen = min(self._seen, next_place[last])

    def _drop(self, group: int) -> None:
        self._unused.discard(group)
        self.num_bytes -= self._blocks.pop(group).num_bytes

    def _due_places(self, group: int) -> Int64:
        """Remaining places of a group, ascending."""
        start, stop = np.searchsorted(self._groups_sorted_I, [group, group + 1])
        places = self._places_I[start:stop]
        due: Int64 = places[np.searchsorted(places, self._next) :]
        return due

    def _due_rows(self, group: int) -> Int64:
        """Remaining rows of a group, ascending, without repeats."""
        # Split chains and weighted caches name a row several times.
        return np.unique(self._rows_I[self._due_places(group)])
