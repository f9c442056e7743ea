"""Which vLLM generates, and how: the `engine` block of the configurations."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator

from shared.config import StrictModel


class EmbeddedConfig(StrictModel):
    """vLLM in this program. Numbers that are None are vLLM's own defaults."""

    kind: Literal["embedded"] = "embedded"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto is the model's own."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of prompt and completion together."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Chains generated at once."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one step of the engine computes at most."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory for weights and key-value cache."""
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Gigabytes (2^30 bytes) of key-value cache; None: on a GPU by gpu_memory_utilization, on a CPU a quarter of what
    is free."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that each layer is spread over."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Groups of GPUs that the layers are dealt to."""
    enable_expert_parallel: bool = False
    """Spread whole experts of a mixture over the GPUs instead of cutting each."""
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    """How workers of several GPUs are started; ray spans machines."""
    quantization: str | None = None
    """vLLM's name of a quantisation to load weights with, such as fp8; null is the model's own."""
    kv_cache_dtype: str | None = None
    """Of the key-value cache, such as fp8."""
    enforce_eager: bool = False
    """Compile nothing: starts sooner, generates more slowly on a GPU."""
    in_process: bool | None = None
    """Run the engine's loop in this process; None: on a CPU yes, on a GPU in a process of its own."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests handed to the engine beyond those it generates at once, so that it never idles."""


class ServerConfig(StrictModel):
    """vLLM servers over HTTP (`vllm serve`): they load the model and choose precision and parallelism themselves.
    Draws, temperatures and exact entropies need stillroom's plugin in them (docs/signals.md)."""

    kind: Literal["server"]
    endpoints: list[str] = Field(min_length=1)
    """Addresses such as http://gpu-1:8000: every one serves the same model, and shares the work."""
    model: str | None = None
    """Name under which the model is served; None: the only one there."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the API key. The key itself is written nowhere."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of prompt and completion together; None: what the servers have, which must then be the same."""
    max_in_flight: int = Field(default=256, ge=1)
    """Chains that an endpoint generates at once; above its --max-num-seqs they wait there and count as stalled."""
    max_attempts: int = Field(default=5, ge=1)
    """How often a chain is asked for when endpoints break down over it; then it is one failure. Answers of an endpoint
    that is busy (429, 503) do not count."""
    stall_s: float = Field(default=600.0, gt=0)
    """Seconds without a byte of a chain after which it is asked for again."""
    give_up_minutes: float = Field(default=10.0, gt=0)
    """Stop when no endpoint was usable for so long, at the start (a server loads for minutes) or later."""

    @field_validator("endpoints")
    @classmethod
    def _plain_addresses(cls, value: list[str]) -> list[str]:
        # .../v1 is what OpenAI clients are given: both mean the same server.
        addresses = [one.rstrip("/").removesuffix("/v1") for one in value]
        for given, address in zip(value, addresses, strict=True):
            if "@" in address:
                raise ValueError(f"the address of {address.rpartition('@')[2]} holds a password: use api_key_env")
            if not _is_server_address(address):
                raise ValueError(f"{given!r} is no address of a server: it looks like http://host:8000")
        if len(set(addresses)) < len(addresses):
            raise ValueError("an endpoint stands there twice")
        return addresses


def _is_server_address(address: str) -> bool:
    if not address.isprintable() or " " in address:
        return False
    try:
        parts = urlsplit(address)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0) and not (
            parts.query or parts.fragment
        )
    except ValueError:
        # A port that is no number, or half an IPv6 address.
        return False


def _engine_kind(value: Any) -> str:
    """Embedded where nothing is said."""
    return str(value.get("kind", "embedded")) if isinstance(value, Mapping) else str(value.kind)


EngineConfig = Annotated[
    Annotated[EmbeddedConfig, Tag("embedded")] | Annotated[ServerConfig, Tag("server")],
    Discriminator(
        _engine_kind,
        custom_error_type="engine_kind",
        custom_error_message="kind is 'embedded' (vLLM in this program) or 'server' (vLLM over HTTP)",
    ),
]
