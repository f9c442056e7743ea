"""The `data` block of a training configuration: which chains the student reads, and as what."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stillroom.config import StrictModel
from stillroom.storage.paths import CacheRoot


class CacheConfig(StrictModel):
    """One cache to read."""

    path: CacheRoot
    """A folder, or the URL of a prefix in an object store: s3://, gs:// or az://BUCKET/PREFIX."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch reads each chain of this cache, 0.001 to 1000: 2 reads each twice, 0.5 every other one."""
    chains_version: int | None = Field(default=None, ge=0)
    """Version of the chains to read; None pins the latest when the run starts."""
    verdicts_version: int | None = Field(default=None, ge=0)
    """Version of the verdicts to read; None pins the latest when the run starts."""
    features: str | None = None
    """Feature set to read, by its name or id, for losses that need one; None is the cache's only one. Its version is
    pinned when the run starts."""


class TeacherConfig(StrictModel):
    """A cache in which another teacher scored the same chains."""

    path: CacheRoot
    """A folder or URL. Its chains are found by chain_id: the same prompt and completion tokens."""
    weight: float | str = 1.0
    """The teacher's share of the mixture, relative to the others: a number, or a SQL expression over its `chains`, e.g.
    `source = 'code'` (true is 1)."""


class MixtureConfig(StrictModel):
    """Several teachers on one token: the target is the weighted mean of their distributions."""

    own: float | str = 1.0
    """Weight of the chain's own cache, like `weight`."""
    teachers: list[TeacherConfig] = Field(min_length=1)
    """The other teachers. If one has not scored a chain, the rest share its weight."""


class PromptConfig(StrictModel):
    """What the student's prompts leave out of the teacher's (context distillation). Rendered with the cache's chat
    template."""

    drop_system: bool = False
    """Leave system messages out."""
    remove: list[str] = Field(default_factory=list)
    """Texts to delete from the messages, e.g. an instruction that only the teacher gets."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, e.g. `{enable_thinking: false}`, besides those that the cache was built with."""

    @model_validator(mode="after")
    def _has_effect(self) -> "PromptConfig":
        if not (self.drop_system or self.remove or self.chat_template_kwargs):
            raise ValueError("changes nothing: set drop_system, remove or chat_template_kwargs, or leave it out")
        return self


class TermsConfig(StrictModel):
    """Terms of a domain, whose tokens in completions count `weight` times as much in the losses."""

    words: list[str] = Field(default_factory=list)
    """Terms of one or more words."""
    file: Path | None = None
    """UTF-8 text file with one term per line; lines that begin with # are comments."""
    sql: str | None = None
    """SQL expression over `chains`: a list of terms for that chain alone, e.g. `string_split(metadata ->> 'terms',
    ',')`."""
    weight: float = Field(default=3.0, gt=0)
    """Factor on the weight of a term's tokens. The loss is the weighted mean."""
    match_case: bool = False
    """Distinguish upper and lower case."""
    whole_words: bool = True
    """Match whole words only, not `ion` in `nation`. No effect between Chinese or Japanese characters."""

    @model_validator(mode="after")
    def _has_effect(self) -> "TermsConfig":
        if not self.words and self.file is None and self.sql is None:
            raise ValueError("names no terms: set words, file or sql")
        # A factor of 1 is what all other tokens have.
        if self.weight == 1:
            raise ValueError("weight 1 has no effect: set another, or leave terms out")
        return self


class StepsConfig(StrictModel):
    """Splits chains at their steps into examples: the question and the steps so far are context, and the next step is
    learned. Each completion token is learned once an epoch. Evaluations use whole chains.
    """

    at: list[Literal["paragraphs", "lines", "numbered", "equations"]] | None = Field(default=None, min_length=1)
    """Where steps begin: after blank lines, on every line, at `Step 3` or `3.` at the start of a line, or after
    displayed equations and lines with an equals sign. None: [paragraphs], or only at `pattern` if it is set."""
    pattern: str | None = None
    """Python regular expression: a step also begins at each of its matches (^ matches at every line)."""
    min_tokens: int = Field(default=16, ge=1)
    """Shorter steps are merged into the one before."""
    context_steps: int | None = Field(default=None, ge=0)
    """Earlier steps that an example keeps besides the question. None: all that fit max_tokens."""

    @model_validator(mode="after")
    def _compiles(self) -> "StepsConfig":
        try:
            # Here, so that a typo is reported before the caches are opened.
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error
        return self


class DataConfig(StrictModel):
    """What the student reads."""

    caches: list[CacheConfig] = Field(min_length=1)
    """Caches to read; an item may be just a path or a URL."""
    behaviour: list[CacheRoot] = Field(default_factory=list)
    """For policy_gradient: caches in which the student itself generated chains that `caches` score, matched by
    chain_id. Chains that none of them holds have no policy gradient."""
    mixture: MixtureConfig | None = None
    """Other teachers of the same chains; None uses only the chain's own."""
    prompt: PromptConfig | None = None
    """None gives the student the teacher's prompts."""
    kind: Literal["distributions", "projected", "text"] = "distributions"
    """`projected` is for a student of another vocabulary: chains are retokenised and distributions are projected into
    it once, when the run starts. `text` retokenises the chains and trains on the text only (losses: cross_entropy).
    Both end a finished chain with the token that the student's chat template writes behind an answer."""
    text: Literal["chain", "reference"] = "chain"
    """With `kind: text`: train on the teacher's chain, or on the prompt's reference answer (prompts without one are
    left out)."""
    where: str | None = None
    """SQL condition over `chains` that selects the training data, e.g. `split = 'train' and correct`; None is all."""
    weight: str | None = None
    """SQL expression over `chains`: weight of a chain's tokens in the losses, e.g. `1 - mean_top1_prob`."""
    pack_tokens: int = Field(default=4096, ge=16)
    """Tokens per pack: chains are packed up to this length, and each attends only to itself."""
    max_chains: int | None = Field(default=None, ge=1)
    """Use at most this many of the selected chains, chosen by a hash of their id; None uses all."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Maximum tokens of a chain, prompt and completion; None is pack_tokens."""
    long_chains: Literal["truncate", "skip", "split"] = "truncate"
    """What to do with longer chains. Truncated chains never teach an end of sequence."""
    steps: StepsConfig | None = None
    """Learn chains step by step. None: each chain is one example."""
    terms: TermsConfig | None = None
    """Weight the terms of a domain. None is off."""

    @model_validator(mode="after")
    def _text_has_effect(self) -> "DataConfig":
        if self.text != "chain" and self.kind != "text":
            raise ValueError(f"text: {self.text} has no effect with kind: {self.kind}: set kind: text")
        for key, value in (("behaviour", self.behaviour), ("mixture", self.mixture), ("prompt", self.prompt)):
            if value and self.kind != "distributions":
                raise ValueError(f"{key} has no effect with kind: {self.kind}: remove it, or set kind: distributions")
        return self

    @field_validator("caches", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        return (
            [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )
