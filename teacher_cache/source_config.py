"""Where prompts come from: the sources of a build's configuration."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config import StrictModel


class SourceBase(StrictModel):
    """What every source of prompts has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    """Stands in the cache's `source` column."""
    samples: int | None = Field(default=None, ge=1)
    """Chains a prompt; None takes `sampling.samples`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Completion tokens a chain; None takes `sampling.max_tokens`."""
    temperature: float | None = Field(default=None, ge=0)
    """None takes `sampling.temperature`."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first so many prompts."""
    system: str | None = None
    """A system message put before each prompt that has none."""
    instruction: str | None = None
    """Text appended to the last user message, after a blank line."""


class FieldsBase(SourceBase):
    """How rows of a file or dataset become prompts: `messages`, or one text field."""

    messages_field: str | None = None
    """Field with a list of {role, content}."""
    prompt_field: str | None = None
    """Field with the text of one user message."""
    reference_field: str | None = None
    """Field with the right answer."""
    judge: Literal["math", "exact", "regex", "code"] | None = None
    """How answers are checked against the reference."""
    metadata_fields: list[str] = Field(default_factory=list)
    """Further fields to keep in the cache's `metadata` column."""
    drop_final_answer: bool = False
    """Leave off the assistant messages at the end of `messages`: turns finished conversations into prompts."""

    @model_validator(mode="after")
    def _one_field(self) -> "FieldsBase":
        if (self.messages_field is None) == (self.prompt_field is None):
            raise ValueError("set exactly one of messages_field and prompt_field")
        if self.judge is not None and self.reference_field is None:
            raise ValueError("judge has no effect without reference_field: name the field with the right answer")
        if self.drop_final_answer and self.messages_field is None:
            raise ValueError("drop_final_answer has no effect without messages_field")
        return self


class JsonlFile(StrictModel):
    """Rows of a JSON Lines file."""

    kind: Literal["jsonl"]
    path: Path
    """A file, or a folder of .jsonl files."""


class ParquetFile(StrictModel):
    """Rows of a Parquet file."""

    kind: Literal["parquet"]
    path: Path
    """A file, or a folder of .parquet files."""


class HuggingFaceDataset(StrictModel):
    """Rows of a Hugging Face dataset."""

    kind: Literal["huggingface"]
    dataset: str
    """Hub id such as openai/gsm8k, or a local folder."""
    config: str | None = None
    """Which configuration of the dataset, where it has several."""
    split: str = "train"
    """Which split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""


class JsonlSource(FieldsBase, JsonlFile):
    """Prompts from a JSON Lines file."""


class ParquetSource(FieldsBase, ParquetFile):
    """Prompts from a Parquet file."""


class HuggingFaceSource(FieldsBase, HuggingFaceDataset):
    """Prompts from a Hugging Face dataset, by hub id or local folder."""


class ReasoningGymSource(SourceBase):
    """Seeded reasoning tasks with their own answer checkers."""

    kind: Literal["reasoning_gym"]
    task: str
    """Name of a reasoning-gym dataset, such as chain_sum or gsm_symbolic."""
    size: int = Field(ge=1)
    """How many tasks are made."""
    seed: int = 0
    """Of the tasks: the same seed makes the same ones."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's own configuration."""


Source = Annotated[
    JsonlSource | ParquetSource | HuggingFaceSource | ReasoningGymSource,
    Field(discriminator="kind"),
]


class DecontaminateConfig(StrictModel):
    """Evaluation sets whose questions must not be among the prompts."""

    against: list[Source] = Field(min_length=1)
    """Read like sources of prompts: the text of the user messages counts."""
    ngram: int = Field(default=13, ge=2)
    """Words in a row that a prompt and an evaluation text must share; shorter evaluation texts count whole."""


def require_distinct(names: list[str]) -> None:
    """Raises ValueError where two sources have the same name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two sources are named {twice[0]!r}: names tell them apart in SQL")
