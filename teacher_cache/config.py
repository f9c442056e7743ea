"""Configuration of `teacher-cache plan`, `build` and `score`: teacher, engine, prompts or completions, capture.

Field docstrings are the text of docs/configuration.md (`python -m tools.config_reference`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillroom.config import StrictModel, apply_override, read_yaml, validate_config
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot
from teacher_cache.engine import switches
from teacher_cache.prompts.config import CompletionsConfig, PromptsConfig
from teacher_cache.scrub.config import ScrubConfig

MAX_API_LOGPROBS = 20
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _is_empty(value: Mapping[str, Any]) -> bool:
    # Left out where it is empty: runs without it keep their ids and manifests.
    return not value


def require_no_lora(engine: "EmbeddedConfig") -> None:
    """Raises ValueError for arguments of vLLM that do nothing without an adapter."""
    if idle := sorted(switches.LORA & engine.vllm.keys()):
        raise ValueError(f"engine.vllm.{idle[0]} has no effect without teacher.adapter")


def _not_refused(block: str, given: dict[str, Any]) -> dict[str, Any]:
    if (problem := switches.refused(block, given)) is not None:
        raise ValueError(problem)
    return given


class VllmModelConfig(StrictModel):
    """What every use of vLLM in this process has. Numbers left at None take vLLM's own defaults."""

    dtype: Dtype = "auto"
    """Type of weights and activations; `auto` is the model's own."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum tokens of prompt and completion together."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Maximum chains computed at once."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens computed in one engine step."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Fraction of each GPU's memory for weights and KV cache."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs that each layer is split across."""
    quantization: str | None = None
    """Quantization to load weights with, by vLLM's name, such as fp8; None is the model's own."""


class EmbeddedConfig(VllmModelConfig):
    """vLLM in this process. Numbers left at None take vLLM's own defaults."""

    kind: Literal["embedded"] = "embedded"
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """KV cache in GiB (2^30 bytes). None: on a GPU what gpu_memory_utilization leaves, on a CPU what max_num_seqs
    chains of max_model_len tokens need, at most a quarter of free memory."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Number of pipeline stages that the layers are divided into."""
    enable_expert_parallel: bool = False
    """Place whole experts of a mixture-of-experts model on different GPUs instead of splitting each expert."""
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    """How multi-GPU workers are started; `ray` spans machines."""
    kv_cache_dtype: str | None = None
    """Type of the KV cache, such as fp8."""
    enforce_eager: bool | None = None
    """Skip compilation: starts sooner, generates more slowly. None: on a CPU skip it if the tokens left do not repay
    it, on a GPU always compile."""
    in_process: bool | None = None
    """Run the engine loop in this process. None: yes on a CPU, in a separate process on a GPU."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests queued in the engine beyond max_num_seqs, so that it never idles."""
    vllm: dict[str, Any] = Field(default_factory=dict, exclude_if=_is_empty)
    """Other arguments of the installed vLLM's EngineArgs, such as `enable_prefix_caching: false`. Those that may change
    tokens are part of the run's identity (docs/switches.md)."""

    @field_validator("vllm")
    @classmethod
    def _usable_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _not_refused("engine", value)

    @property
    def switches(self) -> dict[str, Any]:
        """The part of `vllm` that may change tokens."""
        return switches.changing(self.vllm)


class ServerConfig(StrictModel):
    """vLLM servers over HTTP (`vllm serve`), which load the model and choose precision and parallelism themselves.
    Draws, temperatures and exact entropies need stillroom's plugin installed there (docs/signals.md)."""

    kind: Literal["server"]
    endpoints: list[str] = Field(min_length=1)
    """Addresses such as http://gpu-1:8000, which all serve the same model and share the work."""
    model: str | None = None
    """Name under which the model is served. None: the only one served."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the API key. The key itself is never written to disk."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum tokens of prompt and completion together. None: the servers' own limit, which must then be the same."""
    max_in_flight: int = Field(default=256, ge=1)
    """Concurrent chains per endpoint. Chains above its --max-num-seqs, times its --data-parallel-size, wait there,
    which counts towards stall_s."""
    max_attempts: int = Field(default=5, ge=1)
    """Attempts per chain when endpoints break down while generating it; after that it is recorded as a failure. Busy
    responses (429, 503) do not count."""
    stall_s: float = Field(default=600.0, gt=0)
    """Retry a chain after this many seconds without receiving any of it."""
    handshake_s: float = Field(default=60.0, gt=0)
    """Exclude an endpoint that does not finish its checks, a few short requests, within this many seconds; it is
    checked again. The others start without it."""
    give_up_minutes: float = Field(default=10.0, gt=0)
    """Stop after this many minutes without a usable endpoint, at the start (servers load for minutes) or later."""

    @model_validator(mode="before")
    @classmethod
    def _arguments_are_flags(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("vllm"):
            flags = " ".join(f"--{str(name).replace('_', '-')}" for name in data["vllm"])
            raise ValueError(f"vllm: a server has its own engine arguments: give {flags} to `vllm serve` instead")
        return data

    @property
    def switches(self) -> dict[str, Any]:
        """Empty: a server does not report its engine arguments."""
        return {}

    @field_validator("endpoints")
    @classmethod
    def _plain_addresses(cls, value: list[str]) -> list[str]:
        # OpenAI clients are configured with .../v1: both forms mean the same server.
        addresses = [one.rstrip("/").removesuffix("/v1") for one in value]
        for given, address in zip(value, addresses, strict=True):
            if "@" in address:
                raise ValueError(f"the address of {address.rpartition('@')[2]} holds a password: use api_key_env")
            if not _is_server_address(address):
                raise ValueError(f"{given!r} is not a server address: expected a form like http://host:8000")
        if len(set(addresses)) < len(addresses):
            raise ValueError("an endpoint is listed twice")
        return addresses


class PriceConfig(StrictModel):
    """What an API charges, in any currency."""

    input: float = Field(ge=0)
    """Per million prompt tokens."""
    output: float = Field(ge=0)
    """Per million completion tokens, reasoning included."""


SET_ELSEWHERE = {
    **{name: f"sampling.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **{name: f"sampling.{name}" for name in ("seed", "max_tokens")},
    "chat_template_kwargs": "teacher.chat_template_kwargs",
}
"""Fields of a request, and the setting that each comes from."""
OFF: Mapping[str, float | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": None,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling of an API that gets none of these fields."""


class OpenAIConfig(StrictModel):
    """A teacher behind an OpenAI-compatible API (chat completions). `teacher.model` then names the folder or hub id of
    its tokenizer; `score` needs another engine."""

    kind: Literal["openai"]
    endpoint: str
    """Base address, such as https://api.openai.com/v1."""
    model: str
    """Name under which the API serves the teacher."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the API key. The key itself is never written to disk."""
    signals: Literal["top_logprobs", "none"] = "top_logprobs"
    """What to store. `top_logprobs`: the API's log probabilities, at most 20 per token; its tokens must equal those of
    teacher.model byte for byte. `none`: text only, for students with data.kind: text. Part of the
    identity of run and chains."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Extra fields of each request, such as `reasoning_effort`. null removes a field that would otherwise be sent. Part
    of the identity of run and chains."""
    price: PriceConfig | None = None
    """Prices from which `plan` and `stats` compute the cost."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum tokens of prompt and completion together. None: the API's own limit."""
    max_in_flight: int = Field(default=32, ge=1)
    """Concurrent requests."""
    max_attempts: int = Field(default=8, ge=1)
    """Attempts per chain, with increasing pauses. Busy responses (429, 503) do not count, nor do attempts while the API
    answers nobody."""
    stall_s: float = Field(default=3600.0, gt=0)
    """Retry a chain whose answer has not arrived after this many seconds. Answers are not streamed."""
    give_up_minutes: float = Field(default=10.0, gt=0)
    """Stop after this many minutes in which the API answered nobody."""

    @property
    def switches(self) -> dict[str, Any]:
        """`parameters`, each of which may change tokens, and whether distributions are missing."""
        # Otherwise chains of text alone would count as done when distributions are asked for later.
        return self.parameters if self.signals == "top_logprobs" else {**self.parameters, "signals": self.signals}

    @field_validator("endpoint")
    @classmethod
    def _base_address(cls, value: str) -> str:
        return api_address(value)

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"model", "messages", "stream", "n", "logprobs", "top_logprobs"} & value.keys()):
            raise ValueError(f"{taken[0]} is set by teacher-cache: remove it")
        for name, setting in SET_ELSEWHERE.items():
            if value.get(name) is not None:
                raise ValueError(f"{name} is set by {setting}, which run and chains are named after: remove it here")
        return value


def engine_kind(default: str, message: str) -> Discriminator:
    """Chooses a kind of engine by its key `kind`; `message` names the kinds there are."""

    def kind_of(value: Any) -> str:
        return str(value.get("kind", default)) if isinstance(value, Mapping) else str(value.kind)

    return Discriminator(kind_of, custom_error_type="engine_kind", custom_error_message=message)


EngineConfig = Annotated[
    Annotated[EmbeddedConfig, Tag("embedded")]
    | Annotated[ServerConfig, Tag("server")]
    | Annotated[OpenAIConfig, Tag("openai")],
    engine_kind(
        "embedded", "kind must be 'embedded' (vLLM in this process), 'server' (vLLM over HTTP) or 'openai' (any API)"
    ),
]


class ModelConfig(StrictModel):
    """Where a model comes from."""

    model: str
    """Hugging Face model folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models that you trust as much as your own code."""
    adapter: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Folder of a LoRA adapter by peft that is applied to the model. Its content is part of the teacher's identity
    (docs/switches.md)."""


class TeacherConfig(ModelConfig):
    """The model that generates or scores chains."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the model's chat template, such as `enable_thinking: true`; part of the run's identity. Names that
    the template does not mention are refused."""


SAMPLING_PRESETS: dict[str, dict[str, Any]] = {
    "r1": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
    "qwen3": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "max_tokens": 32768},
    "greedy": {"temperature": 0.0, "top_p": 1.0},
}
"""Recommended by the model cards for answers with reasoning; `greedy` is argmax."""


class UntilConfig(StrictModel):
    """Generates further chains of a prompt until enough are judged right. Needs a source with a judge that runs during
    a build."""

    right: int = Field(ge=1)
    """Right chains at which a prompt is done."""
    samples: int = Field(ge=2)
    """Maximum chains per prompt. `sampling.samples` chains are always generated."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.right > self.samples:
            raise ValueError(f"right={self.right} exceeds samples={self.samples}")
        return self


class SamplingConfig(StrictModel):
    """How the teacher samples. Stored distributions are at temperature 1 whatever the sampling temperature."""

    # Excluded from dumps: only the resulting values are part of a run's and a sample's identity.
    preset: Literal["r1", "qwen3", "greedy"] | None = Field(default=None, exclude=True)
    """Recommended values for a model family, used instead of the defaults below; other keys override it."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature; 0 always takes the most probable token. DeepSeek recommends 0.5 to 0.7 for R1."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability mass; 1 is off."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the top_k most probable tokens only; None is off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Exclude tokens less probable than this fraction of the most probable one; 0 is off."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens already in the chain; 1 is off."""
    max_tokens: int = Field(default=32768, ge=1)
    """Maximum completion tokens per chain."""
    samples: int = Field(default=1, ge=1)
    """Chains per prompt, each with its own seed."""
    # Left out where it is off: neither runs nor samples get another id.
    until: UntilConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Generate further chains for prompts that the teacher got wrong."""
    seed: int = 0
    """Base sampling seed; each chain's seed is derived from it, the prompt and the sample index."""
    vllm: dict[str, Any] = Field(default_factory=dict, exclude_if=_is_empty)
    """Other fields of vLLM's SamplingParams, such as `stop` or `repetition_detection`, also for servers; part of the
    identity of run and chains (docs/switches.md)."""

    @field_validator("vllm")
    @classmethod
    def _usable_parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _not_refused("sampling", value)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("preset"), str):
            # An unknown preset is refused by its type afterwards, with the names that there are.
            return {**SAMPLING_PRESETS.get(data["preset"], {}), **data}
        return data

    @model_validator(mode="after")
    def _greedy_repeats(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "samples > 1 at temperature 0 would repeat one chain: raise temperature or set samples to 1"
            )
        if self.until is not None and self.samples >= self.until.samples:
            raise ValueError(f"until has no effect: samples={self.samples} reaches until.samples={self.until.samples}")
        return self


class ReasoningConfig(StrictModel):
    """Tokens that separate a chain's reasoning from its answer."""

    start: str = "<think>"
    """Token that opens the reasoning; chat templates may already put it into the prompt."""
    end: str = "</think>"
    """Token that closes the reasoning. If the tokenizer lacks it, completions count as answers without reasoning."""


class CaptureConfig(StrictModel):
    """What is stored of each token's distribution."""

    codec: str = "topk-u8"
    """How distributions are stored: topk-u8 (8-bit codes) or topk-f32 (exact)."""
    max_support: int = Field(default=8, ge=1, le=1024)
    """Maximum exact entries per token: the teacher's most probable tokens with their logprobs."""
    nucleus: float | None = Field(default=0.999, gt=0, lt=1)
    """Keep only the smallest set of entries with this probability mass; None always keeps max_support entries."""
    draws: int = Field(default=8, ge=0, le=256)
    """Tokens drawn from the tail where max_support ends before the nucleus: unbiased targets (arXiv 2503.16870).
    8 exact entries and 8 draws teach more than 64 exact entries, in two fifths of the bytes (docs/signals.md)."""
    temperatures: list[float] = Field(default_factory=list, max_length=8)
    """Temperatures other than 1 whose log-partition is stored, so that losses at these temperatures are exact."""

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        from stillroom.cache.codec import check_codec

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
            raise ValueError(f"{bad[0]:g} is out of range: use temperatures from 0.05 to 100 other than 1")
        if len(set(value)) < len(value):
            raise ValueError("a temperature is listed twice")
        # The order is part of the run id: equal sets must be equal runs.
        return sorted(value)


class ShardConfig(StrictModel):
    """When a shard is closed. A crash loses at most the open shard."""

    max_mb: float = Field(default=512.0, gt=0)
    """Approximate shard size in MB (10^6 bytes)."""
    max_minutes: float = Field(default=10.0, gt=0)
    """Close a shard after this many minutes, whatever its size."""
    row_group_tokens: int = Field(default=65536, ge=1)
    """Completion tokens per row group, the unit that readers load."""


class JudgingConfig(StrictModel):
    """How answers are checked during a build. Verdicts do not affect what is generated."""

    processes: int = Field(default=1, ge=1)
    """Number of judge processes; unit tests of code may take half a minute each."""


class FailureConfig(StrictModel):
    """When failed prompts stop the build."""

    max_consecutive: int | None = Field(default=100, ge=1)
    """Stop after this many consecutive failures; None never stops."""


class RunConfig(StrictModel):
    """Settings that `build` and `score` share."""

    cache: CacheRoot
    """Folder of the cache, or an object store URL: s3://, gs:// or az://BUCKET/PREFIX."""
    run: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the run; letters, digits and underscores."""
    teacher: TeacherConfig
    reasoning: ReasoningConfig = ReasoningConfig()
    capture: CaptureConfig = CaptureConfig()
    engine: EngineConfig = EmbeddedConfig()
    shard: ShardConfig = ShardConfig()
    judging: JudgingConfig = JudgingConfig()
    scrub: ScrubConfig | None = None
    """Replace personal data before anything is sent or stored; None leaves texts as they are."""
    failures: FailureConfig = FailureConfig()

    @model_validator(mode="after")
    def _adapter_is_applied(self) -> Self:
        if isinstance(self.engine, OpenAIConfig) and self.teacher.adapter is not None:
            raise ValueError("teacher.adapter has no effect with engine.kind openai: remove it")
        if isinstance(self.engine, ServerConfig) and self.teacher.adapter is not None and self.engine.model is None:
            raise ValueError("teacher.adapter: set engine.model to the name under which the server serves the adapter")
        if isinstance(self.engine, EmbeddedConfig) and self.teacher.adapter is None:
            require_no_lora(self.engine)
        return self

    @model_validator(mode="after")
    def _api_gives_it(self) -> Self:
        if not isinstance(self.engine, OpenAIConfig):
            return self
        if self.capture.draws or self.capture.temperatures:
            raise ValueError("an API gives neither draws nor log-partitions: set capture: {max_support: 20, draws: 0}")
        if self.engine.signals == "top_logprobs" and self.capture.max_support > MAX_API_LOGPROBS:
            raise ValueError(f"an API gives at most {MAX_API_LOGPROBS} candidates a token: set capture.max_support: 20")
        return self


class BuildConfig(RunConfig):
    """Prompts for which the teacher generates chains."""

    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _parameters_reach_vllm(self) -> Self:
        if isinstance(self.engine, OpenAIConfig) and self.sampling.vllm:
            raise ValueError("sampling.vllm is for vLLM: an API takes further fields in engine.parameters")
        parameters = self.engine.parameters if isinstance(self.engine, OpenAIConfig) else {}
        for name, off in ((name, off) for name, off in OFF.items() if name in parameters):
            own = [one.temperature for one in self.prompts.sources] if name == "temperature" else []
            if other := [one for one in (getattr(self.sampling, name), *own) if one not in (None, off)]:
                shown = "null" if off is None else f"{off:g}"
                raise ValueError(
                    f"engine.parameters removes {name}, so the API samples at {shown} and not at {other[0]:g}: set "
                    f"sampling.{name}: {shown}"
                )
        return self

    @model_validator(mode="after")
    def _variants_have_a_cache_of_their_own(self) -> Self:
        if self.prompts.augment is not None and str(self.prompts.augment.cache) == str(self.cache):
            raise ValueError("prompts.augment.cache is the build's own: students would train on its answers")
        return self

    @model_validator(mode="after")
    def _greedy_source_repeats(self) -> Self:
        for source in self.prompts.sources:
            temperature = self.sampling.temperature if source.temperature is None else source.temperature
            # Again by source: each may override what the block above has checked.
            until, samples = self.sampling.until, source.samples or self.sampling.samples
            if temperature == 0 and (samples > 1 or until is not None):
                asked = "samples > 1" if samples > 1 else "sampling.until"
                raise ValueError(f"source {source.name!r} would repeat one chain: it has {asked} at temperature 0")
            if until is not None and samples > until.samples:
                raise ValueError(f"source {source.name!r} has samples={samples}, above until.samples={until.samples}")
        return self


class ScoreConfig(RunConfig):
    """Existing completions that the teacher scores."""

    completions: CompletionsConfig

    @model_validator(mode="after")
    def _api_cannot_score(self) -> Self:
        if isinstance(self.engine, OpenAIConfig):
            raise ValueError("chat APIs do not score texts: use engine.kind embedded or server")
        return self


def extra_sampling(config: RunConfig) -> dict[str, Any]:
    """What of `sampling.vllm` is on."""
    return switches.effective(config.sampling.vllm) if isinstance(config, BuildConfig) else {}


def load_run_config(path: Path, overrides: Sequence[str] = (), command: str | None = None) -> BuildConfig | ScoreConfig:
    """Reads a configuration with `a.b=c` overrides: a ScoreConfig if it has a `completions` block.

    `command` (`build` or `score`) says which kind is wanted. Raises ConfigError for the other kind, or for the first
    key that is wrong.
    """
    data = read_yaml(path)
    if "run" not in data and {"last_hidden", "layers", "attention"} & data.keys():
        raise ConfigError(f"{path} names states to store at existing chains: teacher-cache features {path}")
    if command == "build" and "completions" in data:
        raise ConfigError(f"{path} names existing completions, which are scored: teacher-cache score {path}")
    if command == "score" and "prompts" in data:
        raise ConfigError(f"{path} names prompts, for which chains are generated: teacher-cache build {path}")
    if "student" in data and "teacher" not in data:
        raise ConfigError(f"{path} configures a student: student-train run {path}")
    for override in overrides:
        apply_override(data, override)
    # With neither block the command decides which one is reported missing.
    scores = command == "score" or "completions" in data
    config = validate_config(data, ScoreConfig, str(path)) if scores else validate_config(data, BuildConfig, str(path))
    if isinstance(config.engine, EmbeddedConfig):
        # A server's vLLM is another one, which the handshake asks.
        switches.check_names("engine", config.engine.vllm)
        switches.check_names("sampling", extra_sampling(config))
    return config


def api_address(value: str) -> str:
    """The base address of an OpenAI-compatible API. Raises ValueError for what is none."""
    if "@" in value:
        raise ValueError(f"the address of {value.rpartition('@')[2]} holds a password: use api_key_env")
    if not _is_server_address(value):
        raise ValueError(f"{value!r} is not a server address: expected a form like http://host:8000/v1")
    # Documentation of APIs often gives the address of the request instead of the base.
    address = value.rstrip("/").removesuffix("/chat/completions")
    return address if urlsplit(address).path else f"{address}/v1"


def _is_server_address(address: str) -> bool:
    if not address.isprintable() or " " in address:
        return False
    try:
        parts = urlsplit(address)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0) and not (
            parts.query or parts.fragment
        )
    except ValueError:
        # A port that is not a number, or an incomplete IPv6 address.
        return False
