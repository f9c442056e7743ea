"""Chains read by any program → their candidates with probabilities, in Arrow: what the SQL view `topk` shows.

In: rows of `chains` as Polars, Spark, Daft, Ray Data or Hugging Face datasets hand them over: other list types, wider
integers, nulls or empty lists in columns that a shard lacks. Out: one row per candidate. Needs numpy and pyarrow only,
and no version of theirs in particular, because these programs bring their own.

Shape legend: R chains, T completion tokens, E entries (supports and draws), all of them flat over the table.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.columns import logprobs_of
from stillroom.errors import CorruptError, DataError
from stillroom.schema.records import Int32, Int64

CODED = ("topk_codes", "tail_codes")
EXACT = ("topk_logprobs", "tail_logmass")
TOPK_COLUMNS = ("sample_id", "topk_n", "draw_n", "topk_ids", *CODED, *EXACT)
"""Columns of `chains` that `topk` reads; of the last four, those of the cache's codec are enough."""


@dataclass(frozen=True)
class _Lists:
    """A list column of all rows: flat values, and their number per row."""

    values: npt.NDArray[np.generic]
    lengths_R: Int64


def topk(chains: pa.Table | pa.RecordBatch) -> pa.Table:
    """Candidates of all tokens: sample_id, position, rank, token_id, prob, weight, drawn, as in the SQL view `topk`.

    `chains` needs `sample_id`, `topk_n`, `topk_ids`, `draw_n` if the cache has it, and `topk_codes` and `tail_codes` or
    `topk_logprobs` and `tail_logmass`. Chains of the two codecs may be mixed; those of topk-u8 then come first. `prob`
    is the token's probability at temperature 1; `weight` is the same in the support, and a draw's share of the tail.
    Raises DataError for a missing column, CorruptError if the lists contradict each other.
    """
    missing = [name for name in ("sample_id", "topk_n", "topk_ids") if name not in chains.schema.names]
    pairs = [pair for pair in (CODED, EXACT) if set(pair) <= set(chains.schema.names)]
    if missing or not pairs:
        wanted = ", ".join(missing) or f"{' and '.join(CODED)}, or {' and '.join(EXACT)}"
        raise DataError(f"the table has no {wanted}: select {', '.join(TOPK_COLUMNS)}")
    table = pa.Table.from_batches([chains]) if isinstance(chains, pa.RecordBatch) else chains
    table = table.select([name for name in TOPK_COLUMNS if name in table.schema.names])
    # Views of strings, as DataFusion and Polars may give, cannot be filtered in pyarrow.
    names = table.column("sample_id").cast(pa.string())
    table = table.set_column(table.schema.get_field_index("sample_id"), "sample_id", names)
    # Some programs hand over [] for a null list; a chain has at least one token, so its codec is the one with values.
    lengths_R = {pair: _lists(table, pair[1]).lengths_R for pair in pairs}
    coded_R = lengths_R[CODED] > 0 if CODED in pairs else np.zeros(table.num_rows, np.bool_)
    parts = [
        _candidates(table.filter(pa.array(chosen_R)), pair)
        for pair, chosen_R in ((CODED, coded_R), (EXACT, ~coded_R))
        if pair in pairs
    ]
    return pa.concat_tables(parts)


def _candidates(table: pa.Table, pair: tuple[str, str]) -> pa.Table:
    """Candidates of chains of one codec, whose columns of entries and tails are `pair`."""
    n, ids, entries, tails = (_lists(table, name) for name in ("topk_n", "topk_ids", *pair))
    n_T = n.values.astype(np.int32)
    draw_n_T = _draw_counts(table, n.lengths_R)
    entry_n_T = n_T + draw_n_T
    if not (len(ids.values) == len(entries.values) == entry_n_T.sum() and len(tails.values) == len(n_T)):
        raise CorruptError(f"topk_n and draw_n do not add up to the entries of topk_ids and {pair[0]}: select all four")
    drawn_E = np.repeat(np.tile([False, True], len(n_T)), np.stack([n_T, draw_n_T], axis=1).reshape(-1))
    if pair == CODED:
        codes_E, codes_T = entries.values.astype(np.int64), tails.values.astype(np.int64)
        logprobs_E, tail_T = logprobs_of(codes_E, codes_T, entry_n_T, drawn_E)
    else:
        logprobs_E, tail_T = entries.values.astype(np.float32), tails.values.astype(np.float32)
    prob_E = np.exp(logprobs_E, dtype=np.float64)
    # Tokens without draws have no entry that uses their share; 1 only avoids a division by zero.
    share_T = np.exp(tail_T, dtype=np.float64) / np.maximum(draw_n_T, 1)
    tokens_R = n.lengths_R
    position_T = np.arange(len(n_T)) - np.repeat(np.cumsum(tokens_R) - tokens_R, tokens_R)
    rank_E = np.arange(len(prob_E)) - np.repeat(np.cumsum(entry_n_T, dtype=np.int64) - entry_n_T, entry_n_T) + 1
    row_T = np.repeat(np.arange(table.num_rows), tokens_R)
    return pa.table(
        {
            "sample_id": table.column("sample_id").take(pa.array(np.repeat(row_T, entry_n_T))),
            "position": pa.array(np.repeat(position_T, entry_n_T), pa.int32()),
            "rank": pa.array(rank_E, pa.int32(), mask=drawn_E),
            "token_id": pa.array(ids.values.astype(np.int32)),
            "prob": pa.array(prob_E),
            "weight": pa.array(np.where(drawn_E, np.repeat(share_T, entry_n_T), prob_E)),
            "drawn": pa.array(drawn_E),
        }
    )


def _draw_counts(table: pa.Table, tokens_R: Int64) -> Int32:
    """Draws per token: none in shards of version 1, whose `draw_n` is null or missing."""
    counts_T = np.zeros(int(tokens_R.sum()), np.int32)
    if "draw_n" in table.schema.names:
        draws = _lists(table, "draw_n")
        has_T = np.repeat(draws.lengths_R > 0, tokens_R)
        if has_T.sum() != len(draws.values):
            raise CorruptError("draw_n does not have one entry per token of topk_n")
        counts_T[has_T] = draws.values
    return counts_T


def _lists(table: pa.Table, name: str) -> _Lists:
    column = table.column(name)
    # A Spark or pandas column without values has no list type.
    if pa.types.is_null(column.type):
        return _Lists(np.zeros(0, np.float64), np.zeros(len(column), np.int64))
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    values = pc.list_flatten(column)
    return _Lists(values.to_numpy(), lengths.to_numpy().astype(np.int64))
