"""A user's own files beside the views: CSV, Parquet, JSON and Arrow, each by a name of its own, read-only.

A session may read exactly these files: no folder, pattern or address, and nothing that only looks like a table.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from stillroom.errors import ConfigError, DataError, one_line
from stillroom.sql.views import VIEWS, quote

if TYPE_CHECKING:
    import duckdb

TABLE_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
READERS = {
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz"), "read_csv"),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz"), "read_json"),
    ".parquet": "read_parquet",
}
ARROW = (".arrow", ".feather")
ENDINGS = (*READERS, *ARROW)
# By default DuckDB decides from the first 20,480 rows: a JSON field that comes later would be missing without a word.
# It also takes lines of a CSV file that do not fit the others for a preamble or comments, and drops them.
OPTIONS = {
    "read_csv": "sample_size = -1, skip = 0, comment = ''",
    "read_json": "sample_size = -1, records = true",
    "read_parquet": "hive_partitioning = false",
}


def create_tables(connection: "duckdb.DuckDBPyConnection", files: Mapping[str, Path]) -> list[str]:
    """Creates a table for each file, or a view of Parquet; returns the paths that views read.

    Raises ConfigError for a name or file that cannot be a table, DataError for a file that cannot be read.
    """
    import duckdb

    paths = []
    for name, path in files.items():
        ending = _check(name, path)
        require_free(connection, "table name", name)
        place = str(path.absolute())
        try:
            if ending in ARROW:
                _copy_arrow(connection, name, path)
                continue
            reader = READERS[ending]
            # A view of text would be parsed for its types, as a whole, whenever a query names it.
            kind = "VIEW" if ending == ".parquet" else "TABLE"
            connection.execute(f'CREATE {kind} "{name}" AS FROM {reader}({quote(place)}, {OPTIONS[reader]})')
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as {ending}: {_problem(error)}") from error
        _require_columns(connection, name, path)
        if kind == "VIEW":
            paths.append(place)
    return paths


def require_free(connection: "duckdb.DuckDBPyConnection", what: str, name: str) -> None:
    """Raises ConfigError for a name that a query would have to quote: `FROM semi` is a syntax error."""
    query = """SELECT 1 FROM duckdb_keywords()
      WHERE keyword_name = lower(?) AND keyword_category IN ('reserved', 'type_function')"""
    if connection.execute(query, [name]).fetchone():
        raise ConfigError(f"{what} {name!r} is a reserved word of SQL: choose another")


def _check(name: str, path: Path) -> str:
    """The ending of the file, which says how it is read."""
    if name.lower() in VIEWS:
        raise ConfigError(f"table name {name!r} is taken by a view of the cache: choose another")
    if not TABLE_NAME.match(name):
        raise ConfigError(f"table name {name!r} is not a valid SQL name: use letters, digits and underscores")
    if "://" in str(path):
        raise ConfigError(f"{name}={path} is a URL: download the file and use the copy")
    ending = next((one for one in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(one)), None)
    if ending is None:
        raise ConfigError(f"{name}={path}: its name must end in one of {', '.join(ENDINGS)}")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{name}={path} {what}: use one file, without * or folders")
    if path.stat().st_size == 0:
        raise DataError(f"{name}={path} is empty")
    return ending


def _require_columns(connection: "duckdb.DuckDBPyConnection", name: str, path: Path) -> None:
    """Raises DataError for text that DuckDB takes for one column, because its lines differ in their delimiters."""
    columns = [row[0] for row in connection.execute(f'DESCRIBE "{name}"').fetchall()]
    if len(columns) == 1 and any(sign in columns[0] for sign in ",;\t|"):
        raise DataError(f"{path}: its lines have different numbers of cells (first line: {columns[0]!r})")


def _problem(error: Exception) -> str:
    """What DuckDB or pyarrow says, without advice on options that nobody can set here."""
    text = one_line(error)
    for advice in (" Possible ", " Try ", " LINE 1: "):
        text = text.partition(advice)[0]
    return text[:300]


def _copy_arrow(connection: "duckdb.DuckDBPyConnection", name: str, path: Path) -> None:
    # Both kinds of Arrow file, and DuckDB cannot read either by its path.
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        given = reader.read_all()
        connection.register("given_table", given)
        connection.execute(f'CREATE TABLE "{name}" AS FROM given_table')
        connection.unregister("given_table")
