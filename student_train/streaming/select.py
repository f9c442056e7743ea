"""Which chains a run trains on: a SQL condition, evaluated once at pinned versions of its caches and kept with the run.

In: caches, a condition over the view `chains`. Out: `selection.parquet`, one row a chain (where it lies, how long it
is, what it weighs), with a header that says what was asked of which versions. So a run can be repeated while its
caches grow. Cost: 28 bytes a chain in memory; no token is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.manifest import ShardHeader
from schemas.records import Float32
from shared.catalog import Catalog
from shared.condition import check_condition, dry_run, in_brackets, run_with
from shared.errors import ConfigError
from shared.filter_columns import ShardFooter, check_filter_columns
from shared.sql import open_cache
from shared.storage import Location
from student_train.streaming.selection import (
    SCHEMA,
    PinnedCache,
    Selection,
    SelectionHeader,
    keys_of,
    load_selection,
    totals_of,
    write_selection,
)


@dataclass(frozen=True, slots=True)
class CacheSource:
    """A cache to select from. `weight`: how often an epoch reads each of its chains; version None: the latest."""

    root: Location
    weight: float = 1.0
    chains_version: int | None = None
    verdicts_version: int | None = None


@dataclass(frozen=True, slots=True)
class SelectionRequest:
    """What to select. `where` is a SQL condition over `chains` (None: all), `weight` a SQL expression (None: 1)."""

    sources: Sequence[CacheSource]
    where: str | None = None
    weight: str | None = None
    max_chains: int | None = None
    """Keep so many of them, those with the smallest sample ids (which are hashes, so a fair sample); None keeps all."""
    any_tokenizer: bool = False
    """Do not refuse shards of several tokenizers: only the text will be read."""
    key: str = "data.where"
    """What `where` is called in the configuration, for messages."""


def open_selection(path: Path, request: SelectionRequest) -> Selection:
    """The selection kept at `path`, or a new one frozen there. Raises ConfigError where it was asked something else."""
    if not path.exists():
        return freeze(path, request)
    selection = load_selection(path, [source.root for source in request.sources])
    check_request(path, selection.header, request)
    return selection


def check_request(path: Path, header: SelectionHeader, request: SelectionRequest) -> None:
    """Raises ConfigError where a frozen selection answers another request."""
    asked: dict[str, tuple[object, object]] = {
        "where": (header.where, request.where),
        "weight": (header.weight, request.weight),
        "max_chains": (header.max_chains, request.max_chains),
    }
    for cache, source in zip(header.caches, request.sources, strict=True):
        asked[f"weight of {source.root}"] = (cache.weight, source.weight)
        if source.chains_version is not None:
            asked[f"chains_version of {source.root}"] = (cache.chains_version, source.chains_version)
        if source.verdicts_version is not None:
            asked[f"verdicts_version of {source.root}"] = (cache.verdicts_version, source.verdicts_version)
    for name, (kept, wanted) in asked.items():
        if kept != wanted:
            raise ConfigError(f"{path} was frozen with {name} {kept!r}, now it is {wanted!r}: name another run folder")


def freeze(path: Path, request: SelectionRequest) -> Selection:
    """Evaluates the request over the view `chains` of each cache and writes the answer to `path`.

    Rows of weight 0 and rows without a prompt or completion token are left out and counted. Raises ConfigError for SQL
    that DuckDB refuses, an empty selection, weights that are negative or not finite, or shards of different tokenizers.
    """
    _check_sources(request.sources)
    catalogs = [Catalog(source.root, source.chains_version, source.verdicts_version) for source in request.sources]
    answers = [_query(catalog, number, request) for number, catalog in enumerate(catalogs)]
    rows = pa.concat_tables([found for found, _ in answers])
    if not rows.num_rows:
        raise ConfigError(_empty_message(catalogs, request))
    weights = rows.column("weight").to_numpy()
    _check_weights(weights, request.weight)
    usable = (rows.column("num_tokens").to_numpy() > 0) & (rows.column("num_prompt_tokens").to_numpy() > 0)
    rows = _first_by_id(rows.filter(pa.array(usable & (weights > 0))), request.max_chains)
    if not rows.num_rows:
        raise ConfigError(f"{request.key} {request.where!r} selects only chains that are empty or weigh 0: widen it")
    rows, headers = _locate(catalogs, [footers for _, footers in answers], rows)
    if not request.any_tokenizer:
        check_one_tokenizer(headers)
    header = SelectionHeader(
        caches=[
            PinnedCache(
                root=str(catalog.root.resolve()),
                weight=source.weight,
                chains_version=catalog.chains.version,
                verdicts_version=catalog.verdicts.version,
            )
            for catalog, source in zip(catalogs, request.sources, strict=True)
        ],
        where=request.where,
        weight=request.weight,
        max_chains=request.max_chains,
        num_zero_weight=int((usable & (weights == 0)).sum()),
        num_empty=int((~usable).sum()),
        teacher_fingerprints=sorted({one.teacher_fingerprint for one in headers.values()}),
        tokenizer_fingerprints=sorted({one.tokenizer_fingerprint for one in headers.values()}),
        template_fingerprints=sorted({one.template_fingerprint for one in headers.values()}),
        codecs=sorted({one.codec for one in headers.values()}),
        vocab_size=max(one.vocab_size for one in headers.values()),
        max_support=max(one.max_support for one in headers.values()),
        draws=min(one.draws for one in headers.values()),
        temperatures=sorted(set.intersection(*(set(one.temperatures) for one in headers.values()))),
        **totals_of(rows),
    )
    return write_selection(path, rows, header)


def check_one_tokenizer(headers: dict[str, ShardHeader]) -> None:
    """Raises ConfigError naming two shards whose tokenizers differ."""
    first_path, first = next(iter(headers.items()))
    for path, header in headers.items():
        if header.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise ConfigError(
                f"selected shards have two tokenizers: {first_path} has {first.tokenizer_fingerprint}, {path} has "
                f"{header.tokenizer_fingerprint}: select one with data.where, or train on text alone (data.kind: text)"
            )


def _check_sources(sources: Sequence[CacheSource]) -> None:
    if not sources:
        raise ConfigError("no cache is named: a selection needs at least one")
    roots = [source.root.resolve() for source in sources]
    for source, root in zip(sources, roots, strict=True):
        if roots.count(root) > 1:
            raise ConfigError(f"cache {source.root} is named twice: give it a weight to read it more often")
        # Below a millionth, the unit that repeats are counted in, no epoch would ever read a chain.
        if not 0.001 <= source.weight <= 1000:
            raise ConfigError(f"cache {source.root} has weight {source.weight}: weights lie between 0.001 and 1000")


def _query(catalog: Catalog, number: int, request: SelectionRequest) -> tuple[pa.Table, dict[str, ShardFooter]]:
    """Places, lengths and weights of the chains that the condition picks, and the footers of all shards by path."""
    where, weight = request.where, request.weight
    condition = f"WHERE {in_brackets(where)}" if where is not None else ""
    expression = in_brackets(weight) if weight is not None else "1"
    footers = check_filter_columns(catalog, f"{where} {weight}")
    with open_cache(catalog) as session:
        check_condition(session, request.key, where)
        if weight is not None:
            dry_run(session, "data.weight", weight, f"SELECT CAST({expression} AS FLOAT) FROM chains LIMIT 0")
        query = (
            f"SELECT {number}::SMALLINT AS cache, file, row_in_file, sample_id, num_prompt_tokens, num_tokens, "
            f"CAST({expression} AS FLOAT) AS weight FROM chain_places {condition} ORDER BY file, row_in_file"
        )
        given = {name: sql for name, sql in ((request.key, where), ("data.weight", weight)) if sql is not None}
        rows = run_with(session, " or ".join(given), " / ".join(given.values()), query)
    # A NULL weight reads as nan and is refused with the other bad weights.
    filled = rows.column("weight").fill_null(float("nan"))
    return rows.set_column(rows.schema.get_field_index("weight"), "weight", filled), footers


def _first_by_id(rows: pa.Table, max_chains: int | None) -> pa.Table:
    if max_chains is None or rows.num_rows <= max_chains:
        return rows
    order = np.argsort(keys_of(rows.column("sample_id"), "the selection"), kind="stable")
    return rows.take(pa.array(np.sort(order[:max_chains])))


def _empty_message(catalogs: Sequence[Catalog], request: SelectionRequest) -> str:
    names = ", ".join(str(catalog.root) for catalog in catalogs)
    total = sum(file.num_rows for catalog in catalogs for file in catalog.chains.files())
    if not total:
        return f"{names} holds no chains yet: build some first with `teacher-cache build`"
    return (
        f"{request.key} {request.where!r} selects none of the {total} chains of {names}: widen it (`teacher-cache sql` "
        "tries it)"
    )


def _check_weights(weights: Float32, expression: str | None) -> None:
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        raise ConfigError(
            f"data.weight {expression!r} is {weights[bad][0]} for {int(bad.sum())} of {len(weights)} chains: weights "
            "are finite and not negative (coalesce() mends NULL)"
        )


def _locate(
    catalogs: Sequence[Catalog], footers: Sequence[dict[str, ShardFooter]], rows: pa.Table
) -> tuple[pa.Table, dict[str, ShardHeader]]:
    """Rows as a selection keeps them (SCHEMA), with `row_in_file` as row group and row in it; headers by shard."""
    cache_R, row_R = rows.column("cache").to_numpy(), rows.column("row_in_file").to_numpy()
    encoded = rows.column("file").combine_chunks().dictionary_encode()
    file_R = encoded.indices.to_numpy()
    starts = np.flatnonzero(np.diff(cache_R, prepend=-1) | np.diff(file_R, prepend=-1)).tolist()
    files = encoded.dictionary.to_pylist()
    group_R, place_R = np.zeros(len(row_R), np.int32), np.zeros(len(row_R), np.int32)
    headers = {}
    for start, stop in zip(starts, [*starts[1:], len(row_R)], strict=True):
        cache, file = int(cache_R[start]), files[file_R[start]]
        footer, mine = footers[cache][file], slice(start, stop)
        group_R[mine] = np.searchsorted(footer.first_rows_G, row_R[mine], side="right") - 1
        place_R[mine] = row_R[mine] - footer.first_rows_G[group_R[mine]]
        headers[str(catalogs[cache].chains.folder / file)] = footer.header
    columns = {**{name: rows.column(name) for name in rows.column_names}, "row_group": group_R, "row_in_group": place_R}
    return pa.Table.from_pydict({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA), headers
