"""Chains as text for a student of another vocabulary: tokenised once with the student's tokenizer, kept with the run.

In: a selection of any caches, a tokenizer. Out: a folder of Parquet files with token ids (same row groups, same order)
and a selection over them, which plans, streams and resumes like any other. No distributions, so cross-entropy only.
A chain that came to its own end gets the student's end of sequence; one that was cut off does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import ConfigError, CorruptError
from stillroom.log import Progress
from stillroom.models import came_to_its_end, fingerprint_template, fingerprint_tokenizer, special_pieces
from stillroom.schema.records import Int64, stable_hash
from stillroom.schema.tables import list_of
from stillroom.storage.paths import atomic_path
from student_train.data.selection import (
    SCHEMA,
    Selection,
    SelectionRequest,
    check_request,
    keys_of,
    load_selection,
    open_selection,
    totals_of,
    write_selection,
)

TEXT_METADATA_KEY = b"stillroom-text"
TEXT_COLUMNS = [
    "sample_id",
    "run_id",
    "messages",
    "reference",
    "text",
    "reasoning",
    "answer",
    "finish_reason",
    "token_ids",
]

Completion = Literal["chain", "reference"]
"""What is learnt: what the teacher said, or the reference answer of the prompt."""

TEXT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", list_of(pa.int32()), nullable=False),
        pa.field("token_ids", list_of(pa.int32()), nullable=False),
    ]
)


class TextTokenizer(Protocol):
    """What retokenising asks of a student's tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Identity of tokenizer and chat template together."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

    @property
    def eos_id(self) -> int:
        """The id that ends an answer."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt as the chat template writes it, up to where the answer begins."""

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts, whose special tokens count as such."""

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, in which nothing a teacher wrote becomes a special token."""


class HuggingFaceText:
    """A transformers tokenizer as TextTokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """`vocab_size` is the width of the student's logits. Raises ConfigError without a template or an end token."""
        if tokenizer.chat_template is None:
            raise ConfigError("the student's tokenizer has no chat template: give it one (chat_template.jinja)")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the student's tokenizer has no eos_token: name one in its tokenizer_config.json")
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_id = int(tokenizer.eos_token_id)
        self.fingerprint = stable_hash(fingerprint_tokenizer(tokenizer), fingerprint_template(tokenizer))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text, with the generation prompt."""
        rendered: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return rendered

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with special tokens parsed, none added."""
        return self._encode(texts, split_special_tokens=False)

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with special tokens taken for plain text."""
        return self._encode(texts, split_special_tokens=True)

    def _encode(self, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            # transformers fails on an empty batch.
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


@dataclass(frozen=True, slots=True)
class Markers:
    """What opens and closes the reasoning in a teacher's text (None where its run did not say), and ends its turns."""

    start: str | None
    end: str | None
    special: Mapping[int, str] = field(default_factory=dict)
    """Special tokens of the teacher, by id."""


def open_text_selection(
    path: Path, request: SelectionRequest, tokenizer: TextTokenizer, completion: Completion = "chain"
) -> Selection:
    """The text selection kept at `path`, or a new one: frozen, then retokenised into a folder beside it.

    Goes on where an interrupted call stopped. Raises ConfigError where `path` answers another request or tokenizer.
    """
    if not path.exists():
        source = open_selection(path.with_name(f"{path.stem}.source.parquet"), replace(request, any_tokenizer=True))
        return retokenise(path, source, tokenizer, completion)
    selection = load_selection(path, [one.root for one in request.sources])
    check_request(path, selection.header, request)
    if selection.header.tokenizer_fingerprints != [tokenizer.fingerprint]:
        raise ConfigError(f"{path} was tokenised with another tokenizer or chat template: name another run folder")
    return selection


def retokenise(path: Path, source: Selection, tokenizer: TextTokenizer, completion: Completion = "chain") -> Selection:
    """Tokenises the chains of `source` and writes a selection of the results to `path`, with files in `<path's
    stem>-text`.

    Chains that come to no token are left out and counted. Raises ConfigError where that leaves none, CorruptError for a
    shard that cannot be read.
    """
    folder = path.parent / f"{path.stem}-text"
    markers = _markers(source)
    parts, done, num_tokens = [], 0, 0
    groups_of_file = np.split(np.arange(len(source.file_G)), _file_starts(source)[1:])
    with Progress("tokenise", source.num_chains, "chains") as progress:
        for groups in groups_of_file:
            target = folder / f"{source.cache_G[groups[0]]}-{source.path_of(groups[0]).stem}.parquet"
            rows = np.flatnonzero((source.group_R >= groups[0]) & (source.group_R <= groups[-1]))
            request_hash = stable_hash(tokenizer.fingerprint, completion, source.key_R[rows].tolist())
            if _hash_of(target) != request_hash:
                _write_file(target, request_hash, source, groups, tokenizer, markers, completion)
            part = _rows_of(target, source, rows)
            parts.append(part)
            done, num_tokens = done + len(rows), num_tokens + int(part.column("num_tokens").to_numpy().sum())
            progress.update(done, num_tokens)
    rows_out = pa.concat_tables(parts)
    if not rows_out.num_rows:
        what = "a reference answer" if completion == "reference" else "text"
        raise ConfigError(
            f"none of the {source.num_chains} chains of {source.header.where!r} has {what}: select others "
            "(`teacher-cache sql` shows the columns reference and text)"
        )
    header = source.header.model_copy(
        update={
            "text": folder.name,
            "num_empty": source.header.num_empty + source.num_chains - rows_out.num_rows,
            "tokenizer_fingerprints": [tokenizer.fingerprint],
            "template_fingerprints": [],
            "codecs": [],
            "vocab_size": tokenizer.vocab_size,
            "max_support": 0,
            "draws": 0,
            "temperatures": [],
            **totals_of(rows_out),
        }
    )
    return write_selection(path, rows_out, header)


def completion_text(row: Mapping[str, Any], prompt: str, markers: Markers) -> str:
    """What the student is to say after `prompt`: the teacher's text with its reasoning opened exactly once and closed.

    A teacher whose template opens the reasoning (DeepSeek-R1: the prompt ends in "<think>") leaves the opening out of
    its own text; a decoder that drops special tokens leaves out both marks.
    """
    text: str = row["text"]
    if row["reasoning"] is None or markers.start is None or markers.end is None:
        return text
    if row["answer"] is not None and markers.end not in text:
        text = f"{row['reasoning']}{markers.end}{row['answer']}"
    opened = prompt.rstrip().endswith(markers.start)
    begins = text.lstrip().startswith(markers.start)
    if opened and begins:
        return text.lstrip().removeprefix(markers.start).lstrip("\n")
    return text if opened or begins else f"{markers.start}\n{text}"


def _write_file(
    target: Path,
    request_hash: str,
    source: Selection,
    groups: Int64,
    tokenizer: TextTokenizer,
    markers: Mapping[str, Markers],
    completion: Completion,
) -> None:
    schema = TEXT_SCHEMA.with_metadata({TEXT_METADATA_KEY: request_hash.encode()})
    path = source.path_of(groups[0])
    shard, _ = open_shard(path)
    with (
        shard,
        atomic_path(target) as temp,
        pq.ParquetWriter(temp, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for group in groups.tolist():
            table = read_row_group(shard, int(source.row_group_G[group]), TEXT_COLUMNS, str(path))
            rows = np.flatnonzero(source.group_R == group)
            table = table.take(pa.array(source.row_in_group_R[rows]))
            if not (keys_of(table.column("sample_id"), source.where(group)) == source.key_R[rows]).all():
                raise CorruptError(f"{source.where(group)} holds another chain than was selected (sample_id differs)")
            tokenised = _tokenise(_with_last_id(table), tokenizer, markers, completion)
            # An empty row group keeps the numbering of groups that is the source's.
            writer.write_table(tokenised, row_group_size=max(tokenised.num_rows, 1))


def _with_last_id(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with the last token of each chain in the place of all of them."""
    ids = table.column("token_ids").combine_chunks()
    last = pc.subtract(pc.cumulative_sum(pc.list_value_length(ids)), 1)
    table = table.drop_columns("token_ids").append_column("last_id", ids.flatten().take(last))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _tokenise(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    markers: Mapping[str, Markers],
    completion: Completion,
) -> pa.Table:
    if completion == "reference":
        rows = [{**row, "finish_reason": "stop"} for row in rows if row["reference"]]
    prompts = [tokenizer.render(row["messages"]) for row in rows]
    if completion == "reference":
        texts = [str(row["reference"]) for row in rows]
    else:
        texts = [completion_text(row, one, markers[row["run_id"]]) for row, one in zip(rows, prompts, strict=True)]
    prompt_ids, token_ids = tokenizer.encode_prompts(prompts), tokenizer.encode_completions(texts)
    ends = [[tokenizer.eos_id] if _has_ended(row, markers[row["run_id"]]) else [] for row in rows]
    whole = [ids + end for ids, end in zip(token_ids, ends, strict=True)]
    kept = [number for number in range(len(rows)) if whole[number] and prompt_ids[number]]
    return pa.Table.from_pydict(
        {
            "sample_id": [rows[number]["sample_id"] for number in kept],
            "prompt_token_ids": [prompt_ids[number] for number in kept],
            "token_ids": [whole[number] for number in kept],
        },
        schema=TEXT_SCHEMA,
    )


def _has_ended(row: Mapping[str, Any], markers: Markers) -> bool:
    return came_to_its_end(row["finish_reason"], row["text"], markers.special.get(row["last_id"]))


def _rows_of(target: Path, source: Selection, rows: Int64) -> pa.Table:
    """Rows of a selection (SCHEMA) for the chains in `target`; `rows` are those of `source` it was made from."""
    try:
        with pq.ParquetFile(target, page_checksum_verification=True) as file:
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CorruptError(f"{target} cannot be read: {reason}: delete it to rebuild it") from error
    keys = keys_of(table.column("sample_id"), str(target))
    kept = rows[np.isin(source.key_R[rows], keys)]
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = {
        "cache": pa.array(source.cache_G[source.group_R[kept]].astype(np.int16)),
        "file": pa.array([target.name] * len(kept), pa.string()),
        "row_group": pa.array(group),
        "row_in_group": pa.array((np.arange(len(kept)) - first).astype(np.int32)),
        "sample_id": table.column("sample_id"),
        "num_prompt_tokens": pc.list_value_length(table.column("prompt_token_ids")),
        "num_tokens": pc.list_value_length(table.column("token_ids")),
        "weight": pa.array(source.weight_R[kept]),
    }
    return pa.Table.from_pydict(columns).cast(SCHEMA)


def _hash_of(target: Path) -> str | None:
    """The request that a finished file answers, None where there is no file."""
    if not target.exists():
        return None
    try:
        metadata = pq.read_schema(target).metadata or {}
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CorruptError(f"{target} cannot be read: {reason}: delete it to rebuild it") from error
    return str(metadata.get(TEXT_METADATA_KEY, b"").decode())


def _file_starts(source: Selection) -> Int64:
    """First group of each file that the selection reads, int64."""
    changes_G = np.ones(len(source.file_G), bool)
    changes_G[1:] = (np.diff(source.file_G) != 0) | (np.diff(source.cache_G) != 0)
    return np.flatnonzero(changes_G)


def _markers(source: Selection) -> dict[str, Markers]:
    """By run id, what each teacher's reasoning begins and ends with, and its special tokens."""
    found = {}
    for folder in dict.fromkeys(source.folders):
        catalog = Catalog(folder.parent)
        for run_id, manifest in catalog.runs().items():
            special = special_pieces(catalog.vocab_path(manifest.teacher.tokenizer_fingerprint))
            found[run_id] = Markers(manifest.reasoning.get("start"), manifest.reasoning.get("end"), special)
    return found
