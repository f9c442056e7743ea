"""Streams packs to one rank in planned order, reading ahead of training.

In: a frozen selection, a PlanSpec, a rank and the world size. Out: packs, endless or counted. Epochs follow each other
without a gap: a global batch may hold the last packs of one epoch and the first of the next, so every chain is seen
exactly once an epoch and only a run's last step may be short. Ranks without a pack get an empty one there, because all
ranks take part in every step.

State is (epoch, cursor), the first pack that no rank has consumed. It is the same on every rank and independent of the
world size: rank r takes pack cursor + r, then cursor + r + world, ...

    B packs of a global batch (all ranks and accumulation steps), W ranks
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from stillroom.errors import ConfigError
from stillroom.log import format_duration, note
from stillroom.schema.records import Int64
from student_train.data.epoch_plan import EpochPlans, Place, PlanSpec
from student_train.data.features import StageFeatures
from student_train.data.pack import Pack, PackedPiece, build_pack, empty_pack
from student_train.data.rows import FOLDER_AHEAD_GROUPS, STORE_AHEAD_GROUPS, RowBlock, RowBuffer, read_rows
from student_train.data.selection import Selection
from student_train.data.steps import planned

THREAD_NAME = "pack-stream"
WAIT_NOTE_S = 10.0
"""A consumer that waits says so this often."""


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Totals since the stream was made.

    stall_s is how long the consumer waited, num_group_reads includes row groups read again because the buffer was too
    small, max_buffer_bytes is the peak of decoded rows.
    """

    num_packs: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    stall_s: float = 0.0
    num_group_reads: int = 0
    max_buffer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Item:
    """Message of the reading thread: a pack with the state after it, an error, or (neither) the end."""

    pack: Pack | None = None
    place_after: Place = (0, 0)
    error: BaseException | None = None
    num_group_reads: int = 0
    max_buffer_bytes: int = 0


class PackStream:
    """Iterator over this rank's packs; as a context manager it stops its threads. One consumer."""

    def __init__(
        self,
        selection: Selection,
        spec: PlanSpec,
        *,
        packs_per_step: int,
        rank: int = 0,
        world: int = 1,
        num_epochs: int | None = None,
        with_signals: bool = True,
        features: StageFeatures | None = None,
        buffer_mib: int = 1024,
        prefetch_packs: int = 8,
        read_ahead_groups: int | None = None,
        tell: Callable[[str], None] = note,
    ) -> None:
        """Sets up the stream; threads start with the first pack.

        packs_per_step: packs of a global batch.
        num_epochs: None never ends.
        with_signals: False reads token ids only.
        features: what is read of the tables of features; None leaves them alone.
        buffer_mib: budget of decoded rows.
        read_ahead_groups: row groups read before they are due; None is 2 from folders, 8 from object stores.
        tell: called every WAIT_NOTE_S while the consumer waits, with a line that says for which file.

        Raises ConfigError for an impossible rank, a batch that does not divide among the ranks, or no chain left.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"rank={rank} is none of world={world} ranks, which count from 0")
        if packs_per_step < 1 or packs_per_step % world:
            raise ConfigError(
                f"a global batch of {packs_per_step} packs cannot be divided among {world} ranks: make it a multiple"
            )
        assert buffer_mib > 0
        assert prefetch_packs > 0
        assert read_ahead_groups is None or read_ahead_groups >= 0
        self._selection = selection
        # Where chains are split into examples, plans number these, and rows are still those of chains.
        self.plans = EpochPlans(planned(selection), spec, num_epochs)
        self._packs_per_step, self._rank, self._world = packs_per_step, rank, world
        self._with_signals = with_signals and not selection.is_text
        self._features = features
        self._budget_bytes, self._prefetch_packs = buffer_mib << 20, prefetch_packs
        is_distant = not all(isinstance(folder, Path) for folder in selection.folders)
        usual = STORE_AHEAD_GROUPS if is_distant else FOLDER_AHEAD_GROUPS
        self._read_ahead_groups = usual if read_ahead_groups is None else read_ahead_groups
        self._place: Place = (0, 0)
        self._stats = StreamStats()
        self._tell = tell
        self._rows: RowBuffer | None = None
        self._queue: queue.Queue[_Item] = queue.Queue(prefetch_packs)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        """The next pack, which then counts as consumed on every rank. Raises errors of reading (CorruptError)."""
        if self._ended:
            raise StopIteration
        if self._thread is None:
            self._start()
        started_s = time.perf_counter()
        item = self._next_item(started_s)
        waited_s = time.perf_counter() - started_s
        if item.pack is None:
            self.close()
            self._ended = True
            if item.error is not None:
                raise item.error
            raise StopIteration
        # Only packs that were taken count: a checkpoint reads those still in the queue again.
        self._place = item.place_after
        self._count(item, item.pack, waited_s)
        return item.pack

    def _next_item(self, started_s: float) -> _Item:
        while True:
            try:
                return self._queue.get(timeout=WAIT_NOTE_S)
            except queue.Empty:
                group = None if self._rows is None else self._rows.waiting_for
                what = "the next pack" if group is None else self._selection.where(group)
                waited = format_duration(time.perf_counter() - started_s)
                self._tell(f"waiting for data: rank {self._rank} of {self._world} has waited {waited} for {what}")

    @property
    def stats(self) -> StreamStats:
        """Totals since the stream was made."""
        return self._stats

    def state_dict(self) -> dict[str, Any]:
        """Position (epoch, cursor) and the hash of its plan. JSON-ready."""
        epoch, cursor = self._place
        return {"epoch": epoch, "cursor": cursor, "plan": self.plans.hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state saved with any world size. Raises ConfigError if it belongs to another plan."""
        if state["plan"] != self.plans.hash:
            raise ConfigError(
                "the checkpoint's data position belongs to another selection or packing: resume with the run's own "
                "settings, or choose another run folder"
            )
        self.close()
        # Normalised: a state at the very end of an epoch is the beginning of the next.
        self._place = self.plans.place(int(state["epoch"]), int(state["cursor"]))
        self._ended = False

    def close(self) -> None:
        """Stops reading ahead; iteration may continue and reads unconsumed packs again."""
        if self._thread is None:
            return
        self._closing.set()
        # The thread may be waiting for room, and puts no second item once the event is set.
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        # Joined, so that a later `_start` does not read beside it and fill a second buffer.
        self._thread.join()
        self._thread = None

    def _start(self) -> None:
        # New queue and event: what an earlier thread had read ahead belongs to another place.
        self._closing = threading.Event()
        self._queue = queue.Queue(self._prefetch_packs)
        reader = threading.Thread(target=self._read_ahead, args=(self._place,), name=THREAD_NAME, daemon=True)
        self._thread = reader
        reader.start()

    def _count(self, item: _Item, pack: Pack, waited_s: float) -> None:
        stats = self._stats
        self._stats = replace(
            stats,
            num_packs=stats.num_packs + 1,
            num_tokens=stats.num_tokens + pack.num_tokens,
            num_loss_tokens=stats.num_loss_tokens + pack.num_loss_tokens,
            stall_s=stats.stall_s + waited_s,
            num_group_reads=stats.num_group_reads + item.num_group_reads,
            max_buffer_bytes=max(stats.max_buffer_bytes, item.max_buffer_bytes),
        )

    def _read_ahead(self, place: Place) -> None:
        try:
            with self._loaders() as pool, contextlib.closing(self._items(place, pool)) as items:
                for item in items:
                    if not self._put(item):
                        return
            self._put(_Item())
        # Anything at all: a consumer whose reader has ended without a word would wait for ever.
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._put(_Item(error=error))

    def _put(self, item: _Item) -> bool:
        """False if the stream was closed meanwhile."""
        if self._closing.is_set():
            return False
        self._queue.put(item)
        return True

    def _loaders(self) -> contextlib.AbstractContextManager[Executor | None]:
        """Threads that read row groups ahead; exit waits for reads in flight."""
        if not self._read_ahead_groups:
            return contextlib.nullcontext()
        return ThreadPoolExecutor(self._read_ahead_groups, thread_name_prefix=THREAD_NAME)

    def _items(self, place: Place, pool: Executor | None) -> Generator[_Item, None, None]:
        """Packs of this rank from a place on, each with the place after all ranks took theirs."""
        plans, num_taken = self.plans, 0
        reader: _EpochReader | None = None
        # All ranks stop at the same pack: when the data has ended and the current step is complete.
        while not plans.is_end(place[0]) or num_taken * self._world % self._packs_per_step:
            # At the end of an epoch some ranks read from it while others already read from the next.
            epoch, cursor = plans.place(place[0], place[1] + self._rank)
            # After a pack of every rank, so that a state is the same on all of them.
            place = plans.place(place[0], place[1] + self._world)
            num_taken += 1
            if plans.is_end(epoch):
                yield _Item(empty_pack(with_signals=self._with_signals, features=self._features), place)
                continue
            if reader is None or reader.epoch != epoch:
                make_buffer = functools.partial(self._buffer, pool)
                reader = _EpochReader(self._selection, plans, epoch, cursor, self._world, make_buffer, self._features)
            reads_before = reader.buffer.num_reads
            pack = reader.read(cursor)
            num_reads = reader.buffer.num_reads - reads_before
            yield _Item(pack, place, num_group_reads=num_reads, max_buffer_bytes=reader.buffer.max_bytes)

    def _buffer(self, pool: Executor | None, rows_I: Int64) -> RowBuffer:
        selection = self._selection

        def load(group: int, rows_R: Int64) -> RowBlock:
            return read_rows(selection, group, rows_R, with_signals=self._with_signals, features=self._features)

        self._rows = RowBuffer(load, rows_I, selection.group_R, self._budget_bytes, pool, self._read_ahead_groups)
        return self._rows


class _EpochReader:
    """Reads packs `cursor`, `cursor + world`, ... of one epoch."""

    def __init__(
        self,
        selection: Selection,
        plans: EpochPlans,
        epoch: int,
        cursor: int,
        world: int,
        make_buffer: Callable[[Int64], RowBuffer],
        features: StageFeatures | None,
    ) -> None:
        self.epoch = epoch
        self._selection, self._features = selection, features
        self._plans, self._plan = plans, plans.plan(epoch)
        pack_I = np.repeat(np.arange(self._plan.num_packs), np.diff(self._plan.offsets))
        # This rank's packs alone: its buffer must not hold row groups for the others.
        mine_I = (pack_I >= cursor) & ((pack_I - cursor) % world == 0)
        rows_I = plans.pieces.row_P[self._plan.items_I[mine_I]].astype(np.int64)
        examples = selection.examples
        self.buffer = make_buffer(rows_I if examples is None else examples.row_E[rows_I].astype(np.int64))

    def read(self, cursor: int) -> Pack:
        pieces, items = self._plans.pieces, self._plan.pack(cursor)
        weight_R, examples = self._selection.weight_R, self._selection.examples
        row_I, skipped_I = pieces.row_P[items], np.zeros_like(items)
        if examples is not None:
            row_I, skipped_I = examples.row_E[row_I], examples.context_E[row_I]
        packed = []
        for row, skipped, first, loss, stop in zip(
            row_I.tolist(),
            skipped_I.tolist(),
            pieces.first_P[items].tolist(),
            pieces.loss_P[items].tolist(),
            pieces.stop_P[items].tolist(),
            strict=True,
        ):
            block, index = self.buffer.next_row()
            packed.append(PackedPiece(row, block, index, first, loss, stop, float(weight_R[row]), skipped))
        return build_pack(packed, self._features)
