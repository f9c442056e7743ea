"""Captured distributions to stored columns and back: the only place that knows how signals become numbers on disk.

In: a Capture (rank-ordered [T, K] arrays from the engine). Out: Signals (ragged support, tail mass) and Arrow columns,
one value a chain. Everything is vectorised over tokens; no Python object a token or candidate.

Shape legend: T tokens, K captured candidates, M draws a token, S temperatures, R rows (chains); N stored candidates, D
stored draws and E both of all tokens (flat).

The entries of a token are its support in rank order and then its draws, in the same columns; `topk_n` and `draw_n`
count them.

`topk-u8`   log probability as 8-bit square-root code c: lp = -32 (c/255)^2 nats, resolution finest near certainty.
            The tail's log mass has the same code, up to 254; 255 means no tail. Decoding divides by the decoded total
            (support and tail), so every decoded distribution sums to one. Scalars a token keep 10 mantissa bits.
            A draw's code is that of its own log probability; what it weighs is the tail's mass over `draw_n`.
`topk-f32`  everything as float32, exact.
`archive`   what `topk-u8` holds, entropy coded (shared.archive): its rows cannot be decoded or moved one by one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.manifest import ShardHeader
from schemas.records import Capture, Draws, Float32, Int32, Int64, Signals
from schemas.tables import SIGNAL_FIELDS, TOKEN_FIELDS, signal_fields
from shared.archive_columns import BLOBS, check_numba, pack, unpack
from shared.errors import ConfigError, CorruptError
from shared.list_columns import list_column, read_lists, require_rows, require_values
from shared.quantise import (
    MAX_CODE,
    PARTITION_MANTISSA_BITS,
    SCALAR_MANTISSA_BITS,
    codes_of,
    logprobs_of,
    round_mantissa,
    tail_codes_of,
)

Array = npt.NDArray[Any]

_PER_ENTRY = ("topk_ids", "topk_codes", "topk_logprobs")


def check_codec(codec: str) -> None:
    """Raises ConfigError unless `codec` is a known name whose packages are installed."""
    if codec not in SIGNAL_FIELDS:
        raise ConfigError(f"codec {codec!r} is unknown: choose one of {', '.join(SIGNAL_FIELDS)}")
    if codec == "archive":
        check_numba()


def support_of(capture: Capture, max_support: int, nucleus: float | None) -> Signals:
    """Cuts each token's candidates to the smallest prefix with mass >= nucleus, at most max_support entries.

    The tail is what the kept prefix leaves of 1, and at least the captured mass that was cut off: 1 - sum(p) loses its
    digits to cancellation when the tail is small. Entropy is the engine's where it is exact; otherwise that of all
    captured candidates with the rest counted as one further outcome, a lower bound. Draws are kept where the support
    was cut by `max_support`, that is where the tail is more than the nucleus leaves; they are from outside all captured
    candidates, so no more than `max_support` of those may have been captured.
    """
    logprobs_TK = capture.topk_logprobs_TK
    num_captured = logprobs_TK.shape[1]
    probs_TK = np.exp(logprobs_TK.astype(np.float64))
    cumulative_TK = np.cumsum(probs_TK, axis=1)
    limit = min(max_support, num_captured)
    if nucleus is None:
        n_T = np.full(len(logprobs_TK), limit, np.int32)
    else:
        n_T = np.minimum((cumulative_TK[:, :limit] < nucleus).sum(axis=1) + 1, limit).astype(np.int32)
    kept_TK = np.arange(num_captured)[None, :] < n_T[:, None]
    kept_mass_T = np.take_along_axis(cumulative_TK, n_T[:, None].astype(np.int64) - 1, axis=1)[:, 0]
    tail_T = np.maximum(1.0 - kept_mass_T, np.where(kept_TK, 0.0, probs_TK).sum(axis=1))
    entropy_T = capture.entropy_T if capture.entropy_T is not None else _support_entropy(probs_TK, logprobs_TK)
    return Signals(
        topk_n_T=n_T,
        topk_ids_N=capture.topk_ids_TK[kept_TK].astype(np.int32),
        topk_logprobs_N=logprobs_TK[kept_TK].astype(np.float32),
        tail_logmass_T=_log(tail_T).astype(np.float32),
        sampled_logprob_T=capture.sampled_logprob_T.astype(np.float32),
        sampled_rank_T=capture.sampled_rank_T.astype(np.int32),
        entropy_T=entropy_T.astype(np.float32),
        draws=_draws_of(capture, n_T, kept_mass_T, nucleus),
        log_partitions_TS=capture.log_partitions_TS,
    )


def encode(codec: str, rows: Sequence[Signals], token_ids: Sequence[Int32]) -> dict[str, pa.Array]:
    """Token and signal columns of `rows`, one value a row, typed as schemas.tables says; `token_ids` are the rows'
    completions. All rows of a row group belong in one call: `archive` codes them as one block.

    Raises ConfigError for an unknown codec or one whose packages are missing.
    """
    check_codec(codec)
    n_T = _concat([row.topk_n_T for row in rows], np.int32)
    tokens_R = np.array([len(row.topk_n_T) for row in rows], np.int64)
    values = _flat_values(codec, rows, n_T)
    entries_R = np.array([_num_entries(row) for row in rows], np.int64)
    partitions_R = np.array([len(_flat_partitions(row)) for row in rows], np.int64)
    packed: dict[str, pa.Array] = {}
    if codec == "archive":
        values["token_ids"] = _concat(token_ids, np.int32)
        packed = pack(values, tokens_R)
        values = {name: values[name] for name in ("sampled_rank", "sampled_logprob", "entropy", "log_partitions")}
    lengths = dict.fromkeys(_PER_ENTRY, entries_R) | {"log_partitions": partitions_R}
    return {name: list_column(flat, lengths.get(name, tokens_R)) for name, flat in values.items()} | packed


def signal_columns(header: ShardHeader) -> list[str]:
    """Names of the columns `decode` needs, besides `token_ids`."""
    check_codec(header.codec)
    return [field.name for field in [*TOKEN_FIELDS, *signal_fields(header.codec, header.format_version)]]


def decode(table: pa.Table, header: ShardHeader, where: str) -> tuple[Signals, Int64]:
    """Signals of all rows of `table`, one after the other, and row offsets [R+1] int64 in tokens.

    `table` holds `token_ids` and `signal_columns(header)`. Raises CorruptError naming `where` (the shard), the row and
    the column when lengths, counts, codes or ids contradict the format.
    """
    lists = ["token_ids", *(name for name in signal_columns(header) if name not in BLOBS)]
    values, lengths = read_lists(table, lists, where)
    tokens_R = lengths["token_ids"]
    for name in lengths:
        if name not in (*_PER_ENTRY, "log_partitions"):
            require_rows(lengths[name] == tokens_R, where, name, "has not one entry a token of token_ids")
    row_offsets = np.concatenate([[0], np.cumsum(tokens_R)]).astype(np.int64)
    if header.codec == "archive":
        values, lengths = unpack(table, values, lengths, row_offsets, header, where)
    n_T = values["topk_n"].astype(np.int32)
    require_values((n_T >= 1) & (n_T <= header.max_support), row_offsets, where, "topk_n", "is outside 1..max_support")
    draw_n_T = _draw_counts(values, header, row_offsets, where)
    entry_n_T = n_T if draw_n_T is None else n_T + draw_n_T
    _check_entries(entry_n_T, lengths, row_offsets, where)
    ids_E = values["topk_ids"]
    if len(ids_E) and (int(ids_E.min()) < 0 or int(ids_E.max()) >= header.vocab_size):
        bad_E = (ids_E < 0) | (ids_E >= header.vocab_size)
        row = int(np.searchsorted(np.cumsum(lengths["topk_ids"]), np.flatnonzero(bad_E)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column topk_ids: id outside the vocabulary of {header.vocab_size}")
    drawn_E = None if draw_n_T is None else _drawn(n_T, draw_n_T)
    if "topk_codes" in values:
        logprobs_E, tail_T = _decode_codes(values, entry_n_T, drawn_E, lengths, row_offsets, where)
    else:
        logprobs_E, tail_T = values["topk_logprobs"], values["tail_logmass"]
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
        log_partitions_TS=_partitions(values, lengths, header, tokens_R, where),
    )
    return signals, row_offsets


def decode_rows(table: pa.Table, rows: Int64, header: ShardHeader, where: str) -> Signals:
    """Signals of rows `rows`, ascending, of a row group; raises as `decode`. Only `archive` decodes all rows for it."""
    if len(rows) == table.num_rows:
        return decode(table, header, where)[0]
    if header.codec != "archive":
        return decode(table.take(pa.array(rows)), header, where)[0]
    signals, offsets = decode(table, header, where)
    kept_R = np.zeros(table.num_rows, np.bool_)
    kept_R[rows] = True
    return signals.keep(np.repeat(kept_R, np.diff(offsets)))


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
    kept_values = {name: flat[kept_E if name in _PER_ENTRY else kept_T] for name, flat in values.items()}
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
                columns[field.name] = list_column(flat, entries_R if field.name in _PER_ENTRY else tokens_R)
        return columns
    signals, offsets = decode(table, header, where)
    rows = [signals.slice(int(start), int(stop)) for start, stop in pairwise(offsets)]
    return encode(codec, rows, [np.asarray(ids.as_py(), np.int32) for ids in table.column("token_ids")])


def scalars_of(signals: Signals) -> dict[str, float]:
    """Means over the tokens of one chain that SQL reads without opening distributions. NaN-free: T must be >= 1."""
    starts_T = np.cumsum(signals.topk_n_T, dtype=np.int64) - signals.topk_n_T
    return {
        "mean_logprob": float(signals.sampled_logprob_T.mean(dtype=np.float64)),
        "mean_entropy": float(signals.entropy_T.mean(dtype=np.float64)),
        "mean_top1_prob": float(np.exp(signals.topk_logprobs_N[starts_T], dtype=np.float64).mean()),
        "mean_tail_mass": float(np.exp(signals.tail_logmass_T, dtype=np.float64).mean()),
        "mean_support": float(signals.topk_n_T.mean(dtype=np.float64)),
    }


def _code_values(table: pa.Table, header: ShardHeader, where: str) -> tuple[dict[str, Array], Int64]:
    """Flat columns as `topk-u8` stores them, with those that `archive` builds upon, and tokens of each row."""
    names = ["token_ids", "sampled_rank", "sampled_logprob"]
    if header.codec != "archive":
        names += ["topk_ids", "topk_codes", "topk_n", "tail_codes"]
        names += ["draw_n"] if header.format_version >= 2 else []
    # Everything is checked once as a reader would.
    decode(table, header, where)
    values, lengths = read_lists(table, names, where)
    tokens_R = lengths["token_ids"]
    if header.codec == "archive":
        row_offsets = np.concatenate([[0], np.cumsum(tokens_R)]).astype(np.int64)
        values, _ = unpack(table, values, lengths, row_offsets, header, where)
    if "draw_n" not in values:
        values["draw_n"] = np.zeros(len(values["topk_n"]), np.int16)
    return values, tokens_R


def _support_entropy(probs_TK: npt.NDArray[np.float64], logprobs_TK: Float32) -> npt.NDArray[np.float64]:
    tail_T = np.maximum(1.0 - probs_TK.sum(axis=1), 0.0)
    safe_TK = np.where(probs_TK > 0, logprobs_TK, 0.0)
    return np.asarray(-(probs_TK * safe_TK).sum(axis=1) - tail_T * np.where(tail_T > 0, _log(tail_T), 0.0))


def _draws_of(
    capture: Capture, n_T: Int32, kept_mass_T: npt.NDArray[np.float64], nucleus: float | None
) -> Draws | None:
    """The draws of tokens whose support reached its limit before the nucleus; of the others none."""
    if capture.draw_ids_TM is None or capture.draw_logprobs_TM is None:
        return None
    num_captured, num_draws = capture.topk_ids_TK.shape[1], capture.draw_ids_TM.shape[1]
    cut_T = (n_T == num_captured) & (kept_mass_T < (1.0 if nucleus is None else nucleus))
    # Outside the support there may be no probability to draw from: the engine then says -inf.
    cut_T &= np.isfinite(capture.draw_logprobs_TM).all(axis=1)
    return Draws(
        n_T=np.where(cut_T, num_draws, 0).astype(np.int32),
        ids_D=capture.draw_ids_TM[cut_T].reshape(-1).astype(np.int32),
        logprobs_D=capture.draw_logprobs_TM[cut_T].reshape(-1).astype(np.float32),
    )


def _concat_draws(rows: Sequence[Signals]) -> Draws | None:
    """The draws of all rows, or None where no row has any."""
    if all(row.draws is None for row in rows):
        return None
    return Draws.concat([row.draws or Draws.none(len(row.topk_n_T)) for row in rows])


def _drawn(n_T: Int32, draw_n_T: Int32) -> npt.NDArray[np.bool_]:
    """Which entries are draws: of each token n_T entries are not, the next draw_n_T are."""
    kinds_2T = np.tile([False, True], len(n_T))
    return np.repeat(kinds_2T, np.stack([n_T, draw_n_T], axis=1).reshape(-1))


def _interleave(n_T: Int32, draws: Draws, *pairs: tuple[Array, Array]) -> list[Array]:
    """Each pair (of the support [N], of the draws [D]) as one array [E], token by token."""
    drawn_E = _drawn(n_T, draws.n_T)
    merged = []
    for support_N, draws_D in pairs:
        both_E = np.zeros(len(drawn_E), support_N.dtype)
        both_E[~drawn_E] = support_N
        both_E[drawn_E] = draws_D
        merged.append(both_E)
    return merged


def _flat_values(codec: str, rows: Sequence[Signals], n_T: Int32) -> dict[str, Array]:
    """Flat values of the columns of a codec whose rows stand alone; those of `topk-u8` for `archive`."""
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


def _num_entries(row: Signals) -> int:
    return len(row.topk_ids_N) + (0 if row.draws is None else len(row.draws.ids_D))


def _flat_partitions(row: Signals) -> Float32:
    return np.zeros(0, np.float32) if row.log_partitions_TS is None else row.log_partitions_TS.reshape(-1)


def _draw_counts(values: dict[str, Array], header: ShardHeader, row_offsets: Int64, where: str) -> Int32 | None:
    """Draws of each token, None where the shard stores none."""
    if "draw_n" not in values:
        return None
    draw_n_T = values["draw_n"].astype(np.int32)
    good_T = (draw_n_T >= 0) & (draw_n_T <= header.draws)
    require_values(good_T, row_offsets, where, "draw_n", f"is outside 0..{header.draws}, the header's draws")
    return draw_n_T if header.draws else None


def _partitions(
    values: dict[str, Array], lengths: dict[str, Int64], header: ShardHeader, tokens_R: Int64, where: str
) -> Float32 | None:
    num_temperatures = len(header.temperatures)
    if "log_partitions" not in values:
        return None
    good_R = lengths["log_partitions"] == tokens_R * num_temperatures
    require_rows(good_R, where, "log_partitions", f"has not {num_temperatures} entries a token, one a temperature")
    if not num_temperatures:
        return None
    partitions_TS: Float32 = values["log_partitions"].reshape(-1, num_temperatures)
    return partitions_TS


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _concat(parts: Sequence[Array], dtype: type[Any]) -> Array:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _check_entries(n_T: Int32, lengths: dict[str, Int64], row_offsets: Int64, where: str) -> None:
    total_T = np.concatenate([[0], np.cumsum(n_T, dtype=np.int64)])
    entries_R = total_T[row_offsets[1:]] - total_T[row_offsets[:-1]]
    for name in _PER_ENTRY:
        if name in lengths:
            require_rows(
                lengths[name] == entries_R, where, name, "has not the number of entries that the counts add up to"
            )


def _decode_codes(
    values: dict[str, Array],
    n_T: Int32,
    drawn_E: npt.NDArray[np.bool_] | None,
    lengths: dict[str, Int64],
    row_offsets: Int64,
    where: str,
) -> tuple[Float32, Float32]:
    """Log probabilities of all entries, `n_T` a token, and tails; the draws' mass is the tail's, not counted twice."""
    codes_E, tails_T = values["topk_codes"], values["tail_codes"]
    entry_offsets = np.concatenate([[0], np.cumsum(lengths["topk_codes"])]).astype(np.int64)
    require_values((codes_E >= 0) & (codes_E <= MAX_CODE), entry_offsets, where, "topk_codes", "is outside 0..255")
    require_values((tails_T >= 0) & (tails_T <= MAX_CODE), row_offsets, where, "tail_codes", "is outside 0..255")
    return logprobs_of(codes_E, tails_T, n_T, drawn_E)
