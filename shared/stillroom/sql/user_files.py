"""A user's own files beside the views: CSV, Parquet, JSON Lines and Arrow, each by a name of its own, read-only.

A session may read exactly these files: no folder, pattern or address, and nothing that only looks like a table.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from stillroom.errors import ConfigError, DataError, first_line
from stillroom.sql.views import VIEWS, quote

if TYPE_CHECKING:
    import duckdb

TABLE_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
READERS = {
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz"), "read_csv"),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".ndjson"), "read_ndjson"),
    ".parquet": "read_parquet",
}
ARROW = (".arrow", ".feather")
ENDINGS = (*READERS, *ARROW)


def create_tables(connection: "duckdb.DuckDBPyConnection", files: Mapping[str, Path]) -> list[str]:
    """Creates a view for each file; returns the paths that these read. Arrow files are copied to the database.

    Raises ConfigError for a name or file that cannot be a table, DataError for a file that cannot be read.
    """
    import duckdb

    paths = []
    for name, path in files.items():
        ending = _check(name, path)
        place = str(path.absolute())
        try:
            if ending in ARROW:
                _copy_arrow(connection, name, path)
                continue
            connection.execute(f'CREATE VIEW "{name}" AS FROM {READERS[ending]}({quote(place)}{_options(ending)})')
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as {ending}: {first_line(error)}") from error
        paths.append(place)
    return paths


def _check(name: str, path: Path) -> str:
    """The ending of the file, which says how it is read."""
    if not TABLE_NAME.match(name) or name.lower() in VIEWS:
        raise ConfigError(f"table name {name!r} is not a free SQL name: use letters, digits and underscores")
    if "://" in str(path):
        raise ConfigError(f"{name}={path} is an address: download the file, and name the copy")
    ending = next((one for one in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(one)), None)
    if ending is None:
        raise ConfigError(f"{name}={path}: its name must end in one of {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"{name}={path} is not a file: name one file, without * or folders")
    return ending


def _options(ending: str) -> str:
    return ", hive_partitioning = false" if ending == ".parquet" else ""


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
