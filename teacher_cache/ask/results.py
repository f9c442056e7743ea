"""Query results as text: table, csv, json, markdown. Everything but a table streams, one record batch at a time.

In: a stream of record batches. Out: pieces of text. A table is for eyes: it is cut to the width of the terminal and to
a number of rows, numbers to six digits. The others are for programs and hold every row and digit.
"""

import datetime
import decimal
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv

from shared.terminal import cut, one_line, pad, width_of

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


def table_text(reader: pa.RecordBatchReader, max_rows: int, width: int | None, shown: Shown) -> Iterator[str]:
    """A table of the first `max_rows` rows in `width` columns (None: as wide as it gets), and what that was in
    `shown`.
    """
    rows: list[list[Any]] = []
    for batch in reader:
        rows.extend(_rows(batch.slice(0, max_rows - len(rows))))
        shown.num_rows += batch.num_rows
        if shown.num_rows > max_rows:
            break
    shown.num_shown = len(rows)
    if reader.schema.names == EXPLAINED:
        yield from (f"{plan}\n" for _, plan in rows)
        return
    _count_rest(reader, shown)
    names = [one_line(name) for name in reader.schema.names]
    cells = [[_cell(value) for value in row] for row in rows]
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
    names = _distinct(reader.schema.names)
    yield "["
    first = True
    for batch in reader:
        lines = [
            json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False) for row in _rows(batch)
        ]
        if lines:
            yield ("\n" if first else ",\n") + ",\n".join(lines)
            first = False
    yield "\n]\n"


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
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


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
