"""Configuration of prompts and completions: the sources whose rows are read, and how rows become prompts.

Part of teacher_cache.config, whose page says where the text of these docstrings goes.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stillroom.config import StrictModel, nearest_name
from stillroom.storage.paths import CacheRoot
from teacher_cache.prompts.expressions import check_expression
from teacher_cache.prompts.variant_config import AugmentConfig

NAME_IN_TEMPLATE = re.compile(r"\{([A-Za-z_]\w*)\}")
"""A variable in a template's text. Other braces stand for themselves, as in LaTeX."""


class NamedSource(StrictModel):
    """What every source of prompts and completions has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    """Name of the source, stored in the cache's `source` column."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many rows, from the start."""


class RowFields(NamedSource):
    """How rows of a file or dataset become prompts: fields that prompts and completions share.

    `a.b` names field b of the struct a.
    """

    messages_field: str | None = None
    """Field with a list of messages, or its JSON text: {role, content}, or {from, value} as in ShareGPT. human and gpt
    mean user and assistant, developer means system."""
    prompt_field: str | None = None
    """Field with the text of one user message, or with a list of messages."""
    system_field: str | None = None
    """Field with the system message; rows may leave it empty."""
    ignored_fields: list[str] = Field(default_factory=list)
    """Columns, or keys of messages, that are left out of prompts on purpose, such as tools or reasoning_content.
    Otherwise rows with a value there are malformed, because the teacher would not see it."""
    system: str | None = None
    """System message for prompts that have none."""
    instruction: str | None = None
    """Text appended to the last user message, after a blank line."""
    reference_field: str | None = None
    """Field with the reference answer, such as `answer` or `reward_model.ground_truth`."""
    judge: Literal["math", "exact", "regex", "code", "llm"] | None = None
    """How answers are checked against the reference; `llm` leaves them to `teacher-cache judge --llm`."""
    metadata_fields: list[str] = Field(default_factory=list)
    """Further fields to store in the cache's `metadata` column."""

    @property
    def fields(self) -> list[str]:
        """Every field that is read."""
        return _distinct(self.messages_field, self.prompt_field, *self.optional_fields)

    @property
    def optional_fields(self) -> list[str]:
        """Fields that a row may lack; a name that no row has is a mistake."""
        return _distinct(self.system_field, self.reference_field, *self.metadata_fields)

    @model_validator(mode="after")
    def _judge_has_reference(self) -> Self:
        if self.judge is not None and self.reference_field is None:
            raise ValueError(
                "judge has no effect without reference_field: set it to the field with the reference answer"
            )
        return self


class PromptSource(NamedSource):
    """What every source of prompts has."""

    samples: int | None = Field(default=None, ge=1)
    """Chains per prompt; None takes `sampling.samples`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum completion tokens per chain; None takes `sampling.max_tokens`."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; None takes `sampling.temperature`."""


class PromptFields(PromptSource, RowFields):
    """Prompts from rows: exactly one of `messages_field` and `prompt_field`."""

    drop_final_answer: bool = False
    """Remove assistant messages at the end of `messages`, which turns finished conversations into prompts."""

    @model_validator(mode="after")
    def _one_field(self) -> Self:
        if (self.messages_field is None) == (self.prompt_field is None):
            raise ValueError("set exactly one of messages_field and prompt_field")
        if self.drop_final_answer and self.messages_field is None:
            raise ValueError("drop_final_answer has no effect without messages_field")
        return self


class FileRows(StrictModel):
    """Rows of files."""

    path: CacheRoot
    """A file, a folder, or a glob such as `data/**/*.jsonl.gz`; local, or s3://, gs:// or az://BUCKET/PREFIX. Files may
    be compressed with gzip, zstd or bzip2. Names in folders that begin with a dot or underscore are skipped."""
    split: str | None = None
    """Use only this split's files of a folder, by the names of files and folders; required if they name several."""


class JsonlFile(FileRows):
    """Rows of JSON Lines files, JSON arrays, or files with one JSON object each."""

    kind: Literal["jsonl"]


class CsvFile(FileRows):
    """Rows of CSV files whose first line names the columns. Empty cells are null."""

    kind: Literal["csv"]
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between cells; None: a tab in .tsv files, else a comma."""


class ParquetFile(FileRows):
    """Rows of Parquet files."""

    kind: Literal["parquet"]


class HuggingFaceDataset(StrictModel):
    """Rows of a Hugging Face dataset."""

    kind: Literal["huggingface"]
    dataset: str
    """Hub id such as openai/gsm8k, or a local folder."""
    config: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""


class JsonlSource(PromptFields, JsonlFile):
    """Prompts from JSON Lines or JSON files."""


class CsvSource(PromptFields, CsvFile):
    """Prompts from CSV files."""


class ParquetSource(PromptFields, ParquetFile):
    """Prompts from Parquet files."""


class HuggingFaceSource(PromptFields, HuggingFaceDataset):
    """Prompts from a Hugging Face dataset, by hub id or local folder."""


class ReasoningGymSource(PromptSource):
    """Seeded reasoning tasks with their own answer checkers."""

    kind: Literal["reasoning_gym"]
    task: str
    """Name of a reasoning-gym dataset, such as chain_sum or gsm_symbolic."""
    size: int = Field(ge=1)
    """Number of tasks to generate."""
    seed: int = 0
    """Seed of the tasks: the same seed generates the same tasks."""
    system: str | None = None
    """System message for prompts that have none."""
    instruction: str | None = None
    """Text appended to the last user message, after a blank line."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's own configuration."""


Number = int | Annotated[float, Field(allow_inf_nan=False)]


class RangeVariable(StrictModel):
    """A number from `min` to `max` in steps."""

    min: Number
    """Smallest value."""
    max: Number
    """Largest value."""
    step: Number = Field(default=1, gt=0)
    """Distance between values; 0.5 also gives halves. Decimals are exact."""

    @property
    def count(self) -> int:
        """Number of values."""
        return int((Fraction(str(self.max)) - Fraction(str(self.min))) / Fraction(str(self.step))) + 1

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        return self


class ChoiceVariable(StrictModel):
    """One of a list of numbers or texts."""

    choices: list[Number | str] = Field(min_length=1)
    """The values, such as names."""


class ExpressionVariable(StrictModel):
    """A value computed from the variables above it."""

    expression: str
    """Arithmetic such as `apples * price`; also sqrt, gcd, lcm, factorial, comb, floor, ceil, round, abs, min, max."""


def _variable_kind(value: Any) -> str:
    keys = set(value) if isinstance(value, Mapping) else set(type(value).model_fields)
    return next((key for key in ("expression", "choices") if key in keys), "range")


Variable = Annotated[
    Annotated[RangeVariable, Tag("range")]
    | Annotated[ChoiceVariable, Tag("choices")]
    | Annotated[ExpressionVariable, Tag("expression")],
    Discriminator(_variable_kind),
]


class Template(StrictModel):
    """A question with variables, and its answer."""

    text: str = Field(min_length=1)
    """The question. `{name}` is replaced by a variable's value; other braces stay."""
    variables: dict[str, Variable] = Field(min_length=1)
    """Variables by name: {min, max, step}, {choices} or {expression}."""
    conditions: list[str] = Field(default_factory=list)
    """Expressions that must hold, such as `total % people == 0`; other draws are discarded."""
    answer: str | None = None
    """Expression of the reference answer. Sums and quotients are exact: 2.5, or 1/3. None: no reference."""

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        known: list[str] = []
        used = set(NAME_IN_TEMPLATE.findall(self.text))
        for name, variable in self.variables.items():
            if isinstance(variable, ExpressionVariable):
                used |= check_expression(variable.expression, known)
            known.append(name)
        for expression in [*self.conditions, *([self.answer] if self.answer is not None else [])]:
            used |= check_expression(expression, known)
        if unused := [name for name in known if name not in used]:
            raise ValueError(
                f"variable {unused[0]!r} has no effect: the text, the conditions or the answer must use it"
            )
        return self


class TemplateSource(PromptSource):
    """Questions with variables, filled with random values; answers are computed. Always in the train split: variants
    of one template are too similar for a held-out set."""

    kind: Literal["template"]
    templates: list[Template] = Field(min_length=1)
    """The questions."""
    size: int = Field(ge=1)
    """Variants of each template, all different."""
    seed: int = 0
    """Seed of the values; a larger size keeps the variants of a smaller one."""
    system: str | None = None
    """System message for prompts that have none."""
    instruction: str | None = None
    """Text appended to the last user message, after a blank line."""
    judge: Literal["math", "exact"] = "math"
    """How answers are checked where a template has one."""


Source = Annotated[
    JsonlSource | CsvSource | ParquetSource | HuggingFaceSource | ReasoningGymSource | TemplateSource,
    Field(discriminator="kind"),
]


class DecontaminateConfig(StrictModel):
    """Evaluation sets whose questions must not appear among the prompts."""

    against: list[Source] = Field(min_length=1)
    """Evaluation sets, read like prompt sources; the text of user messages is compared."""
    ngram: int = Field(default=13, ge=2)
    """Consecutive words that a prompt must share with an evaluation text to be skipped; shorter texts must be equal."""


class DedupeConfig(StrictModel):
    """Prompts that nearly repeat an earlier one are skipped (MinHash, then compared exactly). Not compared: tasks of
    generators and templates, which resemble each other on purpose, and prompts with different system messages."""

    similarity: float = Field(default=0.8, ge=0.2, le=1)
    """Skip a prompt at this Jaccard similarity to an earlier one: shared n-grams divided by all n-grams of both."""
    ngram: int = Field(default=3, ge=1)
    """Words per n-gram (characters in Chinese and Japanese). Case and punctuation are ignored."""


class PromptsConfig(StrictModel):
    """Where prompts come from, their order and the held-out split."""

    sources: list[Source] = Field(min_length=1)
    seed: int = 0
    """Seed of the prompt order, which is shuffled so that a half-built cache is a fair sample of the whole."""
    heldout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of prompts whose chains get split 'heldout' instead of 'train'; chosen by hash of the prompt."""
    decontaminate: DecontaminateConfig | None = None
    """Skip prompts that overlap an evaluation set."""
    dedupe: DedupeConfig | None = None
    """Skip prompts that nearly repeat an earlier one, in the order of the sources. Exact repeats are always skipped."""
    augment: AugmentConfig | None = None
    """Add variants of prompts: edited words, changed numbers, paraphrases by the teacher."""
    max_unusable_frac: float = Field(default=0.5, ge=0, le=1)
    """Stop before generating if more than this fraction of a source's rows is malformed, or of its first prompts is
    refused by the chat template; 1 uses whatever is left."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        _require_distinct([source.name for source in self.sources])
        return self

    @model_validator(mode="after")
    def _edits_have_sources(self) -> Self:
        kinds = {source.name: source.kind for source in self.sources}
        for edit in [] if self.augment is None else self.augment.edits:
            for name in edit.sources or []:
                if name not in kinds:
                    raise ValueError(f"augment: there is no source {name!r}{nearest_name(name, [*kinds])}")
                if kinds[name] in ("reasoning_gym", "template"):
                    raise ValueError(f"augment: source {name!r} makes its own variants: raise its size")
        return self


class CompletionFields(RowFields):
    """How rows become prompts and completions, in one of three ways.

    Conversations: `messages_field`, whose last message is the assistant's and is the completion. Texts:
    `completion_field`, with the prompt in `prompt_field` or `messages_field`. Tokens: `prompt_ids_field` and
    `completion_ids_field`, used as they are; `prompt_field` or `messages_field` may give the prompt's text.
    """

    completion_field: str | None = None
    """Field with the text of the completion, including markers such as <think>, or with a list of texts (generations):
    each becomes a chain, and of `metadata_fields` with a list of the same length each chain gets its own item."""
    prompt_ids_field: str | None = None
    """Field with the prompt's token ids, chat template already applied."""
    completion_ids_field: str | None = None
    """Field with the completion's token ids."""
    append_eos: bool = True
    """End completion texts with the token that ends the assistant's turn in the chat template, or the tokenizer's
    end-of-sequence token, like a chain that stopped; set false for truncated texts. Nothing is appended to token ids.
    """
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of `messages_field` are completions. With `all` each turn becomes a chain whose prompt is
    the conversation before it, so that every turn is learned once; `reference_field` then belongs to the last turn."""

    @property
    def are_ids(self) -> bool:
        """Whether rows hold token ids rather than texts."""
        return self.completion_ids_field is not None

    @property
    def fields(self) -> list[str]:
        """Every field that is read."""
        own = (self.completion_field, self.prompt_ids_field, self.completion_ids_field)
        return _distinct(self.messages_field, self.prompt_field, *own, *self.optional_fields)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.prompt_ids_field is None) != (self.completion_ids_field is None):
            raise ValueError("set both prompt_ids_field and completion_ids_field, or neither")
        if self.turns == "all" and (self.messages_field is None or self.completion_field is not None or self.are_ids):
            raise ValueError("turns: all needs messages_field alone: completion fields hold a single turn")
        if self.messages_field is not None and self.prompt_field is not None:
            raise ValueError("messages_field and prompt_field both give the prompt: remove one")
        if self.are_ids:
            for name in ("completion_field", "append_eos", "system", "system_field", "instruction", "ignored_fields"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name} has no effect on token ids: remove it")
        elif self.messages_field is None and (self.prompt_field is None or self.completion_field is None):
            raise ValueError(
                "set messages_field (with the assistant's turn last), or prompt_field and completion_field, or "
                "prompt_ids_field and completion_ids_field"
            )
        return self


class JsonlCompletions(CompletionFields, JsonlFile):
    """Completions from JSON Lines or JSON files."""


class CsvCompletions(CompletionFields, CsvFile):
    """Completions from CSV files."""


class ParquetCompletions(CompletionFields, ParquetFile):
    """Completions from Parquet files."""


class HuggingFaceCompletions(CompletionFields, HuggingFaceDataset):
    """Completions from a Hugging Face dataset, by hub id or local folder."""


class CacheCompletions(NamedSource):
    """Chains of another cache, token by token, with their prompts, splits, references and metadata."""

    kind: Literal["cache"]
    path: CacheRoot
    """The other cache: a folder or s3://BUCKET/PREFIX."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many chains, the first by `sample_id`."""
    where: str | None = None
    """SQL condition on the columns of `chains`, such as `correct AND finish_reason = 'stop'`."""
    retokenise: bool = False
    """Score the chains' text with this teacher's tokenizer and template, for teachers with different tokenizers. The
    rows then get other `chain_id`s, and reasoning markers that were special tokens are not part of the text."""


CompletionSource = Annotated[
    JsonlCompletions | CsvCompletions | ParquetCompletions | HuggingFaceCompletions | CacheCompletions,
    Field(discriminator="kind"),
]


class CompletionsConfig(StrictModel):
    """Where completions come from; they are scored in the order of their sources."""

    sources: list[CompletionSource] = Field(min_length=1)
    heldout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of prompts whose chains get split 'heldout' instead of 'train'; chosen by hash of the prompt. Chains of
    another cache keep their split."""
    decontaminate: DecontaminateConfig | None = None
    """Skip prompts that overlap an evaluation set."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        _require_distinct([source.name for source in self.sources])
        return self


FileSource = JsonlSource | CsvSource | ParquetSource | HuggingFaceSource


FileCompletions = JsonlCompletions | CsvCompletions | ParquetCompletions | HuggingFaceCompletions


RowSource = FileSource | FileCompletions
"""Sources whose rows are read from files and datasets."""


def _distinct(*names: str | None) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _require_distinct(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two sources are named {twice[0]!r}: names distinguish them in SQL")
