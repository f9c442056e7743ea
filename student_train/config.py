"""The YAML of `student-train init`, `plan`, `run`, `eval` and `export`: what a training run reads, learns and saves."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stillroom.config import Json, StrictModel, flat
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot
from student_train.stage_config import (
    BELOW_HEAD,
    PRUNED_AXES,
    AdversarialConfig,
    LoraConfig,
    LossConfig,
    NegativesConfig,
    PruneConfig,
    QuantiseConfig,
    ScheduleConfig,
    StageConfig,
    TokenWeightsConfig,
    stage_key,
)

__all__ = [
    "CPU_CHUNK_TOKENS",
    "GPU_CHUNK_TOKENS",
    "HELDOUT",
    "PRUNED_AXES",
    "RUN_KEYS",
    "TEXT_LOSSES",
    "AdversarialConfig",
    "CacheConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "InitConfig",
    "LoraConfig",
    "LossConfig",
    "MixtureConfig",
    "NegativesConfig",
    "PromptConfig",
    "PruneConfig",
    "QuantiseConfig",
    "ScheduleConfig",
    "StageConfig",
    "StepsConfig",
    "StudentConfig",
    "TeacherConfig",
    "TermsConfig",
    "TokenWeightsConfig",
    "TrainConfig",
    "accumulation_of",
    "meaning_of",
    "packs_per_step",
    "stage_key",
]

TEXT_LOSSES = ("cross_entropy", "asymmetric_likelihood", "unlikelihood")
"""Losses that need nothing but the text of a chain."""
HELDOUT = "split = 'heldout'"
RUN_KEYS = ("run", "checkpoint", "eval", "tensorboard")
"""Blocks that may change when a run resumes: they say where and how often, never what is learnt."""


class InitConfig(PruneConfig):
    """How `student-train init` creates the student: what to keep of a teacher."""

    teacher: str
    """Hugging Face folder or hub id of the model to cut from."""
    vocabulary: Literal["written", "stored"] | None = None
    """Also cut embeddings, head and (BPE) tokenizer to the ids that the caches use: those in texts or likeliest
    somewhere, or all that distributions store. Distributions then count removed ids as tail. None keeps all."""

    def _cuts_vocabulary(self) -> bool:
        return self.vocabulary is not None


class StudentConfig(StrictModel):
    """The model to train."""

    model: str
    """A Hugging Face folder or hub id; with `init`, the folder that `student-train init` writes."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models that you trust as much as your own code."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. sdpa is torch's own, run on each document of a pack separately (models with sliding windows use
    a mask); flash_attention_2 needs the package flash-attn and a GPU."""
    init: InitConfig | None = None


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


# Each chunk reads and writes the whole gradient of the weight once. At V = 49152 and H = 576 on one core, forward and
# backward over 585 tokens take 1.00 s in chunks of 128, 0.88 s of 256 (48 MiB of logits), 0.86 s of 512. A GPU needs
# larger products to fill it.
CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 1024


class EngineConfig(StrictModel):
    """Precision, memory and parallelism (DeepSpeed)."""

    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of weights and activations; the optimizer keeps float32 copies. float32 is faster on most CPUs; float16
    (ZeRO 1 to 3) scales the loss and skips steps that overflow."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over the ranks: 1 the optimizer state, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Keep optimizer state in CPU memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in CPU memory (ZeRO 3)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose logits are in memory at a time; None is 256 on a CPU and 1024 on a GPU."""

    def needs_no_zero(self, num_ranks: int, *, is_cpu: bool) -> bool:
        """Whether ZeRO would neither shard nor convert anything: half precision needs float32 copies."""
        is_plain = self.precision == "float32" and self.zero_stage in (1, 2) and not self.offload_optimizer
        return is_plain and num_ranks == 1 and is_cpu

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.precision == "float16" and self.zero_stage == 0:
            # DeepSpeed 0.19.8 divides gradients by a loss scale there that it never multiplied the loss by.
            raise ValueError(
                "precision float16 needs zero_stage 1, 2 or 3: without ZeRO, DeepSpeed does not scale the loss"
            )
        return self


class EvalConfig(StrictModel):
    """Evaluation on held-out chains: before the first step, at the end of each stage, and in between."""

    where: str = HELDOUT
    """SQL condition over `chains` that selects the held-out chains."""
    max_chains: int | None = Field(default=512, ge=1)
    """Use at most this many of them, chosen by a hash of their id; None uses all."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also evaluate every this many optimizer steps; the best of these checkpoints is kept."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written and kept. The last step of a stage and an interruption always write one."""

    every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_last: int = Field(default=2, ge=1)
    """Latest checkpoints to keep, besides the one with the lowest held-out loss."""


class TrainConfig(StrictModel):
    """A training run: its folder, the student, its data and its stages."""

    run: Path
    """The run's folder: configuration, selections, metrics, checkpoints. The same command resumes a run."""
    seed: int = Field(default=0, ge=0)
    """Seeds the order of chains, new weights (LoRA) and dropout."""
    student: StudentConfig
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    eval: EvalConfig | None = Field(default_factory=EvalConfig)
    """None turns evaluation off."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tensorboard: bool = False
    """Also write TensorBoard files (needs the package tensorboard)."""

    @model_validator(mode="after")
    def _prunes_a_trained_model(self) -> "TrainConfig":
        if self.stages[0].prune is not None:
            key = stage_key(0, self.stages[0].name)
            raise ValueError(f"{key}: prune has no stage before it: cut the student with student.init instead")
        return self

    @model_validator(mode="after")
    def _agrees(self) -> "TrainConfig":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are named {names}: give each its own name")
        for number, stage in enumerate(self.stages):
            key = stage_key(number, stage.name)
            if stage.batch_tokens % self.data.pack_tokens:
                raise ValueError(
                    f"{key}: batch_tokens={stage.batch_tokens} is not a multiple of "
                    f"data.pack_tokens={self.data.pack_tokens}: set it to {_nearest_multiple(stage, self.data)}"
                )
            if self.data.kind == "text" and stage.token_weights is not None:
                raise ValueError(
                    f"{key}: token_weights need distributions, but data.kind: text has none: remove them "
                    "(data.weight weights whole chains, focal_gamma weights tokens by the student)"
                )
            if _is_elastic(stage) and (self.eval is None or self.eval.every_steps is None):
                raise ValueError(
                    f"{key}: a loss has an elastic weight, which follows the held-out loss: set eval.every_steps"
                )
            if self.data.kind == "projected":
                for name, loss in stage.losses.items():
                    if name.startswith(BELOW_HEAD) or loss.tail == "exact":
                        raise ValueError(f"{key}: {name} needs the teacher's own tokens: set data.kind: distributions")
            if self.data.kind == "text" and not set(stage.losses) <= set(TEXT_LOSSES):
                raise ValueError(
                    f"{key}: its losses are {', '.join(stage.losses)}, but data.kind: text has no distributions: "
                    "losses must be {cross_entropy: 1}"
                )
            if stage.negatives is not None and self.eval is None:
                raise ValueError(
                    f"{key}: negatives can make right chains less likely too, which only an evaluation shows: set eval"
                )
            if stage.negatives is not None and "dpo" in stage.losses and self.data.kind != "distributions":
                raise ValueError(f"{key}: dpo needs data.kind: distributions")
        return self


def packs_per_step(stage: StageConfig, data: DataConfig) -> int:
    """Packs of a full global batch."""
    return stage.batch_tokens // data.pack_tokens


def accumulation_of(stage: StageConfig, data: DataConfig, num_ranks: int) -> int:
    """Packs that each rank takes a step. Raises ConfigError if the ranks cannot share the batch equally."""
    packs = packs_per_step(stage, data)
    if packs % num_ranks:
        raise ConfigError(
            f"batch_tokens={stage.batch_tokens} is {packs} packs of {data.pack_tokens} tokens, which {num_ranks} ranks "
            f"cannot share equally: set it to a multiple of {num_ranks * data.pack_tokens}"
        )
    return packs // num_ranks


def meaning_of(config: TrainConfig) -> Json:
    """Dotted keys and values of everything that decides what is learnt; with elastic weights that includes `eval`."""
    free = set(RUN_KEYS) - ({"eval"} if any(_is_elastic(stage) for stage in config.stages) else set())
    return flat({key: value for key, value in config.model_dump(mode="json").items() if key not in free})


def _is_elastic(stage: StageConfig) -> bool:
    weights = [loss.weight for loss in stage.losses.values()]
    return any(isinstance(weight, ScheduleConfig) and weight.kind == "elastic" for weight in weights)


def _nearest_multiple(stage: StageConfig, data: DataConfig) -> int:
    return max(1, round(stage.batch_tokens / data.pack_tokens)) * data.pack_tokens
