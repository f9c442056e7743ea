"""Decoded row groups, kept while they are needed and read before they are: rows in an order known beforehand.

In: which rows will be asked for, in order, and how to read rows of a row group. Out: each row, as its place in a block.
Cost: every row group is read about once; memory is bounded by a budget whatever the data's size, and by the transients
of the row groups that are being read.

What is ahead never changes what comes out: a block holds the same rows whoever reads it and when, errors of reading are
raised where the first row of the row group is due. Only the waiting differs: on storage with round trips of 30 ms a row
group takes 0.25 s, and eight at a time hide that (benchmarks/results/stream.md).

    I rows asked for in order ("places"), R rows of a row group
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future

import numpy as np

from schemas.records import Int32, Int64
from student_train.streaming.rows import RowBlock

FOLDER_AHEAD_GROUPS = 2
STORE_AHEAD_GROUPS = 8
"""Row groups that are read, or lie read and unused, before their first row is due. In a store one for each lane of a
plan, whose lanes come to new row groups together; in a folder reading is arithmetic, which more threads make dearer."""


class RowBuffer:
    """Hands out rows in a known order; the next row groups are read in `pool` meanwhile.

    A block is dropped when its last row was handed out, or when all blocks together exceed the budget: then the one
    whose next row is due last goes, and what is still due of it is read again. Nothing is read ahead for which the
    budget has no room. Errors of `load` are raised when the row group's first row is due. One consumer.
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
        """`load(group, rows)` reads rows of a group; row rows_I[i] is the i-th that will be asked for.

        Without a pool each row group is read when its first row is due. Who made the pool ends it.
        """
        self._load = load
        self._rows_I = rows_I
        self._group_I = group_R[rows_I]
        self._budget_bytes = budget_bytes
        self._pool, self._num_ahead = pool, num_ahead
        # Places of each group, in the order in which they come: where to look for what is still due of it.
        self._places_I = np.argsort(self._group_I, kind="stable")
        self._groups_sorted_I = self._group_I[self._places_I]
        self._blocks: dict[int, RowBlock] = {}
        self._unused: set[int] = set()
        self._loading: dict[int, Future[RowBlock]] = {}
        self._next = 0
        # Every group with a place before this one is here, on its way, or was handed out to its last row.
        self._seen = 0
        self._largest_bytes = 0
        self.num_bytes = 0
        self.max_bytes = 0
        self.num_reads = 0

    def next_row(self) -> tuple[RowBlock, int]:
        """The block that holds the next row, and the row's index in it. Raises what reading raised."""
        row, group = int(self._rows_I[self._next]), int(self._group_I[self._next])
        self._take_finished()
        if group not in self._blocks:
            self._keep(group, self._wait_for(group))
        block = self._blocks[group]
        self._unused.discard(group)
        self._next += 1
        if not len(self._due_places(group)):
            self._drop(group)
        self._read_ahead()
        return block, int(np.searchsorted(block.rows_R, row))

    def _take_finished(self) -> None:
        for group, future in list(self._loading.items()):
            # One that failed stays until its first row is due.
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
        """For one more block; how large they are is known when the first one is there."""
        expected_bytes = self.num_bytes + (len(self._loading) + 1) * self._largest_bytes
        return self._largest_bytes > 0 and expected_bytes <= self._budget_bytes

    def _wait_for(self, group: int) -> RowBlock:
        future = self._loading.pop(group, None)
        return self._load(group, self._due_rows(group)) if future is None else future.result()

    def _keep(self, group: int, block: RowBlock) -> None:
        self._blocks[group] = block
        self._unused.add(group)
        self.num_reads += 1
        self.num_bytes += block.num_bytes
        self.max_bytes = max(self.max_bytes, self.num_bytes)
        self._largest_bytes = max(self._largest_bytes, block.num_bytes)
        while self.num_bytes > self._budget_bytes and len(self._blocks) > 1:
            next_place = {other: int(self._due_places(other)[0]) for other in self._blocks if other != group}
            last = max(next_place, key=next_place.__getitem__)
            self._drop(last)
            self._seen = min(self._seen, next_place[last])

    def _drop(self, group: int) -> None:
        self._unused.discard(group)
        self.num_bytes -= self._blocks.pop(group).num_bytes

    def _due_places(self, group: int) -> Int64:
        """Places of a group that are still to come, ascending."""
        start, stop = np.searchsorted(self._groups_sorted_I, [group, group + 1])
        places = self._places_I[start:stop]
        due: Int64 = places[np.searchsorted(places, self._next) :]
        return due

    def _due_rows(self, group: int) -> Int64:
        """Rows of a group that are still to come, ascending, each once."""
        return np.unique(self._rows_I[self._due_places(group)])
