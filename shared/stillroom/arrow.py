"""Chains read by any program → tokens and candidates with probabilities, in Arrow: the SQL views `tokens` and `topk`.

    batches = pyarrow.dataset.dataset(files).to_batches(columns=arrow.TOPK_COLUMNS)
    for candidates in arrow.topk_batches(batches):  # or frame.mapInArrow(arrow.topk_batches, ...) in Spark
        ...

In: rows of `chains` as Polars, Spark, Daft, Ray Data or Hugging Face datasets hand them over: other list types, wider
integers, nulls or empty lists in columns that a shard lacks. Out: one row per token or candidate, in the columns and
types of the view. Needs numpy and pyarrow only (`read_pieces`: the base install), and no version of theirs in
particular, because these programs bring their own.

Shape legend: R chains, T completion tokens, E entries (supports and draws), all of them flat over the table.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.columns import drawn, logprobs_of
from stillroom.errors import CorruptError, DataError
from stillroom.schema.records import Float32, Int32, Int64

CODED = ("topk_codes", "tail_codes")
EXACT = ("topk_logprobs", "tail_logmass")
TOPK_COLUMNS = ["sample_id", "run_id", "topk_n", "draw_n", "topk_ids", *CODED, *EXACT]
"""Columns of `chains` that `topk` reads; of the last four, those of the cache's codec are enough. `run_id` is for
pieces."""
TOKENS_COLUMNS = [
    *TOPK_COLUMNS,
    *("source", "token_ids", "reasoning_end", "sampled_logprob", "sampled_rank", "entropy"),
]
"""Columns of `chains` that `tokens` reads."""
TOPK_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("rank", pa.int64()),
        pa.field("token_id", pa.int32()),
        pa.field("piece", pa.string()),
        pa.field("prob", pa.float64()),
        pa.field("weight", pa.float64()),
        pa.field("drawn", pa.bool_()),
    ]
)
TOKENS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("token_id", pa.int32()),
        pa.field("piece", pa.string()),
        pa.field("logprob", pa.float32()),
        pa.field("rank", pa.int32()),
        pa.field("entropy", pa.float32()),
        pa.field("top1_prob", pa.float64()),
        pa.field("tail_mass", pa.float64()),
        pa.field("support", pa.int16()),
        pa.field("draws", pa.int16()),
        pa.field("part", pa.string()),
    ]
)
BATCH_ENTRIES = 2**19
"""Candidates that `topk_batches` and `tokens_batches` decode at a time, about 90 MB; a longer chain stays whole."""

Chains: TypeAlias = pa.Table | pa.RecordBatch


@dataclass(frozen=True)
class Pieces:
    """The text of every token of a cache's tokenizers, by run. Can be pickled, for programs that decode in workers."""

    texts: pa.Array
    """Vocabularies one after the other; the last entry is null, for ids that a tokenizer does not know."""
    vocabulary_of: dict[str, tuple[int, int]]
    """First place in `texts` and size of the vocabulary of each run."""

    def of(self, runs_R: pa.ChunkedArray, ids: Int32, lengths_R: Int64) -> pa.Array:
        """Pieces of ids, of which chain r has the next `lengths_R[r]`."""
        places = [self.vocabulary_of.get(run, (0, 0)) for run in runs_R.to_pylist()]
        first, size = np.repeat(np.array(places, np.int64).reshape(-1, 2), lengths_R, axis=0).T
        return self.texts.take(pa.array(np.where((ids >= 0) & (ids < size), first + ids, len(self.texts) - 1)))


Decoder = Callable[[Chains, Pieces | None], pa.Table]


def topk(chains: Chains, pieces: Pieces | None = None) -> pa.Table:
    """Candidates of all tokens as in the SQL view `topk` (TOPK_SCHEMA); without `pieces`, `piece` is null.

    `chains` needs `sample_id`, `topk_n`, `topk_ids`, `draw_n` if the cache has it, `run_id` for pieces, and
    `topk_codes` and `tail_codes` or `topk_logprobs` and `tail_logmass`. Chains of the two codecs may be mixed; those of
    topk-u8 then come first. `prob` is the token's probability at temperature 1; `weight` is the same in the support,
    and a draw's share of the tail. Raises DataError for a missing column, CorruptError if the lists contradict each
    other.
    """
    parts = [_candidates(one, pieces) for one in _by_codec(chains, TOPK_COLUMNS, pieces)]
    return pa.concat_tables(parts)


def topk_lists(chains: Chains, pieces: Pieces | None = None) -> pa.ListArray:
    """`topk` as one list of candidates (structs) per chain, in the order of `chains`: for programs whose functions give
    one value per row, which they then explode.
    """
    decoded = _by_codec(chains, TOPK_COLUMNS, pieces)
    rows_R = np.concatenate([one.rows_R for one in decoded])
    structs = pa.concat_tables([_candidates(one, pieces) for one in decoded]).combine_chunks().to_struct_array()
    ends_R = np.concatenate([[0], *(one.entries_R for one in decoded)]).cumsum()
    flat = structs.combine_chunks() if isinstance(structs, pa.ChunkedArray) else structs
    # rows_R says where each chain stood; taken in its order they stand there again.
    return pa.ListArray.from_arrays(pa.array(ends_R, pa.int32()), flat).take(pa.array(np.argsort(rows_R)))


def tokens(chains: Chains, pieces: Pieces | None = None) -> pa.Table:
    """Completion tokens as in the SQL view `tokens` (TOKENS_SCHEMA); without `pieces`, `piece` is null.

    `chains` needs the columns of `topk` and `source`, `token_ids`, `reasoning_end`, `sampled_logprob`, `sampled_rank`
    and `entropy`. Order and errors are those of `topk`.
    """
    parts = [_tokens(one, pieces) for one in _by_codec(chains, TOKENS_COLUMNS, pieces)]
    return pa.concat_tables(parts)


def topk_batches(batches: Iterable[Chains], pieces: Pieces | None = None) -> Iterator[pa.RecordBatch]:
    """`topk` of a stream, such as Spark's `mapInArrow` passes, in memory for BATCH_ENTRIES candidates."""
    return _streamed(topk, batches, pieces)


def tokens_batches(batches: Iterable[Chains], pieces: Pieces | None = None) -> Iterator[pa.RecordBatch]:
    """`tokens` of a stream, in memory for BATCH_ENTRIES candidates."""
    return _streamed(tokens, batches, pieces)


def read_pieces(root: Any) -> Pieces:
    """The vocabularies of a cache, a folder or s3://, gs:// or az://BUCKET/PREFIX. Raises DataError if it is none."""
    # Here, because workers of other programs decode without the base install.
    from stillroom.cache.catalog import Catalog
    from stillroom.models import cached_pieces
    from stillroom.storage.paths import location

    catalog = Catalog(location(root))
    texts: list[str | None] = []
    found: dict[str, tuple[int, int]] = {}
    vocabulary_of = {}
    for run_id, manifest in catalog.runs().items():
        tokenizer = manifest.teacher.tokenizer_fingerprint
        path = catalog.vocab_path(tokenizer)
        if tokenizer not in found and path.exists():
            pieces, _ = cached_pieces(path)
            known = [pieces.get(token_id) for token_id in range(max(pieces, default=-1) + 1)]
            found[tokenizer] = (len(texts), len(known))
            texts += known
        vocabulary_of[run_id] = found.get(tokenizer, (0, 0))
    return Pieces(pa.array([*texts, None], pa.string()), vocabulary_of)


@dataclass(frozen=True)
class _Lists:
    """A list column of all rows: flat values, and their number per row."""

    values: npt.NDArray[np.generic]
    lengths_R: Int64


@dataclass(frozen=True)
class _Decoded:
    """Chains of one codec and their distributions: natural logs, and places of the entries."""

    table: pa.Table
    rows_R: Int64
    """Their places in the table that was passed in."""
    tokens_R: Int64
    entries_R: Int64
    n_T: Int32
    draw_n_T: Int32
    ids_E: Int32
    logprobs_E: Float32
    tail_T: Float32

    @property
    def entry_n_T(self) -> Int32:
        return self.n_T + self.draw_n_T

    @property
    def first_T(self) -> Int64:
        """The place of each token's first entry."""
        return np.cumsum(self.entry_n_T, dtype=np.int64) - self.entry_n_T

    @property
    def position_T(self) -> Int64:
        return np.arange(len(self.n_T)) - np.repeat(np.cumsum(self.tokens_R) - self.tokens_R, self.tokens_R)


def _by_codec(chains: Chains, wanted: list[str], pieces: Pieces | None) -> list[_Decoded]:
    """The chains of each codec whose columns `chains` has."""
    if not isinstance(chains, (pa.Table, pa.RecordBatch)):
        kind = type(chains)
        raise TypeError(f"chains must be a pyarrow Table or RecordBatch, not {kind.__module__}.{kind.__qualname__}")
    optional = {"draw_n", *CODED, *EXACT, *(("run_id",) if pieces is None else ())}
    missing = [name for name in wanted if name not in chains.schema.names and name not in optional]
    pairs = [pair for pair in (CODED, EXACT) if set(pair) <= set(chains.schema.names)]
    if missing or not pairs:
        what = ", ".join(missing) or f"{' and '.join(CODED)}, or {' and '.join(EXACT)}"
        raise DataError(f"the table has no {what}: select {', '.join(wanted)}")
    table = pa.Table.from_batches([chains]) if isinstance(chains, pa.RecordBatch) else chains
    table = table.select([name for name in wanted if name in table.schema.names])
    # Views of strings, as DataFusion and Polars may give, cannot be filtered in pyarrow.
    for name in {"sample_id", "run_id", "source"} & set(table.schema.names):
        table = table.set_column(table.schema.get_field_index(name), name, table.column(name).cast(pa.string()))
    # Some programs hand over [] for a null list; a chain has at least one token, so its codec is the one with values.
    coded_R = _lists(table, CODED[1]).lengths_R > 0 if CODED in pairs else np.zeros(table.num_rows, np.bool_)
    return [
        _decode(table.filter(pa.array(chosen_R)), np.flatnonzero(chosen_R), pair)
        for pair, chosen_R in ((CODED, coded_R), (EXACT, ~coded_R))
        if pair in pairs
    ]


def _decode(table: pa.Table, rows_R: Int64, pair: tuple[str, str]) -> _Decoded:
    """Distributions of chains of one codec, whose columns of entries and tails are `pair`."""
    n, ids, entries, tails = (_lists(table, name) for name in ("topk_n", "topk_ids", *pair))
    n_T = n.values.astype(np.int32)
    draw_n_T = _draw_counts(table, n.lengths_R)
    if not (len(ids.values) == len(entries.values) == (n_T + draw_n_T).sum() and len(tails.values) == len(n_T)):
        raise CorruptError(f"topk_n and draw_n do not add up to the entries of topk_ids and {pair[0]}: select all four")
    if len(n_T) and n_T.min() < 1:
        raise CorruptError("topk_n holds a token without candidates")
    if pair == CODED:
        codes_E, codes_T = entries.values.astype(np.int64), tails.values.astype(np.int64)
        logprobs_E, tail_T = logprobs_of(codes_E, codes_T, n_T + draw_n_T, drawn(n_T, draw_n_T))
    else:
        logprobs_E, tail_T = entries.values.astype(np.float32), tails.values.astype(np.float32)
    ids_E = ids.values.astype(np.int32)
    return _Decoded(table, rows_R, n.lengths_R, ids.lengths_R, n_T, draw_n_T, ids_E, logprobs_E, tail_T)


def _candidates(one: _Decoded, pieces: Pieces | None) -> pa.Table:
    entry_n_T = one.entry_n_T
    drawn_E = drawn(one.n_T, one.draw_n_T)
    prob_E = np.exp(one.logprobs_E, dtype=np.float64)
    # Tokens without draws have no entry that uses their share; 1 only avoids a division by zero.
    share_T = np.exp(one.tail_T, dtype=np.float64) / np.maximum(one.draw_n_T, 1)
    row_E = np.repeat(np.arange(one.table.num_rows), one.entries_R)
    rank_E = np.arange(len(prob_E)) - np.repeat(one.first_T, entry_n_T) + 1
    return pa.table(
        {
            "sample_id": one.table.column("sample_id").take(pa.array(row_E)),
            "position": pa.array(np.repeat(one.position_T, entry_n_T)),
            "rank": pa.array(rank_E, pa.int64(), mask=drawn_E),
            "token_id": pa.array(one.ids_E),
            "piece": _pieces(one, pieces, one.ids_E, one.entries_R),
            "prob": pa.array(prob_E),
            "weight": pa.array(np.where(drawn_E, np.repeat(share_T, entry_n_T), prob_E)),
            "drawn": pa.array(drawn_E),
        },
        schema=TOPK_SCHEMA,
    )


def _tokens(one: _Decoded, pieces: Pieces | None) -> pa.Table:
    names = ("token_ids", "sampled_logprob", "sampled_rank", "entropy")
    columns = {name: _lists(one.table, name) for name in names}
    for name, column in columns.items():
        if not np.array_equal(column.lengths_R, one.tokens_R):
            raise CorruptError(f"{name} does not have one entry per token of topk_n")
    ids_T = columns["token_ids"].values.astype(np.int32)
    rows_T = pa.array(np.repeat(np.arange(one.table.num_rows), one.tokens_R))
    end_T = one.table.column("reasoning_end").cast(pa.int64()).take(rows_T)
    # Until the reasoning ends, and in chains where it never does.
    is_reasoning_T = pc.fill_null(pc.less(pa.array(one.position_T), end_T), True)
    return pa.table(
        {
            "sample_id": one.table.column("sample_id").take(rows_T),
            "source": one.table.column("source").take(rows_T),
            "position": pa.array(one.position_T),
            "token_id": pa.array(ids_T),
            "piece": _pieces(one, pieces, ids_T, one.tokens_R),
            "logprob": pa.array(columns["sampled_logprob"].values.astype(np.float32)),
            "rank": pa.array(columns["sampled_rank"].values.astype(np.int32)),
            "entropy": pa.array(columns["entropy"].values.astype(np.float32)),
            "top1_prob": pa.array(np.exp(one.logprobs_E[one.first_T], dtype=np.float64)),
            "tail_mass": pa.array(np.exp(one.tail_T, dtype=np.float64)),
            "support": pa.array(one.n_T.astype(np.int16)),
            "draws": pa.array(one.draw_n_T.astype(np.int16)),
            "part": pc.if_else(is_reasoning_T, "reasoning", "answer"),
        },
        schema=TOKENS_SCHEMA,
    )


def _pieces(one: _Decoded, pieces: Pieces | None, ids: Int32, lengths_R: Int64) -> pa.Array:
    if pieces is None:
        return pa.nulls(len(ids), pa.string())
    return pieces.of(one.table.column("run_id"), ids, lengths_R)


def _streamed(decode: Decoder, batches: Iterable[Chains], pieces: Pieces | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        start, num_entries = 0, 0
        entries = _lists(table, "topk_ids").lengths_R.tolist() if "topk_ids" in table.schema.names else []
        for row, num in enumerate(entries):
            if row > start and num_entries + num > BATCH_ENTRIES:
                yield from decode(table.slice(start, row - start), pieces).to_batches()
                start, num_entries = row, 0
            num_entries += num
        # Also for no rows: a missing column is an error whatever the number.
        yield from decode(table.slice(start), pieces).to_batches()


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
