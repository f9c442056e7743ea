"""The `stages` block of a training configuration: what a stage trains, with which losses and on which chains."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stillroom.config import StrictModel

BELOW_HEAD = ("hidden_", "attention_")
"""Beginnings of the names of losses."""
LOSSES_AT_ONE = ("chunk_likelihood", "policy_gradient", "asymmetric_likelihood", "unlikelihood", "dpo")
"""Besides cross-entropies: losses that compare at temperature 1 whatever the stage's is."""
Axis = Literal["layers", "mlp_channels", "kv_groups", "hidden_size"]
PRUNED_AXES: tuple[Axis, ...] = get_args(Axis)


class ScheduleConfig(StrictModel):
    """A number that changes over a stage, from its first optimizer step to its last.

    `elastic` (loss weights only) follows the held-out loss instead of the step: the value is `end` + (`start` - `end`)
    x r, where r is the held-out loss divided by its value at the start of the stage, at most 1.
    """

    kind: Literal["linear", "cosine", "exponential", "elastic"]
    start: float = Field(ge=0)
    """Value at the first step."""
    end: float | None = Field(default=None, ge=0)
    """Value at the last step; for an elastic weight, the value at a held-out loss of 0."""
    factor: float | None = Field(default=None, gt=0)
    """`exponential` only, instead of `end`: step n has start * factor^n."""

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
    """One loss of a mix; a plain number is its weight."""

    weight: float | ScheduleConfig = 1.0
    tail: Literal["stored", "bucket", "drop", "renormalise", "exact"] | None = None
    """Divergences: how probability outside the stored entries counts. `stored` (None) estimates it from the cache's
    draws and equals `bucket` without draws; `bucket` treats it as one outcome; `drop` ignores it; `renormalise`
    rescales the stored entries to mass 1. `exact` compares whole distributions, computed from the teacher's last hidden
    states and head (a feature set), on the tokens that have them, at any temperature."""
    beta: float | None = None
    """jsd: the teacher's share of the mixture, between 0 and 1; None is 0.5. dpo: larger values keep the
    student closer to its start; None is 0.1."""
    alpha: float | None = None
    """Skewed KLs: share of the KL's first argument in the mixture, between 0 and 1; None is 0.1. asymmetric_likelihood:
    weight of a wrong chain's tokens relative to a right one's; None is 0.8."""
    clip: float | None = None
    """policy_gradient: as in PPO, a token gets no gradient once its probability relative to the student that generated
    the chain has moved by this fraction in the direction of its advantage; between 0 and 1, None is 0.2."""
    max_ratio: float | None = None
    """policy_gradient: limit of a token's probability relative to the student that generated the chain, above which its
    gradient stops growing; None is 3."""
    max_advantage: float | None = None
    """policy_gradient: limit of a token's advantage, log p(teacher) - log p(student that generated it), in nats;
    None is 10."""
    interpolation: float | ScheduleConfig | None = None
    """taid: where the target lies between the student (0) and the teacher (1); None moves from 0.4 to 1 over the
    stage."""
    temperature: float | None = None
    """chunk_likelihood: the probabilities p of chunks of text are compared as p^(1/temperature), above 0; None is 100.
    Independent of the stage's temperature, and of what the cache stores."""
    layers: dict[int, int] | None = Field(default=None, min_length=1)
    """Losses below the head: teacher layer to student layer, e.g. {12: 4}. Hidden losses count layers from 1 (states
    after that many), attention_kl from 0. None takes every stored layer, each beside the student's at the same share of
    depth; `plan` prints the map."""
    project: bool | None = None
    """hidden_mse and hidden_cosine: whether a learned linear map takes the student's states to the teacher's. None is
    true where their widths differ."""


class NegativesConfig(StrictModel):
    """Wrong chains, for asymmetric_likelihood, unlikelihood and dpo. No other loss but start_kl applies to them, unless
    `correct_by_teacher` is set.

    `dpo` pairs each with a right chain (one that `where` of the stage selects) of the same prompt and trains on the
    pairs alone. Every evaluation then also measures held-out right chains, and warns once they become less likely.
    """

    where: str
    """SQL condition over `chains`, e.g. `split = 'train' and not correct and finish_reason = 'stop'`: the stage's
    `where` does not limit it. Chains that it selects are wrong even if `where` selects them too."""
    correct_by_teacher: bool = False
    """Also apply divergences and policy_gradient to wrong chains: they teach what the teacher would have said there,
    not the tokens themselves. Meant for chains that the student generated."""
    right: str = "correct"
    """SQL condition that selects, among the held-out chains, those whose likelihood must not fall."""


class TokenWeightsConfig(StrictModel):
    """Weights of tokens in the losses, computed from the teacher's distribution. The loss is a weighted mean, so only
    their ratios matter.
    """

    entropy: float | None = None
    """Multiplies weights by (1 + the teacher's entropy in nats)^entropy. Above 0 emphasises tokens where the teacher
    was unsure (the forks of a chain), below 0 those where it was sure."""
    tail: float | None = Field(default=None, gt=0)
    """Multiplies weights by (1 - tail mass)^tail: tokens whose distribution is stored only in part count less."""

    @model_validator(mode="after")
    def _has_effect(self) -> "TokenWeightsConfig":
        if self.entropy is None and self.tail is None:
            raise ValueError("sets neither entropy nor tail and has no effect: set one or leave it out")
        return self


class LoraConfig(StrictModel):
    """Low-rank adapters (peft)."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32, gt=0)
    """Adapters are scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Linear layers that get an adapter, e.g. [q_proj, v_proj], and stacked experts, e.g. [experts.down_proj]; None is
    all linear layers but the head and the routers of experts."""


class PruneConfig(StrictModel):
    """How much of a model to keep. What is not set stays. A pruned model must be trained again before it is of use."""

    layers: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = (
        None
    )
    """How many layers to keep; or a list of layer numbers, from 0."""
    mlp_channels: int | None = Field(default=None, ge=1)
    """Channels of each MLP to keep (`intermediate_size`)."""
    kv_groups: int | None = Field(default=None, ge=1)
    """Key-value heads of each layer to keep, each with the query heads that share it."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels of the hidden states to keep."""
    parameters: float | None = Field(default=None, gt=0)
    """Instead of sizes: parameters to keep, embeddings included, before a cut of the vocabulary; below 1 a share of the
    model's. The axes of `along` are cut by one common ratio, MLP and hidden channels to multiples of 32 (hidden ones of
    8 where heads need it)."""
    along: list[Axis] | None = Field(default=None, min_length=1)
    """With `parameters`: what to cut; None is layers and mlp_channels."""
    rank_layers: Literal["spacing", "importance"] = "spacing"
    """Which layers to keep: evenly spaced ones with the first and the last, or the most important ones, found by
    repeatedly removing the layer whose absence raises KL(teacher, model) least on cached chains."""
    rank_width: Literal["weights", "activations"] = "weights"
    """Which channels to keep: those with the largest L1 norm of weights, or with the largest outputs on cached
    chains."""
    calibration_tokens: int = Field(default=8192, ge=1)
    """Tokens of the stage's chains (of the first stage for `init`) that `importance` and `activations` run."""

    @property
    def along_axes(self) -> tuple[Axis, ...]:
        """The axes that `parameters` cuts."""
        if self.parameters is None:
            return ()
        return ("layers", "mlp_channels") if self.along is None else tuple(self.along)

    @property
    def needs_chains(self) -> bool:
        """Whether ranking runs cached chains."""
        return self.rank_layers == "importance" or self.rank_width == "activations"

    def number_of(self, axis: Axis) -> int | None:
        """The size set for an axis."""
        layers = len(self.layers) if isinstance(self.layers, list) else self.layers
        return {
            "layers": layers,
            "mlp_channels": self.mlp_channels,
            "kv_groups": self.kv_groups,
            "hidden_size": self.hidden_size,
        }[axis]

    @property
    def axes(self) -> list[str]:
        """All axes that are cut."""
        # In the order of PRUNED_AXES, whatever order the file has: plans and records of equal cuts are equal.
        named = [axis for axis in PRUNED_AXES if self.number_of(axis) is not None]
        return [*named, *(axis for axis in self.along_axes if axis not in named)]

    def _cuts_vocabulary(self) -> bool:
        return False

    @model_validator(mode="after")
    def _cuts_have_effect(self) -> "PruneConfig":
        if not self.axes and not self._cuts_vocabulary():
            raise ValueError(f"cuts nothing: set one of {', '.join(PRUNED_AXES)}, or parameters")
        if self.along is not None and self.parameters is None:
            raise ValueError("along has no effect without parameters")
        twice = [axis for axis in self.along_axes if self.number_of(axis) is not None]
        if twice:
            raise ValueError(
                f"{twice[0]} is set, and parameters cuts it too: remove one of them, or list other axes in along"
            )
        if self.rank_layers == "importance" and ("layers" not in self.axes or isinstance(self.layers, list)):
            raise ValueError("rank_layers: importance has no effect: set layers to a number, or parameters")
        if self.rank_width == "activations" and self.axes == ["layers"]:
            raise ValueError("rank_width: activations has no effect where only layers are cut")
        return self


class QuantiseConfig(StrictModel):
    """Quantisation-aware training: the forward pass rounds weights (and activations) as the quantised export will."""

    format: Literal["w8a8", "w4a16"]
    """w8a8: 8-bit weights with a scale per output channel, and 8-bit activations with a scale per token. w4a16: 4-bit
    weights with a scale per group of inputs. Linear layers only; embeddings and head stay."""
    group_size: int | None = Field(default=None, ge=1)
    """w4a16 only: weights that share a scale; None is 32."""

    @property
    def weights_per_scale(self) -> int:
        """Of w4a16."""
        return self.group_size or 32

    @model_validator(mode="after")
    def _group_has_effect(self) -> "QuantiseConfig":
        if self.group_size is not None and self.format != "w4a16":
            raise ValueError(f"group_size has no effect with format: {self.format}, which has a scale per channel")
        return self


class AdversarialConfig(StrictModel):
    """Trains on disturbed prompts: input embeddings are shifted to raise the stage's losses, and the student still has
    to match the teacher's distributions for the prompt as it was.
    """

    epsilon: float = Field(gt=0)
    """Largest shift per entry of a token's embedding, relative to the embedding's root mean square, e.g. 0.05."""
    steps: int = Field(default=1, ge=1)
    """1 is the fast gradient sign method, more are projected gradient. Each costs a forward and a backward pass."""
    fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of the packs that are disturbed, chosen by the run's seed."""


class StageConfig(StrictModel):
    """One part of a run: what is trained, on which data, with which losses, for how long. Stages run in order."""

    name: str = Field(default="distill", pattern=r"^[A-Za-z0-9_\-]+$")
    """Used in checkpoint names and metrics; letters, digits, '_' and '-'."""
    trainable: Literal["all", "lora", "head", "body"] = "all"
    """All weights, adapters (LoRA), the head only, or the body: everything but embeddings and head. Training a head
    that is tied to the embeddings trains both, and backpropagates through all layers."""
    lora: LoraConfig | None = None
    """Only with `trainable: lora`; None uses the defaults."""
    prune: PruneConfig | None = None
    """Prune the previous stage's model before this stage trains. For the first stage use `student.init`."""
    quantise: QuantiseConfig | None = None
    """Train (and evaluate) the student as it will be once quantised. Weights stay in float; rounding the exported ones
    to nearest gives the values that were trained. Only with `trainable: all` or `body`."""
    losses: dict[str, LossConfig] = Field(
        default_factory=lambda: {
            "forward_kl": LossConfig(weight=0.9),
            "cross_entropy": LossConfig(weight=0.1),
        },
        min_length=1,
    )
    """Losses by name, each with its weight or its settings."""
    temperature: float | ScheduleConfig = Field(default=1.0)
    """Temperature of teacher and student in divergences, which are multiplied by its square; cross-entropies stay at 1.
    Values other than 1 must be among the cache's `capture.temperatures`; a schedule moves through those."""
    focal_gamma: float | None = Field(default=None, gt=0)
    """Hard tokens count more: weights are multiplied by (1 - q)^focal_gamma, q the student's probability of the sampled
    token. None is off."""
    token_weights: TokenWeightsConfig | None = None
    """None weights all tokens of a chain equally."""
    adversarial: AdversarialConfig | None = None
    """Train on disturbed prompts. None is off."""
    balance_weight: float | None = Field(default=None, ge=0)
    """Mixtures of experts: weight of the loss that keeps all experts in use. None is the model's own
    (`router_aux_loss_coef` in its config.json), 0 turns it off."""
    where: str | None = None
    """SQL condition of this stage; None takes `data.where`."""
    negatives: NegativesConfig | None = None
    """Wrong chains, which some losses make less likely; None uses none."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the selection; 1 if neither this nor max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which the stage ends, even in the middle of an epoch."""
    batch_tokens: int = Field(default=65536, ge=16)
    """Tokens of the global batch: a multiple of data.pack_tokens times the number of ranks."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate. LoRA needs about ten times that of full weights."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    """Share of the stage's steps over which the learning rate rises from 0."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak; no effect on a constant schedule."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW) of matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean squared gradient."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this value; None does not clip."""

    @field_validator("losses", mode="before")
    @classmethod
    def _weights_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # `forward_kl: 0.9` is short for `forward_kl: {weight: 0.9}`.
        return {name: {"weight": one} if isinstance(one, int | float) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _has_effect(self) -> "StageConfig":
        if self.lora is not None and self.trainable != "lora":
            raise ValueError(f"lora has no effect with trainable: {self.trainable}")
        if self.quantise is not None and self.trainable not in ("all", "body"):
            why = "adapters are merged into the weights, which then round differently"
            raise ValueError(
                f"quantise needs trainable: all or body, not {self.trainable}: "
                f"{why if self.trainable == 'lora' else 'the head is never quantised, and nothing else would learn'}"
            )
        if self.balance_weight and self.trainable == "head":
            raise ValueError("balance_weight has no effect with trainable: head, which freezes the experts: remove it")
        tau = self.temperature
        if isinstance(tau, ScheduleConfig) and tau.kind == "elastic":
            raise ValueError("temperature cannot be elastic: give it a linear, cosine or exponential schedule")
        # Schedules are monotonic, so their ends bound them.
        low = tau if isinstance(tau, float) else min(one for one in (tau.start, tau.end) if one is not None)
        if low <= 0:
            raise ValueError(f"temperature {low} must be above 0")
        if tau != 1.0 and all(
            name.startswith(("cross_entropy", *BELOW_HEAD)) or name in LOSSES_AT_ONE for name in self.losses
        ):
            raise ValueError(
                f"temperature has no effect on {' and '.join(self.losses)}: remove it, or add a loss on distributions"
            )
        if tau != 1.0 and "start_kl" in self.losses:
            raise ValueError("start_kl compares at temperature 1 alone: remove temperature or start_kl")
        for name, loss in self.losses.items():
            if isinstance(loss.interpolation, ScheduleConfig) and loss.interpolation.kind == "elastic":
                raise ValueError(f"{name}.interpolation cannot be elastic: give it a linear or cosine schedule")
        below = [name for name in self.losses if name.startswith(BELOW_HEAD)]
        if self.trainable == "head" and below:
            raise ValueError(f"{below[0]} has no effect with trainable: head, which freezes the layers below it")
        return self


def stage_key(number: int, name: str) -> str:
    """How messages name a stage: its key in the configuration, counted from 0, and its name."""
    return f"stages.{number} ({name})"
