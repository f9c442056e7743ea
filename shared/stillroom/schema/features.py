"""The table `features`: its columns, the header of its files, and the manifest of a feature set (FORMAT.md)."""

from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from stillroom.schema.manifest import Teacher
from stillroom.schema.tables import list_of

FEATURES_VERSION = 1
"""Version of the format of features, independent of that of chains."""
FEATURES_METADATA_KEY = b"stillroom-features"
"""Key of the Parquet metadata that holds a FeatureHeader as JSON."""

FEATURE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("chain_id", pa.string(), nullable=False),
        pa.field("num_context", pa.int32(), nullable=False),
        pa.field("positions", list_of(pa.int32()), nullable=False),
        pa.field("hidden", pa.binary()),
        pa.field("layers", pa.binary()),
        pa.field("attention", pa.binary()),
    ]
)
PAYLOADS = ("hidden", "layers", "attention")
"""Columns that hold a chain's signals, null where the set does not store them."""


class _Record(BaseModel):
    # Readers ignore keys of later writers: FORMAT.md promises it.
    model_config = ConfigDict(frozen=True, extra="ignore")


class FeatureHeader(_Record):
    """Which set a file of the table belongs to, and which shard its chains came from."""

    format_version: int = FEATURES_VERSION
    set_id: str
    worker: str
    constants: str = Field(description="hash in the name of the set's constants: another set of scales decodes wrong")
    teacher_fingerprint: str
    chains_file: str = Field(description="shard that held the chains; join rows by sample_id, since shards are copied")


class StoredVectors(_Record):
    """How one kind of state is stored: the last hidden state, or one layer."""

    name: str = Field(description="'hidden' after the final norm, or 'layer<i>': the stream after i decoder layers")
    layer: int | None = Field(description="i of 'layer<i>'; null for 'hidden'")
    bits: int = Field(description="per coefficient: 8 or 4")
    rank: int | None = Field(description="coefficients per token; null stores every channel")
    lost_frac: float = Field(description="share of the calibration states' variance outside the basis; 0 at full rank")
    error_frac: float = Field(description="relative squared error of decoded calibration states, basis included")


class StoredAttention(_Record):
    """Which attention weights are stored."""

    heads: list[tuple[int, int]] = Field(description="(decoder layer, head), both from 0, in stored order")
    num_heads: int = Field(description="query heads of a layer of the teacher, stored or not")
    num_keys: int = Field(description="most attended positions stored per query and head")
    entropy: list[float] = Field(description="mean attention entropy of each of `heads` on the calibration chains")


class Head(_Record):
    """The teacher's output layer: logits = softcap(scale * (hidden @ weight.T + bias))."""

    file: str = Field(description="safetensors beside the set's folder; its name carries its SHA-256")
    vocab_size: int
    hidden_size: int
    logit_scale: float = 1.0
    softcap: float | None = Field(default=None, description="c: logits are c * tanh(logits / c)")
    norm: dict[str, Any] = Field(
        default={}, description="kind and epsilon of the final norm, which `hidden` has passed"
    )


class SetManifest(_Record):
    """`feature_sets/<set_id>/manifest.json`: what a feature set holds and how to decode it."""

    format_version: int = FEATURES_VERSION
    set_id: str
    name: str
    created_at: str
    teacher: Teacher
    num_layers: int = Field(description="decoder layers of the teacher")
    hidden_size: int
    entropy_frac: float | None = Field(description="share of each chain's tokens stored, the most uncertain; null: all")
    hidden: StoredVectors | None
    layers: list[StoredVectors]
    attention: StoredAttention | None
    head: Head | None = Field(description="null if the set stores no last hidden state")
    constants: str = Field(description="hash in the name of constants-<hash>.safetensors")
    num_calibration_tokens: int
    logprob_error: float | None = Field(
        description="median difference in nats of head x hidden from the cache's sampled_logprob, before coding"
    )
    engine: dict[str, Any]
    software: dict[str, str]
