"""A training configuration: its run, the student, data, stages, engine and evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from stillroom.config import Json, StrictModel, flat
from stillroom.errors import ConfigError
from student_train.config.data import DataConfig
from student_train.config.stage import BELOW_HEAD, PruneConfig, ScheduleConfig, StageConfig, stage_key

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

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_student(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "teacher" in data and "student" not in data:
            raise ValueError("this configures a teacher: use teacher-cache build")
        return data

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
