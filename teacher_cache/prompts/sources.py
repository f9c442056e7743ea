"""Reads prompt sources: rows of JSON Lines, Parquet and Hugging Face datasets, and generated reasoning-gym tasks.

In: one source of the configuration. Out: a stream of Draft (messages, reference, metadata) and Failure in source order.
A malformed row is a Failure that names its place; a source that cannot be read at all raises DataError. Scored
completions (prompts.completions) read their rows here too.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.config import nearest_name
from stillroom.errors import DataError, one_line
from stillroom.judging.gym_tasks import jsonable, make_entries
from stillroom.schema.records import Message, stable_hash
from teacher_cache.config import (
    FileSource,
    HuggingFaceDataset,
    JsonlFile,
    ParquetFile,
    ReasoningGymSource,
    RowSource,
    Source,
)
from teacher_cache.engine.api import Failure

PARQUET_BATCH_ROWS = 1024
LONE_SURROGATE = "holds half of a character (a lone surrogate), which is not valid text"

MISSING = object()
"""Stands for a field that a row lacks, which null does not."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """`where` names the row for a person, `number` is its position in its file (lines from 1, rows from 0); `values` is
    an error message if the row cannot be read.
    """

    where: str
    number: int
    values: Json | str


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before its system message and instruction. `where` names the row for a person."""

    where: str
    messages: tuple[Message, ...]
    reference: str | None
    metadata: Json


def read_source(source: Source) -> Iterator[Draft | Failure]:
    """Drafts and malformed rows of one source, at most `limit` drafts. Raises DataError if it cannot be read."""
    if isinstance(source, ReasoningGymSource):
        found = _reasoning_gym(source)
    else:
        found = (_draft(source, row) for row in read_rows(source))
    num_drafts = 0
    for one in found:
        yield one
        num_drafts += isinstance(one, Draft)
        if num_drafts == source.limit:
            return


def read_rows(source: RowSource) -> Iterator[Row]:
    """All rows of a file, folder or dataset. Raises DataError if it cannot be read or lacks a named field."""
    name, fields = source.name, source.fields
    if isinstance(source, JsonlFile):
        _require_jsonl_fields(source.path, source.optional_fields, name)
        return jsonl_rows(source.path, name)
    if isinstance(source, ParquetFile):
        return parquet_rows(source.path, fields, name)
    return huggingface_rows(source, source.limit, fields, name)


def count_rows(source: RowSource) -> int:
    """How many rows `read_rows` yields; files are counted without parsing them."""
    if isinstance(source, JsonlFile):
        return count_jsonl_rows(source.path, source.name)
    if isinstance(source, ParquetFile):
        try:
            return sum(pq.read_metadata(file).num_rows for file in _files(source.path, ".parquet", source.name))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {source.name}: {source.path} is not a Parquet file: {one_line(error)}") from error
    return sum(1 for _ in read_rows(source))


def jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    """Lines of a file, or of all .jsonl files in a folder; `name` is the source's, for messages."""
    for where, number, line in _lines(path, name):
        yield Row(where, number, _json(line))


def count_jsonl_rows(path: Path, name: str) -> int:
    """How many rows `jsonl_rows` yields, without parsing them."""
    return sum(1 for _ in _lines(path, name))


def parquet_rows(path: Path, fields: Sequence[str], name: str) -> Iterator[Row]:
    """The given columns of a file, or of all .parquet files in a folder."""
    for file_path in _files(path, ".parquet", name):
        try:
            file = pq.ParquetFile(file_path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {name}: {file_path} is not a Parquet file: {one_line(error)}") from error
        _check_columns(fields, _column_names(file.schema_arrow), str(file_path), name)
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=list(fields))
        rows = (row for batch in batches for row in batch.to_pylist())
        try:
            yield from (Row(f"{file_path}:{number}", number, row) for number, row in enumerate(rows))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {name}: {file_path} is damaged: {one_line(error)}") from error


def huggingface_rows(source: HuggingFaceDataset, limit: int | None, fields: Sequence[str], name: str) -> Iterator[Row]:
    """The given columns of a dataset. With a limit, a hub dataset is streamed instead of downloaded."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source {name} needs the package datasets: pip install datasets") from error
    where = f"source {name}: dataset {source.dataset}"
    try:
        rows = _load_dataset(source, streaming=limit is not None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ConnectionError) as error:
        raise DataError(f"{where} cannot be loaded: {one_line(error)}") from error
    if rows.column_names is not None:
        columns = rows.column_names if rows.features is None else _column_names(rows.features.arrow_schema)
        _check_columns(fields, columns, source.dataset, name)
        # Structs are read whole: only columns can be selected.
        wanted = dict.fromkeys(one if one in rows.column_names else _outer_of(one, rows.column_names) for one in fields)
        rows = rows.select_columns(list(wanted))
    number, iterator = 0, iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # streams pass on whatever networks, archives and loader scripts raise
            raise DataError(f"{where} breaks off after {number} rows: {one_line(error)}") from error
        yield Row(f"{source.dataset}:{number}", number, row)
        number += 1


def malformed(source: str, where: str, message: str) -> Failure:
    """The failure of an unusable row. Its id depends on the row's place, so a rerun does not record it again."""
    return Failure(stable_hash("malformed", source, where), "", source, 0, "malformed", f"{where}: {message}")


def metadata_of(source: RowSource, row: Row, values: Json) -> Json:
    """The row's place, the configured metadata fields, and the judge."""
    place = "line" if isinstance(source, JsonlFile) else "row"
    metadata = {place: row.number, **{name: jsonable(find(values, name)) for name in source.metadata_fields}}
    return metadata if source.judge is None else {**metadata, "judge": source.judge}


def reference_of(source: RowSource, values: Json) -> str | None:
    """The reference answer as text; values other than text become JSON."""
    value = None if source.reference_field is None else find(values, source.reference_field)
    return value if value is None or isinstance(value, str) else json.dumps(jsonable(value), ensure_ascii=False)


def require_encodable(draft: Draft, *others: str) -> None:
    """Raises ValueError for text that UTF-8 cannot hold: JSON may contain half of an emoji, Parquet may not."""
    texts = [*others, *(text for message in draft.messages for text in (message.role, message.content))]
    try:
        "".join([*texts, draft.reference or "", json.dumps(draft.metadata, ensure_ascii=False)]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(LONE_SURROGATE) from error


def find(row: Json, field: str, default: Any = None) -> Any:
    """The field's value; `a.b` is field b of the struct a, unless the row has a field of that very name."""
    if field in row:
        return row[field]
    outer, dot, inner = field.partition(".")
    while dot:
        if isinstance(value := row.get(outer), dict):
            return find(value, inner, default)
        step, dot, inner = inner.partition(".")
        outer += f".{step}"
    return default


def names_of(row: Json, prefix: str = "") -> list[str]:
    """Every name under which `find` gives a value."""
    names = []
    for name, value in row.items():
        names += [f"{prefix}{name}", *(names_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [])]
    return names


def value_of(row: Json, field: str) -> Any:
    """The field's value. Raises ValueError if it is missing or null."""
    value = find(row, field, MISSING)
    if value is MISSING:
        raise ValueError(f"field {field!r} is missing{nearest_name(field, names_of(row))}")
    if value is None:
        raise ValueError(f"field {field!r} is null")
    return value


def text_of(row: Json, field: str) -> str:
    """The field's text. Raises ValueError if it is not text or blank."""
    value = value_of(row, field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} is not a text, or it is blank")
    return value


def conversation_of(row: Json, field: str) -> list[Message]:
    """The field's messages. Raises ValueError if it is not a list of messages."""
    value = value_of(row, field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is not a list of messages, or it is empty")
    return [_message(item, field, index) for index, item in enumerate(value)]


def _reasoning_gym(source: ReasoningGymSource) -> Iterator[Draft | Failure]:
    """Raises DataError for an unknown task or an option that it refuses."""
    try:
        for index, entry in enumerate(make_entries(source.task, source.seed, source.size, source.options)):
            # Enough to generate the entry again: its checker needs tuples and integer keys that JSON does not keep.
            metadata = {
                "judge": "reasoning_gym",
                "task": source.task,
                "seed": source.seed,
                "index": index,
                "size": source.size,
                "options": jsonable(source.options),
                "entry": entry["metadata"],
            }
            where = f"{source.task}[{index}] of seed {source.seed}"
            yield Draft(where, (Message("user", entry["question"]),), entry["answer"], metadata)
    except ImportError as error:
        raise DataError(f"source {source.name} needs the package reasoning-gym: pip install reasoning-gym") from error
    except LookupError as error:
        hint = nearest_name(source.task, list(error.args))
        raise DataError(f"source {source.name}: reasoning-gym has no task {source.task!r}{hint}") from error
    except ValueError as error:
        raise DataError(f"source {source.name}: task {source.task} refuses its options: {one_line(error)}") from error


def _draft(source: FileSource, row: Row) -> Draft | Failure:
    if isinstance(row.values, str):
        return malformed(source.name, row.where, row.values)
    try:
        messages = _messages(source, row.values)
        metadata = metadata_of(source, row, row.values)
        draft = Draft(row.where, messages, reference_of(source, row.values), metadata)
        require_encodable(draft)
    except ValueError as error:
        return malformed(source.name, row.where, str(error))
    return draft


def _messages(source: FileSource, row: Json) -> tuple[Message, ...]:
    if source.prompt_field is not None:
        return (Message("user", text_of(row, source.prompt_field)),)
    field = str(source.messages_field)
    messages = conversation_of(row, field)
    if source.drop_final_answer:
        while messages and messages[-1].role == "assistant":
            messages.pop()
    if not messages or messages[-1].role in ("assistant", "system"):
        role = messages[-1].role if messages else "assistant"
        hint = " (drop_final_answer: true removes answers)" if role == "assistant" else ""
        raise ValueError(f"field {field!r} ends with the {role}: a prompt must end with a question{hint}")
    return tuple(messages)


def _message(item: Any, field: str, index: int) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise ValueError(f"field {field!r}, message {index} is not {{role: text, content: text}}")
    if not content.strip() and role == "user":
        raise ValueError(f"field {field!r}, message {index} is empty")
    return Message(role, content)


def _require_jsonl_fields(path: Path, fields: Sequence[str], name: str) -> None:
    """Raises DataError if no row has one of the fields. Stops at the row where all were seen, usually the first; a pipe
    can be read only once and is not checked.
    """
    if not path.is_file() and not path.is_dir():
        return
    missing, known = list(fields), dict[str, None]()
    for row in jsonl_rows(path, name) if missing else ():
        if isinstance(row.values, dict):
            known |= dict.fromkeys(names_of(row.values))
            missing = [field for field in missing if find(row.values, field, MISSING) is MISSING]
        if not missing:
            return
    if missing and known:
        hint = nearest_name(missing[0], list(known))
        raise DataError(f"source {name}: no row of {path} has a field {missing[0]!r}{hint}")


def _lines(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    """Place, line number from 1, and bytes of every line that is not blank."""
    for file in _files(path, ".jsonl", name):
        try:
            with file.open("rb") as stream:
                yield from ((f"{file}:{number}", number, line) for number, line in enumerate(stream, 1) if line.strip())
        except OSError as error:
            raise DataError(f"source {name}: {file} cannot be read: {error.strerror}") from error


def _json(line: bytes) -> Json | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"holds a {type(row).__name__}, a row is a JSON object"


def _load_dataset(source: HuggingFaceDataset, *, streaming: bool) -> Any:
    import datasets

    folder, split = Path(source.dataset), source.split
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        loaded = datasets.load_from_disk(source.dataset)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(f"it has no split {split!r}{nearest_name(split, list(loaded))}")
        return loaded[split]
    # Streaming fetches only the first rows of a hub dataset; a local folder is there anyway.
    streaming = streaming and not folder.exists()
    return datasets.load_dataset(
        source.dataset, source.config, split=split, revision=source.revision, streaming=streaming
    )


def _check_columns(fields: Iterable[str], columns: Sequence[str], where: str, name: str) -> None:
    for field in fields:
        if field not in columns:
            raise DataError(f"source {name}: {where} has no column {field!r}{nearest_name(field, list(columns))}")


def _column_names(fields: Iterable[pa.Field], prefix: str = "") -> list[str]:
    """Names of columns, and dotted names of the fields of structs."""
    names = []
    for field in fields:
        names.append(f"{prefix}{field.name}")
        if pa.types.is_struct(field.type):
            names += _column_names(field.type.fields, f"{prefix}{field.name}.")
    return names


def _outer_of(field: str, columns: Sequence[str]) -> str:
    """The column that holds a field of a struct."""
    return max((one for one in columns if field.startswith(f"{one}.")), key=len)


def _files(path: Path, suffix: str, name: str) -> list[Path]:
    try:
        if path.is_dir():
            # A folder may be named like a file.
            found = sorted(one for one in path.rglob(f"*{suffix}") if not one.is_dir())
            if not found:
                raise DataError(f"source {name}: the folder {path} holds no {suffix} file")
            return found
        if not path.exists():
            raise DataError(f"source {name}: {path} does not exist")
    except OSError as error:
        raise DataError(f"source {name}: {path} cannot be read: {error.strerror}") from error
    return [path]
