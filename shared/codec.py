"""Captured distributions to stored columns and back: the only place that knows how signals become numbers on disk.

In: a Capture (rank-ordered [T, K] arrays from the engine). Out: Signals (ragged support, tail mass) and Arrow list
columns, one list a chain. Everything is vectorised over tokens; no Python object a token or candidate.

Shape legend: T tokens, K captured candidates, N stored candidates of all tokens (flat), R rows (chains).

`topk-u8`   log probability as 8-bit square-root code c: lp = -32 (c/255)^2 nats, resolution finest near certainty.
            The tail's log mass has the same code, up to 254; 255 means no tail. Decoding divides by the decoded total
            (support and tail), so every decoded distribution sums to one. Scalars a token keep 10 mantissa bits.
`topk-f32`  everything as float32, exact.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.manifest import ShardHeader
from schemas.records import Capture, Float32, Int64, Signals
from schemas.tables import SIGNAL_FIELDS, TOKEN_FIELDS, list_of
from shared.errors import ConfigError, CorruptError

Array = npt.NDArray[Any]

LOGPROB_RANGE_NATS = 32.0
"""Log probabilities below minus this are stored as minus this by `topk-u8`."""

MAX_CODE = 255
SCALAR_MANTISSA_BITS = 10

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
    captured candidates with the rest counted as one further outcome, a lower bound.
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
    )


def encode(codec: str, rows: Sequence[Signals]) -> dict[str, pa.Array]:
    """Token and signal columns of `rows`, one list a row, typed as schemas.tables says.

    Raises ConfigError for an unknown codec.
    """
    check_codec(codec)
    n_T = np.concatenate([row.topk_n_T for row in rows]) if rows else np.zeros(0, np.int32)
    tokens_R = np.array([len(row.topk_n_T) for row in rows], np.int64)
    entries_R = np.array([len(row.topk_ids_N) for row in rows], np.int64)
    ids_N = _concat([row.topk_ids_N for row in rows], np.int32)
    logprobs_N = _concat([row.topk_logprobs_N for row in rows], np.float32)
    tail_T = _concat([row.tail_logmass_T for row in rows], np.float32)
    sampled_T = _concat([row.sampled_logprob_T for row in rows], np.float32)
    entropy_T = _concat([row.entropy_T for row in rows], np.float32)
    columns = {
        "sampled_rank": _lists(_concat([row.sampled_rank_T for row in rows], np.int32), tokens_R),
        "topk_ids": _lists(ids_N, entries_R),
        "topk_n": _lists(n_T.astype(np.int16), tokens_R),
    }
    if codec == "topk-u8":
        columns["sampled_logprob"] = _lists(_round_mantissa(sampled_T), tokens_R)
        columns["entropy"] = _lists(_round_mantissa(entropy_T), tokens_R)
        columns["topk_codes"] = _lists(_codes(logprobs_N), entries_R)
        columns["tail_codes"] = _lists(_tail_codes(tail_T), tokens_R)
    else:
        columns["sampled_logprob"] = _lists(sampled_T, tokens_R)
        columns["entropy"] = _lists(entropy_T, tokens_R)
        columns["topk_logprobs"] = _lists(logprobs_N, entries_R)
        columns["tail_logmass"] = _lists(tail_T, tokens_R)
    return columns


def signal_columns(codec: str) -> list[str]:
    """Names of the columns `decode` needs, besides `token_ids`."""
    check_codec(codec)
    return [field.name for field in [*TOKEN_FIELDS, *SIGNAL_FIELDS[codec]]]


def decode(table: pa.Table, header: ShardHeader, where: str) -> tuple[Signals, Int64]:
    """Signals of all rows of `table`, one after the other, and row offsets [R+1] int64 in tokens.

    `table` holds `token_ids` and `signal_columns(header.codec)`. Raises CorruptError naming `where` (the shard), the
    row and the column when lengths, counts, codes or ids contradict the format.
    """
    values, lengths = _read_lists(table, ["token_ids", *signal_columns(header.codec)], where)
    tokens_R = lengths["token_ids"]
    for name in lengths:
        if name not in ("topk_ids", "topk_codes", "topk_logprobs"):
            _require(lengths[name] == tokens_R, where, name, "has not one entry a token of token_ids")
    row_offsets = np.concatenate([[0], np.cumsum(tokens_R)]).astype(np.int64)
    n_T = values["topk_n"].astype(np.int32)
    _require_tokens((n_T >= 1) & (n_T <= header.max_support), row_offsets, where, "topk_n", "is outside 1..max_support")
    _check_entries(n_T, lengths, row_offsets, where)
    ids_N = values["topk_ids"]
    if len(ids_N) and (int(ids_N.min()) < 0 or int(ids_N.max()) >= header.vocab_size):
        bad_N = (ids_N < 0) | (ids_N >= header.vocab_size)
        row = int(np.searchsorted(np.cumsum(lengths["topk_ids"]), np.flatnonzero(bad_N)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column topk_ids: id outside the vocabulary of {header.vocab_size}")
    if header.codec == "topk-u8":
        logprobs_N, tail_T = _decode_codes(values, n_T, lengths, row_offsets, where)
    else:
        logprobs_N, tail_T = values["topk_logprobs"], values["tail_logmass"]
    signals = Signals(
        topk_n_T=n_T,
        topk_ids_N=ids_N,
        topk_logprobs_N=logprobs_N,
        tail_logmass_T=tail_T,
        sampled_logprob_T=values["sampled_logprob"],
        sampled_rank_T=values["sampled_rank"],
        entropy_T=values["entropy"],
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


def _round_mantissa(x: Float32) -> Float32:
    """Rounds float32 half up to SCALAR_MANTISSA_BITS explicit bits, so that two of its four bytes compress to almost
    none.
    """
    dropped = 23 - SCALAR_MANTISSA_BITS
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


def _check_entries(n_T: npt.NDArray[np.int32], lengths: dict[str, Int64], row_offsets: Int64, where: str) -> None:
    total_T = np.concatenate([[0], np.cumsum(n_T, dtype=np.int64)])
    entries_R = total_T[row_offsets[1:]] - total_T[row_offsets[:-1]]
    for name in ("topk_ids", "topk_codes", "topk_logprobs"):
        if name in lengths:
            _require(lengths[name] == entries_R, where, name, "has not the number of entries that topk_n adds up to")


def _decode_codes(
    values: dict[str, Array],
    n_T: npt.NDArray[np.int32],
    lengths: dict[str, Int64],
    row_offsets: Int64,
    where: str,
) -> tuple[Float32, Float32]:
    codes_N, tails_T = values["topk_codes"], values["tail_codes"]
    entry_offsets = np.concatenate([[0], np.cumsum(lengths["topk_codes"])]).astype(np.int64)
    _require_tokens((codes_N >= 0) & (codes_N <= MAX_CODE), entry_offsets, where, "topk_codes", "is outside 0..255")
    _require_tokens((tails_T >= 0) & (tails_T <= MAX_CODE), row_offsets, where, "tail_codes", "is outside 0..255")
    if not len(n_T):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    mass_T = np.add.reduceat(_CODE_PROB[codes_N], starts_T) + _TAIL_PROB[tails_T]
    log_mass_T = np.log(mass_T).astype(np.float32)
    logprobs_N = _CODE_LOGPROB[codes_N] - np.repeat(log_mass_T, n_T)
    tail_T = np.where(tails_T == MAX_CODE, np.float32(-np.inf), _CODE_LOGPROB[tails_T] - log_mass_T)
    return logprobs_N, tail_T.astype(np.float32)


def _require(good_R: npt.NDArray[np.bool_], where: str, column: str, problem: str) -> None:
    if not good_R.all():
        row = int(np.flatnonzero(~good_R)[0])
        raise CorruptError(f"{where}: row {row}, column {column} {problem}")


def _require_tokens(good: npt.NDArray[np.bool_], offsets: Int64, where: str, column: str, problem: str) -> None:
    if not good.all():
        row = int(np.searchsorted(offsets[1:], np.flatnonzero(~good)[0], side="right"))
        raise CorruptError(f"{where}: row {row}, column {column}: a value {problem}")
