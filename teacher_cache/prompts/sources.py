"""Rows of files, datasets and task generators to drafts of prompts: one reader a kind of source.

In: a source of the configuration. Out: a stream of Draft (messages, reference, metadata) and LoadFailure, in the
source's own order. One malformed row is one LoadFailure that names its place; a source that cannot be read at all is a
DataError.

Rows of files and datasets, one dictionary a row, in their own order: JSON Lines, Parquet, Hugging Face.

A row that cannot be read is the text that says why; a file or dataset that cannot be read at all is a DataError.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.config import nearest_name
from stillroom.errors import DataError
from stillroom.judging.judges import import_reasoning_gym, jsonable, task_names
from stillroom.schema.records import Message, stable_hash
from teacher_cache.config import CompletionFields, FieldsBase, JsonlSource, ParquetSource, ReasoningGymSource, Source

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


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A row that never became a request: what the failures table says about it."""

    sample_id: str
    prompt_id: str
    source: str
    sample_index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as its source gives it, before system message and instruction. `where` is a place a person can look up."""

    where: str
    messages: tuple[Message, ...]
    reference: str | None
    metadata: Json


HALF_CHARACTERS = "holds half of a character (a lone surrogate), which is no text"


def read_source(source: Source) -> Iterator[Draft | LoadFailure]:
    """Drafts and malformed rows of one source, at most `limit` drafts. Raises DataError where the source cannot be
    read.
    """
    num_drafts = 0
    for row in _rows(source):
        yield row
        num_drafts += isinstance(row, Draft)
        if num_drafts == source.limit:
            return


def _rows(source: Source) -> Iterator[Draft | LoadFailure]:
    if isinstance(source, ReasoningGymSource):
        return _reasoning_gym(source)
    if isinstance(source, JsonlSource):
        require_jsonl_fields(source.path, optional_fields(source), source.name)
        return _drafts(source, jsonl_rows(source.path, source.name), "line")
    fields = _fields(source)
    if isinstance(source, ParquetSource):
        return _drafts(source, parquet_rows(source.path, fields, source.name), "row")
    hub = (source.dataset, source.config, source.split, source.revision)
    return _drafts(source, huggingface_rows(*hub, limit=source.limit, fields=fields, name=source.name), "row")


def malformed(source: str, where: str, message: str) -> LoadFailure:
    """The failure of a row that is no prompt; its id depends on its place, so that a rerun does not record it twice."""
    return LoadFailure(
        sample_id=stable_hash("malformed", source, where),
        prompt_id="",
        source=source,
        sample_index=0,
        reason="malformed",
        message=f"{where}: {message}",
    )


def _drafts(source: FieldsBase, rows: Iterable[Row], place: str) -> Iterator[Draft | LoadFailure]:
    for row in rows:
        if isinstance(row.values, str):
            yield malformed(source.name, row.where, row.values)
        else:
            yield _draft(source, row.where, row.values, {place: row.number})


def _draft(source: FieldsBase, where: str, row: Json, place: Json) -> Draft | LoadFailure:
    try:
        messages = _messages(source, row)
    except ValueError as error:
        return malformed(source.name, where, str(error))
    metadata = {**place, **{name: jsonable(row.get(name)) for name in source.metadata_fields}}
    if source.judge is not None:
        metadata["judge"] = source.judge
    reference = reference_text(row.get(source.reference_field)) if source.reference_field is not None else None
    draft = Draft(where, messages, reference, metadata)
    if has_half_characters(draft):
        return malformed(source.name, where, HALF_CHARACTERS)
    return draft


def has_half_characters(draft: Draft, *others: str) -> bool:
    """Whether some text cannot be written as UTF-8: JSON may hold half of an emoji, tables may not."""
    texts = [*others, *(text for message in draft.messages for text in (message.role, message.content))]
    try:
        "".join([*texts, draft.reference or "", json.dumps(draft.metadata, ensure_ascii=False)]).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def value_of(row: Json, field: str) -> Any:
    """The field's value. Raises ValueError where it is missing or null."""
    value = row.get(field)
    if value is None and field in row:
        raise ValueError(f"field {field!r} is null")
    if value is None:
        raise ValueError(f"field {field!r} is missing{nearest_name(field, list(map(str, row)))}")
    return value


def text_of(row: Json, field: str) -> str:
    """The field's text. Raises ValueError where it is none or blank."""
    value = value_of(row, field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} is not a text with something in it")
    return value


def conversation_of(row: Json, field: str) -> list[Message]:
    """The field's messages. Raises ValueError where they are none."""
    value = value_of(row, field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is not a list of messages with something in it")
    return [_message(item, field, index) for index, item in enumerate(value)]


def _messages(source: FieldsBase, row: Json) -> tuple[Message, ...]:
    if source.prompt_field is not None:
        return (Message("user", text_of(row, source.prompt_field)),)
    field = str(source.messages_field)
    messages = conversation_of(row, field)
    if source.drop_final_answer:
        while messages and messages[-1].role == "assistant":
            messages.pop()
    if not messages or messages[-1].role in ("assistant", "system"):
        role = messages[-1].role if messages else "assistant"
        hint = " (drop_final_answer: true leaves answers off)" if role == "assistant" else ""
        raise ValueError(f"field {field!r} ends with the {role}: a prompt ends with a question{hint}")
    return tuple(messages)


def _message(item: Any, field: str, index: int) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise ValueError(f"field {field!r}, message {index} is not {{role: text, content: text}}")
    if not content.strip() and role == "user":
        raise ValueError(f"field {field!r}, message {index} is empty")
    return Message(role, content)


def reference_text(value: Any) -> str | None:
    """A right answer as text: what is none already becomes JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(jsonable(value), ensure_ascii=False)


def _reasoning_gym(source: ReasoningGymSource) -> Iterator[Draft | LoadFailure]:
    dataset = open_reasoning_gym(source)
    for index in range(source.size):
        entry = dataset[index]
        reference = entry["answer"]
        metadata = {
            "judge": "reasoning_gym",
            "task": source.task,
            "seed": source.seed,
            "index": index,
            "size": source.size,
            "options": jsonable(source.options),
            "entry": jsonable(entry["metadata"]),
        }
        messages = (Message("user", str(entry["question"])),)
        where = f"{source.task}[{index}] of seed {source.seed}"
        yield Draft(where, messages, None if reference is None else str(reference), metadata)


def open_reasoning_gym(source: ReasoningGymSource) -> Any:
    """The reasoning-gym dataset of a source. Raises DataError for an unknown task or an option that it refuses."""
    try:
        reasoning_gym = import_reasoning_gym()
        names = task_names()
    except ImportError as error:
        raise DataError(f"source {source.name} needs the package reasoning-gym: pip install reasoning-gym") from error
    if source.task not in names:
        hint = nearest_name(source.task, names)
        raise DataError(f"source {source.name}: reasoning-gym has no task {source.task!r}{hint}")
    try:
        return reasoning_gym.create_dataset(source.task, seed=source.seed, size=source.size, **source.options)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"source {source.name}: task {source.task} refuses its options: {_one_line(error)}") from error


def _fields(source: FieldsBase) -> list[str]:
    named = (source.messages_field, source.prompt_field, source.reference_field, *source.metadata_fields)
    return list(dict.fromkeys(name for name in named if name is not None))


def optional_fields(source: FieldsBase | CompletionFields) -> list[str]:
    """Fields that a row may lack, and of which a name that no row has is a slip."""
    reference = () if source.reference_field is None else (source.reference_field,)
    return [*reference, *source.metadata_fields]
