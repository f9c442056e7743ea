"""Row groups in another codec, or without some of their rows.

Shape legend: T tokens, R rows (chains), E entries of all tokens (flat).
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.cache.archive.columns import pack
from stillroom.cache.codec import PER_ENTRY, decode, encode, read_values
from stillroom.cache.columns import list_column
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int64
from stillroom.schema.tables import signal_fields

Array = npt.NDArray[Any]

CODE_COLUMNS = (
    *("token_ids", "sampled_rank", "sampled_logprob"),
    *("topk_ids", "topk_codes", "topk_n", "tail_codes", "draw_n"),
)
"""What `archive` is made of."""


def filter_rows(table: pa.Table, kept_R: npt.NDArray[np.bool_], header: ShardHeader, where: str) -> pa.Table:
    """The kept rows of a row group with all its columns; those of `archive` are coded anew, the codes unchanged.

    Raises as `decode`.
    """
    kept = table.filter(pa.array(kept_R))
    if header.codec != "archive" or kept_R.all():
        return kept
    values, tokens_R = _code_values(table, header, where)
    kept_T = np.repeat(kept_R, tokens_R)
    kept_E = np.repeat(kept_T, values["topk_n"].astype(np.int64) + values["draw_n"])
    kept_values = {name: flat[kept_E if name in PER_ENTRY else kept_T] for name, flat in values.items()}
    for name, column in pack(kept_values, tokens_R[kept_R]).items():
        place = kept.schema.get_field_index(name)
        kept = kept.set_column(place, kept.schema.field(place), column)
    return kept


def recode_columns(table: pa.Table, header: ShardHeader, codec: str, where: str) -> dict[str, pa.Array]:
    """Token and signal columns of a row group in another codec, or in this format version: `topk-u8` and `archive` turn
    into each other code for code, the others by way of their decoded distributions. Raises as `decode` and `encode`.
    """
    if {header.codec, codec} <= {"topk-u8", "archive"}:
        values, tokens_R = _code_values(table, header, where)
        columns = {name: table.column(name) for name in ("sampled_logprob", "sampled_rank", "entropy")}
        if header.format_version >= 2:
            columns["log_partitions"] = table.column("log_partitions")
        else:
            columns["log_partitions"] = list_column(np.zeros(0, np.float32), np.zeros(table.num_rows, np.int64))
        if codec == "archive":
            return columns | pack(values, tokens_R)
        totals_T = np.concatenate([[0], np.cumsum(values["topk_n"].astype(np.int64) + values["draw_n"])])
        entries_R = np.diff(totals_T[np.concatenate([[0], np.cumsum(tokens_R)])])
        for field in signal_fields(codec):
            if field.name not in columns:
                flat = values[field.name].astype(field.type.value_type.to_pandas_dtype())
                columns[field.name] = list_column(flat, entries_R if field.name in PER_ENTRY else tokens_R)
        return columns
    signals, offsets = decode(table, header, where)
    rows = [signals.slice(int(start), int(stop)) for start, stop in pairwise(offsets)]
    return encode(codec, rows, [np.asarray(ids.as_py(), np.int32) for ids in table.column("token_ids")])


def _code_values(table: pa.Table, header: ShardHeader, where: str) -> tuple[dict[str, Array], Int64]:
    """Flat columns as `topk-u8` stores them, with those that `archive` builds upon, and tokens of each row."""
    values, row_offsets = read_values(table, header, where)
    # Version 1 had no draws.
    values.setdefault("draw_n", np.zeros(len(values["topk_n"]), np.int16))
    return {name: values[name] for name in CODE_COLUMNS}, np.diff(row_offsets)
