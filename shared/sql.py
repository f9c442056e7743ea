"""SQL over a cache: DuckDB views on exactly the files that the catalog shows, locked down. The only file that imports
duckdb.

The views live in a small database file that is made for the session and opened read-only; the configuration is then
locked with external access off, so that a query can read the cache's files and nothing else, and write nowhere.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import RunManifest
from schemas.tables import FAILURE_SCHEMA, VERDICT_SCHEMA, VOCAB_SCHEMA, table_schema
from shared.catalog import Catalog, Table
from shared.errors import ConfigError, CorruptError
from shared.views import quote, view_statements

if TYPE_CHECKING:
    import duckdb

SCHEMA_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


EXPLAIN_PREFIX = re.compile(r"\s*EXPLAIN\s+(?:ANALYZE\s+)?(?:\([^)]*\)\s*)?", re.IGNORECASE)


class Session:
    """A locked DuckDB connection over one or more caches; a context manager."""

    def __init__(self, catalogs: Mapping[str, Catalog]) -> None:
        """Makes the views; the cache named `main` is the one whose views need no prefix.

        Raises ConfigError for a name that is no plain SQL identifier.
        """
        import duckdb

        self._folder = tempfile.TemporaryDirectory(prefix="stillroom-sql-")
        database = Path(self._folder.name) / "views.duckdb"
        paths = _write_empties(Path(self._folder.name))
        with duckdb.connect(str(database)) as connection:
            for name, catalog in catalogs.items():
                files = _files_of(catalog, paths)
                create_views(connection, name, files, catalog.runs())
                allowed = [path for group in files.values() for path in group]
                paths = {**paths, **{f"{name}:{number}": path for number, path in enumerate(allowed)}}
        self.connection = duckdb.connect(str(database), read_only=True)
        _lock(self.connection, list(paths.values()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def arrow(self, query: str) -> pa.Table:
        """The whole result. Raises ConfigError with DuckDB's reason where the query is wrong or not allowed."""
        return self.batches(query).read_all()

    def batches(self, query: str, rows_per_batch: int = 8192) -> pa.RecordBatchReader:
        """The result as a stream of record batches, for results larger than memory."""
        import duckdb

        try:
            _require_select(self.connection, query)
            return self.connection.sql(query).to_arrow_reader(rows_per_batch)
        except duckdb.Error as error:
            raise query_error(error) from error

    def explain(self, query: str) -> str:
        """DuckDB's plan, which shows the columns and filters that reach Parquet."""
        rows = self.arrow(f"EXPLAIN {query}").to_pylist()
        return "\n".join(str(row["explain_value"]) for row in rows)

    def close(self) -> None:
        """Closes the connection and removes the session's database."""
        self.connection.close()
        self._folder.cleanup()


def open_cache(catalog: Catalog) -> Session:
    """A session over one cache, at the versions the catalog is pinned to."""
    return Session({"main": catalog})


def query_error(error: Exception) -> Exception:
    """DuckDB's error as one line for the user: a damaged file is a CorruptError, anything else the query's fault."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    if "IO Error" in text or "Invalid Input Error: No magic bytes" in text or "TProtocolException" in text:
        return CorruptError(f"{text} (`teacher-cache verify` lists what is wrong)")
    return ConfigError(f"query: {text}")


def create_views(
    connection: "duckdb.DuckDBPyConnection",
    schema: str,
    files: Mapping[str, Sequence[str]],
    runs: Mapping[str, RunManifest],
) -> None:
    """Creates the views of one cache in `schema`; `files` names the Parquet files of each table."""
    if not SCHEMA_NAME.match(schema):
        raise ConfigError(f"cache name {schema!r} is no SQL name: use letters, digits and underscores")
    if schema != "main":
        connection.execute(f'CREATE SCHEMA "{schema}"')
    connection.execute(f'USE "{schema}"')
    _create_runs(connection, runs)
    for statement in view_statements(files):
        connection.execute(statement)
    connection.execute("USE main")


def _require_select(connection: "duckdb.DuckDBPyConnection", query: str) -> None:
    """Refuses all but one SELECT (DESCRIBE, SHOW, SUMMARIZE count as such) or the EXPLAIN of one.

    The lock alone is not enough: DuckDB may write to the paths it may read, and `COPY ... (USE_TMP_FILE false)` would
    truncate a shard, also under EXPLAIN ANALYZE and inside a WITH clause of a SELECT.
    """
    explained = EXPLAIN_PREFIX.match(query)
    inner = query[explained.end() :] if explained else query
    statements = connection.extract_statements(inner)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        found = " and ".join(kind.replace("_", " ") for kind in kinds) or "nothing"
        raise ConfigError(f"query: one SELECT (or EXPLAIN of one) is allowed here, found {found}: a cache is read-only")
    # DuckDB binds WITH clauses that write only at the top level, so below another SELECT it refuses them itself.
    bare = statements[0].query.rstrip().rstrip(";")
    connection.execute(f"EXPLAIN SELECT * FROM (\n{bare}\n)")


def _lock(connection: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> None:
    listed = ", ".join(quote(path) for path in paths)
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET parquet_metadata_cache = true")
    connection.execute(f"SET allowed_paths = [{listed}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _write_empties(folder: Path) -> dict[str, str]:
    """Empty files that lend every table its columns, also where it has no file yet or files of several codecs."""
    schemas = {
        "chains": table_schema(),
        "verdicts": VERDICT_SCHEMA,
        "failures": FAILURE_SCHEMA,
        "vocab": VOCAB_SCHEMA,
    }
    paths = {}
    for name, schema in schemas.items():
        path = folder / f"{name}.parquet"
        pq.write_table(schema.empty_table(), path)
        paths[name] = str(path)
    return paths


def _files_of(catalog: Catalog, empties: Mapping[str, str]) -> dict[str, list[str]]:
    def visible(table: Table) -> list[str]:
        return [str(table.path_of(file)) for file in table.files()]

    return {
        "chains": [empties["chains"], *visible(catalog.chains)],
        "verdicts": [empties["verdicts"], *visible(catalog.verdicts)],
        "failures": [empties["failures"], *visible(catalog.failures)],
        "vocab": [empties["vocab"], *(str(path) for path in catalog.vocab_paths())],
    }


def _create_runs(connection: "duckdb.DuckDBPyConnection", runs: Mapping[str, RunManifest]) -> None:
    connection.execute(
        "CREATE TABLE runs (run_id VARCHAR, name VARCHAR, kind VARCHAR, created_at TIMESTAMPTZ, teacher VARCHAR,"
        " teacher_fingerprint VARCHAR, tokenizer VARCHAR, codec VARCHAR, sampling JSON, capture JSON, engine JSON,"
        " prompts JSON, software JSON)"
    )
    for row in _run_rows(runs):
        connection.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", row)


def _run_rows(runs: Mapping[str, RunManifest]) -> Iterator[list[Any]]:
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
            run.capture.get("codec"),
            *(_json(dumped[key]) for key in ("sampling", "capture", "engine", "prompts", "software")),
        ]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
