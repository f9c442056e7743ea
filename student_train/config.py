"""What a training run is asked to do: the YAML of `student-train init`, `plan`, `run`, `eval` and `export`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Json, StrictModel
from shared.errors import ConfigError
from shared.storage import CacheRoot
from student_train.stage_config import ScheduleConfig, StageConfig, stage_key

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
    """Loss tokens whose logits exist at a time; None is 128 on a CPU and 1024 on a GPU."""

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
