"""Configuration of `teacher-cache features`: which states of the teacher to store, of which chains and tokens.

Field docstrings are the text of docs/configuration.md (`python -m tools.config_reference`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Tag, model_validator

from stillroom.config import StrictModel, apply_override, read_yaml, validate_config
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot
from teacher_cache.config import Dtype, ModelConfig, TeacherConfig, VllmModelConfig, engine_kind


class FeatureTeacher(ModelConfig):
    """The teacher of the cache's chains, whose fingerprint must be theirs."""

    @property
    def as_teacher(self) -> TeacherConfig:
        """The same for what a build shares with this."""
        return TeacherConfig(**self.model_dump())


class TransformersConfig(StrictModel):
    """The model in transformers in this process, for teachers that fit one device. Attention needs it."""

    kind: Literal["transformers"]
    dtype: Dtype = "auto"
    """Type of weights and activations; `auto` is the model's own."""
    device: str | None = None
    """torch device such as cuda:1; None takes the first GPU, or the CPU without one."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens per forward pass, padding included; a longer chain is computed alone."""


class VllmConfig(VllmModelConfig):
    """vLLM in this process, for teachers of any size. Numbers left at None take vLLM's own defaults."""

    kind: Literal["vllm"] = "vllm"
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """KV cache in GiB (2^30 bytes), which also holds the states of running chains."""
    enforce_eager: bool = True
    """Skip compilation, which few passes repay: every chain is read at once, not token by token."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens handed to the engine at a time. Their states wait on local disk until all of them are computed."""


FeatureEngineConfig = Annotated[
    Annotated[VllmConfig, Tag("vllm")] | Annotated[TransformersConfig, Tag("transformers")],
    engine_kind("vllm", "kind must be 'vllm' or 'transformers', both in this process"),
]


class ChainsConfig(StrictModel):
    """Which chains get features. More of them continue the same set."""

    where: str | None = None
    """SQL condition on the columns of `chains`, such as `correct AND split = 'train'`."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of these chains, chosen by hash: a larger fraction includes a smaller one."""


class TokensConfig(StrictModel):
    """Which completion tokens get features."""

    entropy_frac: float | None = Field(default=None, gt=0, lt=1)
    """Store only this fraction of each chain's tokens, those where the teacher's entropy in the cache is highest; None
    stores all."""


class HiddenConfig(StrictModel):
    """The last hidden state, after the final norm: with the head, which is stored once, the exact distribution."""

    bits: Literal[4, 8] = 8
    """Bits per coefficient."""
    rank: int | None = Field(default=None, ge=1)
    """Coefficients per token, in the basis that keeps the distributions best; None stores every channel."""


def _number_or_frac(value: Any) -> Any:
    # Not a number is refused too: it is not between 0 and 1.
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{value:g} is neither a layer's number nor a fraction of depth between 0 and 1")
    return value


LayerPlace = Annotated[int | float, BeforeValidator(_number_or_frac)]


class LayersConfig(StrictModel):
    """States of middle layers."""

    at: list[LayerPlace] = Field(min_length=1)
    """Layers by number (7 is the stream after 7 decoder layers) or as a fraction of depth (0.25)."""
    bits: Literal[4, 8] = 8
    """Bits per coefficient."""
    rank: int | None = Field(default=64, ge=1)
    """Coefficients per token in each layer's principal components; None stores every channel."""


class AttentionConfig(StrictModel):
    """The most attended positions of some heads. Never whole matrices."""

    layers: list[LayerPlace] = Field(min_length=1)
    """Decoder layers by number (from 0) or as a fraction of depth (0.5 of 30 is layer 15)."""
    keep_frac: float = Field(default=0.6, gt=0, le=1)
    """Fraction of each layer's heads to store, chosen by their mean entropy on the calibration chains."""
    entropy: Literal["high", "low"] = "high"
    """Which end of that ranking is kept: heads that look everywhere, or heads that look at one place."""
    keys: int = Field(default=8, ge=1, le=256)
    """Positions stored per query and head, with their weights; all others are one number."""


class CalibrationConfig(StrictModel):
    """The chains from which scales, bases and heads are fitted, once per set: the first by hash."""

    tokens: int = Field(default=16384, ge=1)
    """Stored tokens to fit on; a basis needs many times its rank."""


class FeatureShardConfig(StrictModel):
    """When a file is closed. A crash loses at most the open file. Each file holds chains of one shard."""

    max_mb: float = Field(default=512.0, gt=0)
    """Approximate file size in MB (10^6 bytes)."""
    max_minutes: float = Field(default=10.0, gt=0)
    """Close a file after this many minutes, whatever its size."""


class FeaturesConfig(StrictModel):
    """Hidden states and attention to store for chains that exist."""

    cache: CacheRoot
    """The cache that holds the chains, and gets the features: a folder, or s3://, gs:// or az://BUCKET/PREFIX."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the feature set; letters, digits and underscores."""
    teacher: FeatureTeacher
    engine: FeatureEngineConfig = VllmConfig()
    chains: ChainsConfig = ChainsConfig()
    tokens: TokensConfig = TokensConfig()
    last_hidden: HiddenConfig | None = None
    """Store the last hidden state."""
    layers: LayersConfig | None = None
    """Store states of middle layers."""
    attention: AttentionConfig | None = None
    """Store attention; needs engine.kind transformers."""
    calibration: CalibrationConfig = CalibrationConfig()
    shard: FeatureShardConfig = FeatureShardConfig()
    max_bytes: int | None = Field(default=None, ge=1)
    """Refuse to start if the set would be larger, by the plan's prediction."""

    @model_validator(mode="after")
    def _stores_something(self) -> Self:
        if self.last_hidden is None and self.layers is None and self.attention is None:
            raise ValueError("nothing to store: set last_hidden, layers or attention")
        if self.teacher.adapter is not None and isinstance(self.engine, VllmConfig):
            raise ValueError("teacher.adapter needs engine.kind: transformers")
        if self.attention is not None and isinstance(self.engine, VllmConfig):
            raise ValueError(
                "attention needs engine.kind: transformers, because vLLM's kernels never form attention weights"
            )
        return self


def load_features_config(path: Path, overrides: Sequence[str] = ()) -> FeaturesConfig:
    """Reads a configuration with `a.b=c` overrides. Raises ConfigError for one of another command or the first key
    that is wrong.
    """
    data = read_yaml(path)
    for key, command in (("prompts", "build"), ("completions", "score")):
        if key in data:
            raise ConfigError(f"{path} is a configuration of another command: teacher-cache {command} {path}")
    for override in overrides:
        apply_override(data, override)
    return validate_config(data, FeaturesConfig, str(path))


def is_features_file(path: Path) -> bool:
    """Whether the file is of this command: builds and scores have a `run`."""
    data = read_yaml(path)
    return "run" not in data and bool({"last_hidden", "layers", "attention"} & data.keys())
