"""Captured distributions to stored columns and back: the only place that knows how signals become numbers on disk.

In: a Capture (rank-ordered [T, K] arrays from the engine). Out: Signals (ragged support, tail mass) and Arrow list
columns, one list a chain. Everything is vectorised over tokens; no Python object a token or candidate.

Shape legend: T tokens, K captured candidates, M draws a token, S temperatures, R rows (chains); N stored candidates, D
stored draws and E both of all tokens (flat).

The entries of a token are its support in rank order and then its draws, in the same columns; `topk_n` and `draw_n`
count them.

`topk-u8`   log probability as 8-bit square-root code c: lp = -32 (c/255)^2 nats, resolution finest near certainty.
            The tail's log mass has the same code, up to 254; 255 means no tail. Decoding divides by the decoded total
            (support and tail), so every decoded distribution sums to one. Scalars a token keep 10 mantissa bits.
            A draw's code is that of its own log probability; what it weighs is the tail's mass over `draw_n`.
`topk-f32`  everything as float32, exact.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.manifest import ShardHeader
from schemas.records import Capture, Draws, Float32, Int32, Int64, Signals
from schemas.tables import SIGNAL_FIELDS, TOKEN_FIELDS, list_of, signal_fields
from shared.errors import ConfigError, CorruptError

Array = npt.NDArray[Any]

LOGPROB_RANGE_NATS = 32.0
"""Log probabilities below minus this are stored as minus this by `topk-u8`."""

MAX_CODE = 255
SCALAR_MANTISSA_BITS = 10
PARTITION_MANTISSA_BITS = 14
"""An error of a log-partition is a factor on every probability at its temperature: 2e-4 nats at worst below 8."""

_PER_ENTRY = ("topk_ids", "topk_codes", "topk_logprobs")

_CODE_LOGPROB = (-LOGPROB_RANGE_NATS * (np.arange(MAX_CODE + 1) / MAX_CODE) ** 2).astype(np.float32)
_CODE_PROB = np.exp(_CODE_LOGPROB.astype(np.float64))
_TAIL_PROB = np.where(np.arange(MAX_CODE + 1) == MAX_CODE, 0.0, _CODE_PROB)


def check_codec(codec: str) -> None:
    """Raises ConfigError unless `codec` is a known name."""
    if codec not in SIGNAL_FIELDS:
        raise ConfigError(f"codec {codec!r} is unknown: choose one of {', '.join(SIGNAL_FIELDS)}")


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


def encode(codec: str, rows: Sequence[Signals]) -> dict[str, pa.Array]:
    """Token and signal columns of `rows`, one list a row, typed as schemas.tables says.

    Raises ConfigError for an unknown codec.
    """
    check_codec(codec)
    n_T = _concat([row.topk_n_T for row in rows], np.int32)
    tokens_R = np.array([len(row.topk_n_T) for row in rows], np.int64)
    draws = _concat_draws(rows)
    ids_E = _concat([row.topk_ids_N for row in rows], np.int32)
    logprobs_E = _concat([row.topk_logprobs_N for row in rows], np.float32)
    entries_R = np.array([len(row.topk_ids_N) for row in rows], np.int64)
    if draws is not None:
        ids_E, logprobs_E = _interleave(n_T, draws, (ids_E, draws.ids_D), (logprobs_E, draws.logprobs_D))
        entries_R = entries_R + np.array([0 if row.draws is None else len(row.draws.ids_D) for row in rows], np.int64)
    tail_T = _concat([row.tail_logmass_T for row in rows], np.float32)
    sampled_T = _concat([row.sampled_logprob_T for row in rows], np.float32)
    entropy_T = _concat([row.entropy_T for row in rows], np.float32)
    partitions = _concat([_flat_partitions(row) for row in rows], np.float32)
    partitions_R = np.array([len(_flat_partitions(row)) for row in rows], np.int64)
    draw_n_T = np.zeros(len(n_T), np.int32) if draws is None else draws.n_T
    columns = {
        "sampled_rank": _lists(_concat([row.sampled_rank_T for row in rows], np.int32), tokens_R),
        "topk_ids": _lists(ids_E, entries_R),
        "topk_n": _lists(n_T.astype(np.int16), tokens_R),
        "draw_n": _lists(draw_n_T.astype(np.int16), tokens_R),
    }
    if codec == "topk-u8":
        columns["sampled_logprob"] = _lists(_round_mantissa(sampled_T, SCALAR_MANTISSA_BITS), tokens_R)
        columns["entropy"] = _lists(_round_mantissa(entropy_T, SCALAR_MANTISSA_BITS), tokens_R)
        columns["log_partitions"] = _lists(_round_mantissa(partitions, PARTITION_MANTISSA_BITS), partitions_R)
        columns["topk_codes"] = _lists(_codes(logprobs_E), entries_R)
        columns["tail_codes"] = _lists(_tail_codes(tail_T), tokens_R)
    else:
        columns["sampled_logprob"] = _lists(sampled_T, tokens_R)
        columns["entropy"] = _lists(entropy_T, tokens_R)
        columns["log_partitions"] = _lists(partitions, partitions_R)
        columns["topk_logprobs"] = _lists(logprobs_E, entries_R)
        columns["tail_logmass"] = _lists(tail_T, tokens_R)
    return columns


def signal_columns(header: ShardHeader) -> list[str]:
    """Names of the columns `decode` needs, besides `token_ids`."""
    check_codec(header.codec)
    return [field.name for field in [*TOKEN_FIELDS, *signal_fields(header.codec, header.format_version)]]


def decode(table: pa.Table, header: ShardHeader, where: str) -> tuple[Signals, Int64]:
    """Signals of all rows of `table`, one after the other, and row offsets [R+1] int64 in tokens.

    `table` holds `token_ids` and `signal_columns(header)`. Raises CorruptError naming `where` (the shard), the row and
    the column when lengths, counts, codes or ids contradict the format.
    """
    values, lengths = _read_lists(table, ["token_ids", *signal_columns(header)], where)
    tokens_R = lengths["token_ids"]
    for name in lengths:
        if name not in (*_PER_ENTRY, "log_partitions"):
            _require(lengths[name] == tokens_R, where, name, "has not one entry a token of token_ids")
    row_offsets = np.concatenate([[0], np.cumsum(tokens_R)]).astype(np.int64)
    n_T = values["topk_n"].astype(np.int32)
    _require_tokens((n_T >= 1) & (n_T <= header.max_support), row_offsets, where, "topk_n", "is outside 1..max_support")
    draw_n_T = _draw_counts(values, header, row_offsets, where)
    entry_n_T = n_T if draw_n_T is None else n_T + draw_n_T
    _check_entries(entry_n_T, lengths, row_offsets, where)
    ids_E = values["topk_ids"]
    if len(ids_E) and (int(ids_E.min()) < 0 or int(ids_E.max()) >= header.vocab_size):
        bad_E = (ids_E < 0) | (ids_E >= header.vocab_size)
        row = int(np.searchsorted(np.cumsum(lengths["topk_ids"]), np.flatnonzero(bad_E)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column topk_ids: id outside the vocabulary of {header.vocab_size}")
    drawn_E = None if draw_n_T is None else _drawn(n_T, draw_n_T)
    if header.codec == "topk-u8":
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


def _flat_partitions(row: Signals) -> Float32:
    return np.zeros(0, np.float32) if row.log_partitions_TS is None else row.log_partitions_TS.reshape(-1)


def _draw_counts(values: dict[str, Array], header: ShardHeader, row_offsets: Int64, where: str) -> Int32 | None:
    """Draws of each token, None where the shard stores none."""
    if "draw_n" not in values:
        return None
    draw_n_T = values["draw_n"].astype(np.int32)
    good_T = (draw_n_T >= 0) & (draw_n_T <= header.draws)
    _require_tokens(good_T, row_offsets, where, "draw_n", f"is outside 0..{header.draws}, the header's draws")
    return draw_n_T if header.draws else None


def _partitions(
    values: dict[str, Array], lengths: dict[str, Int64], header: ShardHeader, tokens_R: Int64, where: str
) -> Float32 | None:
    num_temperatures = len(header.temperatures)
    if "log_partitions" not in values:
        return None
    good_R = lengths["log_partitions"] == tokens_R * num_temperatures
    _require(good_R, where, "log_partitions", f"has not {num_temperatures} entries a token, one a temperature")
    if not num_temperatures:
        return None
    partitions_TS: Float32 = values["log_partitions"].reshape(-1, num_temperatures)
    return partitions_TS


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _codes(logprobs: Float32) -> npt.NDArray[np.int16]:
    scaled = np.sqrt(np.clip(-logprobs, 0.0, LOGPROB_RANGE_NATS) / LOGPROB_RANGE_NATS)
    codes: npt.NDArray[np.int16] = np.rint(MAX_CODE * scaled).astype(np.int16)
    return codes


def _tail_codes(logmass: Float32) -> npt.NDArray[np.int16]:
    """Codes of tails; however small, a tail that is there never becomes the code for none."""
    codes = np.where(np.isneginf(logmass), MAX_CODE, np.minimum(_codes(logmass), MAX_CODE - 1))
    return codes.astype(np.int16)


def _round_mantissa(x: Float32, num_bits: int) -> Float32:
    """Rounds float32 half up to `num_bits` explicit bits of mantissa, so that the others compress to almost nothing."""
    dropped = 23 - num_bits
    bits = x.view(np.uint32).astype(np.uint64) + (1 << (dropped - 1))
    return ((bits >> dropped) << dropped).astype(np.uint32).view(np.float32)


def _concat(parts: Sequence[Array], dtype: type[Any]) -> Array:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _lists(values: Array, lengths_R: Int64) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32))
    array = pa.array(values)
    return pa.ListArray.from_arrays(offsets, array, type=list_of(array.type))


def _read_lists(table: pa.Table, names: Sequence[str], where: str) -> tuple[dict[str, Array], dict[str, Int64]]:
    values, lengths = {}, {}
    for name in names:
        if name not in table.column_names:
            raise CorruptError(f"{where}: column {name} is missing: the file is not what its header says")
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        flat = column.flatten()
        if column.null_count or flat.null_count:
            raise CorruptError(f"{where}: column {name} holds nulls, which the format forbids")
        values[name] = flat.to_numpy(zero_copy_only=False)
        lengths[name] = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values, lengths


def _check_entries(n_T: Int32, lengths: dict[str, Int64], row_offsets: Int64, where: str) -> None:
    total_T = np.concatenate([[0], np.cumsum(n_T, dtype=np.int64)])
    entries_R = total_T[row_offsets[1:]] - total_T[row_offsets[:-1]]
    for name in _PER_ENTRY:
        if name in lengths:
            _require(lengths[name] == entries_R, where, name, "has not the number of entries that the counts add up to")


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
    _require_tokens((codes_E >= 0) & (codes_E <= MAX_CODE), entry_offsets, where, "topk_codes", "is outside 0..255")
    _require_tokens((tails_T >= 0) & (tails_T <= MAX_CODE), row_offsets, where, "tail_codes", "is outside 0..255")
    if not len(n_T):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    probs_E = _CODE_PROB[codes_E]
    if drawn_E is not None:
        probs_E[drawn_E] = 0.0
    mass_T = np.add.reduceat(probs_E, starts_T) + _TAIL_PROB[tails_T]
    log_mass_T = np.log(mass_T).astype(np.float32)
    logprobs_E = _CODE_LOGPROB[codes_E] - np.repeat(log_mass_T, n_T)
    tail_T = np.where(tails_T == MAX_CODE, np.float32(-np.inf), _CODE_LOGPROB[tails_T] - log_mass_T)
    return logprobs_E, tail_T.astype(np.float32)


def _require(good_R: npt.NDArray[np.bool_], where: str, column: str, problem: str) -> None:
    if not good_R.all():
        row = int(np.flatnonzero(~good_R)[0])
        raise CorruptError(f"{where}: row {row}, column {column} {problem}")


def _require_tokens(good: npt.NDArray[np.bool_], offsets: Int64, where: str, column: str, problem: str) -> None:
    if not good.all():
        row = int(np.searchsorted(offsets[1:], np.flatnonzero(~good)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column {column}: a value {problem}")
