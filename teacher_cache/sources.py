"""Rows of files, datasets and task generators to drafts of prompts: one reader a kind of source.

In: a source of the configuration. Out: a stream of Draft (messages, reference, metadata) and LoadFailure, in the
source's own order. One malformed row is one LoadFailure that names its place; a source that cannot be read at all is a
DataError.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.records import Message, stable_hash
from shared.config import nearest_name
from shared.errors import DataError
from shared.gym import import_reasoning_gym, jsonable, task_names
from teacher_cache.config import (
    FieldsBase,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    ReasoningGymSource,
    Source,
)

PARQUET_BATCH_ROWS = 1024

Json = dict[str, Any]


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


def read_source(source: Source) -> Iterator[Draft | LoadFailure]:
    """Drafts and malformed rows of one source, at most `limit` drafts. Raises DataError where the source cannot be
    read.
    """
    if isinstance(source, JsonlSource):
        rows = _jsonl(source)
    elif isinstance(source, ParquetSource):
        rows = _drafts(source, _parquet_rows(source))
    elif isinstance(source, HuggingFaceSource):
        rows = _drafts(source, _huggingface_rows(source))
    else:
        rows = _reasoning_gym(source)
    num_drafts = 0
    for row in rows:
        yield row
        num_drafts += isinstance(row, Draft)
        if num_drafts == source.limit:
            return


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


def _jsonl(source: JsonlSource) -> Iterator[Draft | LoadFailure]:
    for path in _files(source.path, ".jsonl", source.name):
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _jsonl_row(source, f"{path}:{number}", line, number)


def _jsonl_row(source: JsonlSource, where: str, line: bytes, number: int) -> Draft | LoadFailure:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return malformed(source.name, where, f"not JSON: {error}")
    if not isinstance(row, dict):
        return malformed(source.name, where, f"holds a {type(row).__name__}, a row is a JSON object")
    return _draft(source, where, row, {"line": number})


def _parquet_rows(source: ParquetSource) -> Iterator[tuple[str, Json, int]]:
    for path in _files(source.path, ".parquet", source.name):
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {source.name}: {path} is not a Parquet file: {_one_line(error)}") from error
        _check_columns(source, file.schema_arrow.names, str(path))
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=_fields(source))
        rows = (row for batch in batches for row in batch.to_pylist())
        try:
            yield from ((f"{path}:{number}", row, number) for number, row in enumerate(rows))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"source {source.name}: {path} is damaged: {_one_line(error)}") from error


def _huggingface_rows(source: HuggingFaceSource) -> Iterator[tuple[str, Json, int]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source {source.name} needs the package datasets: pip install datasets") from error
    try:
        rows = _load_dataset(source)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"source {source.name}: dataset {source.dataset} cannot be loaded: {_one_line(error)}"
        ) from error
    if rows.column_names is not None:
        _check_columns(source, rows.column_names, source.dataset)
        rows = rows.select_columns(_fields(source))
    yield from ((f"{source.dataset}:{number}", row, number) for number, row in enumerate(rows))


def _load_dataset(source: HuggingFaceSource) -> Any:
    import datasets

    folder = Path(source.dataset)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        loaded = datasets.load_from_disk(source.dataset)
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise ValueError(f"it has no split {source.split!r}{nearest_name(source.split, list(loaded))}")
            return loaded[source.split]
        return loaded
    # The first rows of a hub dataset do not need the rest of it.
    streaming = source.limit is not None and not folder.exists()
    return datasets.load_dataset(
        source.dataset, source.config, split=source.split, revision=source.revision, streaming=streaming
    )


def _drafts(source: FieldsBase, rows: Iterable[tuple[str, Json, int]]) -> Iterator[Draft | LoadFailure]:
    for where, row, number in rows:
        yield _draft(source, where, row, {"row": number})


def _draft(source: FieldsBase, where: str, row: Json, place: Json) -> Draft | LoadFailure:
    try:
        messages = _messages(source, row)
    except ValueError as error:
        return malformed(source.name, where, str(error))
    metadata = {**place, **{name: jsonable(row.get(name)) for name in source.metadata_fields}}
    if source.judge is not None:
        metadata["judge"] = source.judge
    reference = _reference(row.get(source.reference_field)) if source.reference_field is not None else None
    draft = Draft(where, messages, reference, metadata)
    if _has_half_characters(draft):
        return malformed(source.name, where, "holds half of a character (a lone surrogate), which is no text")
    return draft


def _has_half_characters(draft: Draft) -> bool:
    """Whether some text cannot be written as UTF-8: JSON may hold half of an emoji, tables may not."""
    texts = [text for message in draft.messages for text in (message.role, message.content)]
    try:
        "".join([*texts, draft.reference or "", json.dumps(draft.metadata, ensure_ascii=False)]).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _messages(source: FieldsBase, row: Json) -> tuple[Message, ...]:
    field = source.messages_field or source.prompt_field
    value = row.get(str(field))
    if value is None:
        raise ValueError(f"field {field!r} is missing{nearest_name(str(field), list(map(str, row)))}")
    if source.prompt_field is not None:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {field!r} is not a text with something in it")
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is not a list of messages with something in it")
    messages = [_message(item, field, index) for index, item in enumerate(value)]
    if source.drop_final_answer:
        while messages and messages[-1].role == "assistant":
            messages.pop()
    if not messages or messages[-1].role in ("assistant", "system"):
        role = messages[-1].role if messages else "assistant"
        hint = " (drop_final_answer: true leaves answers off)" if role == "assistant" else ""
        raise ValueError(f"field {field!r} ends with the {role}: a prompt ends with a question{hint}")
    return tuple(messages)


def _message(item: Any, field: str | None, index: int) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise ValueError(f"field {field!r}, message {index} is not {{role: text, content: text}}")
    if not content.strip() and role == "user":
        raise ValueError(f"field {field!r}, message {index} is empty")
    return Message(role, content)


def _reference(value: Any) -> str | None:
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


def _check_columns(source: FieldsBase, columns: list[str], where: str) -> None:
    for field in _fields(source):
        if field not in columns:
            raise DataError(f"source {source.name}: {where} has no column {field!r}{nearest_name(field, columns)}")


def _files(path: Path, suffix: str, name: str) -> list[Path]:
    if path.is_dir():
        found = sorted(path.rglob(f"*{suffix}"))
        if not found:
            raise DataError(f"source {name}: the folder {path} holds no {suffix} file")
        return found
    if not path.exists():
        raise DataError(f"source {name}: {path} does not exist")
    return [path]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
