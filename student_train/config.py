"""What a training run is asked to do: the YAML of `student-train init`, `plan`, `run`, `eval` and `export`.

What one stage of a run trains, by which losses and for how long: the `stages` of a run's configuration.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stillroom.config import Json, StrictModel
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot


class ScheduleConfig(StrictModel):
    """A number that changes over a stage, from its first optimizer step to its last.

    `elastic` (weights of losses alone) follows what the student has learnt instead of the step: the value is `end` +
    (`start` - `end`) x the held-out loss as a share of what it was when the stage began, at most 1.
    """

    kind: Literal["linear", "cosine", "exponential", "elastic"]
    start: float = Field(ge=0)
    """Value at the first step."""
    end: float | None = Field(default=None, ge=0)
    """Value at the last step; of an elastic weight, where the held-out loss would be 0."""
    factor: float | None = Field(default=None, gt=0)
    """`exponential` alone, instead of `end`: step n has start * factor^n."""

    @model_validator(mode="after")
    def _one_end(self) -> "ScheduleConfig":
        if (self.end is None) == (self.factor is None):
            raise ValueError("set exactly one of end and factor")
        if self.factor is not None and self.kind != "exponential":
            raise ValueError(f"factor has no effect on a {self.kind} schedule: set end")
        if self.kind == "exponential" and not (self.start > 0 and (self.end is None or self.end > 0)):
            raise ValueError("an exponential schedule never reaches 0: start and end must be above 0")
        return self


class LossConfig(StrictModel):
    """One loss of a mix; a plain number stands for its weight."""

    weight: float | ScheduleConfig = 1.0
    beta: float | None = None
    """jsd_stored_tail: the teacher's share of the mixture, between 0 and 1; None is 0.5."""
    alpha: float | None = None
    """Skewed KLs: share of the divergence's own side in the mixture, between 0 and 1; None is 0.1."""


class TokenWeightsConfig(StrictModel):
    """What each token counts in the losses, by what the teacher's distribution was like there.

    The loss is a mean by these weights: only their ratios matter.
    """

    entropy: float | None = None
    """Weight x (1 + the teacher's entropy in nats)^entropy: above 0 stresses the forks of a chain, where the teacher
    itself was unsure, below 0 the tokens that it was sure of."""
    tail: float | None = Field(default=None, gt=0)
    """Weight x (1 - tail mass)^tail: tokens whose distribution the cache holds only in part count less."""

    @model_validator(mode="after")
    def _has_effect(self) -> "TokenWeightsConfig":
        if self.entropy is None and self.tail is None:
            raise ValueError("sets neither entropy nor tail and has no effect: set one or leave it out")
        return self


class LoraConfig(StrictModel):
    """Low-rank adapters (peft) instead of full weights."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32, gt=0)
    """Adapters are multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped while it learns."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Names of the linear layers that get an adapter, e.g. [q_proj, v_proj]; None is all but the head."""


def stage_key(number: int, name: str) -> str:
    """What a stage is called in messages: its key in the configuration, from 0, and its name."""
    return f"stages.{number} ({name})"


class StageConfig(StrictModel):
    """One part of a run: what is trained, on what, by which losses, for how long. Stages follow each other."""

    name: str = Field(default="distill", pattern=r"^[A-Za-z0-9_\-]+$")
    """Stands in the names of checkpoints and in metrics; letters, digits, '_' and '-'."""
    trainable: Literal["all", "lora", "head"] = "all"
    """What learns: all weights, adapters (LoRA), or the head alone. A head that is tied to the embeddings is both, and
    its gradient passes through all layers."""
    lora: LoraConfig | None = None
    """Only with `trainable: lora`; None takes its defaults."""
    losses: dict[str, LossConfig] = Field(
        default_factory=lambda: {
            "forward_kl_stored_tail": LossConfig(weight=0.9),
            "cross_entropy": LossConfig(weight=0.1),
        },
        min_length=1,
    )
    """Losses by name, with their weights."""
    temperature: float | ScheduleConfig = Field(default=1.0)
    """At which the losses on distributions compare teacher and student, times its square (cross-entropies stay at 1).
    Other temperatures than 1 are those that the cache holds (`capture.temperatures`); a schedule steps through them."""
    focal_gamma: float | None = Field(default=None, gt=0)
    """Hard tokens count more: weight times (1 - q(sampled token))^gamma, q the student at this step. None is off."""
    token_weights: TokenWeightsConfig | None = None
    """None counts all tokens of a chain alike."""
    where: str | None = None
    """SQL condition of this stage; None takes `data.where`."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the selection; 1 where neither this nor max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which the stage ends, in the middle of an epoch where they fall there."""
    batch_tokens: int = Field(default=65536, ge=16)
    """Tokens of the global batch: a multiple of data.pack_tokens times the number of ranks."""
    learning_rate: float = Field(gt=0)
    """Peak. LoRA takes about ten times the rate of full weights."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    """Share of the stage's steps over which the rate rises from 0."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """The rate at the end, as a share of the peak; no effect on a constant schedule."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW) of matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean of their squares."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; None does not clip."""

    @field_validator("losses", mode="before")
    @classmethod
    def _weights_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"weight": one} if isinstance(one, int | float) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _has_effect(self) -> "StageConfig":
        if self.lora is not None and self.trainable != "lora":
            raise ValueError(f"lora has no effect with trainable: {self.trainable}")
        tau = self.temperature
        if isinstance(tau, ScheduleConfig) and tau.kind == "elastic":
            raise ValueError("temperature cannot be elastic: give it a linear, cosine or exponential schedule")
        low = tau if isinstance(tau, float) else min(one for one in (tau.start, tau.end) if one is not None)
        if low <= 0:
            raise ValueError(f"temperature {low} must be above 0")
        if tau != 1.0 and all(name.startswith("cross_entropy") for name in self.losses):
            raise ValueError("temperature has no effect on cross-entropies: drop it or add a loss on distributions")
        return self


HELDOUT = "split = 'heldout'"
RUN_KEYS = ("run", "checkpoint", "eval", "tensorboard")
"""Blocks that may change between a run and its resumption: they say where and how often, never what is learnt."""


class InitConfig(StrictModel):
    """How `student-train init` makes the student's folder."""

    teacher: str
    """Hugging Face folder or hub id of the model to cut from."""
    layers: int = Field(ge=1)
    """Layers to keep: evenly spaced, the first and the last among them."""


class StudentConfig(StrictModel):
    """The model that learns."""

    model: str
    """A Hugging Face folder or hub id; with `init` the folder that `student-train init` writes."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models you trust as much as your own programs."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. sdpa is torch's own, run on each document of a pack alone (models with sliding windows take a
    mask of the pack); flash_attention_2 needs the package flash-attn and a GPU."""
    init: InitConfig | None = None


class CacheConfig(StrictModel):
    """One cache to read from."""

    path: CacheRoot
    """A folder, or the URL of a prefix in an object store: s3://, gs:// or az://BUCKET/PREFIX."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this cache's chains an epoch, 0.001 to 1000: 2 shows each chain twice, 0.5 every other one."""
    chains_version: int | None = Field(default=None, ge=0)
    """Version of the chains to read; None takes the latest when the run begins, and the run keeps it."""
    verdicts_version: int | None = Field(default=None, ge=0)
    """Version of the verdicts to read; None takes the latest when the run begins, and the run keeps it."""


class DataConfig(StrictModel):
    """What the student reads."""

    caches: list[CacheConfig] = Field(min_length=1)
    """Caches; an item may be a path or a URL alone."""
    kind: Literal["distributions", "text"] = "distributions"
    """`text` retokenises the chains for the student and learns from the text alone (losses: cross_entropy)."""
    text: Literal["chain", "reference"] = "chain"
    """What `kind: text` learns: what the teacher said, or the prompt's reference answer (chains without one are left
    out)."""
    where: str | None = None
    """SQL condition over `chains` that selects what to learn from, e.g. `split = 'train' and correct`; None is all."""
    weight: str | None = None
    """SQL expression over `chains`: the weight of a chain's tokens in the losses, e.g. `1 - mean_top1_prob`."""
    pack_tokens: int = Field(default=4096, ge=16)
    """Tokens of a pack: chains are packed together up to this length, each seeing only itself."""
    max_chains: int | None = Field(default=None, ge=1)
    """Take so many of the selected chains, chosen by hash of their id; None takes all."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Tokens (prompt and completion) of a chain at most; None is pack_tokens."""
    long_chains: Literal["truncate", "skip", "split"] = "truncate"
    """What happens to longer chains. Truncated ones never teach an end of sequence."""

    @model_validator(mode="after")
    def _text_has_effect(self) -> "DataConfig":
        if self.text != "chain" and self.kind != "text":
            raise ValueError(f"text: {self.text} has no effect with kind: {self.kind}: set kind: text")
        return self

    @field_validator("caches", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        return (
            [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )


class EngineConfig(StrictModel):
    """How the arithmetic is spread over the machine (DeepSpeed)."""

    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and activations; the optimizer keeps float32 copies. float32 is the faster one on most CPUs; float16
    (ZeRO 1 to 3) scales the loss, and skips steps that overflow."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO spreads over the ranks: 1 optimizer state, 2 and gradients, 3 and weights."""
    offload_optimizer: bool = False
    """Keep optimizer state in CPU memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in CPU memory (ZeRO 3)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    chunk_tokens: int | None = Field(default=None, ge=1)
    """Loss tokens whose logits exist at a time; None is 256 on a CPU and 1024 on a GPU."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.precision == "float16" and self.zero_stage == 0:
            # DeepSpeed 0.19.8 divides gradients by a loss scale there that it never multiplied the loss by.
            raise ValueError("precision float16 needs zero_stage 1, 2 or 3: DeepSpeed scales no loss without ZeRO")
        return self


class EvalConfig(StrictModel):
    """Evaluation on chains that are not trained on, at the beginning and the end of each stage and in between."""

    where: str = HELDOUT
    """SQL condition over `chains` that selects the held-out ones."""
    max_chains: int | None = Field(default=512, ge=1)
    """Evaluate on so many of them, chosen by hash of their id; None takes all."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also evaluate after every so many optimizer steps; the best of these checkpoints is kept."""


class CheckpointConfig(StrictModel):
    """When the run's state is saved, and what is kept. The last step of a stage and an interruption always save."""

    every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep, besides the one with the lowest held-out loss."""


class TrainConfig(StrictModel):
    """A training run: its folder, the student, what it reads, and the stages it goes through."""

    run: Path
    """The run's folder: configuration, selection, metrics, checkpoints. The same command resumes what is there."""
    seed: int = Field(default=0, ge=0)
    """Seeds the order of chains, new weights (LoRA) and dropout."""
    student: StudentConfig
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    eval: EvalConfig | None = Field(default_factory=EvalConfig)
    """None never evaluates."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tensorboard: bool = False
    """Also write TensorBoard files (needs the package tensorboard)."""

    @model_validator(mode="after")
    def _agrees(self) -> "TrainConfig":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages have the names {names}: give each its own")
        for number, stage in enumerate(self.stages):
            key = stage_key(number, stage.name)
            if stage.batch_tokens % self.data.pack_tokens:
                raise ValueError(
                    f"{key}: batch_tokens={stage.batch_tokens} is no multiple of "
                    f"data.pack_tokens={self.data.pack_tokens}: take {_nearest_multiple(stage, self.data)}"
                )
            if self.data.kind == "text" and stage.token_weights is not None:
                raise ValueError(
                    f"{key}: token_weights weigh by distributions, but data.kind: text holds none: leave "
                    " them out (data.weight weighs whole chains, focal_gamma by the student)"
                )
            if _is_elastic(stage) and (self.eval is None or self.eval.every_steps is None):
                raise ValueError(
                    f"{key}: a loss has an elastic weight, which follows the held-out loss: set eval.every_steps"
                )
            if self.data.kind == "text" and list(stage.losses) != ["cross_entropy"]:
                raise ValueError(
                    f"{key}: its losses are {', '.join(stage.losses)}, but data.kind: text holds no distributions: "
                    "losses must be {cross_entropy: 1}"
                )
        return self


def packs_per_step(stage: StageConfig, data: DataConfig) -> int:
    """Packs of a full global batch."""
    return stage.batch_tokens // data.pack_tokens


def accumulation_of(stage: StageConfig, data: DataConfig, num_ranks: int) -> int:
    """Packs that each rank takes a step. Raises ConfigError where the batch does not divide among the ranks."""
    packs = packs_per_step(stage, data)
    if packs % num_ranks:
        raise ConfigError(
            f"batch_tokens={stage.batch_tokens} holds {packs} packs of {data.pack_tokens} tokens, which do not divide "
            f"among {num_ranks} ranks: take a multiple of {num_ranks * data.pack_tokens}"
        )
    return packs // num_ranks


def meaning_of(config: TrainConfig) -> Json:
    """Dotted keys and values of everything that decides what is learnt; elastic weights follow `eval`, so it counts."""
    free = set(RUN_KEYS) - ({"eval"} if any(_is_elastic(stage) for stage in config.stages) else set())
    return _flat({key: value for key, value in config.model_dump(mode="json").items() if key not in free})


def _is_elastic(stage: StageConfig) -> bool:
    weights = [loss.weight for loss in stage.losses.values()]
    return any(isinstance(weight, ScheduleConfig) and weight.kind == "elastic" for weight in weights)


def _flat(value: Any, prefix: str = "") -> Json:
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = ((str(number), item) for number, item in enumerate(value))  # type: ignore[assignment]
    else:
        return {prefix: value}
    return {key: one for name, item in items for key, one in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}


def _nearest_multiple(stage: StageConfig, data: DataConfig) -> int:
    return max(1, round(stage.batch_tokens / data.pack_tokens)) * data.pack_tokens
