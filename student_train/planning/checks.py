"""What would fail only later is refused here: losses without their data, cuts and layers that the student lacks."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stillroom.errors import ConfigError
from stillroom.log import warn
from stillroom.storage.paths import Location
from student_train.config.data import DataConfig
from student_train.config.run import TrainConfig, accumulation_of
from student_train.config.stage import LoraConfig, StageConfig, stage_key
from student_train.data.selection import Selection
from student_train.model.shape import model_shape

if TYPE_CHECKING:
    from student_train.losses.mix import LossMix
    from student_train.planning.plan import StagePlan

WITH_SIGNALS = "distributions, or projected for a student of another vocabulary"


@contextlib.contextmanager
def naming_stage(number: int, stage: StageConfig) -> Iterator[None]:
    """Puts the stage before what is wrong with its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{stage_key(number, stage.name)}: {error}") from error


def accumulation_on(config: TrainConfig, number: int, num_ranks: int) -> int:
    """Packs that each rank takes a step. Raises ConfigError if the ranks cannot share the batch equally."""
    with naming_stage(number, config.stages[number]):
        return accumulation_of(config.stages[number], config.data, num_ranks)


def check_losses(mix: "LossMix", selection: Selection) -> None:
    """Raises ConfigError where the cache does not hold what a loss of the mix needs."""
    for term in mix.terms:
        if term.needs_distribution and selection.is_text:
            raise ConfigError(f"{term.name} needs distributions: set data.kind: {WITH_SIGNALS}")
        if term.needs_chunks and selection.is_text:
            raise ConfigError(f"{term.name} needs the teacher's log probabilities: set data.kind: {WITH_SIGNALS}")


def check_own_words(mix: "LossMix", stage: StageConfig, data: DataConfig) -> None:
    """Raises ConfigError where losses on wrong chains or on the student's own have none, and where such chains have no
    loss.
    """
    wanting = [term.name for term in mix.terms if term.needs_negatives]
    if wanting and stage.negatives is None:
        raise ConfigError(
            f"{wanting[0]} needs wrong chains: set negatives: {{where: split = 'train' and not correct and "
            "finish_reason = 'stop'}"
        )
    if stage.negatives is not None and not wanting:
        raise ConfigError(
            f"negatives have no effect with the losses {', '.join(mix.names)}: add asymmetric_likelihood, unlikelihood "
            "or dpo"
        )
    if mix.reads_behaviour and not data.behaviour:
        raise ConfigError(
            "policy_gradient needs the student's log probabilities of its own chains: set data.behaviour to the cache "
            "into which it generated them"
        )
    trained = {_absolute(one.path) for one in data.caches}
    if (
        mix.reads_behaviour
        and data.mixture is None
        and (same := [one for one in data.behaviour if _absolute(one) in trained])
    ):
        raise ConfigError(
            f"data.behaviour names {same[0]}, which data.caches reads too: teacher and writer would be one, and "
            "policy_gradient 0: name the cache that `teacher-cache score` read the chains from"
        )
    if mix.reads_pairs and mix.reads_behaviour:
        raise ConfigError("dpo trains on pairs of chains, policy_gradient on single ones: give each a stage of its own")
    if mix.reads_pairs and data.steps is not None:
        raise ConfigError("dpo compares whole chains: remove data.steps")
    if mix.reads_pairs and (stage.token_weights is not None or mix.focal_gamma is not None):
        raise ConfigError("dpo weighs pairs as a whole: remove token_weights and focal_gamma")
    if mix.reads_pairs and data.terms is not None:
        raise ConfigError("dpo weighs pairs as a whole: remove data.terms")


def _absolute(root: Location) -> str:
    return str(root.absolute() if isinstance(root, Path) else root)


def check_prepared(selection: Selection, data: DataConfig) -> None:
    """Raises ConfigError where `mixture` or `prompt` has changed none of a stage's chains."""
    made = selection.header.prepared
    if data.mixture is not None and made is not None and not made.num_reached:
        raise ConfigError(
            "data.mixture: none of its teachers has scored any of the selected chains (same prompt and completion "
            "tokens) with a weight above 0: score them with `teacher-cache score` from the same cache"
        )
    if data.prompt is not None and made is not None and not made.num_rewritten:
        raise ConfigError("data.prompt changes none of the selected prompts: remove it")


def check_temperature(mix: "LossMix", selection: Selection, stage: StageConfig) -> None:
    """Raises ConfigError where the cache lacks the log-partition of the stage's temperature, or of a schedule's end."""
    if mix.is_exact:
        return
    asked = stage.temperature
    # At another temperature p^(1/T) needs its own normaliser over the whole vocabulary, and of the teacher only a part
    # of it is stored.
    held = selection.header.temperatures
    if asked == 1.0 or (isinstance(asked, float) and asked in held):
        return
    if selection.is_projected:
        raise ConfigError("temperature must be 1 with data.kind: projected: log-partitions are of the teacher's ids")
    names = ", ".join(f"{one:g}" for one in held) or "none besides 1"
    if isinstance(asked, float):
        raise ConfigError(
            f"temperature {asked:g} needs the teacher's log-partition at it; the selected chains hold {names}: use one "
            f"of them, or build a cache with capture.temperatures: [{asked:g}]"
        )
    if not held:
        raise ConfigError(
            "temperature is a schedule, but the selected chains hold no other than 1: build a cache with "
            "capture.temperatures"
        )


def check_prunes(config: TrainConfig) -> None:
    """Refuses cuts of later stages that would only fail when the stages before are trained."""
    asked = [(number, stage) for number, stage in enumerate(config.stages) if stage.prune is not None]
    if not asked:
        return
    from student_train.model.narrow import Sizes, layout_of, planned_sizes
    from student_train.model.prune import kept_layers, require_layers
    from student_train.model.student import meta_causal

    model = meta_causal(config.student)
    num_layers = int(model.config.to_dict().get("num_hidden_layers", 0))
    sizes: Sizes | None = None
    for number, stage in asked:
        assert stage.prune is not None
        with naming_stage(number, stage):
            require_layers(model)
            if stage.prune.rank_layers == "importance" and config.data.kind == "text":
                raise ConfigError("prune.rank_layers: importance needs distributions, and data.kind: text has none")
            # The next cut starts from what this one leaves.
            if set(stage.prune.axes) - {"layers"} or stage.prune.parameters is not None:
                layout, first = layout_of(model)
                sizes = planned_sizes(layout, replace(sizes or first, layers=num_layers), stage.prune)
                num_layers = sizes.layers
            elif stage.prune.layers is not None:
                num_layers = len(kept_layers(num_layers, stage.prune.layers))


def check_lora_targets(config: TrainConfig) -> None:
    """Refuses names that peft would refuse only when the stages before are trained."""
    named = [(number, stage) for number, stage in enumerate(config.stages) if stage.lora and stage.lora.targets]
    if not named:
        return
    layers = model_shape(config.student).adaptable
    for number, stage in named:
        assert stage.lora is not None
        with naming_stage(number, stage):
            _require_lora_targets(layers, stage.lora)


def check_balance(config: TrainConfig) -> None:
    """Refuses a weight for a loss that the student does not have."""
    named = [(number, stage) for number, stage in enumerate(config.stages) if stage.balance_weight]
    if named and model_shape(config.student).balance_weight is None:
        with naming_stage(*named[0]):
            raise ConfigError("balance_weight: the student has no balance loss of experts: remove it")


def _require_lora_targets(layers: list[str], lora: LoraConfig) -> None:
    """Raises ConfigError for a target that is the name, or the end of the dotted name, of no layer that peft adapts."""
    for target in lora.targets or []:
        # peft adapts every layer whose dotted name ends so.
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise ConfigError(f"lora.targets: the student has no linear layer {target!r}: there are {known}")


def require_one_teacher_vocabulary(selections: list[Selection]) -> None:
    found = {
        (*selection.header.tokenizer_fingerprints, str(selection.header.vocab_size))
        for selection in selections
        # A selection of text has the ids of the student, not of a teacher.
        if not selection.is_text
    }
    if len(found) > 1:
        shown = " and ".join(sorted(" ".join(one) for one in found))
        raise ConfigError(
            f"stages and eval select chains of different vocabularies (tokenizer, logits): {shown}: select one"
        )


def warn_of_seen(stages: "list[StagePlan]", heldout: Selection) -> None:
    for stage in stages:
        num_seen = len(np.intersect1d(stage.selection.key_R, heldout.key_R))
        if num_seen:
            warn(
                f"stage {stage.config.name} trains on {num_seen} of the {len(np.unique(heldout.key_R))} chains that it "
                f"is evaluated on: add split <> 'heldout' to {_where_of(stage.config)}"
            )


def _where_of(stage: StageConfig) -> str:
    """The conditions that select a stage's chains."""
    own = "data.where" if stage.where is None else "the stage's where"
    return own if stage.negatives is None else f"{own} and to negatives.where"
