"""Row groups kept within a budget and read ahead: the same rows whatever is ahead, errors where their rows are due."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stillroom.errors import CorruptError
from stillroom.schema.records import Int64
from student_train.data.rows import RowBlock, RowBuffer

ROWS_PER_GROUP = 10
GROUP_R = np.repeat(np.arange(20, dtype=np.int32), ROWS_PER_GROUP)
IN_ORDER = np.arange(len(GROUP_R))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as running:
        yield running


def fake_block(rows: Int64) -> RowBlock:
    """Each row is one token that is the row's number."""
    offsets = np.arange(len(rows) + 1)
    return RowBlock(rows, rows.astype(np.int32), offsets, rows.astype(np.int32), offsets, None, None)


BLOCK_BYTES = fake_block(np.arange(ROWS_PER_GROUP)).num_bytes


def wandering() -> Int64:
    """Rows in an order that wanders over the groups, some twice."""
    rng = np.random.default_rng(0)
    return rng.permutation(np.concatenate([IN_ORDER, np.arange(50)]))


def tokens_of(buffer: RowBuffer, count: int) -> list[int]:
    found = []
    for _ in range(count):
        block, index = buffer.next_row()
        found.append(int(block.tokens_of(index)[0]))
    return found


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("did not happen")


@pytest.mark.parametrize("num_ahead", [0, 1, 8])
@pytest.mark.parametrize("budget_rows", [1, 10, 40, 10_000])
def test_memory_stays_within_the_budget(budget_rows: int, num_ahead: int, pool: ThreadPoolExecutor) -> None:
    rows_I = wandering()
    budget_bytes = budget_rows * fake_block(np.arange(1)).num_bytes
    loads: list[tuple[int, int]] = []

    def load(group: int, rows: Int64) -> RowBlock:
        assert (GROUP_R[rows] == group).all()
        loads.append((group, len(rows)))
        return fake_block(rows)

    buffer = RowBuffer(load, rows_I, GROUP_R, budget_bytes, pool if num_ahead else None, num_ahead)
    assert tokens_of(buffer, len(rows_I)) == rows_I.tolist()
    assert buffer.max_bytes <= max(budget_bytes, BLOCK_BYTES) + BLOCK_BYTES
    assert buffer.num_bytes == 0
    assert buffer.num_reads == len(loads)
    if budget_rows == 10_000:
        assert len(loads) == 20
    else:
        # What was read again held only the rows that were still due.
        assert sum(size for _, size in loads) < 10 * len(loads)


def test_the_next_row_groups_are_read_before_they_are_due(pool: ThreadPoolExecutor) -> None:
    loaded: list[int] = []

    def load(group: int, rows: Int64) -> RowBlock:
        loaded.append(group)
        return fake_block(rows)

    buffer = RowBuffer(load, IN_ORDER, GROUP_R, 1 << 30, pool, num_ahead=3)
    assert tokens_of(buffer, 2) == [0, 1]
    eventually(lambda: len(loaded) == 4)
    assert sorted(loaded) == [0, 1, 2, 3]
    # Group 1 is in use now, so that a further one may come.
    assert tokens_of(buffer, 9) == list(range(2, 11))
    eventually(lambda: len(loaded) == 5)
    assert tokens_of(buffer, len(GROUP_R) - 11) == list(range(11, len(GROUP_R)))
    assert sorted(loaded) == list(range(20))


def test_nothing_is_read_ahead_without_room(pool: ThreadPoolExecutor) -> None:
    """Two blocks fit, one is in use: one may be on its way and no more."""
    started: list[int] = []
    gate = threading.Event()

    def load(group: int, rows: Int64) -> RowBlock:
        started.append(group)
        assert group == 0 or gate.wait(10)
        return fake_block(rows)

    buffer = RowBuffer(load, IN_ORDER, GROUP_R, 2 * BLOCK_BYTES, pool, num_ahead=8)
    assert tokens_of(buffer, 9) == list(range(9))
    eventually(lambda: started == [0, 1])
    gate.set()
    assert tokens_of(buffer, len(GROUP_R) - 9) == list(range(9, len(GROUP_R)))
    assert buffer.max_bytes == 2 * BLOCK_BYTES


def test_an_error_is_raised_where_its_rows_are_due(pool: ThreadPoolExecutor) -> None:
    def load(group: int, rows: Int64) -> RowBlock:
        if group == 2:
            raise CorruptError("group 2 is damaged")
        return fake_block(rows)

    buffer = RowBuffer(load, IN_ORDER, GROUP_R, 1 << 30, pool)
    assert tokens_of(buffer, 20) == list(range(20))
    with pytest.raises(CorruptError, match="group 2 is damaged"):
        buffer.next_row()


def test_of_two_blocks_the_one_needed_last_goes() -> None:
    rows_I = np.array([0, 10, 20, 1, 11, 21, 2, 12, 22])
    loads: list[int] = []

    def load(group: int, rows: Int64) -> RowBlock:
        loads.append(group)
        return fake_block(rows)

    # All three groups hold three due rows at first; the budget is two such blocks.
    buffer = RowBuffer(load, rows_I, GROUP_R, 2 * fake_block(np.arange(3)).num_bytes)
    assert tokens_of(buffer, len(rows_I)) == rows_I.tolist()
    # 0 1, then 2 for 1 (needed after 0); 1 again for 0, and so on: the one used least recently would be read each time.
    assert len(loads) < len(rows_I)
    assert loads[:4] == [0, 1, 2, 1]
