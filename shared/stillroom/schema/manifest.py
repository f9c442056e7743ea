"""Models of `runs/<run_id>.json` and of the header in a shard's Parquet metadata."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stillroom.schema import FORMAT_VERSION
from stillroom.schema.records import stable_hash

SHARD_METADATA_KEY = b"stillroom"
"""Key of the Parquet metadata that holds a shard's ShardHeader as JSON."""


class _Record(BaseModel):
    # Readers ignore keys of later writers: FORMAT.md promises it.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Teacher(_Record):
    """The teacher model. Fingerprints are 32 hex characters; FORMAT.md says what each covers."""

    model: str
    revision: str | None = None
    fingerprint: str = Field(description="hash of the other fingerprints, the adapter's among them where there is one")
    weights_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    vocab_size: int = Field(description="width of the teacher's logits; every stored id is below it")
    # Left out where there is none: manifests without one stay as they were.
    adapter: str | None = Field(default=None, exclude_if=lambda value: value is None, description="LoRA adapter")
    adapter_fingerprint: str | None = Field(default=None, exclude_if=lambda value: value is None)

    @property
    def shown_adapter(self) -> str | None:
        """The adapter for a person: its folder may hold another one by now."""
        return None if self.adapter_fingerprint is None else f"{self.adapter} ({self.adapter_fingerprint[:8]})"


class ShardHeader(_Record):
    """Everything a reader needs to decode a shard, stored in the shard itself."""

    format_version: int = FORMAT_VERSION
    codec: str
    max_support: int = Field(description="largest support a token can have in this shard")
    nucleus: float | None = Field(description="mass at which the support ends; null keeps max_support entries")
    draws: int = Field(
        default=0, description="draws from the tail of a token whose support ends before the nucleus; 0: none"
    )
    temperatures: list[float] = Field(default=[], description="of the stored log-partitions, in their order")
    entropy: str = Field(description="'exact' over the whole vocabulary or 'support': of the captured top-k and tail")
    vocab_size: int
    run_id: str
    worker: str
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str


class RunManifest(_Record):
    """`runs/<run_id>.json`: teacher, settings and software of a run. Never contains secrets."""

    format_version: int = FORMAT_VERSION
    run_id: str
    name: str
    kind: str = Field(description="'generate' or 'score'")
    created_at: str
    teacher: Teacher
    sampling: dict[str, Any]
    capture: dict[str, Any]
    engine: dict[str, Any]
    prompts: dict[str, Any]
    reasoning: dict[str, Any]
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="arguments of the chat template")
    software: dict[str, str]


def run_id_for(
    name: str,
    kind: str,
    teacher_fingerprint: str,
    sampling: Mapping[str, Any],
    capture: Mapping[str, Any],
    reasoning: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any],
) -> str:
    """`<name>_<8 hex>`. A different teacher, capture, reasoning, sampling or argument of the chat template makes a
    different run, and so does scoring; more samples per prompt do not. The arguments are fields of RunManifest.
    """
    how_many = ("samples", "until")
    how: object = {key: value for key, value in sampling.items() if key not in how_many}
    if kind == "score":
        # Engine arguments may change what a teacher says of given tokens.
        how = {"score": how} if how else "score"
    # Only where there are any: runs without them keep the ids of earlier versions.
    template = [dict(chat_template_kwargs)] if chat_template_kwargs else []
    return f"{name}_{stable_hash('run', teacher_fingerprint, capture, reasoning, how, *template)[:8]}"
