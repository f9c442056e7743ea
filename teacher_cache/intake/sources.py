"""Rows of files, datasets and task generators to drafts of prompts: one reader a kind of source.

In: a source of the configuration. Out: a stream of Draft (messages, reference, metadata) and LoadFailure, in the
source's own order. One malformed row is one LoadFailure that names its place; a source that cannot be read at all is a
DataError.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from schemas.records import Message, stable_hash
from shared.config import nearest_name
from shared.errors import DataError
from shared.gym import import_reasoning_gym, jsonable, task_names
from teacher_cache.intake.source_rows import Row, huggingface_rows, jsonl_rows, parquet_rows, require_jsonl_fields
from teacher_cache.score_config import CompletionFields
from teacher_cache.source_config import FieldsBase, JsonlSource, ParquetSource, ReasoningGymSource, Source

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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
