"""`teacher-cache sql`: one query over one or more caches; the interactive session is in shell.py.

In: a SELECT, from the command line or stdin. Out: its result on stdout, or in a file that becomes visible whole. The
session is locked (sql.session): it reads the caches' files and nothing else, and writes nowhere; the file of `--out` is
written by this module, never by the query.

A table is cut to the width of the terminal and to a number of rows, numbers to six digits. The other formats hold every
row and digit (markdown six digits), and stream one record batch at a time.
"""

import datetime
import decimal
import gzip
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog, check_hash
from stillroom.errors import ConfigError
from stillroom.log import Progress, cut, harmless, note, one_line, pad, width_of
from stillroom.sql.session import Session, export_views
from stillroom.storage.paths import Location, atomic_path, check_out, location

FORMATS = ("table", "csv", "json", "jsonl", "markdown", "parquet", "arrow")
FILES_ONLY = ("parquet", "arrow")
SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".md": "markdown",
    ".txt": "table",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = ".gz"
"""After the suffix of a text format."""
DEFAULT_MAX_ROWS = 40
ROWS_PER_GROUP = 65536
MIN_COLUMN_WIDTH = 12
"""Columns of text are not squeezed below this; a table that is still too wide is shown one value a line."""

COUNTING_LIMIT_S = 1.0
"""How long the rows that a table leaves out are counted."""

EXPLAINED = ["explain_key", "explain_value"]
"""Columns of the answer to EXPLAIN. Its plan is drawn in lines, and shown as drawn."""

GAP = "  "


@dataclass(slots=True)
class Shown:
    """How much of a result a table holds. `num_rows` is a lower bound unless `counted`."""

    num_shown: int = 0
    num_rows: int = 0
    counted: bool = True


def open_caches(
    cache: Location, attach: Sequence[str], version: int | None = None, verdicts_version: int | None = None
) -> dict[str, Catalog]:
    """The cache as `main`, at the versions given, and those of `attach`, each `NAME=CACHE`, by their names."""
    catalogs = {"main": Catalog(cache, version, verdicts_version)}
    folders = _named(attach, "--attach", "NAME=CACHE, for example r1=/data/r1-cache", catalogs)
    return catalogs | {name: Catalog(location(folder)) for name, folder in folders.items()}


def own_files(items: Sequence[str]) -> dict[str, Path]:
    """The tables of `--with`, each `NAME=FILE`."""
    named = _named(items, "--with", "NAME=FILE, for example mine=labels.csv", ())
    return {name: Path(path) for name, path in named.items()}


def _named(items: Sequence[str], option: str, form: str, taken: Iterable[str]) -> dict[str, str]:
    """Each `NAME=VALUE` of a repeatable option, by name."""
    named: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} {item!r} is not of the form {form}")
        # SQL does not tell r1 from R1.
        if name.lower() in map(str.lower, [*taken, *named]):
            raise ConfigError(f"{option} {item!r}: the name {name!r} is taken, choose another")
        named[name] = value
    return named


def run_queries(
    session: Session, text: str, output_format: str | None, out: Path | None, max_rows: int = DEFAULT_MAX_ROWS
) -> None:
    """Answers the statements of `text`, separated by `;`, one after the other; see `run_query`."""
    statements = [text] if text.lstrip().startswith(".") else session.statements(text)
    if len(statements) > 1 and (out is not None or output_format not in (None, "table", "markdown")):
        given = f"--format {output_format}" if out is None else f"--out {out}"
        raise ConfigError(f"{given} holds one result, {len(statements)} statements given: run one at a time")
    for number, statement in enumerate(statements or [text]):
        if number:
            print(flush=True)
        run_query(session, statement, output_format, out, max_rows)


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
        raise ConfigError(f"query: {command} works only in an interactive session: use SQL here, such as FROM chains")
    chosen = _format_of(output_format, out)
    if chosen in FILES_ONLY and out is None:
        raise ConfigError(f"--format {chosen} needs --out FILE: it is not text")
    reader = session.batches(query)
    if out is None:
        shown = Shown()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        _print(_text(reader, chosen, max_rows, width, shown))
        if chosen == "table" and not shown.num_rows:
            note("0 rows")
        _say_rest(shown, in_session)
    elif chosen == "parquet":
        note(f"{out}: {_write_parquet(reader, out)} rows")
    elif chosen == "arrow":
        note(f"{out}: {_write_arrow(reader, out)} rows")
    else:
        shown = Shown()
        pieces = (piece.encode("utf-8") for piece in _text(reader, chosen, max_rows, None, shown))
        with atomic_path(out) as temp, temp.open("wb") as stream:
            if out.suffix != COMPRESSED:
                stream.writelines(pieces)
            else:
                # No name and time inside, so that equal results are equal files.
                with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as compressed:
                    compressed.writelines(pieces)
        note(f"{out}: written")
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


def write_views(catalogs: dict[str, Catalog], path: Path, files: Mapping[str, Path] | None = None) -> None:
    """`--export-views`: the views as a database for the plain duckdb program, absolute paths in it."""
    check_out("--export-views", path, [one.root for one in catalogs.values()])
    if path.exists() and not _is_duckdb(path):
        raise ConfigError(f"--export-views {path} exists and is not a DuckDB database: delete it, or use another file")
    export_views(catalogs, path, files)
    note(f"{path}: views over the current shards; open it with `duckdb -readonly {path}`")


def _is_duckdb(path: Path) -> bool:
    with path.open("rb") as file:
        # DuckDB's magic bytes stand behind a checksum of 8.
        return file.read(12)[8:] == b"DUCK"


def read_stdin() -> str:
    """The query on stdin."""
    text = sys.stdin.read()
    if not text.strip():
        raise ConfigError("no query on stdin: give one as an argument, pipe one in, or start on a terminal")
    return text


def table_text(reader: pa.RecordBatchReader, max_rows: int, width: int | None, shown: Shown) -> Iterator[str]:
    """A table of the first `max_rows` rows in `width` columns (None: as wide as it gets), and what that was in
    `shown`.
    """
    rows: list[list[Any]] = []
    # The query streams: once the table is full, no further row is converted.
    for batch in reader:
        rows.extend(_rows(batch.slice(0, max_rows - len(rows))))
        shown.num_rows += batch.num_rows
        if shown.num_rows > max_rows:
            break
    shown.num_shown = len(rows)
    # A plan is a drawing of many lines, which cells would cut.
    if reader.schema.names == EXPLAINED:
        yield from (f"{plan}\n" for _, plan in rows)
        return
    _count_rest(reader, shown)
    names = [one_line(name) for name in reader.schema.names]
    cells = [[_cell(value) for value in row] for row in rows]
    # In columns of the terminal: a Chinese character takes two.
    widths = [max(map(width_of, column)) for column in zip(names, *cells, strict=True)]
    numeric = [_is_number(field.type) for field in reader.schema]
    fitted = _fit(widths, numeric, width)
    if fitted is None:
        yield from _records(names, cells, width)
    else:
        yield from _lines(names, cells, fitted, numeric)


def csv_text(reader: pa.RecordBatchReader) -> Iterator[str]:
    """RFC 4180 with a header line; NULL is an empty field, an empty string is `""`, lists and structs are JSON."""
    header = True
    for batch in _with_empty(reader):
        sink = pa.BufferOutputStream()
        arrays = [_csv_column(array) for array in batch.columns]
        plain = pa.Table.from_arrays(arrays, names=batch.schema.names)
        pyarrow.csv.write_csv(plain, sink, pyarrow.csv.WriteOptions(include_header=header))
        yield sink.getvalue().to_pybytes().decode("utf-8")
        header = False


def json_text(reader: pa.RecordBatchReader) -> Iterator[str]:
    """An array of objects, one a line. NaN and infinities, which JSON lacks, are null; times are ISO 8601."""
    yield "["
    before = "\n"
    for line in json_lines_text(reader):
        yield before + line.removesuffix("\n")
        before = ",\n"
    yield "\n]\n"


def json_lines_text(reader: pa.RecordBatchReader) -> Iterator[str]:
    """One object a line, with values as in `json_text`."""
    names = _distinct(reader.schema.names)
    for batch in reader:
        for row in _rows(batch):
            yield json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False) + "\n"


def markdown_text(reader: pa.RecordBatchReader) -> Iterator[str]:
    """A GitHub table; numbers to six digits, markup in cells escaped."""
    yield _markdown_row(reader.schema.names)
    yield _markdown_row(["--:" if _is_number(field.type) else "---" for field in reader.schema])
    for batch in reader:
        yield "".join(_markdown_row([_markdown_cell(value) for value in row]) for row in _rows(batch))


def _with_empty(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The batches, preceded by an empty one, so that a result without rows has its header too."""
    yield pa.RecordBatch.from_pylist([], schema=reader.schema)
    yield from reader


def _rows(batch: pa.RecordBatch) -> list[list[Any]]:
    columns = [column.to_pylist() for column in batch.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _count_rest(reader: pa.RecordBatchReader, shown: Shown) -> None:
    started_s = time.monotonic()
    for batch in reader:
        shown.num_rows += batch.num_rows
        if time.monotonic() - started_s > COUNTING_LIMIT_S:
            shown.counted = False
            return


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    return one_line(_string(value))


def _string(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None).isoformat(sep=" ", timespec="seconds" if not value.microsecond else "auto")
    if isinstance(value, (list, dict)):
        return json.dumps(_plain(value), ensure_ascii=False)
    return str(_plain(value))


def _plain(value: Any) -> Any:
    """The value as JSON knows it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # sum() of integers is HUGEINT in DuckDB, which arrives as a decimal, and JSON has none.
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, pa.MonthDayNano):
        return _interval(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _interval(value: pa.MonthDayNano) -> str:
    """As DuckDB writes it: `1 month 3 days 2:00:00`, without parts that are zero."""
    counts = ((value.months, "month"), (value.days, "day"))
    parts = [f"{count} {unit}{'' if abs(count) == 1 else 's'}" for count, unit in counts if count]
    if value.nanoseconds or not parts:
        # Python writes a negative timedelta as -1 day and a positive rest.
        sign = "-" if value.nanoseconds < 0 else ""
        parts.append(f"{sign}{datetime.timedelta(microseconds=abs(value.nanoseconds) // 1000)}")
    return " ".join(parts)


def _csv_column(array: pa.Array) -> pa.Array:
    kind = array.type
    simple = _is_number(kind) or pa.types.is_boolean(kind)
    if simple or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array
    values = [None if value is None else _csv_value(value) for value in array.to_pylist()]
    return pa.array(values, pa.string())


def _csv_value(value: Any) -> str:
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, (list, dict)) else str(plain)


def _markdown_cell(value: Any) -> str:
    text = _cell(value)
    # & first, or the escapes of the others would be escaped again.
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("`", "&#96;"), ("|", "\\|")):
        text = text.replace(character, escaped)
    return text


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _distinct(names: Sequence[str]) -> list[str]:
    """Names made unique, so that no column of an object is lost: `x`, `x_1`."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        seen = counts.get(name, 0)
        counts[name] = seen + 1
        distinct.append(name if seen == 0 else f"{name}_{seen}")
    return distinct


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _fit(widths: list[int], numeric: Sequence[bool], width: int | None) -> list[int] | None:
    """Column widths that together fit: the widest columns of text give first. None where they cannot."""
    if width is None:
        return widths
    fitted = list(widths)
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0:
        squeezable = [i for i, size in enumerate(fitted) if not numeric[i] and size > MIN_COLUMN_WIDTH]
        if not squeezable:
            return None
        widest = max(squeezable, key=lambda i: fitted[i])
        fitted[widest] -= 1
        excess -= 1
    return fitted


def _lines(
    names: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int], numeric: Sequence[bool]
) -> Iterator[str]:
    def line(row: Sequence[str]) -> str:
        padded = [pad(cut(text, size), size, right=num) for text, size, num in zip(row, widths, numeric, strict=True)]
        return GAP.join(padded).rstrip() + "\n"

    yield line(names)
    yield GAP.join("─" * size for size in widths) + "\n"
    for row in cells:
        yield line(row)


def _records(names: Sequence[str], cells: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    label = max(map(width_of, names))
    for number, row in enumerate(cells, 1):
        yield f"─ row {number} ".ljust(label + len(GAP), "─") + "\n"
        for name, text in zip(names, row, strict=True):
            shown = text if width is None else cut(text, max(width - label - len(GAP), MIN_COLUMN_WIDTH))
            yield f"{pad(name, label)}{GAP}{shown}\n"


def _format_of(output_format: str | None, out: Path | None) -> str:
    if output_format is not None and output_format not in FORMATS:
        raise ConfigError(f"--format {output_format} is unknown: choose one of {', '.join(FORMATS)}")
    if out is None:
        return output_format or "table"
    # result.csv.gz: the format is that of the inner suffix.
    name = out.with_suffix("") if out.suffix == COMPRESSED else out
    chosen = output_format or SUFFIXES.get(name.suffix)
    if chosen is None:
        raise ConfigError(f"--out {out}: set --format, or use a file name that ends in {', '.join(SUFFIXES)}")
    if out.suffix == COMPRESSED and chosen in FILES_ONLY:
        raise ConfigError(f"--out {out}: {chosen} files are not compressed as a whole: remove {COMPRESSED}")
    return chosen


def _text(
    reader: pa.RecordBatchReader, output_format: str, max_rows: int, width: int | None, shown: Shown
) -> Iterator[str]:
    if output_format == "csv":
        return csv_text(reader)
    if output_format == "json":
        return json_text(reader)
    if output_format == "jsonl":
        return json_lines_text(reader)
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
        # In this order: the writer ends its file before that gets its name.
        with atomic_path(out) as temp, pq.ParquetWriter(temp, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch, row_group_size=ROWS_PER_GROUP)
                num_rows += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(
            f"--out {out}: Parquet cannot store this type ({error}): cast it, for example to VARCHAR"
        ) from error
    return num_rows


def _write_arrow(reader: pa.RecordBatchReader, out: Path) -> int:
    """An Arrow IPC file; uncompressed, which every reader knows and can map into memory."""
    num_rows = 0
    with atomic_path(out) as temp, pa.ipc.new_file(temp, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows
