"""What one stage of a run trains, by which losses and for how long: the `stages` of a run's configuration."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import StrictModel


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
