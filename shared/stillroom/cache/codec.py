"""Distributions to stored columns and back: the only place that knows how signals become numbers on disk.

In: Signals (ragged support, draws, tail mass). Out: Arrow columns, one list per chain, and back. Everything is
vectorised over tokens; there is no Python object per token or candidate.

Shape legend: T tokens, S temperatures, R rows (chains); N stored candidates, D stored draws and E both of all tokens
(flat).

The entries of a token are its support in rank order followed by its draws, in the same columns; `topk_n` and `draw_n`
count them.

`topk-u8`   log probability as 8-bit square-root code c: lp = -32 (c/255)^2 nats, resolution finest near certainty.
            The tail's log mass has the same code, up to 254; 255 means no tail. Decoding divides by the decoded total
            (support and tail), so every decoded distribution sums to one. Scalars per token keep 10 mantissa bits.
            A draw's code is that of its own log probability; its weight is the tail's mass over `draw_n`.
`topk-f32`  everything as float32, exact.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.cache.columns import (
    MAX_CODE,
    PARTITION_MANTISSA_BITS,
    SCALAR_MANTISSA_BITS,
    codes_of,
    drawn,
    list_column,
    logprobs_of,
    offsets_of,
    read_lists,
    require_rows,
    require_values,
    round_mantissa,
    tail_codes_of,
)
from stillroom.errors import ConfigError, CorruptError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Draws, Float32, Int32, Int64, Signals
from stillroom.schema.tables import SIGNAL_FIELDS, TOKEN_FIELDS, signal_fields

Array = npt.NDArray[Any]
PER_ENTRY = ("topk_ids", "topk_codes", "topk_logprobs")
"""Columns with one value per entry; the others have one per token."""


def check_codec(codec: str) -> None:
    """Raises ConfigError unless `codec` is a known name."""
    if codec not in SIGNAL_FIELDS:
        raise ConfigError(f"codec {codec!r} is unknown: choose one of {', '.join(SIGNAL_FIELDS)}")


def encode(codec: str, rows: Sequence[Signals]) -> dict[str, pa.Array]:
    """Token and signal columns, one list per row. Raises ConfigError if `codec` is unknown."""
    check_codec(codec)
    n_T = _concat([row.topk_n_T for row in rows], np.int32)
    tokens_R = np.array([len(row.topk_n_T) for row in rows], np.int64)
    values = _flat_values(codec, rows, n_T)
    entries_R = np.array([_num_entries(row) for row in rows], np.int64)
    partitions_R = np.array([len(_flat_partitions(row)) for row in rows], np.int64)
    # All other columns have one value per token.
    lengths = dict.fromkeys(PER_ENTRY, entries_R) | {"log_partitions": partitions_R}
    return {name: list_column(flat, lengths.get(name, tokens_R)) for name, flat in values.items()}


def num_elements(row: Signals) -> int:
    """Elements of the row's longest list."""
    return max(_num_entries(row), len(_flat_partitions(row)))


def signal_columns(header: ShardHeader) -> list[str]:
    """Names of the columns `decode` needs, besides `token_ids`."""
    check_codec(header.codec)
    return [field.name for field in [*TOKEN_FIELDS, *signal_fields(header.codec, header.format_version)]]


def decode(table: pa.Table, header: ShardHeader, where: str) -> tuple[Signals, Int64]:
    """Signals of all rows of `table`, one after the other, and row offsets [R+1] int64 in tokens.

    `table` has `token_ids` and `signal_columns(header)`. Raises CorruptError naming `where` (the shard), row and column
    if lengths, counts, codes or ids contradict the format.
    """
    values, row_offsets = _read_values(table, header, where)
    n_T, ids_E = values["topk_n"].astype(np.int32), values["topk_ids"]
    # Shards of version 1 have no draw_n.
    # Without draws in the header the column holds zeros only, and to look for draws would cost a pass.
    draw_n_T = values["draw_n"].astype(np.int32) if header.draws and "draw_n" in values else None
    drawn_E = None if draw_n_T is None else drawn(n_T, draw_n_T)
    if "topk_codes" in values:
        entry_n_T = n_T if draw_n_T is None else n_T + draw_n_T
        logprobs_E, tail_T = logprobs_of(values["topk_codes"], values["tail_codes"], entry_n_T, drawn_E)
    else:
        logprobs_E, tail_T = values["topk_logprobs"], values["tail_logmass"]
    # Entries are stored together because one column compresses better than two; here they part.
    draws = None
    if draw_n_T is not None and drawn_E is not None:
        draws = Draws(draw_n_T, ids_E[drawn_E], logprobs_E[drawn_E])
        ids_E, logprobs_E = ids_E[~drawn_E], logprobs_E[~drawn_E]
    signals = Signals(
        topk_n_T=n_T,
        topk_ids_N=ids_E,
        topk_logprobs_N=logprobs_E,
        tail_logmass_T=tail_T,
        sampled_logprob_T=values["sampled_logprob"],
        sampled_rank_T=values["sampled_rank"],
        entropy_T=values["entropy"],
        draws=draws,
        log_partitions_TS=_partitions(values, header),
    )
    return signals, row_offsets


def _read_values(table: pa.Table, header: ShardHeader, where: str) -> tuple[dict[str, Array], Int64]:
    """Flat values of `token_ids` and `signal_columns(header)`, and row offsets [R+1] int64 in tokens.

    Makes every check that FORMAT.md requires of a reader; raises as `decode`.
    """
    values, lengths = read_lists(table, ["token_ids", *signal_columns(header)], where)
    tokens_R = lengths["token_ids"]
    for name in lengths:
        if name not in (*PER_ENTRY, "log_partitions"):
            require_rows(lengths[name] == tokens_R, where, name, "does not have one entry per token of token_ids")
    row_offsets = offsets_of(tokens_R)
    _check_counts(values, lengths, header, row_offsets, where)
    if "log_partitions" in values:
        num = len(header.temperatures)
        good_R = lengths["log_partitions"] == tokens_R * num
        require_rows(good_R, where, "log_partitions", f"does not have {num} entries per token, one per temperature")
    ids_E = values["topk_ids"]
    # Two reductions first: a mask of every id is only needed to name the bad row.
    if len(ids_E) and (int(ids_E.min()) < 0 or int(ids_E.max()) >= header.vocab_size):
        bad_E = (ids_E < 0) | (ids_E >= header.vocab_size)
        row = int(np.searchsorted(np.cumsum(lengths["topk_ids"]), np.flatnonzero(bad_E)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column topk_ids: id outside the vocabulary of {header.vocab_size}")
    if "topk_codes" in values:
        codes_E, tails_T = values["topk_codes"], values["tail_codes"]
        entry_offsets = offsets_of(lengths["topk_codes"])
        require_values((codes_E >= 0) & (codes_E <= MAX_CODE), entry_offsets, where, "topk_codes", "is outside 0..255")
        require_values((tails_T >= 0) & (tails_T <= MAX_CODE), row_offsets, where, "tail_codes", "is outside 0..255")
    return values, row_offsets


def _check_counts(
    values: dict[str, Array], lengths: dict[str, Int64], header: ShardHeader, row_offsets: Int64, where: str
) -> None:
    """Checks support and draw counts of every token, and that they add up to the number of entries."""
    entry_n_T = values["topk_n"].astype(np.int64)
    good_T = (entry_n_T >= 1) & (entry_n_T <= header.max_support)
    require_values(good_T, row_offsets, where, "topk_n", "is outside 1..max_support")
    if "draw_n" in values:
        draw_n_T = values["draw_n"].astype(np.int64)
        good_T = (draw_n_T >= 0) & (draw_n_T <= header.draws)
        require_values(good_T, row_offsets, where, "draw_n", f"is outside 0..{header.draws}, the header's draws")
        entry_n_T += draw_n_T
    total_T = offsets_of(entry_n_T)
    entries_R = total_T[row_offsets[1:]] - total_T[row_offsets[:-1]]
    for name in PER_ENTRY:
        if name in lengths:
            require_rows(
                lengths[name] == entries_R, where, name, "does not have the number of entries that the counts add up to"
            )


def _flat_values(codec: str, rows: Sequence[Signals], n_T: Int32) -> dict[str, Array]:
    draws = _concat_draws(rows)
    ids_E = _concat([row.topk_ids_N for row in rows], np.int32)
    logprobs_E = _concat([row.topk_logprobs_N for row in rows], np.float32)
    if draws is not None:
        ids_E, logprobs_E = _interleave(n_T, draws, (ids_E, draws.ids_D), (logprobs_E, draws.logprobs_D))
    tail_T = _concat([row.tail_logmass_T for row in rows], np.float32)
    sampled_T = _concat([row.sampled_logprob_T for row in rows], np.float32)
    entropy_T = _concat([row.entropy_T for row in rows], np.float32)
    partitions = _concat([_flat_partitions(row) for row in rows], np.float32)
    values: dict[str, Array] = {
        "sampled_rank": _concat([row.sampled_rank_T for row in rows], np.int32),
        "topk_ids": ids_E,
        "topk_n": n_T.astype(np.int16),
        "draw_n": (np.zeros(len(n_T), np.int32) if draws is None else draws.n_T).astype(np.int16),
    }
    if codec == "topk-f32":
        exact = {"sampled_logprob": sampled_T, "entropy": entropy_T, "log_partitions": partitions}
        return values | exact | {"topk_logprobs": logprobs_E, "tail_logmass": tail_T}
    return values | {
        "sampled_logprob": round_mantissa(sampled_T, SCALAR_MANTISSA_BITS),
        "entropy": round_mantissa(entropy_T, SCALAR_MANTISSA_BITS),
        "log_partitions": round_mantissa(partitions, PARTITION_MANTISSA_BITS),
        "topk_codes": codes_of(logprobs_E),
        "tail_codes": tail_codes_of(tail_T),
    }


def _concat_draws(rows: Sequence[Signals]) -> Draws | None:
    """The draws of all rows, or None if no row has any."""
    if all(row.draws is None for row in rows):
        return None
    return Draws.concat([row.draws or Draws.none(len(row.topk_n_T)) for row in rows])


def _interleave(n_T: Int32, draws: Draws, *pairs: tuple[Array, Array]) -> list[Array]:
    """Merges each pair (support [N], draws [D]) into one array [E], token by token."""
    drawn_E = drawn(n_T, draws.n_T)
    merged = []
    for support_N, draws_D in pairs:
        both_E = np.zeros(len(drawn_E), support_N.dtype)
        both_E[~drawn_E] = support_N
        both_E[drawn_E] = draws_D
        merged.append(both_E)
    return merged


def _num_entries(row: Signals) -> int:
    return len(row.topk_ids_N) + (0 if row.draws is None else len(row.draws.ids_D))


def _flat_partitions(row: Signals) -> Float32:
    return np.zeros(0, np.float32) if row.log_partitions_TS is None else row.log_partitions_TS.reshape(-1)


def _partitions(values: dict[str, Array], header: ShardHeader) -> Float32 | None:
    if "log_partitions" not in values or not header.temperatures:
        return None
    partitions_TS: Float32 = values["log_partitions"].reshape(-1, len(header.temperatures))
    return partitions_TS


def _concat(parts: Sequence[Array], dtype: type[Any]) -> Array:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
