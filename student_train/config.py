"""The YAML of `student-train init`, `plan`, `run`, `eval` and `export`: what a training run reads, learns and saves."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stillroom.config import Json, StrictModel, flat
from stillroom.errors import ConfigError
from stillroom.storage.paths import CacheRoot


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


BELOW_HEAD = ("hidden_", "attention_")
"""Beginnings of the names of losses."""


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
    """Instead of sizes: parameters to keep, embeddings included; below 1 a share of the model's. The axes of `along`
    are cut by one common ratio, MLP and hidden channels to multiples of 32 (hidden ones of 8 where heads need it)."""
    along: list[Literal["layers", "mlp_channels", "kv_groups", "hidden_size"]] | None = Field(
        default=None, min_length=1
    )
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
    def along_axes(self) -> tuple[Literal["layers", "mlp_channels", "kv_groups", "hidden_size"], ...]:
        """The axes that `parameters` cuts."""
        if self.parameters is None:
            return ()
        return ("layers", "mlp_channels") if self.along is None else tuple(self.along)

    @property
    def needs_chains(self) -> bool:
        """Whether ranking runs cached chains."""
        return self.rank_layers == "importance" or self.rank_width == "activations"

    def number_of(self, axis: Literal["layers", "mlp_channels", "kv_groups", "hidden_size"]) -> int | None:
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


PRUNED_AXES: tuple[Literal["layers", "mlp_channels", "kv_groups", "hidden_size"], ...] = (
    "layers",
    "mlp_channels",
    "kv_groups",
    "hidden_size",
)


def stage_key(number: int, name: str) -> str:
    """How messages name a stage: its key in the configuration, counted from 0, and its name."""
    return f"stages.{number} ({name})"


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


LOSSES_AT_ONE = ("chunk_likelihood", "policy_gradient", "asymmetric_likelihood", "unlikelihood", "dpo")
"""Besides cross-entropies: losses that compare at temperature 1 whatever the stage's is."""
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
