"""SQL over a cache: locked DuckDB views on exactly the files that the catalog shows. Only this file imports duckdb.

The views are in a small database file that is made for the session and opened read-only. The configuration is then
locked with external access off, so that a query can read the cache's files and nothing else, and write nowhere.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pyarrow as pa

from stillroom.cache.catalog import Catalog, DataFile, Table, check_hash
from stillroom.cache.shards import open_shard
from stillroom.errors import ConfigError, CorruptError, DataError, StillroomError
from stillroom.schema.manifest import RunManifest
from stillroom.sql.views import CacheFiles, Layout, quote, view_statements
from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import Location, atomic_path

if TYPE_CHECKING:
    import duckdb

REWRITTEN = ("copied-", "mended-")
"""Prefixes of shards made from other shards."""
OPENED_TOGETHER = 8
HASHED_BYTES = 64 * 2**20
"""Each session hashes verdict files up to this total: a fraction of a second."""
T = TypeVar("T")
DAMAGE_SIGNS = ("IO Error", "No magic bytes", "TProtocolException", "Snappy", "ZSTD", "Parquet file")
"""Parts of DuckDB's messages about missing or damaged files."""
LINE_NUMBER = re.compile(r"\bLINE (\d+):")
SCHEMA_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
RESERVED_NAMES = ("main", "temp", "system", "information_schema", "pg_catalog")
READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
"""Nodes of DuckDB's syntax tree that only read; there are others for COPY, INSERT and the like in a WITH clause."""
# Only words in the parentheses: strings or parentheses could make what follows look like another query.
EXPLAIN_PREFIX = re.compile(r"EXPLAIN\s+(?:ANALYZE\s+)?(?:\([A-Za-z_,\s]*\)\s*)?", re.IGNORECASE)


class Session:
    """A locked DuckDB connection over one or more caches; a context manager.

    Queries run in a separate thread, so that Ctrl-C ends the query and leaves the session usable.
    """

    def __init__(self, catalogs: Mapping[str, Catalog]) -> None:
        """Creates the views; those of the cache named `main` need no prefix.

        Raises ConfigError for a name that is not a plain SQL identifier, CorruptError for missing or damaged shards.
        """
        import duckdb

        self._folder = tempfile.TemporaryDirectory(prefix="stillroom-sql-")
        database = Path(self._folder.name) / "views.duckdb"
        try:
            paths = _create_database(database, catalogs)
            self.connection = duckdb.connect(str(database), read_only=True)
            self._schemes = _register_stores(self.connection, catalogs)
            _lock(self.connection, paths)
        except BaseException:
            self._folder.cleanup()
            raise
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="query")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def arrow(self, query: str) -> pa.Table:
        """The whole result. Raises ConfigError with DuckDB's reason if the query is wrong or not allowed."""
        return self.batches(query).read_all()

    def batches(self, query: str, rows_per_batch: int = 8192) -> pa.RecordBatchReader:
        """The result as a stream of record batches, for results larger than memory; several may be open at once.

        Raises ConfigError or CorruptError, also while being read.
        """
        cursor = self.connection.cursor()
        reader = self._run(cursor, lambda: _start(cursor, query, rows_per_batch))
        return pa.RecordBatchReader.from_batches(reader.schema, self._pull(cursor, reader))

    def relation(self, query: str) -> "duckdb.DuckDBPyRelation":
        """The query as a DuckDB relation, which runs when rows are requested. Raises ConfigError as `batches` does."""
        import duckdb

        cursor = self.connection.cursor()
        try:
            return cursor.sql(_require_select(cursor, query))
        except duckdb.Error as error:
            raise query_error(error) from error

    def statements(self, text: str) -> list[str]:
        """The statements in `text`, separated by `;`. Raises ConfigError if one cannot be parsed."""
        import duckdb

        try:
            return [statement.query for statement in self.connection.extract_statements(text)]
        except duckdb.Error as error:
            raise query_error(error) from error

    def _pull(self, cursor: "duckdb.DuckDBPyConnection", reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        # With a default, because a future that raises StopIteration never ends.
        def next_batch() -> pa.RecordBatch | None:
            return next(reader, None)

        while (batch := self._run(cursor, next_batch)) is not None:
            yield batch

    def _run(self, cursor: "duckdb.DuckDBPyConnection", work: Callable[[], T]) -> T:
        import duckdb

        future = self._thread.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            _interrupt(cursor, future)
            raise
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise query_error(error) from error

    def explain(self, query: str) -> str:
        """DuckDB's plan, which shows the columns and filters pushed down to Parquet."""
        rows = self.arrow(f"EXPLAIN {query}").to_pylist()
        return "\n".join(str(row["explain_value"]) for row in rows)

    def close(self) -> None:
        """Closes the connection and removes the session's database."""
        self._thread.shutdown()
        for scheme in self._schemes:
            self.connection.unregister_filesystem(scheme)
        self.connection.close()
        self._folder.cleanup()


def open_session(catalog: Catalog) -> Session:
    """A session over one cache, at the versions of the catalog."""
    return Session({"main": catalog})


def export_views(catalogs: Mapping[str, Catalog], path: Path) -> None:
    """Writes the views to a database file for the duckdb program and notebooks, replacing an older one.

    The views name the current shards by absolute path. No data is copied; chains built later appear after the next
    export. Such a file is not locked.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the database file to write, for example views.duckdb")
    with atomic_path(path) as temp:
        _create_database(temp, catalogs)


def query_error(error: Exception, num_lines_before: int = 0) -> Exception:
    """DuckDB's error as one line for the user: CorruptError for a damaged file, else ConfigError about the query.

    `num_lines_before` is the number of lines before the user's own, which DuckDB counts too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        # DuckDB calls Python only for stillroom.sql.object_files; the last line is its error.
        kind, _, problem = lines[-1].partition(": ")
        return CorruptError(f"{problem} is missing") if kind == "FileNotFoundError" else StillroomError(problem)
    text = " ".join(lines[:2]) if lines else type(error).__name__
    if any(sign in text for sign in DAMAGE_SIGNS):
        return CorruptError(f"{text} (`teacher-cache verify` lists what is wrong)")
    text = LINE_NUMBER.sub(lambda found: f"LINE {int(found[1]) - num_lines_before}:", text)
    return ConfigError(f"query: {text}")


def visible_files(catalog: Catalog) -> CacheFiles:
    """Every visible file by table, shards by layout. Raises CorruptError as `require_sound` does."""
    require_sound(catalog)

    def visible(table: Table) -> list[str]:
        return [str(table.path_of(file).absolute()) for file in table.files()]

    by_layout: dict[Layout, list[str]] = {}
    codecs: dict[str, set[str]] = {}
    for layout, files in _alike(catalog):
        by_layout.setdefault(layout, []).extend(str(catalog.chains.path_of(file).absolute()) for file in files)
        codecs.setdefault(_run_of(files[0]), set()).add(layout[0])
    return CacheFiles(
        chains=by_layout,
        verdicts=visible(catalog.verdicts),
        failures=visible(catalog.failures),
        vocab=[str(path.absolute()) for path in catalog.vocab_paths()],
        codecs={run_id: ", ".join(sorted(names)) for run_id, names in codecs.items()},
    )


def require_sound(catalog: Catalog) -> None:
    """Raises CorruptError if a registered file is missing or has another size, or a verdict file another hash.

    Only for a cache on disk: in an object store each check is a request, and a query reports what it does not find.
    """
    if not isinstance(catalog.root, Path):
        return
    remedy = f"teacher-cache verify {catalog.root} --quarantine"
    for table in (catalog.chains, catalog.verdicts, catalog.failures):
        for file in table.files():
            path = table.path_of(file)
            if not path.exists():
                raise CorruptError(f"{path} is registered but missing: {remedy}")
            size_bytes = path.stat().st_size
            if size_bytes != file.size_bytes:
                raise CorruptError(f"{path} has {size_bytes} bytes, {file.size_bytes} were registered: {remedy}")
    # DuckDB verifies no page checksums, and one flipped bit in a verdict changes counts without an error.
    left_bytes = HASHED_BYTES
    for file in catalog.verdicts.files():
        left_bytes -= file.size_bytes
        if left_bytes < 0:
            return
        try:
            check_hash(catalog.verdicts.path_of(file))
        except CorruptError as error:
            raise CorruptError(f"{error}: {remedy}") from error


def run_rows(runs: Mapping[str, RunManifest], codecs: Mapping[str, str]) -> Iterator[list[Any]]:
    """Rows of the table `runs`; `codecs` are those of a run's shards now, which `copy --round` may have changed."""
    for run in runs.values():
        dumped = run.model_dump(mode="json")
        yield [
            run.run_id,
            run.name,
            run.kind,
            run.created_at,
            run.teacher.model,
            run.teacher.fingerprint,
            run.teacher.tokenizer_fingerprint,
            codecs.get(run.run_id, run.capture.get("codec")),
            *(
                json.dumps(dumped[key], sort_keys=True)
                for key in ("sampling", "capture", "engine", "prompts", "software")
            ),
        ]


def _alike(catalog: Catalog) -> list[tuple[Layout, list[DataFile]]]:
    """Shards grouped by layout.

    All shards that a run's build wrote are alike, so one of them is opened. Those that `copy` and `verify --quarantine`
    wrote may differ (with one footer per run, draws of a run of mixed versions showed as NULL), so each is opened.
    """
    alike: dict[str, list[DataFile]] = {}
    for file in catalog.chains.files():
        is_rewritten = file.path.rpartition("/")[2].startswith(REWRITTEN)
        alike.setdefault(file.path if is_rewritten else _run_of(file), []).append(file)
    firsts = [catalog.chains.path_of(files[0]) for files in alike.values()]
    with ThreadPoolExecutor(OPENED_TOGETHER) as pool:
        layouts = list(pool.map(_layout_of, firsts))
    return list(zip(layouts, alike.values(), strict=True))


def _run_of(file: DataFile) -> str:
    return file.path.partition("/")[0]


def _layout_of(path: Location) -> Layout:
    file, header = open_shard(path)
    file.close()
    return header.codec, header.format_version


def _interrupt(cursor: "duckdb.DuckDBPyConnection", future: Future[T]) -> None:
    # An interrupt before the query has started is lost, so repeat it until the query ends.
    while not future.done():
        cursor.interrupt()
        # A second Ctrl-C must not leave a running query behind, which the next one would wait for.
        with contextlib.suppress(StillRunning, KeyboardInterrupt):
            future.exception(timeout=0.05)


def _create_database(path: Path, catalogs: Mapping[str, Catalog]) -> list[str]:
    """Creates a DuckDB file with the views of all caches; returns the Parquet files that they read."""
    import duckdb

    paths: list[str] = []
    try:
        with duckdb.connect(str(path)) as connection:
            _register_stores(connection, catalogs)
            for name, catalog in catalogs.items():
                files = visible_files(catalog)
                _create_views(connection, name, files, catalog.runs())
                paths.extend(files.paths())
    except duckdb.Error as error:
        raise query_error(error) from error
    return paths


def _register_stores(connection: "duckdb.DuckDBPyConnection", catalogs: Mapping[str, Catalog]) -> list[str]:
    """Lets the connection read the object stores of the caches; returns their schemes."""
    schemes = sorted({one.root.scheme for one in catalogs.values() if isinstance(one.root, ObjectPath)})
    if schemes:
        from stillroom.sql.object_files import ObjectFiles

        for scheme in schemes:
            connection.register_filesystem(ObjectFiles(scheme))
    return schemes


def _create_views(
    connection: "duckdb.DuckDBPyConnection", schema: str, files: CacheFiles, runs: Mapping[str, RunManifest]
) -> None:
    if schema != "main":
        if not SCHEMA_NAME.match(schema) or schema.lower() in RESERVED_NAMES:
            raise ConfigError(f"cache name {schema!r} is not a free SQL name: use letters, digits and underscores")
        connection.execute(f'CREATE SCHEMA "{schema}"')
    connection.execute(f'USE "{schema}"')
    _create_runs(connection, runs, files.codecs)
    for statement in view_statements(files):
        connection.execute(statement)
    connection.execute("USE main")


def _create_runs(
    connection: "duckdb.DuckDBPyConnection", runs: Mapping[str, RunManifest], codecs: Mapping[str, str]
) -> None:
    connection.execute(
        "CREATE TABLE runs (run_id VARCHAR, name VARCHAR, kind VARCHAR, created_at TIMESTAMPTZ, teacher VARCHAR,"
        " teacher_fingerprint VARCHAR, tokenizer VARCHAR, codec VARCHAR, sampling JSON, capture JSON, engine JSON,"
        " prompts JSON, software JSON)"
    )
    for row in run_rows(runs, codecs):
        connection.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", row)


def _lock(connection: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> None:
    # Not enough: DuckDB 2.0 still writes to an allowed path for some forms of COPY, also in a WITH clause, which
    # `_require_select` refuses.
    listed = ", ".join(quote(path) for path in paths)
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute("SET GLOBAL parquet_metadata_cache = true")
    connection.execute(f"SET allowed_paths = [{listed}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _start(connection: "duckdb.DuckDBPyConnection", query: str, rows_per_batch: int) -> pa.RecordBatchReader:
    explain, select = _split_explain(query)
    select = _require_select(connection, select)
    return connection.sql(explain + select).to_arrow_reader(rows_per_batch)


def _split_explain(query: str) -> tuple[str, str]:
    """`EXPLAIN`, `EXPLAIN ANALYZE` or nothing, and the query without it and without comments before it."""
    import duckdb

    words = [offset for offset, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment]
    # Offsets count bytes.
    begun = query.encode()[words[0] :].decode() if words else ""
    prefix = EXPLAIN_PREFIX.match(begun)
    return (prefix[0], begun[prefix.end() :]) if prefix else ("", begun)


def _require_select(connection: "duckdb.DuckDBPyConnection", query: str) -> str:
    """The query without its last `;`. Raises ConfigError unless it is one SELECT (DESCRIBE, SHOW and SUMMARIZE count).

    The lock alone is not enough: DuckDB may write to the paths it may read, and `COPY ... (USE_TMP_FILE false)` would
    truncate a shard, also inside a WITH clause of a SELECT and under EXPLAIN ANALYZE. What is run must be the very text
    that was looked at.
    """
    import duckdb

    select = _without_end(query)
    statements = connection.extract_statements(select)
    kinds = [statement.type.name for statement in statements]
    if not kinds:
        raise ConfigError("query: it is empty: write one SELECT")
    if set(kinds) == {"SELECT"} and len(kinds) > 1:
        raise ConfigError(f"query: {len(kinds)} SELECTs given: run one at a time")
    if kinds != ["SELECT"]:
        found = " and ".join(map(_kind_of, statements))
        raise ConfigError(f"query: one SELECT (or EXPLAIN of one) is allowed here, found {found}: a cache is read-only")
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchone()
    tree = json.loads(row[0]) if row else {"error": True}
    if tree["error"] or not _only_reads(tree):
        raise ConfigError("query: part of it is not a SELECT: a cache is read-only")
    # Planned inside another SELECT, where DuckDB itself refuses WITH clauses that write.
    try:
        connection.execute(f"EXPLAIN SELECT * FROM (\n{select}\n)")
    except duckdb.Error as error:
        raise query_error(error, num_lines_before=1) from error
    return select


def _only_reads(tree: Any) -> bool:
    if isinstance(tree, list):
        return all(_only_reads(one) for one in tree)
    if not isinstance(tree, dict):
        return True
    kind = tree.get("type")
    if (isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES) or "info_type" in tree:
        return False
    return all(_only_reads(one) for one in tree.values())


def _kind_of(statement: "duckdb.Statement") -> str:
    """INSERT, COPY and the like; the user's own word if DuckDB has another one (PIVOT is MULTI)."""
    kind = statement.type.name
    return statement.query.split()[0].upper() if kind in ("MULTI", "LOAD") else kind.replace("_", " ")


def _without_end(query: str) -> str:
    """The query without a final `;` and comments around it."""
    import duckdb

    text = query.encode()
    for offset, kind in reversed(duckdb.tokenize(query)):
        if kind != duckdb.token_type.comment and text[offset : offset + 1] != b";":
            break
        text = text[:offset]
    return text.decode()
