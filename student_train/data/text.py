"""Chains as text for a student of another vocabulary: tokenised once with the student's tokenizer, kept with the run.

In: a selection of any caches, a tokenizer. Out: a folder of Parquet files with token ids (same row groups, same order)
and a selection over them, which plans, streams and resumes like any other. No distributions, so cross-entropy only.
A chain that came to its own end gets the token by which the student's chat template ends an answer; one that was cut
off does not.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError
from stillroom.models import (
    came_to_its_end,
    end_id_of,
    fingerprint_template,
    fingerprint_tokenizer,
    pieces_of,
    special_pieces,
    write_vocab,
)
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import stable_hash
from stillroom.schema.tables import list_of
from stillroom.storage.paths import Location
from student_train.data.freezing import SelectionRequest, check_request, open_selection
from student_train.data.retokenised import SPACE_METADATA_KEY, Counts, retokenise, vocab_beside, write_retokenised
from student_train.data.selection import Selection, load_selection

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
    def end_id(self) -> int:
        """The id that ends an answer."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What the ids of rows depend on, ready for JSON."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt as the chat template writes it, up to where the answer begins."""

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts, whose special tokens count as such."""

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, in which nothing a teacher wrote becomes a special token."""

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """What else readers of the ids have to know."""

    def write_vocab(self, path: Location) -> None:
        """The vocabulary in the form of a cache's."""


class HuggingFaceText:
    """A transformers tokenizer as TextTokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """`vocab_size` is the width of the student's logits. Raises ConfigError without a template or an end token."""
        if tokenizer.chat_template is None:
            raise ConfigError("the student's tokenizer has no chat template: give it one (chat_template.jinja)")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the student's tokenizer has no eos_token: set one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        end_id = end_id_of(tokenizer, {})
        assert end_id is not None
        self.end_id = end_id
        self.tokenizer_fingerprint = fingerprint_tokenizer(tokenizer)
        self.fingerprint = stable_hash(self.tokenizer_fingerprint, fingerprint_template(tokenizer))
        # Rows of most tokenizers keep the identity that they had when all ended with the end of sequence.
        own_end = () if self.end_id == tokenizer.eos_token_id else (self.end_id,)
        self.identity: tuple[object, ...] = (self.fingerprint, *own_end)

    @functools.cached_property
    def pieces(self) -> dict[int, str]:
        """Text of each token by id: pieces_of()."""
        return pieces_of(self.tokenizer)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text, with the generation prompt."""
        rendered: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return rendered

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with special tokens parsed, none added."""
        return self._encode(texts, split_special_tokens=False)

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with special tokens taken for plain text."""
        return self._encode(texts, split_special_tokens=True)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """Whether a text begins with a space that is not its own, as SentencePiece writes it."""
        ((first, *_),) = self.encode_completions(["a"])
        has_space = self.tokenizer.convert_ids_to_tokens(first).startswith(("▁", "Ġ"))
        return {SPACE_METADATA_KEY: b"1"} if has_space else {}

    def write_vocab(self, path: Location) -> None:
        """Every token by id."""
        write_vocab(path, self.tokenizer, self.pieces)

    def _encode(self, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            # transformers fails on an empty batch.
            return []
        if self.tokenizer.is_fast:
            # Offsets and masks take transformers longer than the ids of short texts take their encoder.
            backend = self.tokenizer.backend_tokenizer
            # A tokenizer.json may ask for padding and truncation, which change the ids of a batch.
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = split_special_tokens
            return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        encoded = self.tokenizer(
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
        made = retokenise(path, source, TextRows(source, tokenizer, completion))
        tokenizer.write_vocab(vocab_beside(made.folder))
        header = {
            "tokenizer_fingerprints": [tokenizer.fingerprint],
            "codecs": [],
            "vocab_size": tokenizer.vocab_size,
            "max_support": 0,
        }
        missing = "a reference answer" if completion == "reference" else "text"
        return write_retokenised(path, source, made, header, missing)
    return reopen_retokenised(path, request, tokenizer)


def reopen_retokenised(path: Path, request: SelectionRequest, tokenizer: TextTokenizer) -> Selection:
    """The selection at `path`. Raises ConfigError where it answers another request or tokenizer."""
    selection = load_selection(path, [one.root for one in request.sources])
    check_request(path, selection.header, request)
    if selection.header.tokenizer_fingerprints != [tokenizer.fingerprint]:
        raise ConfigError(f"{path} was tokenised with another tokenizer or chat template: choose another run folder")
    return selection


class TextRows:
    """Makes rows of text alone."""

    verb = "tokenise"
    folder_suffix = "text"
    columns = TEXT_COLUMNS
    with_signals = False

    def __init__(self, source: Selection, tokenizer: TextTokenizer, completion: Completion) -> None:
        self._tokenizer, self._markers, self._completion = tokenizer, markers_of(source), completion
        self.identity = (*tokenizer.identity, completion)

    def prepare(self) -> None:
        """Nothing: each chain stands alone."""

    def metadata(self, header: ShardHeader) -> dict[bytes, bytes]:
        """There are no signals to describe."""
        return self._tokenizer.metadata

    def schema(self, header: ShardHeader) -> pa.Schema:
        """Token ids only."""
        return TEXT_SCHEMA

    def make(self, table: pa.Table, header: ShardHeader, where: str) -> tuple[pa.Table, Counts]:
        """Rows of the chains that come to a token."""
        rows = with_last_id(table)
        if self._completion == "reference":
            rows = [{**row, "finish_reason": "stop"} for row in rows if row["reference"]]
        prompts = [self._tokenizer.render(row["messages"]) for row in rows]
        if self._completion == "reference":
            texts = [str(row["reference"]) for row in rows]
        else:
            texts = [
                completion_text(row, one, self._markers[row["run_id"]]) for row, one in zip(rows, prompts, strict=True)
            ]
        prompt_ids, token_ids = self._tokenizer.encode_prompts(prompts), self._tokenizer.encode_completions(texts)
        ends = [[self._tokenizer.end_id] if has_ended(row, self._markers[row["run_id"]]) else [] for row in rows]
        whole = [ids + end for ids, end in zip(token_ids, ends, strict=True)]
        # Without a prompt token nothing predicts the first token.
        kept = [number for number in range(len(rows)) if whole[number] and prompt_ids[number]]
        columns = {
            "sample_id": [rows[number]["sample_id"] for number in kept],
            "prompt_token_ids": [prompt_ids[number] for number in kept],
            "token_ids": [whole[number] for number in kept],
        }
        return pa.Table.from_pydict(columns, schema=TEXT_SCHEMA), {}


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


def with_last_id(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with the last token of each chain in the place of all of them."""
    ids = table.column("token_ids").combine_chunks()
    # Sums of lengths are where lists end in the flat values; no list is empty.
    last = pc.subtract(pc.cumulative_sum(pc.list_value_length(ids)), 1)
    table = table.drop_columns("token_ids").append_column("last_id", ids.flatten().take(last))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def has_ended(row: Mapping[str, Any], markers: Markers) -> bool:
    """Whether the teacher ended a chain itself."""
    return came_to_its_end(row["finish_reason"], row["text"], markers.special.get(row["last_id"]))


def markers_of(source: Selection) -> dict[str, Markers]:
    """By run id, what each teacher's reasoning begins and ends with, and its special tokens."""
    found = {}
    for folder in dict.fromkeys(source.folders):
        catalog = Catalog(folder.parent)
        for run_id, manifest in catalog.runs().items():
            special = special_pieces(catalog.vocab_path(manifest.teacher.tokenizer_fingerprint))
            found[run_id] = Markers(manifest.reasoning.get("start"), manifest.reasoning.get("end"), special)
    return found
