"""Which chains a run trains on: a SQL condition, evaluated once at pinned versions of its caches and kept with the run.

In: caches, a condition over the view `chains`. Out: `selection.parquet`, one row per chain, with a header that records
the request and the versions. So a run can be repeated while its caches grow. Cost: 28 bytes a chain in memory; no token
is read.

Columns that SQL selects chains by are read first, with their page checksums: DuckDB reads Parquet without verifying
them, so a changed byte in `split` could bring a held-out chain into training without a word. What training itself reads
is verified whenever it is read.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from stillroom.cache.catalog import Catalog, DataFile, check_hash
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import ConfigError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Float32, Int64
from stillroom.schema.tables import CHAIN_FIELDS
from stillroom.sql.conditions import check_condition, dry_run, in_brackets, run_with, shown
from stillroom.sql.session import Session, open_session
from stillroom.storage.paths import Location
from student_train.data.kept_ids import KeptIds, ids_of
from student_train.data.selection import (
    SCHEMA,
    PinnedCache,
    Selection,
    SelectionHeader,
    keys_of,
    load_selection,
    totals_of,
    write_selection,
)

MAX_WEIGHT = 1e6
CHECKED_TOGETHER = 16
"""Shards read at a time: on distant storage each row group costs a round trip."""

LARGE = {
    "messages": ("messages", "prompt"),
    "prompt_token_ids": ("prompt_token_ids",),
    "metadata": ("metadata",),
    "reference": ("reference",),
    "text": ("text",),
    "reasoning": ("reasoning",),
    "answer": ("answer",),
}
"""Columns of text, verified only where the condition names them, and the names that SQL has for each."""


@dataclass(frozen=True, slots=True)
class ShardFooter:
    """What a shard's footer says: its header, and the number of the first row of each of its row groups, int64 [G]."""

    header: ShardHeader
    first_rows_G: Int64


def filter_columns(condition: str) -> list[str]:
    """Columns that a SQL `condition` over `chains` can depend on: small ones, and large ones that it names."""
    words = set(re.findall(r"\w+", condition.lower()))
    small = [field.name for field in CHAIN_FIELDS if not pa.types.is_list(field.type) and field.name not in LARGE]
    # Words rather than a parse: a word too many only verifies a column too many.
    return [*small, *(name for name, names in LARGE.items() if words.intersection(names))]


def check_columns(catalog: Catalog, columns: Sequence[str]) -> dict[str, ShardFooter]:
    """Verifies columns of all shards, and the verdicts.

    Returns the footers that were read for it, by the shard's path below `chains`. Raises CorruptError naming the shard
    and row group, or the file of verdicts, that is damaged.
    """

    def check_shard(file: DataFile) -> ShardFooter:
        path = catalog.chains.path_of(file)
        shard, header = open_shard(path)
        with shard:
            sizes_G = [
                read_row_group(shard, group, columns, str(path)).num_rows for group in range(shard.num_row_groups)
            ]
        return ShardFooter(header, np.cumsum(sizes_G, dtype=np.int64) - np.array(sizes_G, np.int64))

    files = catalog.chains.files()
    with ThreadPoolExecutor(CHECKED_TOGETHER) as pool:
        # Verdicts decide about `correct` and are small: whole files are hashed instead of single columns.
        verdicts = pool.map(check_hash, map(catalog.verdicts.path_of, catalog.verdicts.files()))
        footers = dict(zip([file.path for file in files], pool.map(check_shard, files), strict=True))
        # A list, so that the first error is raised here.
        list(verdicts)
    return footers


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
    """At most this many, those with the smallest sample ids (hashes, so a fair sample); None keeps all."""
    any_tokenizer: bool = False
    """Do not refuse shards of several tokenizers: only the text will be read."""
    key: str = "data.where"
    """What `where` is called in the configuration, for messages."""
    kept_ids: KeptIds | None = None
    """Of a student whose vocabulary is cut."""
    opened: "OpenCaches | None" = field(default=None, compare=False, repr=False)
    """Where several selections ask the same caches."""


class OpenCaches:
    """Caches opened for SQL, whose columns are verified once for all selections that ask them; a context manager."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, int, int], Session] = {}
        self._checked: dict[tuple[str, int, int], tuple[set[str], dict[str, ShardFooter]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.close()

    def session(self, catalog: Catalog) -> Session:
        """Of the cache at the catalog's versions."""
        key = _versions_of(catalog)
        if key not in self._sessions:
            self._sessions[key] = open_session(catalog)
        return self._sessions[key]

    def footers(self, catalog: Catalog, condition: str) -> dict[str, ShardFooter]:
        """Those of all shards by path, once all is verified that `condition` can depend on. Raises CorruptError."""
        key, columns = _versions_of(catalog), filter_columns(condition)
        if key not in self._checked or not self._checked[key][0].issuperset(columns):
            self._checked[key] = set(columns), check_columns(catalog, columns)
        return self._checked[key][1]


def _versions_of(catalog: Catalog) -> tuple[str, int, int]:
    return str(catalog.root), catalog.chains.version, catalog.verdicts.version


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
        "kept_ids": (header.kept_ids, None if request.kept_ids is None else request.kept_ids.packed),
    }
    # Versions that the request leaves open were pinned when it was frozen.
    for cache, source in zip(header.caches, request.sources, strict=True):
        asked[f"weight of {source.root}"] = (cache.weight, source.weight)
        if source.chains_version is not None:
            asked[f"chains_version of {source.root}"] = (cache.chains_version, source.chains_version)
        if source.verdicts_version is not None:
            asked[f"verdicts_version of {source.root}"] = (cache.verdicts_version, source.verdicts_version)
    for name, (kept, wanted) in asked.items():
        if kept != wanted:
            raise ConfigError(
                f"{path} was frozen with {name} {kept!r}, now it is {wanted!r}: choose another run folder"
            )


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
    # A loss needs a token to predict, and a first token something that it follows from.
    usable = (rows.column("num_tokens").to_numpy() > 0) & (rows.column("num_prompt_tokens").to_numpy() > 0)
    # After the check of weights, so that no row that is left out hides a bad one.
    rows = _first_by_id(rows.filter(pa.array(usable & (weights > 0))), request.max_chains)
    if not rows.num_rows:
        raise ConfigError(
            f"{request.key} {shown(request.where)} selects only chains that are empty or have weight 0: widen it"
        )
    rows, headers = _locate(catalogs, [footers for _, footers in answers], rows)
    kept = request.kept_ids
    if not request.any_tokenizer:
        check_one_tokenizer(headers)
    header = SelectionHeader(
        caches=[
            PinnedCache(
                # Absolute: a run may be resumed from another folder.
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
        vocab_size=max(one.vocab_size for one in headers.values()) if kept is None else len(ids_of(kept.packed)),
        max_support=max(one.max_support for one in headers.values()),
        # What not every shard has cannot be used: a pack may mix rows of all of them.
        # The draws of a tail that lost ids would stand for too little: it becomes one bucket.
        draws=min(one.draws for one in headers.values()) if kept is None or kept.has_all_stored else 0,
        temperatures=sorted(set.intersection(*(set(one.temperatures) for one in headers.values()))),
        kept_ids=None if kept is None else kept.packed,
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
                f"{header.tokenizer_fingerprint}: select one with data.where, or set data.kind to projected or text"
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
    if request.opened is None:
        with OpenCaches() as caches:
            return _query(catalog, number, replace(request, opened=caches))
    where, weight = request.where, request.weight
    condition = f"WHERE {in_brackets(where)}" if where is not None else ""
    expression = in_brackets(weight) if weight is not None else "1"
    # Before the query, which would read damaged columns without noticing.
    footers = request.opened.footers(catalog, f"{where} {weight}")
    session = request.opened.session(catalog)
    check_condition(session, request.key, where)
    if weight is not None:
        dry_run(session, "data.weight", weight, f"SELECT CAST({expression} AS FLOAT) FROM chains LIMIT 0")
    query = (
        f"SELECT {number}::SMALLINT AS cache, file, row_in_file, sample_id, num_prompt_tokens, num_tokens, "
        f"CAST({expression} AS FLOAT) AS weight FROM internal.chain_places {condition} ORDER BY file, row_in_file"
    )
    given = {name: sql for name, sql in ((request.key, where), ("data.weight", weight)) if sql is not None}
    rows = run_with(session, " or ".join(given), " / ".join(given.values()), query)
    # A NULL weight reads as nan and is refused with the other bad weights.
    filled = rows.column("weight").fill_null(float("nan"))
    return rows.set_column(rows.schema.get_field_index("weight"), "weight", filled), footers


def _first_by_id(rows: pa.Table, max_chains: int | None) -> pa.Table:
    if max_chains is None or rows.num_rows <= max_chains:
        return rows
    # Ids are hashes, so the smallest are a fair sample, and a grown cache keeps most of it.
    order = np.argsort(keys_of(rows.column("sample_id"), "the selection"), kind="stable")
    # Back in the order of files, in which they are read.
    return rows.take(pa.array(np.sort(order[:max_chains])))


def _empty_message(catalogs: Sequence[Catalog], request: SelectionRequest) -> str:
    names = ", ".join(str(catalog.root) for catalog in catalogs)
    total = sum(file.num_rows for catalog in catalogs for file in catalog.chains.files())
    if not total:
        return f"{names} holds no chains yet: build some first with `teacher-cache build`"
    return (
        f"{request.key} {shown(request.where)} selects none of the {total} chains of {names}: widen it (`teacher-cache "
        "sql` runs it)"
    )


def _check_weights(weights: Float32, expression: str | None) -> None:
    # Above MAX_WEIGHT the gradients of a batch would overflow. nan compares as bad.
    bad = ~((weights >= 0) & (weights <= MAX_WEIGHT))
    if bad.any():
        raise ConfigError(
            f"data.weight {expression!r} is {weights[bad][0]:g} for {int(bad.sum())} of {len(weights)} chains: weights "
            f"lie between 0 and {MAX_WEIGHT:g} (only their ratios matter: divide; use coalesce() for NULL)"
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
        # The last row group that begins at or before the row.
        group_R[mine] = np.searchsorted(footer.first_rows_G, row_R[mine], side="right") - 1
        place_R[mine] = row_R[mine] - footer.first_rows_G[group_R[mine]]
        headers[str(catalogs[cache].chains.folder / file)] = footer.header
    columns = {**{name: rows.column(name) for name in rows.column_names}, "row_group": group_R, "row_in_group": place_R}
    return pa.Table.from_pydict({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA), headers
