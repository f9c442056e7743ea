"""Rows of files and datasets, one dictionary a row, in their own order: JSON Lines, Parquet, Hugging Face.

A row that cannot be read is the text that says why; a file or dataset that cannot be read at all is a DataError.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import nearest_name
from shared.errors import DataError

PARQUET_BATCH_ROWS = 1024

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """`where` is a place that a person can look up, `number` the row's (a line's from 1, else from 0) in its file."""

    where: str
    number: int
    values: Json | str


def jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    """Lines of a file or of all .jsonl files of a folder; `name` is the source's, for messages."""
    for file in _files(path, ".jsonl", name):
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield Row(f"{file}:{number}", number, _json(line))
        except OSError as error:
            raise DataError(f"source {name}: {file} cannot be read: {error.strerror}") from error


def require_jsonl_fields(path: Path, fields: Sequence[str], name: str) -> None:
    """Raises DataError where no row has one of the fields. Rows are read only until every field was met, in most files
    one; a pipe, which can be read but once, is not asked.
    """
    if not path.is_file() and not path.is_dir():
        return
    missing, known = list(fields), dict[str, None]()
    for row in jsonl_rows(path, name) if missing else ():
        if isinstance(row.values, dict):
            known |= dict.fromkeys(row.values)
            missing = [field for field in missing if field not in row.values]
        if not missing:
            return
    if missing and known:
        raise DataError(
            f"source {name}: no row of {path} has a field {missing[0]!r}{nearest_name(missing[0], list(known))}"
        )


def parquet_rows(path: Path, fields: Sequence[str], name: str) -> Iterator[Row]:
    """The fields of a file or of all .parquet files of a folder."""
    for file_path in _files(path, ".parquet", name):
        try:
            file = pq.ParquetFile(file_path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {name}: {file_path} is not a Parquet file: {_one_line(error)}") from error
        _check_columns(fields, file.schema_arrow.names, str(file_path), name)
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=list(fields))
        rows = (row for batch in batches for row in batch.to_pylist())
        try:
            yield from (Row(f"{file_path}:{number}", number, row) for number, row in enumerate(rows))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {name}: {file_path} is damaged: {_one_line(error)}") from error


def huggingface_rows(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None,
    *,
    limit: int | None,
    fields: Sequence[str],
    name: str,
) -> Iterator[Row]:
    """The fields of a dataset, by hub id or local folder; with a limit a hub dataset is not downloaded whole."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source {name} needs the package datasets: pip install datasets") from error
    try:
        rows = _load_dataset(dataset, config, split, revision, limit)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ConnectionError) as error:
        raise DataError(f"source {name}: dataset {dataset} cannot be loaded: {_one_line(error)}") from error
    if rows.column_names is not None:
        _check_columns(fields, rows.column_names, dataset, name)
        rows = rows.select_columns(list(fields))
    numbered = enumerate(_read_on(rows, f"source {name}: dataset {dataset}"))
    yield from (Row(f"{dataset}:{number}", number, row) for number, row in numbered)


def _read_on(rows: Iterable[Json], where: str) -> Iterator[Json]:
    left, num_rows = iter(rows), 0
    while True:
        try:
            row = next(left)
        except StopIteration:
            return
        except Exception as error:  # a stream meets networks, archives and loaders of many authors, each with its own
            raise DataError(f"{where} breaks off after {num_rows} rows: {_one_line(error)}") from error
        yield row
        num_rows += 1


def count_jsonl_rows(path: Path, name: str) -> int:
    """How many rows `jsonl_rows` gives, without parsing them."""
    num_rows = 0
    for file in _files(path, ".jsonl", name):
        try:
            with file.open("rb") as stream:
                num_rows += sum(1 for line in stream if line.strip())
        except OSError as error:
            raise DataError(f"source {name}: {file} cannot be read: {error.strerror}") from error
    return num_rows


def count_parquet_rows(path: Path, name: str) -> int:
    """How many rows `parquet_rows` gives, by the footers."""
    try:
        return sum(pq.read_metadata(file).num_rows for file in _files(path, ".parquet", name))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"source {name}: {path} is not a Parquet file: {_one_line(error)}") from error


def _json(line: bytes) -> Json | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"holds a {type(row).__name__}, a row is a JSON object"


def _load_dataset(dataset: str, config: str | None, split: str, revision: str | None, limit: int | None) -> Any:
    import datasets

    folder = Path(dataset)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        loaded = datasets.load_from_disk(dataset)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"it has no split {split!r}{nearest_name(split, list(loaded))}")
            return loaded[split]
        return loaded
    # The first rows of a hub dataset do not need the rest of it.
    streaming = limit is not None and not folder.exists()
    return datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=streaming)


def _check_columns(fields: Sequence[str], columns: Sequence[str], where: str, name: str) -> None:
    for field in fields:
        if field not in columns:
            raise DataError(f"source {name}: {where} has no column {field!r}{nearest_name(field, list(columns))}")


def _files(path: Path, suffix: str, name: str) -> list[Path]:
    try:
        if path.is_dir():
            # A folder that somebody named like a file is none.
            found = sorted(one for one in path.rglob(f"*{suffix}") if not one.is_dir())
            if not found:
                raise DataError(f"source {name}: the folder {path} holds no {suffix} file")
            return found
        if not path.exists():
            raise DataError(f"source {name}: {path} does not exist")
    except OSError as error:
        raise DataError(f"source {name}: {path} cannot be read: {error.strerror}") from error
    return [path]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
