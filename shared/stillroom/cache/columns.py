"""List columns as flat arrays with lengths, the checks that name row and column, and the coarse codes of numbers.

Shape legend: R rows, T tokens, E entries (supports and draws) of all tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.errors import CorruptError, StillroomError
from stillroom.schema.records import Float32, Int32, Int64
from stillroom.schema.tables import list_of

Array = npt.NDArray[Any]
MAX_LIST_ELEMENTS = 2**31 - 1
"""Of all lists of a column in one row group: Arrow's offsets are 32-bit."""
LOGPROB_RANGE_NATS = 32.0
"""`topk-u8` stores lower log probabilities as minus this."""
MAX_CODE = 255
SCALAR_MANTISSA_BITS = 10
PARTITION_MANTISSA_BITS = 14
"""An error of a log-partition scales every probability at its temperature: at most 2e-4 nats below 8."""
_CODE_LOGPROB = (-LOGPROB_RANGE_NATS * (np.arange(MAX_CODE + 1) / MAX_CODE) ** 2).astype(np.float32)
# There are only 256 codes: decoding looks probabilities up instead of calling exp for every entry.
_CODE_PROB = np.exp(_CODE_LOGPROB.astype(np.float64))
# As a tail, code 255 is zero mass; as an entry it is exp(-32).
_TAIL_PROB = np.where(np.arange(MAX_CODE + 1) == MAX_CODE, 0.0, _CODE_PROB)


def list_column(values: Array, lengths_R: Int64) -> pa.Array:
    """One list per row: row r takes the next `lengths_R[r]` of the flat values.

    Raises StillroomError for more than MAX_LIST_ELEMENTS.
    """
    offsets_R = offsets_of(lengths_R)
    if offsets_R[-1] > MAX_LIST_ELEMENTS:
        raise StillroomError(
            f"a chain has {offsets_R[-1]:,} candidates and draws, but a row group holds {MAX_LIST_ELEMENTS:,}: lower "
            "capture.max_support or draws"
        )
    # Checked above: int32 would wrap around silently.
    array = pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets_R.astype(np.int32)), array, type=list_of(array.type))


def offsets_of(lengths: npt.NDArray[np.integer]) -> Int64:
    """Where lists of these lengths begin in the flat values, and where the last one ends: int64, one entry more."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def read_lists(table: pa.Table, names: Sequence[str], where: str) -> tuple[dict[str, Array], dict[str, Int64]]:
    """Flat values and lengths [R] of list columns. Raises CorruptError if one is missing or contains nulls."""
    values, lengths = {}, {}
    for name in names:
        column = whole_column(table, name, where)
        if not pa.types.is_list(column.type):
            raise CorruptError(f"{where}: column {name} holds {column.type}, not lists: the file is damaged")
        # flatten respects the slice that a row group may be; `values` would not.
        flat = column.flatten()
        if flat.null_count:
            raise CorruptError(f"{where}: column {name} holds nulls, which the format forbids")
        values[name] = flat.to_numpy(zero_copy_only=False)
        lengths[name] = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values, lengths


def whole_column(table: pa.Table, name: str, where: str) -> pa.Array:
    """A column as one array. Raises CorruptError if it is missing or contains nulls."""
    if name not in table.column_names:
        raise CorruptError(f"{where}: column {name} is missing: the file does not match its header")
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise CorruptError(f"{where}: column {name} holds nulls, which the format forbids")
    return column


def require_rows(good_R: npt.NDArray[np.bool_], where: str, column: str, problem: str) -> None:
    """Raises CorruptError naming the first bad row."""
    if not good_R.all():
        row = int(np.flatnonzero(~good_R)[0])
        raise CorruptError(f"{where}: row {row}, column {column} {problem}")


def require_values(good: npt.NDArray[np.bool_], offsets: Int64, where: str, column: str, problem: str) -> None:
    """Raises CorruptError naming the row of the first bad value; row r has values offsets[r] to offsets[r + 1] - 1."""
    if not good.all():
        row = int(np.searchsorted(offsets[1:], np.flatnonzero(~good)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column {column}: a value {problem}")


def codes_of(logprobs: Float32) -> npt.NDArray[np.int16]:
    """Square-root codes, 0 to 255, of log probabilities in nats; resolution is finest near certainty."""
    # Square roots of probabilities would be finer near 1, but give an entry of 3e-4 steps of 0.4 nats instead of 0.12,
    # and KL at temperature 2 grows eightfold.
    scaled = np.sqrt(np.clip(-logprobs, 0.0, LOGPROB_RANGE_NATS) / LOGPROB_RANGE_NATS)
    # Halves to even, in float32: the format says so, and golden shards depend on it.
    codes: npt.NDArray[np.int16] = np.rint(MAX_CODE * scaled).astype(np.int16)
    return codes


def tail_codes_of(logmass: Float32) -> npt.NDArray[np.int16]:
    """Codes of tails; an existing tail, however small, never gets the code for none."""
    codes = np.where(np.isneginf(logmass), MAX_CODE, np.minimum(codes_of(logmass), MAX_CODE - 1))
    return codes.astype(np.int16)


def drawn(n_T: Int32, draw_n_T: Int32) -> npt.NDArray[np.bool_]:
    """Marks entries that are draws: each token has n_T entries of its support, then draw_n_T draws.

    Example: n_T [2, 1] and draw_n_T [1, 0] give [False, False, True, False].
    """
    kinds_2T = np.tile([False, True], len(n_T))
    return np.repeat(kinds_2T, np.stack([n_T, draw_n_T], axis=1).reshape(-1))


def logprobs_of(
    codes_E: npt.NDArray[np.integer],
    tails_T: npt.NDArray[np.integer],
    n_T: Int32,
    drawn_E: npt.NDArray[np.bool_] | None,
) -> tuple[Float32, Float32]:
    """Log probabilities of all entries, n_T per token, and tails, float32 nats, normalised to mass 1 per token.

    Draws (`drawn_E`) do not count towards that mass, because theirs is the tail's.
    """
    if not len(n_T):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    # Codes near 0 are off by up to 0.06 nats: undivided, a fifth of the tokens would have a mass above one.
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    probs_E = _CODE_PROB[codes_E]
    if drawn_E is not None:
        probs_E[drawn_E] = 0.0
    # reduceat is wrong for empty segments; every token has at least one entry, which reading has checked.
    mass_T = np.add.reduceat(probs_E, starts_T) + _TAIL_PROB[tails_T]
    log_mass_T = np.log(mass_T).astype(np.float32)
    logprobs_E = _CODE_LOGPROB[codes_E] - np.repeat(log_mass_T, n_T)
    tail_T = np.where(tails_T == MAX_CODE, np.float32(-np.inf), _CODE_LOGPROB[tails_T] - log_mass_T)
    return logprobs_E, tail_T.astype(np.float32)


def round_mantissa(x: Float32, num_bits: int) -> Float32:
    """Rounds float32 to `num_bits` explicit mantissa bits, half away from zero; the zeroed bits compress well."""
    dropped = 23 - num_bits
    # Floats are sign and magnitude, so adding half a step to the bits rounds away from zero for both signs.
    bits = x.view(np.uint32).astype(np.uint64) + (1 << (dropped - 1))
    return ((bits >> dropped) << dropped).astype(np.uint32).view(np.float32)
