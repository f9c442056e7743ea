"""SQL over a cache: locked DuckDB views on exactly the files that the catalog shows.

The views are in a small database file that is made for the session and opened read-only. The configuration is then
locked with external access off, so that a query can read the cache's files, and those that the user added by name, and
nothing else, and write nowhere.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pyarrow as pa

from stillroom.cache.catalog import Catalog, DataFile, Table, check_hash
from stillroom.cache.features import read_sets, vectors_token_bytes
from stillroom.cache.shards import open_shard
from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.schema.features import SetManifest
from stillroom.schema.manifest import RunManifest
from stillroom.sql.statements import prepare, query_error, require_select
from stillroom.sql.user_files import create_tables, require_free
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
STORAGE_VERSION = "v1.5.0"
"""Of the database file, so that the duckdb program opens exported views: its newest release is older than our library.
"""
SCHEMA_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
RESERVED_NAMES = ("main", "internal", "temp", "system", "information_schema", "pg_catalog")


class Session:
    """A locked DuckDB connection over one or more caches; a context manager.

    Queries run in a separate thread, so that Ctrl-C ends the query and leaves the session usable.
    """

    def __init__(
        self,
        catalogs: Mapping[str, Catalog],
        files: Mapping[str, Path] | None = None,
        num_threads: int | None = None,
        memory: str | None = None,
    ) -> None:
        """Creates the views; those of the cache named `main` need no prefix. `files` are the user's own tables by name.

        `memory` is a size such as 4GB; what does not fit goes to temporary files. Raises ConfigError for a name that is
        not a plain SQL identifier, a file that is not a table, or an invalid size; CorruptError for missing or damaged
        shards.
        """
        import duckdb

        self._folder = tempfile.TemporaryDirectory(prefix="stillroom-sql-")
        database = Path(self._folder.name) / "views.duckdb"
        try:
            # Created in a connection of its own: the one that users query opens the finished file read-only.
            paths = _create_database(database, catalogs, files or {})
            self.connection = duckdb.connect(str(database), read_only=True)
            self._schemes = _register_stores(self.connection, catalogs)
            _limit(self.connection, num_threads, memory)
            _lock(self.connection, paths)
        except BaseException:
            self._folder.cleanup()
            raise
        # Python handles signals in the main thread only, which must not be inside DuckDB when Ctrl-C comes.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="query")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arrow(self, query: str) -> pa.Table:
        """The whole result. Raises ConfigError with DuckDB's reason if the query is wrong or not allowed."""
        return self.batches(query).read_all()

    def batches(self, query: str, rows_per_batch: int = 8192) -> pa.RecordBatchReader:
        """The result as a stream of record batches, for results larger than memory; several may be open at once.

        Raises ConfigError or CorruptError, also while being read.
        """
        cursor = self._cursor()
        reader = self._run(cursor, lambda: _start(cursor, query, rows_per_batch))
        return pa.RecordBatchReader.from_batches(reader.schema, self._pull(cursor, reader))

    def relation(self, query: str) -> "duckdb.DuckDBPyRelation":
        """The query as a DuckDB relation, which runs when rows are requested. Raises ConfigError as `batches` does."""
        import duckdb

        cursor = self._cursor()
        try:
            return cursor.sql(require_select(cursor, query))
        except duckdb.Error as error:
            raise query_error(error) from error

    def statements(self, text: str) -> list[str]:
        """The statements in `text`, separated by `;`. Raises ConfigError if one cannot be parsed."""
        import duckdb

        try:
            return [statement.query for statement in self.connection.extract_statements(text)]
        except duckdb.Error as error:
            raise query_error(error) from error

    def _cursor(self) -> "duckdb.DuckDBPyConnection":
        import duckdb

        try:
            return self.connection.cursor()
        except duckdb.ConnectionException as error:
            raise ConfigError("the cache is closed: open it again") from error

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
        # The thread first: a query that still runs must not lose its connection.
        self._thread.shutdown()
        for scheme in self._schemes:
            self.connection.unregister_filesystem(scheme)
        self.connection.close()
        self._folder.cleanup()


def open_session(catalog: Catalog) -> Session:
    """A session over one cache, at the versions of the catalog."""
    return Session({"main": catalog})


def export_views(catalogs: Mapping[str, Catalog], path: Path, files: Mapping[str, Path] | None = None) -> None:
    """Writes the views to a database file for the duckdb program and notebooks, replacing an older one.

    The views name the current shards by absolute path. No data is copied; chains built later appear after the next
    export. Such a file is not locked.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: use the path of the database file to write, for example views.duckdb")
    with atomic_path(path) as temp:
        # DuckDB's error for a folder that cannot be written reads like one about a damaged shard.
        temp.touch()
        temp.unlink()
        _create_database(temp, catalogs, files or {})


def visible_files(catalog: Catalog) -> CacheFiles:
    """Every visible file by table, shards by layout. Raises CorruptError as `require_sound` does."""
    require_sound(catalog)

    def visible(table: Table) -> list[str]:
        return [str(table.path_of(file).absolute()) for file in table.files()]

    by_layout: dict[Layout, list[str]] = {}
    codecs: dict[str, set[str]] = {}
    for layout, files in _alike(catalog):
        by_layout.setdefault(layout, []).extend(str(catalog.chains.path_of(file).absolute()) for file in files)
        codecs.setdefault(files[0].owner, set()).add(layout[0])
    return CacheFiles(
        chains=by_layout,
        verdicts=visible(catalog.verdicts),
        failures=visible(catalog.failures),
        vocab=[str(path.absolute()) for path in catalog.vocab_paths()],
        features=[] if catalog.features is None else visible(catalog.features),
        codecs={run_id: ", ".join(sorted(names)) for run_id, names in codecs.items()},
    )


def require_sound(catalog: Catalog) -> None:
    """Raises CorruptError if a registered file is missing or has another size, or a verdict file another hash.

    Only for a cache on disk: in an object store each check is a request, and a query reports what it does not find.
    """
    if not isinstance(catalog.root, Path):
        return
    remedy = f"teacher-cache verify {catalog.root} --quarantine"
    for table in catalog.tables():
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
        alike.setdefault(file.path if is_rewritten else file.owner, []).append(file)
    firsts = [catalog.chains.path_of(files[0]) for files in alike.values()]
    with ThreadPoolExecutor(OPENED_TOGETHER) as pool:
        layouts = list(pool.map(_layout_of, firsts))
    return list(zip(layouts, alike.values(), strict=True))


def _layout_of(path: Location) -> Layout:
    file, header = open_shard(path)
    file.close()
    return header.codec, header.format_version


def _interrupt(cursor: "duckdb.DuckDBPyConnection", future: Future[T]) -> None:
    # An interrupt before the query has started is lost, so repeat it until the query ends.
    while not future.done():
        # A second Ctrl-C must not leave a running query behind, which the next one would wait for.
        with contextlib.suppress(StillRunning, KeyboardInterrupt):
            cursor.interrupt()
            future.exception(timeout=0.05)


def _create_database(path: Path, catalogs: Mapping[str, Catalog], files: Mapping[str, Path]) -> list[str]:
    """Creates a DuckDB file with the views of all caches and the user's tables; returns the files that they read."""
    import duckdb

    paths: list[str] = []
    try:
        with duckdb.connect(str(path), config={"storage_compatibility_version": STORAGE_VERSION}) as connection:
            _register_stores(connection, catalogs)
            # In one transaction: each commit of its own would wait for the disk, and there are thirty.
            connection.begin()
            for name, catalog in catalogs.items():
                visible = visible_files(catalog)
                _create_views(connection, name, visible, catalog)
                paths.extend(visible.paths())
            connection.commit()
            paths.extend(create_tables(connection, files))
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


def _create_views(connection: "duckdb.DuckDBPyConnection", schema: str, files: CacheFiles, catalog: Catalog) -> None:
    if schema != "main":
        if not SCHEMA_NAME.match(schema) or schema.lower() in RESERVED_NAMES or schema.endswith("_internal"):
            raise ConfigError(
                f"cache name {schema!r} is taken or not a valid SQL name: use letters, digits and underscores"
            )
        require_free(connection, "cache name", schema)
        connection.execute(f'CREATE SCHEMA "{schema}"')
    internal = "internal" if schema == "main" else f"{schema}_internal"
    connection.execute(f'CREATE SCHEMA "{internal}"')
    # Views name each other without a schema, so each cache's are made where these names are its own.
    connection.execute(f'USE "{schema}"')
    _create_runs(connection, catalog.runs(), files.codecs)
    _create_feature_sets(connection, read_sets(catalog.root) if files.features else {})
    for statement in view_statements(files, internal):
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


def _create_feature_sets(connection: "duckdb.DuckDBPyConnection", sets: Mapping[str, SetManifest]) -> None:
    connection.execute(
        "CREATE TABLE feature_sets (set_id VARCHAR, name VARCHAR, created_at TIMESTAMPTZ, teacher VARCHAR,"
        " teacher_fingerprint VARCHAR, hidden BOOLEAN, layers INTEGER[], num_heads INTEGER, num_keys INTEGER,"
        " entropy_frac FLOAT, vector_bytes_per_token INTEGER, logprob_error FLOAT, stored JSON)"
    )
    for one in sets.values():
        attention = one.attention
        row = [
            *(one.set_id, one.name, one.created_at, one.teacher.model, one.teacher.fingerprint),
            *(one.hidden is not None, [stored.layer for stored in one.layers]),
            *((0, 0) if attention is None else (len(attention.heads), attention.num_keys)),
            *(one.entropy_frac, vectors_token_bytes(one), one.logprob_error),
            json.dumps(one.model_dump(mode="json", include={"hidden", "layers", "attention"}), sort_keys=True),
        ]
        connection.execute(f"INSERT INTO feature_sets VALUES ({', '.join('?' * len(row))})", row)


def _limit(connection: "duckdb.DuckDBPyConnection", num_threads: int | None, memory: str | None) -> None:
    import duckdb

    if num_threads is not None:
        connection.execute(f"SET threads = {num_threads:d}")
    if memory is not None:
        try:
            # DuckDB takes a negative size for no limit.
            if not memory[:1].isdigit():
                raise duckdb.Error
            connection.execute(f"SET memory_limit = {quote(memory)}")
        except duckdb.Error as error:
            raise ConfigError(f"memory {memory!r} is not a size: write 4GB or 512MB") from error


def _lock(connection: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> None:
    # Not enough: DuckDB 2.0 still writes to an allowed path for some forms of COPY, also in a WITH clause, which
    # stillroom.sql.statements refuses.
    listed = ", ".join(quote(path) for path in paths)
    # An extension that loads itself could reach the network or other files.
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    # The same text of a timestamp on every machine.
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    # Files never change under their name, so one read of a footer serves all queries.
    connection.execute("SET GLOBAL parquet_metadata_cache = true")
    connection.execute(f"SET allowed_paths = [{listed}]")
    connection.execute("SET enable_external_access = false")
    # Last: nothing above can be set, or undone by a query, from here on.
    connection.execute("SET lock_configuration = true")


def _start(connection: "duckdb.DuckDBPyConnection", query: str, rows_per_batch: int) -> pa.RecordBatchReader:
    return connection.sql(prepare(connection, query)).to_arrow_reader(rows_per_batch)
