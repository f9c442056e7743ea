"""What a cache build is asked to do: the YAML of `teacher-cache plan` and `build`.

Which vLLM generates, and how: the `engine` block of the configurations.

Where prompts come from: the sources of a build's configuration.

Which completions are scored, and how: the YAML of `teacher-cache score`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillroom.config import StrictModel
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot


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
    """How distributions are stored: topk-u8 (8-bit codes) or topk-f32 (exact)."""
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
