"""What a cache build is asked to do: the YAML of `teacher-cache plan` and `build`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import StrictModel
from shared.errors import ConfigError
from shared.storage import CacheRoot
from teacher_cache.engine_config import EmbeddedConfig, EngineConfig
from teacher_cache.source_config import DecontaminateConfig, Source, require_distinct


class TeacherConfig(StrictModel):
    """The model that is asked."""

    model: str
    """A Hugging Face folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models you trust as much as your own programs."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's chat template, such as `enable_thinking: true`."""


class PromptsConfig(StrictModel):
    """Where questions come from, their order and their held-out part."""

    sources: list[Source] = Field(min_length=1)
    seed: int = 0
    """Of the order in which prompts are asked: a half-built cache is a fair sample of the whole."""
    heldout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts, chosen by hash of the prompt, whose chains get split 'heldout' instead of 'train'."""
    decontaminate: DecontaminateConfig | None = None
    """Leave out prompts that overlap an evaluation set."""

    @model_validator(mode="after")
    def _distinct_names(self) -> "PromptsConfig":
        require_distinct([source.name for source in self.sources])
        return self


SAMPLING_PRESETS: dict[str, dict[str, Any]] = {
    "r1": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
    "qwen3": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "max_tokens": 32768},
    "greedy": {"temperature": 0.0, "top_p": 1.0},
}
"""What the makers of a model recommend in its model card for answers with reasoning; `greedy` is argmax."""


class SamplingConfig(StrictModel):
    """How the teacher draws its tokens. Stored distributions are at temperature 1 whatever stands here."""

    # Not part of what is dumped: its values are, and they alone make a run's and a sample's identity.
    preset: Literal["r1", "qwen3", "greedy"] | None = Field(default=None, exclude=True)
    """Recommended values for a family of models, in the place of the defaults below; keys beside it override it."""
    temperature: float = Field(default=0.6, ge=0)
    """DeepSeek recommends 0.6 (0.5 to 0.7) for R1; 0 takes the most probable token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the smallest set of tokens with this mass; 1 is off."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from the so many most probable tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Leave out tokens less probable than this share of the most probable one; 0 is off."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the scores of tokens that stand in the chain already; 1 is off."""
    max_tokens: int = Field(default=32768, ge=1)
    """Completion tokens a chain."""
    samples: int = Field(default=1, ge=1)
    """Chains a prompt, each with a seed of its own."""
    seed: int = 0
    """Of the draws; each chain has its own, by hash of this, its prompt and its number."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("preset"), str):
            return {**SAMPLING_PRESETS.get(data["preset"], {}), **data}
        return data

    @model_validator(mode="after")
    def _greedy_repeats(self) -> "SamplingConfig":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "samples > 1 at temperature 0 would repeat one chain: raise temperature or set samples to 1"
            )
        return self


class ReasoningConfig(StrictModel):
    """How a chain's reasoning is told from its answer: by the id of one token."""

    start: str = "<think>"
    """Opens the reasoning; may stand in the prompt already."""
    end: str = "</think>"
    """Closes it. A tokenizer without this single token has a teacher that does not reason aloud."""


class CaptureConfig(StrictModel):
    """What is kept of each token's distribution."""

    codec: str = "topk-u8"
    """How distributions are stored: topk-u8 (8-bit codes), topk-f32 (exact) or archive (fewest bytes, not for SQL)."""
    max_support: int = Field(default=8, ge=1, le=1024)
    """Exact entries a token at most: the teacher's most probable tokens with their probabilities."""
    nucleus: float | None = Field(default=0.999, gt=0, lt=1)
    """Keep the smallest prefix with this mass; None keeps max_support entries always."""
    draws: int = Field(default=8, ge=0, le=256)
    """Tokens drawn from the tail where max_support ends before the nucleus: unbiased targets (arXiv 2503.16870).
    8 exact entries and 8 draws teach more than 64 exact ones, in two fifths of the bytes (docs/signals.md)."""
    temperatures: list[float] = Field(default_factory=list, max_length=8)
    """Temperatures besides 1 whose log-partition is kept, so that losses at them are exact."""

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        from shared.codec import check_codec

        try:
            check_codec(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("temperatures")
    @classmethod
    def _usable_temperatures(cls, value: list[float]) -> list[float]:
        bad = [one for one in value if not 0.05 <= one <= 100 or one == 1.0]
        if bad:
            raise ValueError(f"{bad[0]:g} is no temperature to keep: take numbers from 0.05 to 100 other than 1")
        if len(set(value)) < len(value):
            raise ValueError("a temperature stands there twice")
        return sorted(value)


class ShardConfig(StrictModel):
    """When a shard closes. A crash costs at most the open shard."""

    max_mb: float = Field(default=512.0, gt=0)
    """Megabytes (10^6 bytes) of a shard, about."""
    max_minutes: float = Field(default=10.0, gt=0)
    """Minutes after which a shard closes however small it is."""
    row_group_tokens: int = Field(default=65536, ge=1)
    """Completion tokens of a row group, which is what a reader loads at a time."""


class JudgingConfig(StrictModel):
    """How answers are checked while the cache is built. Verdicts change nothing of what is generated."""

    processes: int = Field(default=1, ge=1)
    """Checks at a time; unit tests of code may take half a minute each."""


class FailureConfig(StrictModel):
    """What happens when the engine refuses a prompt."""

    max_consecutive: int | None = Field(default=100, ge=1)
    """Stop the build after so many failures in a row; None never stops."""


class RunConfig(StrictModel):
    """What generating and scoring have in common."""

    cache: CacheRoot
    """Folder to build in, or the URL of a prefix in an object store: s3://, gs:// or az://BUCKET/PREFIX."""
    run: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the run; letters, digits and underscores."""
    teacher: TeacherConfig
    reasoning: ReasoningConfig = ReasoningConfig()
    capture: CaptureConfig = CaptureConfig()
    engine: EngineConfig = EmbeddedConfig()
    shard: ShardConfig = ShardConfig()
    judging: JudgingConfig = JudgingConfig()
    failures: FailureConfig = FailureConfig()


class BuildConfig(RunConfig):
    """`teacher-cache plan` and `build`."""

    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _greedy_source_repeats(self) -> "BuildConfig":
        for source in self.prompts.sources:
            temperature = self.sampling.temperature if source.temperature is None else source.temperature
            if temperature == 0 and (source.samples or self.sampling.samples) > 1:
                raise ValueError(f"source {source.name!r} would repeat one chain: it has samples > 1 at temperature 0")
        return self
