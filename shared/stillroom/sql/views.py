"""The SQL of a cache's views: text only, no database.

chains      one row per chain: readable columns and its latest verdict
prompts     one row per prompt: samples, pass rate, mean length
tokens      one row per completion token: piece, log probability, rank, entropy, top-1 probability, tail mass, part
topk        one row per stored candidate: rank, piece, probability, weight; draws from the tail have no rank
features    one row per chain and feature set: tokens with features, bytes; feature_sets says what a set holds
verdicts    the latest verdict of each judge; failures, runs, vocab as stored
storage     one row per column of a shard: bytes in Parquet
shards      the rows of `chains` as stored: token ids, codes
internal.chain_places, internal.chain_rows  chains with the file and row of each, or with its row group, which reads all
            footers

Probabilities are those that stillroom.cache.codec decodes: codes are divided by the mass of their token, as FORMAT.md
says. `topk.weight` sums to one over the rows of a token: a draw's is its share of the tail.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from stillroom.cache.columns import LOGPROB_RANGE_NATS, MAX_CODE
from stillroom.cache.feature_codec import SHORT_CONTEXT
from stillroom.schema.features import FEATURE_SCHEMA, PAYLOADS
from stillroom.schema.tables import FAILURE_SCHEMA, VERDICT_SCHEMA, VOCAB_SCHEMA, chain_schema, table_schema

VIEWS = (
    *("chains", "prompts", "tokens", "topk", "verdicts", "failures", "runs", "vocab", "features", "feature_sets"),
    *("storage", "shards"),
)
"""Views for users, in the order of the documentation."""

SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.timestamp("us", tz="UTC"): "TIMESTAMPTZ",
}

Layout = tuple[str, int]
"""Codec and format version of a shard, which determine its columns."""


@dataclass(frozen=True, slots=True)
class CacheFiles:
    """Parquet files that the views of one cache read; those of `chains` by their layout."""

    chains: Mapping[Layout, Sequence[str]]
    verdicts: Sequence[str]
    failures: Sequence[str]
    vocab: Sequence[str]
    features: Sequence[str]
    codecs: Mapping[str, str]
    """Codecs of each run's shards, by run id."""

    def paths(self) -> Iterator[str]:
        """Every file."""
        for group in (*self.chains.values(), self.verdicts, self.failures, self.vocab, self.features):
            yield from group


_KEYED = pa.schema([field for field in FEATURE_SCHEMA if field.name not in PAYLOADS])
"""What SQL shows of features: who and where, not the codes."""

# In shards of version 1 draw_n is NULL, and so is its sum: ELSE applies.
ENTRY_N = "CASE WHEN list_sum(draw_n) > 0 THEN list_transform(topk_n, lambda n, i: n + draw_n[i]) ELSE topk_n END"
"""Number of entries of each token: its support and its draws."""

# A product, because pow takes twice the time of exp.
CODE_PROB = f"exp(CAST({{0}} AS DOUBLE) * CAST({{0}} AS DOUBLE) * {-LOGPROB_RANGE_NATS / MAX_CODE**2!r})"
TAIL_CODE_PROB = f"CASE WHEN {{0}} = {MAX_CODE} THEN 0 ELSE {CODE_PROB} END"

WINDOW_TOKENS = 16
"""Long enough that text hardly ever repeats a window unless it loops."""
REPEATED_FRAC = "coalesce(1 - list_unique(windows) / nullif(len(windows), 0), 0)"
"""Share of a chain's windows that occurred before in it (1 - distinct-n of Li et al. 2016, arXiv 1510.03055)."""

DISTRIBUTIONS = f"""SELECT *, list_transform(first_entry, lambda first, i: coalesce(
      list_sum(list_select(code_prob, range(first, first + topk_n[i]))) + {TAIL_CODE_PROB.format("tail_codes[i]")}, 1
    )) AS mass
  FROM (SELECT *, list_transform(topk_codes, lambda c: {CODE_PROB.format("c")}) AS code_prob,
      list_where(range(1, len(topk_ids) + 1),
        flatten(list_transform(entry_n, lambda n: list_resize([true], n, false)))) AS first_entry
    FROM (SELECT *, {ENTRY_N} AS entry_n FROM shards))"""
"""Shards with the place of each token's first entry and the mass of its codes (1 where logprobs are stored exactly).

list_select reads a list from within a lambda in place. list_slice would copy it for every token: 300 times slower.
"""


FILE_OF = r"regexp_extract({}, '([^/\\]+[/\\][^/\\]+)$', 1)"
"""A shard as RUN/FILE, out of its path or URL."""
WITH_PIECES = """LEFT JOIN runs r USING (run_id)
           LEFT JOIN vocab v ON v.tokenizer = r.tokenizer AND v.token_id = t.token_id"""

PROMPTS = """SELECT prompt_id, any_value(source) AS source, any_value(split) AS split,
             any_value(prompt) AS prompt, any_value(reference) AS reference, count(*) AS num_samples,
             count(correct) AS num_judged, count(*) FILTER (correct) AS num_correct,
             avg(correct::INTEGER) AS pass_rate, avg(num_tokens) AS mean_num_tokens,
             count(*) FILTER (truncated) AS num_truncated
           FROM chains GROUP BY prompt_id"""

TOPK_PROB = f"coalesce({CODE_PROB.format('topk_code')} / mass, exp(topk_logprob))"
TOP1_PROB = f"coalesce({CODE_PROB.format('top1_code')} / mass, exp(top1_logprob))"
TAIL_MASS = f"coalesce({TAIL_CODE_PROB.format('tail_code')} / mass, exp(tail_logmass))"

TOKENS = f"""SELECT t.sample_id, t.source, t.position, t.token_id, v.piece, t.logprob, t.rank,
             t.entropy, {TOP1_PROB} AS top1_prob, {TAIL_MASS} AS tail_mass, t.support, coalesce(t.draws, 0) AS draws,
             CASE WHEN t.reasoning_end IS NULL OR t.position < t.reasoning_end THEN 'reasoning' ELSE 'answer' END AS
             part
           FROM (SELECT sample_id, source, run_id, reasoning_end, unnest(range(len(token_ids))) AS position,
               token_ids[position + 1] AS token_id, sampled_logprob[position + 1] AS logprob,
               sampled_rank[position + 1] AS rank, entropy[position + 1] AS entropy, topk_n[position + 1] AS support,
               draw_n[position + 1] AS draws, tail_codes[position + 1] AS tail_code,
               tail_logmass[position + 1] AS tail_logmass, mass[position + 1] AS mass,
               top1_codes[position + 1] AS top1_code, top1_logprobs[position + 1] AS top1_logprob
             FROM (SELECT *, list_select(topk_codes, first_entry) AS top1_codes,
                 list_select(topk_logprobs, first_entry) AS top1_logprobs
               FROM ({DISTRIBUTIONS}))) t
           {WITH_PIECES}"""
"""One row a token. Only positions are unnested: of several lists that are unnested together DuckDB computes every one,
and counting tokens would decode every distribution. The innermost SELECT keeps `list_select` to once a chain.
"""

TOPK = f"""SELECT t.sample_id, t.position, t.rank, t.token_id, v.piece, {TOPK_PROB} AS prob,
             CASE WHEN t.rank IS NULL THEN {TAIL_MASS} / draws ELSE {TOPK_PROB} END AS weight, t.rank IS NULL AS drawn
           FROM (SELECT * EXCLUDE (mass, tail_codes, tail_logmass, draw_n), mass[position + 1] AS mass,
               tail_codes[position + 1] AS tail_code, tail_logmass[position + 1] AS tail_logmass,
               draw_n[position + 1] AS draws
             FROM (SELECT sample_id, run_id, mass, tail_codes, tail_logmass, draw_n,
                 unnest(flatten(list_transform(entry_n, lambda n, i: list_resize([i - 1], n, i - 1)))) AS position,
                 unnest(flatten(list_transform(entry_n, lambda n, i: list_resize(range(1, topk_n[i] + 1), n)))) AS rank,
                 unnest(topk_ids) AS token_id, unnest(topk_codes) AS topk_code, unnest(topk_logprobs) AS topk_logprob
               FROM ({DISTRIBUTIONS}))) t
           {WITH_PIECES}"""


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def view_statements(files: CacheFiles, internal: str) -> list[str]:
    """CREATE VIEW statements in order; the schema `internal` takes views that are not for users."""
    views = {
        **_stored_views(files),
        **_verdict_views(files, internal),
        "chains": _chains(internal),
        **_storage_views(files, internal),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "topk": TOPK,
    }
    return [f"CREATE VIEW {name} AS {query}" for name, query in views.items()]


def _stored_views(files: CacheFiles) -> dict[str, str]:
    """What files hold, with the tokenizer or feature set that their names say."""
    return {
        "shards": _shards(files.chains),
        "failures": _select(FAILURE_SCHEMA, files.failures),
        "vocab": rf"""SELECT token_id, piece, is_special,
             regexp_extract(filename, '([^/\\]+)\.parquet$', 1) AS tokenizer
           FROM ({_select(VOCAB_SCHEMA, files.vocab, ("filename",))})""",
        # Payloads have known sizes, so that nobody need read them to add up bytes.
        "features": rf"""SELECT f.sample_id, f.chain_id, s.name AS feature_set, f.set_id,
             len(f.positions)::INTEGER AS num_stored, f.num_context, len(f.positions) * (s.vector_bytes_per_token
               + s.num_heads * (s.num_keys * CASE WHEN f.num_context > {SHORT_CONTEXT} THEN 5 ELSE 3 END + 1)) AS bytes,
             f.positions
           FROM (SELECT *, regexp_extract(filename, '([^/\\]+)[/\\][^/\\]+$', 1) AS set_id
             FROM ({_select(_KEYED, files.features, ("filename",))})) f JOIN feature_sets s USING (set_id)""",
    }


def _verdict_views(files: CacheFiles, internal: str) -> dict[str, str]:
    """The latest verdict of each judge, and the latest of all."""
    # arg_max_null, because arg_max skips NULL: an undecided latest verdict would show an older decision.
    latest = ", ".join(
        f"arg_max_null({name}, judged_at) AS {name}" for name in ("correct", "score", "rule", "compared")
    )
    return {
        "verdicts": f"""SELECT sample_id, judge, max(judged_at) AS judged_at, {latest}
           FROM ({_verdicts(files.verdicts)}) GROUP BY sample_id, judge""",
        f"{internal}.latest_verdicts": f"""SELECT sample_id, arg_max_null(judge, judged_at) AS judge, {latest}
           FROM verdicts GROUP BY sample_id""",
    }


def _chains(internal: str) -> str:
    return f"""SELECT s.sample_id, s.chain_id, s.prompt_id, s.sample_index, s.run_id, s.source, s.split,
             list_filter(s.messages, lambda m: m.role = 'user')[-1].content AS prompt, s.reference,
             s.text, s.reasoning, s.answer, v.correct, v.score, v.judge, v.rule, v.compared,
             s.finish_reason, s.finish_reason IN ('length', 'repetition') AS truncated,
             s.num_prompt_tokens, s.num_tokens, s.num_reasoning_tokens,
             s.reasoning_end, s.mean_logprob, s.mean_entropy, s.mean_top1_prob, s.mean_tail_mass, s.mean_support,
             {REPEATED_FRAC} AS repeated_frac, s.seed, s.worker, s.created_at, s.metadata
           FROM ({_windows()}) s LEFT JOIN {internal}.latest_verdicts v USING (sample_id)"""


def _storage_views(files: CacheFiles, internal: str) -> dict[str, str]:
    """Bytes of each column, and the file and row of each chain."""
    return {
        f"{internal}.parquet_columns": _parquet_columns(files.chains),
        "storage": f"""SELECT {FILE_OF.format("file_name")} AS file,
             split_part(path_in_schema, ', ', 1) AS column_name, sum(num_values)::BIGINT AS num_values,
             sum(total_compressed_size)::BIGINT AS bytes, sum(total_uncompressed_size)::BIGINT AS uncompressed_bytes
           FROM {internal}.parquet_columns GROUP BY ALL""",
        f"{internal}.row_groups": f"""SELECT {FILE_OF.format("file_name")} AS file, row_group_id,
             sum(num_rows) OVER (PARTITION BY file_name ORDER BY row_group_id) - num_rows AS first_row
           FROM (SELECT DISTINCT file_name, row_group_id, row_group_num_rows AS num_rows
             FROM {internal}.parquet_columns)""",
        f"{internal}.chain_places": f"""SELECT c.*, {FILE_OF.format("p.filename")} AS file,
             p.file_row_number AS row_in_file
           FROM chains c JOIN (SELECT sample_id, filename, file_row_number FROM shards) p USING (sample_id)""",
        # ASOF: the last row group that begins at or before the row.
        f"{internal}.chain_rows": f"""SELECT c.* EXCLUDE (row_in_file), g.row_group_id::INTEGER AS row_group,
             (c.row_in_file - g.first_row)::INTEGER AS row_in_group
           FROM {internal}.chain_places c ASOF JOIN {internal}.row_groups g
           ON c.file = g.file AND c.row_in_file >= g.first_row""",
    }


def _windows() -> str:
    """Shards with a hash of each window of a chain's tokens, made from hashes of pairs of windows half as wide."""
    rows, width = "SELECT *, token_ids AS windows FROM shards", 1
    while width < WINDOW_TOKENS:
        # True cuts to the shorter list, which leaves out windows that would pass the end.
        pairs = f"list_zip(windows, windows[{width + 1}:], true)"
        rows = f"SELECT * REPLACE (list_transform({pairs}, lambda pair: hash(pair)) AS windows) FROM ({rows})"
        width *= 2
    return rows


def _shards(files: Mapping[Layout, Sequence[str]]) -> str:
    """The rows of all layouts, with NULL for columns that a layout lacks.

    Files of one layout have one schema, so DuckDB need not open all of them first, as with `union_by_name`.
    """
    groups = []
    for layout, paths in files.items():
        own = set(chain_schema(*layout).names)
        groups.append(_select(table_schema(), paths, ("filename", "file_row_number"), own))
    return " UNION ALL ".join(groups) or _select(table_schema(), [], ("filename", "file_row_number"))


def _select(
    schema: pa.Schema, paths: Sequence[str], virtual: Sequence[str] = (), present: set[str] | None = None
) -> str:
    """SELECT of the schema's columns, NULL for those not `present` in the files (None: all are present)."""
    if not paths:
        columns = [f"NULL::{_sql_type(field.type)} AS {field.name}" for field in schema]
        extra = [f"NULL::{'VARCHAR' if name == 'filename' else 'BIGINT'} AS {name}" for name in virtual]
        return f"SELECT {', '.join([*columns, *extra])} WHERE false"
    columns = [
        field.name if present is None or field.name in present else f"NULL::{_sql_type(field.type)} AS {field.name}"
        for field in schema
    ]
    # Otherwise a folder named column=value on the cache's path would replace that column.
    options = "".join(f", {name} = true" for name in virtual) + ", hive_partitioning = false"
    return f"SELECT {', '.join([*columns, *virtual])} FROM read_parquet({_listed(paths)}{options})"


def _verdicts(paths: Sequence[str]) -> str:
    """The rows of all verdict files, NULL for columns that files of earlier versions lack."""
    empty = _select(VERDICT_SCHEMA, [])
    if not paths:
        return empty
    files = f"read_parquet({_listed(paths)}, union_by_name = true, hive_partitioning = false)"
    return f"{empty} UNION ALL BY NAME SELECT * FROM {files}"


def _parquet_columns(files: Mapping[Layout, Sequence[str]]) -> str:
    """One row per column chunk, from the shards' footers."""
    paths = [path for group in files.values() for path in group]
    columns = {"file_name": "VARCHAR", "path_in_schema": "VARCHAR"} | dict.fromkeys(
        ("row_group_id", "row_group_num_rows", "num_values", "total_compressed_size", "total_uncompressed_size"),
        "BIGINT",
    )
    if not paths:
        return f"SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in columns.items())} WHERE false"
    return f"SELECT {', '.join(columns)} FROM parquet_metadata({_listed(paths)})"


def _listed(paths: Sequence[str]) -> str:
    return f"[{', '.join(quote(path) for path in paths)}]"


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{field.name} {_sql_type(field.type)}' for field in kind)})"
    return SQL_TYPES[kind]
