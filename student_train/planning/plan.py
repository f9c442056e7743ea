"""Everything about a run that is known before a model is loaded: what each stage reads, in how many steps, by which
losses. All refusals that need no GPU happen here, for all stages at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureSet
from stillroom.errors import ConfigError
from stillroom.log import note
from student_train.config.data import DataConfig
from student_train.config.run import TrainConfig, packs_per_step
from student_train.config.stage import StageConfig
from student_train.data.attached import NOTHING_ATTACHED, Attached
from student_train.data.epoch_plan import EpochPlans, PlanSpec
from student_train.data.features import StageFeatures, pin_features, reopen_features, stage_features, with_layers
from student_train.data.freezing import OpenCaches
from student_train.data.open import eval_request, eval_spec, plan_spec
from student_train.data.selection import Selection
from student_train.data.steps import planned
from student_train.data.stream import PackStream
from student_train.data.tokenizer_check import Vocabulary, check_vocabulary
from student_train.losses.below import AttentionKL
from student_train.losses.mix import LossMix
from student_train.model.prune import require_cut
from student_train.model.shape import model_shape
from student_train.planning.checks import (
    accumulation_on,
    check_balance,
    check_lora_targets,
    check_losses,
    check_own_words,
    check_prepared,
    check_prunes,
    check_temperature,
    naming_stage,
    require_one_teacher_vocabulary,
    warn_of_seen,
)
from student_train.planning.files import RunFiles
from student_train.runtime.run_folder import RunFolder
from student_train.schedule import check_mixes


@dataclass(frozen=True)
class StagePlan:
    """One stage with its frozen selection and its length."""

    index: int
    config: StageConfig
    """As configured, but losses below the head name every pair of layers."""
    selection: Selection
    spec: PlanSpec
    num_epochs: int | None
    """None where max_steps alone ends the stage."""
    accumulation: int
    """Packs that each rank takes a step."""
    packs_per_step: int
    num_steps: int
    mix: LossMix
    """Of the first step."""
    with_signals: bool
    """Whether a loss or a weight of the stage needs distributions; else only token ids are read."""
    attached: Attached = NOTHING_ATTACHED
    """What is known of its tokens besides the stream; the student's start comes with the weights."""
    right: Selection | None = None
    """Held-out right chains of a stage that moves away from wrong ones."""
    features: StageFeatures | None = None
    """What its losses read of the tables of features."""

    def stream(self, rank: int, num_ranks: int, tell: Callable[[str], None] = note) -> PackStream:
        """This rank's packs from the beginning of the stage; `tell` is called while it waits for data."""
        return PackStream(
            self.selection,
            self.spec,
            packs_per_step=self.packs_per_step,
            rank=rank,
            world=num_ranks,
            num_epochs=self.num_epochs,
            with_signals=self.with_signals,
            features=self.features,
            tell=tell,
        )


@dataclass(frozen=True)
class RunPlan:
    """A run that nothing refuses."""

    stages: list[StagePlan]
    heldout: Selection | None
    vocabulary: Vocabulary

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)


def prepare(
    config: TrainConfig,
    folder: Path,
    num_ranks: int,
    *,
    is_first: bool,
    barrier: Callable[[], None],
    spare: Path | None = None,
) -> RunPlan:
    """Freezes the selections below `folder`, or opens those that are there, and checks everything against them.

    With `spare`, held-out chains that `folder` keeps for another `eval` stay there: new ones go to `spare`. The first
    rank writes, the others read after the barrier. Raises ConfigError, DataError, CorruptError.
    """
    with OpenCaches() as caches:
        return _prepared(RunFiles(config, RunFolder(folder), is_first, barrier, spare, caches), num_ranks)


def _prepared(files: RunFiles, num_ranks: int) -> RunPlan:
    config, run, is_first = files.config, files.run, files.is_first
    for number, stage in enumerate(config.stages):
        with naming_stage(number, stage):
            check_own_words(check_mixes(stage, 1), stage, config.data)
    if is_first and config.student.init is not None:
        # Report missing caches first: no student should be cut for a run that would be refused.
        for cache in config.data.caches:
            Catalog(cache.path, cache.chains_version, cache.verdicts_version)
    require_cut(config.student)
    accumulations = [accumulation_on(config, number, num_ranks) for number in range(len(config.stages))]

    # Pinned by the first rank: sets may grow while others start.
    is_pinned_here = is_first and not run.features_path.exists()
    sets = _feature_sets(files)
    try:
        stages = [_stage_plan(files, index, accumulation, sets) for index, accumulation in enumerate(accumulations)]
    except ConfigError:
        # What a stage lacks may be added to the cache, and must then be seen.
        if is_pinned_here:
            run.features_path.unlink(missing_ok=True)
        raise
    heldout = None
    if config.eval is not None:
        heldout = files.heldout(run.heldout_path, eval_request(config.data, config.eval))
        # Refuse here rather than at the first evaluation if the length limit leaves no held-out chain.
        EpochPlans(heldout, eval_spec(config.data), 1)
    if heldout is not None and is_first:
        warn_of_seen(stages, heldout)
    require_one_teacher_vocabulary([*(stage.selection for stage in stages), *([heldout] if heldout else [])])
    caches = [cache.path for cache in config.data.caches]
    vocabulary = check_vocabulary(config.student, stages[0].selection, caches)
    check_lora_targets(config)
    if is_first:
        check_prunes(config)
    check_balance(config)
    return RunPlan(stages, heldout, vocabulary)


def _feature_sets(files: RunFiles) -> list[FeatureSet | None] | None:
    """The pinned sets of the caches; None where no loss reads features."""
    config, path = files.config, files.run.features_path
    if not any(check_mixes(stage, 1).reads_features for stage in config.stages):
        return None
    sets = pin_features(path, config.data) if files.is_first else None
    files.barrier()
    return sets or reopen_features(path, config.data)


def _stage_plan(files: RunFiles, index: int, accumulation: int, sets: list[FeatureSet | None] | None) -> StagePlan:
    config, selection = files.config, files.stage(index)
    stage, features = config.stages[index], None
    spec = plan_spec(config, index)
    # Neither given: one epoch. max_steps alone reads as many epochs as it needs.
    num_epochs = stage.epochs if stage.epochs is not None or stage.max_steps is not None else 1
    with naming_stage(index, stage):
        num_steps = _num_steps(selection, spec, num_epochs, stage, config.data)
        mix = check_mixes(stage, num_steps)
        check_losses(mix, selection)
        check_prepared(selection, config.data)
        check_temperature(mix, selection, stage)
        if sets is not None and mix.reads_features:
            if selection.header.kept_ids is not None:
                raise ConfigError("losses on features need the teacher's vocabulary, and the student's is cut")
            if mix.features:
                if any(one.prune is not None for one in config.stages[: index + 1]):
                    raise ConfigError("losses below the head read layers that `prune` changes: use them before it")
                stage = _with_layers(config, stage, mix, sets)
                mix = check_mixes(stage, num_steps)
            features = stage_features(mix, selection, sets)
    attached, right = files.attached(index, mix, selection)
    return StagePlan(
        index=index,
        config=stage,
        selection=selection,
        spec=spec,
        num_epochs=num_epochs,
        accumulation=accumulation,
        packs_per_step=packs_per_step(stage, config.data),
        num_steps=num_steps,
        mix=mix,
        with_signals=stage.token_weights is not None
        or mix.reads_chunks
        or any(term.needs_distribution for term in mix.terms),
        attached=attached,
        right=right,
        features=features,
    )


def _with_layers(config: TrainConfig, stage: StageConfig, mix: LossMix, sets: list[FeatureSet | None]) -> StageConfig:
    if any(isinstance(term, AttentionKL) for term in mix.features) and config.student.attention != "sdpa":
        raise ConfigError(f"attention_kl needs student.attention: sdpa, not {config.student.attention}")
    shape = model_shape(config.student)
    first = next(one for one in sets if one is not None)
    return with_layers(stage, mix, first, shape.num_layers, shape.hidden_size)


def _num_steps(
    selection: Selection, spec: PlanSpec, num_epochs: int | None, stage: StageConfig, data: DataConfig
) -> int:
    plans = EpochPlans(planned(selection), spec, num_epochs)
    if num_epochs is None:
        assert stage.max_steps is not None
        return stage.max_steps
    if plans.total_packs() == 0:
        raise ConfigError(f"no chain is read in {num_epochs} epochs: raise data.caches.weight")
    # The last step of a stage may be short; epochs in between follow each other without a gap.
    num_steps = -(-plans.total_packs() // packs_per_step(stage, data))
    return num_steps if stage.max_steps is None else min(num_steps, stage.max_steps)
