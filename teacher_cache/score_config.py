"""Which completions are scored, and how: the YAML of `teacher-cache score`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.config import StrictModel
from shared.storage import CacheRoot
from teacher_cache.config import RunConfig
from teacher_cache.source_config import (
    DecontaminateConfig,
    HuggingFaceDataset,
    JsonlFile,
    ParquetFile,
    require_distinct,
)


class CompletionBase(StrictModel):
    """What every source of completions has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    """Stands in the cache's `source` column."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first so many rows."""


class CompletionFields(CompletionBase):
    """How rows of a file or dataset become a prompt and its completion, in one of three ways.

    Conversations: `messages_field`, whose last message is the assistant's and is the completion. Texts:
    `completion_field`, with the prompt in `prompt_field` or in `messages_field`. Tokens: `prompt_ids_field` and
    `completion_ids_field`, taken as they are; `prompt_field` or `messages_field` may say what the prompt was.
    """

    messages_field: str | None = None
    """Field with a list of {role, content}."""
    prompt_field: str | None = None
    """Field with the text of one user message."""
    completion_field: str | None = None
    """Field with the text of the completion, markers such as <think> included."""
    prompt_ids_field: str | None = None
    """Field with the prompt's token ids, the chat template already applied."""
    completion_ids_field: str | None = None
    """Field with the completion's token ids."""
    append_eos: bool = True
    """End texts with the tokenizer's end-of-sequence token, as a chain that stopped does; False for texts that were
    cut. Token ids are never added to."""
    system: str | None = None
    """A system message put before each prompt that has none."""
    instruction: str | None = None
    """Text appended to the last user message, after a blank line."""
    reference_field: str | None = None
    """Field with the right answer."""
    judge: Literal["math", "exact", "regex", "code"] | None = None
    """How answers are checked against the reference."""
    metadata_fields: list[str] = Field(default_factory=list)
    """Further fields to keep in the cache's `metadata` column."""

    @property
    def are_ids(self) -> bool:
        """Whether rows hold tokens rather than texts."""
        return self.completion_ids_field is not None

    @property
    def fields(self) -> list[str]:
        """Every field that is read."""
        prompt = (self.messages_field, self.prompt_field, self.completion_field)
        ids = (self.prompt_ids_field, self.completion_ids_field)
        named = (*prompt, *ids, self.reference_field, *self.metadata_fields)
        return list(dict.fromkeys(name for name in named if name is not None))

    @model_validator(mode="after")
    def _one_way(self) -> "CompletionFields":
        if (self.prompt_ids_field is None) != (self.completion_ids_field is None):
            raise ValueError("prompt_ids_field and completion_ids_field need each other")
        if self.messages_field is not None and self.prompt_field is not None:
            raise ValueError("messages_field and prompt_field both say what the prompt is: leave one out")
        if self.are_ids:
            self._only_ids()
        elif self.messages_field is None and (self.prompt_field is None or self.completion_field is None):
            raise ValueError(
                "set messages_field (the assistant's turn last), or prompt_field and completion_field, or "
                "prompt_ids_field and completion_ids_field"
            )
        if self.judge is not None and self.reference_field is None:
            raise ValueError("judge has no effect without reference_field: name the field with the right answer")
        return self

    def _only_ids(self) -> None:
        for name in ("completion_field", "append_eos", "system", "instruction"):
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect on token ids: leave it out")


class JsonlCompletions(CompletionFields, JsonlFile):
    """Completions from a JSON Lines file."""


class ParquetCompletions(CompletionFields, ParquetFile):
    """Completions from a Parquet file."""


class HuggingFaceCompletions(CompletionFields, HuggingFaceDataset):
    """Completions from a Hugging Face dataset, by hub id or local folder."""


class CacheCompletions(CompletionBase):
    """Chains of another cache, token by token: prompts, splits, references and metadata come along."""

    kind: Literal["cache"]
    path: CacheRoot
    """Folder of the other cache, or s3://BUCKET/PREFIX."""
    limit: int | None = Field(default=None, ge=1)
    """Take so many chains, the first by `sample_id`."""
    where: str | None = None
    """SQL condition over the columns of `chains`, such as `correct AND finish_reason = 'stop'`."""
    retokenise: bool = False
    """Score the chains' text in this teacher's own tokens and template: for a teacher with another tokenizer. Their
    `chain_id` is another then. Reasoning marks that are special tokens of the first teacher are no part of its text."""


CompletionSource = Annotated[
    JsonlCompletions | ParquetCompletions | HuggingFaceCompletions | CacheCompletions,
    Field(discriminator="kind"),
]


class CompletionsConfig(StrictModel):
    """Where completions come from, scored in the order of their sources."""

    sources: list[CompletionSource] = Field(min_length=1)
    heldout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts, chosen by hash of the prompt, whose chains get split 'heldout' instead of 'train'. Chains of
    another cache keep their split."""
    decontaminate: DecontaminateConfig | None = None
    """Leave out prompts that overlap an evaluation set."""

    @model_validator(mode="after")
    def _distinct_names(self) -> "CompletionsConfig":
        require_distinct([source.name for source in self.sources])
        return self


class ScoreConfig(RunConfig):
    """`teacher-cache plan` and `score`."""

    completions: CompletionsConfig
