"""Arrow list columns as flat arrays and lengths, and the checks that name row and column.

Shape legend: R rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.records import Int64
from schemas.tables import list_of
from shared.errors import CorruptError

Array = npt.NDArray[Any]


def list_column(values: Array, lengths_R: Int64) -> pa.Array:
    """A list a row: the next `lengths_R[r]` of the flat values."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32))
    array = pa.array(values)
    return pa.ListArray.from_arrays(offsets, array, type=list_of(array.type))


def read_lists(table: pa.Table, names: Sequence[str], where: str) -> tuple[dict[str, Array], dict[str, Int64]]:
    """Flat values and lengths [R] of list columns. Raises CorruptError for one that is missing or holds nulls."""
    values, lengths = {}, {}
    for name in names:
        column = whole_column(table, name, where)
        if not pa.types.is_list(column.type):
            raise CorruptError(f"{where}: column {name} holds {column.type}, not lists: the file is not what it was")
        flat = column.flatten()
        if flat.null_count:
            raise CorruptError(f"{where}: column {name} holds nulls, which the format forbids")
        values[name] = flat.to_numpy(zero_copy_only=False)
        lengths[name] = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values, lengths


def whole_column(table: pa.Table, name: str, where: str) -> pa.Array:
    """A column as one array. Raises CorruptError where it is missing or holds nulls."""
    if name not in table.column_names:
        raise CorruptError(f"{where}: column {name} is missing: the file is not what its header says")
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise CorruptError(f"{where}: column {name} holds nulls, which the format forbids")
    return column


def require_rows(good_R: npt.NDArray[np.bool_], where: str, column: str, problem: str) -> None:
    """Raises CorruptError naming the first row that is not good."""
    if not good_R.all():
        row = int(np.flatnonzero(~good_R)[0])
        raise CorruptError(f"{where}: row {row}, column {column} {problem}")


def require_values(good: npt.NDArray[np.bool_], offsets: Int64, where: str, column: str, problem: str) -> None:
    """Raises CorruptError naming the row of the first value that is not good; row r has offsets[r]..offsets[r+1]-1."""
    if not good.all():
        row = int(np.searchsorted(offsets[1:], np.flatnonzero(~good)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column {column}: a value {problem}")
