"""`teacher-cache sql`: one query over one or more caches, or an interactive session.

In: a SELECT, from the command line or stdin. Out: its result on stdout or in a file that becomes visible whole. The
session is locked (shared.sql): it reads the caches' files and nothing else, and writes nowhere; the file of `--out` is
written by this module, never by the query.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.catalog import Catalog, check_hash
from shared.errors import ConfigError
from shared.files import atomic_path, check_out
from shared.log import Progress, note
from shared.sql import Session, export_views
from shared.storage import Location, location
from shared.terminal import harmless
from teacher_cache.ask.results import Shown, csv_text, json_text, markdown_text, table_text

FORMATS = ("table", "csv", "json", "markdown", "parquet")
SUFFIXES = {".csv": "csv", ".json": "json", ".md": "markdown", ".parquet": "parquet", ".txt": "table"}
DEFAULT_MAX_ROWS = 40
ROWS_PER_GROUP = 65536


def open_caches(cache: Location, attach: Sequence[str]) -> dict[str, Catalog]:
    """The cache as `main` and those of `attach`, each `NAME=CACHE`, as schemas of their names."""
    catalogs = {"main": Catalog(cache)}
    for item in attach:
        name, equals, folder = item.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"--attach {item!r} is not of the form NAME=CACHE, for example r1=/data/r1-cache")
        if name in catalogs:
            raise ConfigError(f"--attach {item!r}: the name {name!r} is taken, choose another")
        catalogs[name] = Catalog(location(folder))
    return catalogs


def run_query(
    session: Session,
    query: str,
    output_format: str | None = None,
    out: Path | None = None,
    max_rows: int = DEFAULT_MAX_ROWS,
    *,
    in_session: bool = False,
) -> None:
    """Answers one query on stdout or in `out`. The format is, if not given, that of the file's suffix, or a table.

    A table shows `max_rows` rows and says on stderr what it left out, and how more is shown: by options, or by commands
    where this is `in_session`. The other formats hold every row and stream.
    """
    if query.lstrip().startswith("."):
        command = query.split()[0]
        raise ConfigError(f"query: {command} is for a session on a terminal: here is asked in SQL, such as FROM chains")
    chosen = _format_of(output_format, out)
    if chosen == "parquet" and out is None:
        raise ConfigError("--format parquet needs --out FILE: it is not text")
    reader = session.batches(query)
    if out is None:
        shown = Shown()
        _print(_text(reader, chosen, max_rows, _terminal_width(), shown))
        if chosen == "table" and not shown.num_rows:
            note("0 rows")
        _say_rest(shown, in_session)
    elif chosen == "parquet":
        note(f"{out}: {_write_parquet(reader, out)} rows")
    else:
        shown = Shown()
        with atomic_path(out) as temp, temp.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(_text(reader, chosen, max_rows, None, shown))
        _say_rest(shown, in_session)


def check_files(catalogs: Iterable[Catalog]) -> None:
    """Reads every file of the caches and compares it with the hash in its name: DuckDB does not verify page checksums.

    Raises CorruptError naming the first file that is damaged.
    """
    tables = [table for one in catalogs for table in (one.chains, one.verdicts, one.failures)]
    paths = [table.path_of(file) for table in tables for file in table.files()]
    with ThreadPoolExecutor() as pool, Progress("check", len(paths), "files") as progress:
        for number, _ in enumerate(pool.map(check_hash, paths), start=1):
            progress.update(number, 0)


def write_views(catalogs: dict[str, Catalog], path: Path) -> None:
    """`--export-views`: the views as a database for the plain duckdb program, absolute paths in it."""
    check_out("--export-views", path, [one.root for one in catalogs.values()])
    if path.exists() and not _is_duckdb(path):
        raise ConfigError(
            f"--export-views {path} exists and is no DuckDB database, so no earlier export: delete it, or name "
            "another file"
        )
    export_views(catalogs, path)
    note(f"{path}: views over the shards of this moment; open it with `duckdb -readonly {path}`")


def _is_duckdb(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[8:] == b"DUCK"


def read_stdin() -> str:
    """The query on stdin."""
    text = sys.stdin.read()
    if not text.strip():
        raise ConfigError("no query on stdin: give one as an argument, pipe one in, or start on a terminal")
    return text


def _format_of(output_format: str | None, out: Path | None) -> str:
    if output_format is None:
        if out is None:
            return "table"
        if out.suffix not in SUFFIXES:
            raise ConfigError(f"--out {out}: say --format, or end the name in {', '.join(SUFFIXES)}")
        return SUFFIXES[out.suffix]
    if output_format not in FORMATS:
        raise ConfigError(f"--format {output_format} is unknown: choose one of {', '.join(FORMATS)}")
    return output_format


def _text(
    reader: pa.RecordBatchReader, output_format: str, max_rows: int, width: int | None, shown: Shown
) -> Iterator[str]:
    if output_format == "csv":
        return csv_text(reader)
    if output_format == "json":
        return json_text(reader)
    if output_format == "markdown":
        return markdown_text(reader)
    return table_text(reader, max_rows, width, shown)


def _print(pieces: Iterator[str]) -> None:
    """To stdout; on a terminal with control characters written out."""
    on_terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(harmless(piece) if on_terminal else piece)
    sys.stdout.flush()


def _say_rest(shown: Shown, in_session: bool) -> None:
    if shown.num_rows > shown.num_shown:
        total = f"{shown.num_rows}" if shown.counted else f"more than {shown.num_rows}"
        more, every = (".rows N", ".mode csv") if in_session else ("--max-rows", "--format csv")
        note(f"the first {shown.num_shown} rows of {total}: {more} shows more, {every} all of them")


def _write_parquet(reader: pa.RecordBatchReader, out: Path) -> int:
    num_rows = 0
    try:
        with atomic_path(out) as temp, pq.ParquetWriter(temp, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch, row_group_size=ROWS_PER_GROUP)
                num_rows += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(
            f"--out {out}: Parquet has no such type ({error}): cast it, for example to VARCHAR"
        ) from error
    return num_rows


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
