"""Reads rows of files: JSON Lines, JSON, CSV and Parquet; compressed; in folders, by glob, in object stores.

In: a path of the configuration. Out: a stream of Row in the order of the sorted files. What a file is and how it is
compressed is seen from its first bytes, and a file that is not what the configuration says raises DataError with the
remedy. A row that cannot be read holds its error instead of values.
"""

import contextlib
import csv
import glob
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.config import nearest_name
from stillroom.errors import DataError, one_line
from stillroom.storage import objects
from stillroom.storage.objects import STREAM_BYTES, ObjectPath
from stillroom.storage.paths import Location, files_below, open_parquet, relative_name

PARQUET_BATCH_ROWS = 1024
SNIFF_BYTES = 4096
JSON_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
"""Codecs of pyarrow by the first bytes of a file."""
COMPRESSED_SUFFIXES = ("", ".gz", ".zst", ".bz2")
WILDCARD = re.compile(r"[*?\[]")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
"""Words in names of files and folders that mean a split, as the Hugging Face hub reads them."""
ROW_FIELDS = ("data", "rows", "examples", "instances", "records", "items", "train", "test")
"""Fields that hold the rows in files that are one JSON object (SQuAD: data; the hub's API: rows)."""
TO_UTF_8 = "convert it first: iconv -f {} -t UTF-8 OLD > NEW"
ANOTHER_ENCODING = "LATIN1 (or the encoding that it has)"

Json = dict[str, Any]
Line = tuple[int, bytes]
"""Number from 1, and bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """`where` names the row for a person, `number` is its position in its file (lines from 1, rows from 0), `unit` says
    which; `values` is an error message if the row cannot be read.
    """

    where: str
    number: int
    values: Json | str
    unit: str = "row"


def json_rows(path: Location, split: str | None, name: str) -> Iterator[Row]:
    """Rows of JSON Lines, of a JSON array or of a single JSON object; `name` is the source's, for messages."""
    for where, number, unit, row in _json_items(path, split, name):
        yield Row(where, number, _parsed(row) if isinstance(row, bytes) else _object(row), unit)


def count_json_rows(path: Location, split: str | None, name: str) -> int:
    """How many rows `json_rows` yields; lines are not parsed."""
    return sum(1 for _ in _json_items(path, split, name))


def csv_rows(
    path: Location, split: str | None, delimiter: str | None, fields: Sequence[str], name: str
) -> Iterator[Row]:
    """Rows of CSV files, whose first line names the columns. Empty cells are null."""
    # Python's own limit of 128 KiB a cell is shorter than a reasoning chain.
    csv.field_size_limit(sys.maxsize)
    for file in find_files(path, CSV_SUFFIXES, split, name):
        with _opened(file, "csv", name) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            sign = delimiter or ("\t" if ".tsv" in file.name else ",")
            reader = csv.DictReader(text, delimiter=sign, strict=True)
            try:
                _check_header(fields, reader.fieldnames or (), f"source {name}: {file}")
                check_columns(fields, reader.fieldnames or (), str(file), name)
                for row in reader:
                    yield Row(f"{file}:{reader.line_num}", reader.line_num, _cells(row), "line")
            except csv.Error as error:
                raise DataError(f"source {name}: {file}:{reader.line_num} is not CSV: {one_line(error)}") from error
            except UnicodeDecodeError as error:
                hint = TO_UTF_8.format(ANOTHER_ENCODING)
                raise DataError(f"source {name}: {file} is not UTF-8 text: {hint}") from error


def parquet_rows(
    path: Location, split: str | None, fields: Sequence[str], optional: Sequence[str], name: str
) -> Iterator[Row]:
    """The given columns of Parquet files, and the optional ones where a file has them."""
    for file_path in find_files(path, (".parquet",), split, name):
        file = _open_parquet(file_path, name)
        check_columns(fields, column_names(file.schema_arrow), str(file_path), name)
        present = [one for one in optional if one in file.schema_arrow.names]
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=[*dict.fromkeys([*fields, *present])])
        rows = (row for batch in batches for row in batch.to_pylist())
        try:
            yield from (Row(f"{file_path}:{number}", number, row) for number, row in enumerate(rows))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {name}: {file_path} is damaged: {one_line(error)}") from error


def count_parquet_rows(path: Location, split: str | None, name: str) -> int:
    """How many rows `parquet_rows` yields, from the footers."""
    files = find_files(path, (".parquet",), split, name)
    return sum(_open_parquet(file, name).metadata.num_rows for file in files)


def find_files(path: Location, suffixes: Sequence[str], split: str | None, name: str) -> list[Location]:
    """The file itself, the files that a glob matches, or those with one of the suffixes in a folder, sorted.

    Of a folder, names with a leading dot or underscore are passed over (`.cache`, `_SUCCESS`), and only files of
    `split` are used. Raises DataError if nothing is found, or if a folder holds several splits and none is named.
    """
    where = f"source {name}: "
    try:
        is_glob = WILDCARD.search(str(path)) is not None and not path.exists()
        if is_glob or not path.is_dir():
            if split is not None:
                raise DataError(f"{where}split selects files of a folder, and {path} is not a folder: remove split")
            if is_glob:
                found = _matching(path)
                if not found:
                    raise DataError(f"{where}no file matches {path}")
                return found
            if not path.exists():
                raise DataError(f"{where}{path} does not exist")
            return [path]
        if (path / "_delta_log").is_dir():
            raise DataError(
                f"{where}{path} is a Delta table, whose folder also holds removed rows: export its current rows to "
                "Parquet files, or score chains of a cache with kind: cache"
            )
        found = _in_folder(path, suffixes)
    except OSError as error:
        raise DataError(f"{where}{path} cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"{where}the folder {path} holds no {suffixes[0]} file")
    return _of_split(found, path, split, name)


def column_names(fields: Iterable[pa.Field], prefix: str = "") -> list[str]:
    """Names of columns, and dotted names of the fields of structs."""
    names = []
    for field in fields:
        names.append(f"{prefix}{field.name}")
        if pa.types.is_struct(field.type):
            names += column_names(field.type.fields, f"{prefix}{field.name}.")
    return names


def check_columns(fields: Iterable[str], columns: Sequence[str], where: str, name: str) -> None:
    """Raises DataError for the first field that is not a column."""
    for field in fields:
        if field not in columns:
            raise DataError(f"source {name}: {where} has no column {field!r}{nearest_name(field, list(columns))}")


def _check_header(fields: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raises DataError for a column that would be lost, and for another delimiter."""
    # DictReader keeps the last of several columns of one name.
    repeated = next((one for one in fields if columns.count(one) > 1), None)
    if repeated is not None:
        raise DataError(f"{where} has {columns.count(repeated)} columns {repeated!r}: rename all but one")
    sign = next((one for one in ";\t|," if len(columns) == 1 and one in columns[0]), None)
    if sign is not None and columns[0] not in fields:
        raise DataError(f"{where} has one column, {columns[0]!r}: set delimiter: {json.dumps(sign)}")


def _json_items(path: Location, split: str | None, name: str) -> Iterator[tuple[str, int, str, Any]]:
    """Place, number, unit, and bytes of every line that is not blank, or the parsed items of a JSON array."""
    for file in find_files(path, JSON_SUFFIXES, split, name):
        with _opened(file, "jsonl", name) as stream:
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            head = list(itertools.islice(lines, 2))
            document, others = _document(head, lines, f"source {name}: {file}")
            if document is None:
                chained = itertools.chain(head, others)
                yield from ((f"{file}:{number}", number, "line", line) for number, line in chained)
            else:
                yield from ((f"{file}[{number}]", number, "row", row) for number, row in enumerate(document))


def _document(head: Sequence[Line], rest: Iterator[Line], where: str) -> tuple[list[Any] | None, Iterable[Line]]:
    """The rows of a file that is one JSON document, None for JSON Lines; and the lines after `head`."""
    if not head:
        return [], rest
    first = head[0][1]
    if not first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"[", b"{")):
        raise DataError(f"{where} is not JSON: set kind: csv for a table whose first line names the columns")
    try:
        line = json.loads(first)
        if len(head) == 1:
            _refuse_tables(line, where)
        # One line may be an array of rows, if it is all that there is.
        is_array = len(head) == 1 and isinstance(line, list) and all(isinstance(one, dict) for one in line)
        return (line if is_array else None), rest
    except RecursionError:
        # The line is malformed; reading it says so.
        return None, rest
    except ValueError as error:
        # A document that spans lines breaks off where its first line ends; a malformed line breaks before.
        if not isinstance(error, json.JSONDecodeError) or error.pos < len(error.doc.rstrip()):
            return None, rest
    others = list(rest)
    try:
        document = json.loads(b"".join(line for _, line in (*head, *others)))
    except (ValueError, RecursionError) as error:
        if first.startswith(b"{") and len(head) > 1 and head[1][1].startswith(b"{"):
            return None, others
        raise DataError(f"{where} is neither JSON Lines nor one JSON document: {one_line(error)}") from error
    _refuse_tables(document, where)
    return (document if isinstance(document, list) else [document]), others


def _refuse_tables(document: Any, where: str) -> None:
    """Raises DataError for a JSON object that holds rows in a field, or columns: read as one row it would be wrong."""
    if not isinstance(document, dict):
        return
    inside = next((name for name in ROW_FIELDS if _are_objects(document.get(name))), None)
    if inside is not None:
        raise DataError(
            f"{where} holds its rows in the field {inside!r}: write them out: jq -c '.{inside}[]' OLD > NEW"
        )
    # Both forms of pandas: lists, or objects by row number.
    columns = [list(one.values()) if isinstance(one, dict) else one for one in document.values()]
    are_columns = len(columns) > 1 and all(isinstance(one, list) and len(one) > 1 for one in columns)
    if are_columns and len({len(one) for one in columns}) == 1 and any(isinstance(one[0], str) for one in columns):
        program = "import pandas; pandas.read_json('OLD').to_json('NEW', orient='records', lines=True)"
        raise DataError(f'{where} holds columns, not rows: convert it: python -c "{program}"')


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _parsed(line: bytes) -> Json | str:
    try:
        return _object(json.loads(line))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start}): {TO_UTF_8.format(ANOTHER_ENCODING)}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _object(row: Any) -> Json | str:
    return row if isinstance(row, dict) else f"holds a {type(row).__name__}, a row is a JSON object"


def _cells(row: dict[Any, Any]) -> Json | str:
    # DictReader collects cells without a column under None, and gives None to columns without a cell.
    if None in row or None in row.values():
        num_columns = len([name for name in row if name is not None])
        num_cells = sum(cell is not None for name, cell in row.items() if name is not None) + len(row.get(None, ()))
        return f"has {num_cells} cells for {num_columns} columns: put quotes around cells that hold the delimiter"
    return {name: cell or None for name, cell in row.items()}


@contextlib.contextmanager
def _opened(file: Location, kind: str, name: str) -> Iterator[BinaryIO]:
    """The file's decompressed bytes. Raises DataError if it cannot be read or is not of this kind."""
    where = f"source {name}: {file}"
    try:
        with _bytes_of(file) as raw:
            codec = _codec_of(raw.peek(SNIFF_BYTES))
            stream: Any = raw if codec is None else io.BufferedReader(pa.CompressedInputStream(raw, codec))
            problem = _other_kind(stream.peek(SNIFF_BYTES)[:SNIFF_BYTES], kind)
            if problem is not None:
                raise DataError(f"{where} {problem}")
            yield stream
    except (OSError, pa.ArrowException) as error:
        if isinstance(file, ObjectPath) and objects.is_store_error(error):
            raise objects.explained(error, str(file), file.scheme) from error
        raise DataError(f"{where} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def _bytes_of(file: Location) -> io.BufferedReader:
    if isinstance(file, Path):
        return file.open("rb")
    # Objects are read in large requests.
    return io.BufferedReader(_Parts(file.parts()), STREAM_BYTES)


class _Parts(io.RawIOBase):
    """Bytes that come in parts, as a file."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._parts, b""))
        num_bytes = min(len(buffer), len(self._rest))
        buffer[:num_bytes] = self._rest[:num_bytes]
        self._rest = self._rest[num_bytes:]
        return num_bytes


def _codec_of(head: bytes) -> str | None:
    return next((codec for magic, codec in COMPRESSIONS.items() if head.startswith(magic)), None)


def _other_kind(head: bytes, kind: str) -> str | None:
    """What the file is if it is not text of `kind`, and what to do; None if it may be."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return None if kind == "parquet" else "is a Parquet file: set kind: parquet"
    # A tar archive has its magic at byte 257, after the first file's name and attributes.
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it and name the file inside"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head[:64] and kind != "parquet"):
        hint = TO_UTF_8.format("UTF-16")
        return f"is UTF-16 text or not text at all: {hint}"
    if text[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not data: the download was answered with a login or an error page; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data: run git lfs pull in its folder"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "is a zip archive: unpack it and name the file inside"
    if head.startswith(b"ARROW1"):
        return "is an Arrow file: use the folder of the dataset with kind: huggingface"
    if kind != "jsonl" and text.startswith((b"{", b"[{")):
        return "is JSON: set kind: jsonl"
    return None


def _open_parquet(file: Location, name: str) -> pq.ParquetFile:
    try:
        return open_parquet(file)
    except (pa.ArrowException, OSError) as error:
        problem = "is not a Parquet file"
        if isinstance(error, pa.ArrowInvalid):
            with _opened(file, "parquet", name) as stream:
                problem = "is a damaged Parquet file" if stream.read(4) == b"PAR1" else problem
        raise DataError(f"source {name}: {file} {problem}: {one_line(error)}") from error


def _in_folder(folder: Location, suffixes: Sequence[str]) -> list[Location]:
    endings = tuple(f"{suffix}{packed}" for suffix in suffixes for packed in COMPRESSED_SUFFIXES)
    shown = [one for one in files_below(folder) if not _is_hidden(relative_name(one, folder))]
    found = [one for one in shown if one.name.lower().endswith(endings)]
    if not found and suffixes == JSON_SUFFIXES:
        # Beside JSON Lines, .json files describe the data set; alone they are it, as in MATH.
        found = [one for one in shown if one.name.lower().endswith(tuple(f".json{x}" for x in COMPRESSED_SUFFIXES))]
    return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _matching(pattern: Location) -> list[Location]:
    """Files that a glob matches; `**` crosses folders, and no wildcard matches a leading dot."""
    if isinstance(pattern, Path):
        # Path.glob would match leading dots.
        names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207
        return [*sorted(path for path in map(Path, names) if path.is_file())]
    parts = pattern.key.split("/")
    fixed = next(place for place, part in enumerate(parts) if WILDCARD.search(part))
    if fixed == 0:
        raise DataError(f"{pattern} has a wildcard in the bucket's name: write the bucket out")
    expression = re.compile(_glob_expression(pattern.key))
    root = ObjectPath(pattern.scheme, "/".join(parts[:fixed]))
    return [one for one in files_below(root) if isinstance(one, ObjectPath) and expression.fullmatch(one.key)]


def _glob_expression(pattern: str) -> str:
    """A glob as a regular expression over keys: * and ? stay within a folder and match no leading dot."""
    shown = r"(?:(?<=/)(?!\.)|(?<!/))"
    signs = {"**/": r"(?:[^/.][^/]*/)*", "*": f"{shown}[^/]*", "?": f"{shown}[^/]"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]/]+\])", pattern)
    return "".join(signs.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)


def _of_split(files: Sequence[Location], base: Location, split: str | None, name: str) -> list[Location]:
    by_split: dict[str | None, list[Location]] = {}
    for file in files:
        by_split.setdefault(_split_of(relative_name(file, base)), []).append(file)
    named = sorted(one for one in by_split if one is not None)
    if split is None:
        if len(named) > 1:
            raise DataError(
                f"source {name}: {base} holds the splits {' and '.join(named)}: set split: {named[-1]}, or select "
                "files with a glob"
            )
        return list(files)
    wanted = SPLITS.get(split.lower(), split.lower())
    found = [file for file in files if wanted in (_split_of(relative_name(file, base)), *_words(file, base))]
    if not found:
        raise DataError(f"source {name}: {base} has no file of split {split!r}{nearest_name(split, named)}")
    return found


def _split_of(name: str) -> str | None:
    """The split that a file's name, or else its nearest folder's, says. Example: main/test-00000-of-00001.parquet."""
    for part in reversed(PurePosixPath(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _words(file: Location, base: Location) -> list[str]:
    """Names of the file's folders and the beginning of its own, for splits such as train_sft."""
    parts = PurePosixPath(relative_name(file, base).lower()).parts
    return [*parts[:-1], re.split(r"[-.]", parts[-1])[0]]
