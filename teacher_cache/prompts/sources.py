"""Reads prompt sources: rows of files and Hugging Face datasets, generated reasoning-gym tasks, and templates.

In: one source of the configuration. Out: a stream of Draft (messages, reference, metadata) and Failure in source order.
A malformed row is a Failure that names its place; a source that cannot be read at all raises DataError. Scored
completions (prompts.completions) read their rows here too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import nearest_name
from stillroom.errors import DataError, one_line
from stillroom.judging.gym_tasks import jsonable, make_entries
from stillroom.models import hush_hub
from stillroom.schema.records import Message, stable_hash
from stillroom.storage.paths import Location
from teacher_cache.engine.api import Failure
from teacher_cache.prompts.config import (
    CsvFile,
    FileSource,
    HuggingFaceDataset,
    JsonlFile,
    ParquetFile,
    ReasoningGymSource,
    RowSource,
    Source,
    TemplateSource,
)
from teacher_cache.prompts.conversations import MISSING, Json, find, guarded_columns, messages_of, names_of
from teacher_cache.prompts.files import (
    Row,
    check_columns,
    column_names,
    count_json_rows,
    count_parquet_rows,
    csv_rows,
    json_rows,
    parquet_rows,
)
from teacher_cache.prompts.templates import variants

LONE_SURROGATE = "holds a lone surrogate (half of a character), which is not valid text"


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before its system message and instruction. `where` names the row for a person. A variant of a question
    is never held out.
    """

    where: str
    messages: tuple[Message, ...]
    reference: str | None
    metadata: Json
    is_variant: bool = False


def read_source(source: Source) -> Iterator[Draft | Failure]:
    """Drafts and malformed rows of one source, at most `limit` drafts. Raises DataError if it cannot be read."""
    if isinstance(source, ReasoningGymSource):
        found = _reasoning_gym(source)
    elif isinstance(source, TemplateSource):
        found = _of_templates(source)
    else:
        found = (_draft(source, row) for row in read_rows(source))
    num_drafts = 0
    for one in found:
        yield one
        # Malformed rows do not count towards the limit.
        num_drafts += isinstance(one, Draft)
        if num_drafts == source.limit:
            return


def read_rows(source: RowSource) -> Iterator[Row]:
    """All rows of files or of a dataset. Raises DataError if they cannot be read or lack a named field."""
    name, fields, guarded = source.name, source.fields, guarded_columns(source)
    if isinstance(source, HuggingFaceDataset):
        return huggingface_rows(source, source.limit, fields, guarded, name)
    path, split = source.path, source.split
    if isinstance(source, CsvFile):
        return csv_rows(path, split, source.delimiter, fields, name)
    if isinstance(source, ParquetFile):
        return parquet_rows(path, split, fields, guarded, name)
    _require_json_fields(path, split, source.optional_fields, name)
    return json_rows(path, split, name)


def count_rows(source: RowSource) -> int:
    """How many rows `read_rows` yields; JSON Lines and Parquet are counted without parsing."""
    if isinstance(source, JsonlFile):
        return count_json_rows(source.path, source.split, source.name)
    if isinstance(source, ParquetFile):
        return count_parquet_rows(source.path, source.split, source.name)
    return sum(1 for _ in read_rows(source))


def huggingface_rows(
    source: HuggingFaceDataset, limit: int | None, fields: Sequence[str], optional: Sequence[str], name: str
) -> Iterator[Row]:
    """The given columns of a dataset, and the optional ones where it has them. With a limit, a hub dataset is streamed
    instead of downloaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source {name} needs the package datasets: pip install datasets") from error
    where = f"source {name}: dataset {source.dataset}"
    try:
        rows = _load_dataset(source, streaming=limit is not None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ConnectionError) as error:
        is_away = isinstance(error, ConnectionError) and not Path(source.dataset).exists()
        remedy = ": check its id and the network, or name a local folder" if is_away else ""
        raise DataError(f"{where} cannot be loaded: {one_line(error)}{remedy}") from error
    if rows.column_names is not None:
        columns = rows.column_names if rows.features is None else column_names(rows.features.arrow_schema)
        check_columns(fields, columns, source.dataset, name)
        # Structs are read whole: only columns can be selected.
        wanted = dict.fromkeys(one if one in rows.column_names else _outer_of(one, rows.column_names) for one in fields)
        present = [one for one in optional if one in rows.column_names]
        rows = rows.select_columns([*dict.fromkeys([*wanted, *present])])
    number, iterator = 0, iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # streams pass on whatever networks, archives and loader scripts raise
            raise DataError(f"{where} ends unexpectedly after {number} rows: {one_line(error)}") from error
        yield Row(f"{source.dataset}:{number}", number, row)
        number += 1


def malformed(source: str, where: str, message: str) -> Failure:
    """The failure of an unusable row. Its id depends on the row's place, so a rerun does not record it again."""
    return Failure(stable_hash("malformed", source, where), "", source, 0, "malformed", f"{where}: {message}")


def metadata_of(source: RowSource, row: Row, values: Json) -> Json:
    """The row's number, the configured metadata fields, and the judge."""
    metadata = {row.unit: row.number, **{name: jsonable(find(values, name)) for name in source.metadata_fields}}
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
        raise DataError(f"source {source.name}: task {source.task} rejects its options: {one_line(error)}") from error


def _of_templates(source: TemplateSource) -> Iterator[Draft]:
    for index, one in enumerate(variants(source)):
        how = {"kind": "template", "template": one.template, "variant": one.number, "values": dict(one.values)}
        judge = {} if one.answer is None else {"judge": source.judge}
        metadata = {"index": index, **judge, "augment": how}
        where = f"template {one.template}[{one.number}]"
        yield Draft(where, (Message("user", one.question),), one.answer, metadata, is_variant=True)


def _draft(source: FileSource, row: Row) -> Draft | Failure:
    if isinstance(row.values, str):
        return malformed(source.name, row.where, row.values)
    try:
        messages = _messages(source, row.values)
        metadata = metadata_of(source, row, row.values)
        draft = Draft(row.where, messages, reference_of(source, row.values), metadata)
        require_encodable(draft)
    except (ValueError, RecursionError) as error:
        return malformed(source.name, row.where, str(error))
    return draft


def _messages(source: FileSource, row: Json) -> tuple[Message, ...]:
    messages = messages_of(source, row, drop_final_answer=source.drop_final_answer)
    if not messages or messages[-1].role in ("assistant", "system"):
        role = messages[-1].role if messages else "assistant"
        field = source.messages_field or source.prompt_field
        remedy = "" if source.messages_field else f"messages_field: {field} with "
        hint = f" ({remedy}drop_final_answer: true removes answers)" if role == "assistant" else ""
        raise ValueError(f"field {field!r} ends with the {role}: a prompt must end with a question{hint}")
    return tuple(messages)


def _require_json_fields(path: Location, split: str | None, fields: Sequence[str], name: str) -> None:
    """Raises DataError if no row has one of the fields. Stops at the row where all were seen, usually the first; a pipe
    can be read only once and is not checked.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file() and not path.is_dir():
        return
    missing, known = list(fields), dict[str, None]()
    for row in json_rows(path, split, name) if missing else ():
        if isinstance(row.values, dict):
            known |= dict.fromkeys(names_of(row.values))
            missing = [field for field in missing if find(row.values, field, MISSING) is MISSING]
        if not missing:
            return
    if missing and known:
        hint = nearest_name(missing[0], list(known))
        raise DataError(f"source {name}: no row of {path} has a field {missing[0]!r}{hint}")


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
    hush_hub()
    # Streaming fetches only the first rows of a hub dataset; a local folder is there anyway.
    streaming = streaming and not folder.exists()
    return datasets.load_dataset(
        source.dataset, source.config, split=split, revision=source.revision, streaming=streaming
    )


def _outer_of(field: str, columns: Sequence[str]) -> str:
    """The column that holds a field of a struct."""
    return max((one for one in columns if field.startswith(f"{one}.")), key=len)
