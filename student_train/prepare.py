"""Everything about a run that is known before a model is loaded: what each stage reads, in how many steps, by which
losses. All refusals that need no GPU happen here, for all stages at once.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.catalog import Catalog
from shared.errors import ConfigError
from shared.log import warn
from student_train.config import DataConfig, StudentConfig, TrainConfig, accumulation_of, packs_per_step
from student_train.init import require_cut
from student_train.losses.divergences import LossMix
from student_train.model import meta_causal, require_lora_targets
from student_train.runfolder import RunFolder
from student_train.schedule import check_mixes
from student_train.stage_config import StageConfig, stage_key
from student_train.streaming.data import (
    Vocabulary,
    check_losses,
    check_temperature,
    check_vocabulary,
    eval_request,
    eval_spec,
    open_data,
    plan_spec,
    reopen_data,
    train_request,
)
from student_train.streaming.epoch_plan import PlanSpec
from student_train.streaming.heldout import open_heldout
from student_train.streaming.plans import EpochPlans
from student_train.streaming.select import SelectionRequest
from student_train.streaming.selection import Selection
from student_train.streaming.stream import PackStream

Opener = Callable[[Path, SelectionRequest, DataConfig, StudentConfig], Selection]


@dataclass(frozen=True)
class StagePlan:
    """One stage with its frozen selection and its length."""

    index: int
    config: StageConfig
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

    def stream(self, rank: int, num_ranks: int) -> PackStream:
        """This rank's packs from the beginning of the stage."""
        return PackStream(
            self.selection,
            self.spec,
            packs_per_step=self.packs_per_step,
            rank=rank,
            world=num_ranks,
            num_epochs=self.num_epochs,
            with_signals=self.with_signals,
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
    heldout_path: Path | None = None,
) -> RunPlan:
    """Freezes the selections below `folder`, or opens those that are there, and checks everything against them.

    `heldout_path` is where the held-out one is, if not there. The first rank writes, the others read after the barrier.
    Raises ConfigError, DataError, CorruptError.
    """
    for number, stage in enumerate(config.stages):
        with _naming_stage(number, stage):
            check_mixes(stage, 1)
    if is_first and config.student.init is not None:
        # A student is not cut for a run that would be refused: caches that are not there are told of first.
        for cache in config.data.caches:
            Catalog(cache.path, cache.chains_version, cache.verdicts_version)
    require_cut(config.student)
    run = RunFolder(folder)
    accumulations = [_accumulation(config, number, num_ranks) for number in range(len(config.stages))]

    def opened(path: Path, request: SelectionRequest, open_here: Opener = open_data) -> Selection:
        if is_first:
            selection = open_here(path, request, config.data, config.student)
        barrier()
        return selection if is_first else reopen_data(path, request)

    stages = [
        _stage_plan(
            config,
            index,
            accumulation,
            opened(run.selection_path(stage.name), train_request(config.data, index, stage)),
        )
        for index, (stage, accumulation) in enumerate(zip(config.stages, accumulations, strict=True))
    ]
    heldout = None
    if config.eval is not None:
        heldout = opened(heldout_path or run.heldout_path, eval_request(config.data, config.eval), open_heldout)
        # Refused here rather than at the first evaluation: held-out chains of which the limit on length leaves none.
        EpochPlans(heldout, eval_spec(config.data), 1)
    if heldout is not None and is_first:
        _warn_of_seen(stages, heldout)
    _require_one_teacher_vocabulary([*(stage.selection for stage in stages), *([heldout] if heldout else [])])
    caches = [cache.path for cache in config.data.caches]
    vocabulary = check_vocabulary(config.student, stages[0].selection, caches)
    _check_lora_targets(config)
    return RunPlan(stages, heldout, vocabulary)


@contextlib.contextmanager
def _naming_stage(number: int, stage: StageConfig) -> Iterator[None]:
    """Puts the stage before what is wrong with its settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{stage_key(number, stage.name)}: {error}") from error


def _accumulation(config: TrainConfig, number: int, num_ranks: int) -> int:
    with _naming_stage(number, config.stages[number]):
        return accumulation_of(config.stages[number], config.data, num_ranks)


def _check_lora_targets(config: TrainConfig) -> None:
    """Refuses names that peft would refuse only when the stages before are trained."""
    named = [(number, stage) for number, stage in enumerate(config.stages) if stage.lora and stage.lora.targets]
    if not named:
        return
    model = meta_causal(config.student)
    for number, stage in named:
        assert stage.lora is not None
        with _naming_stage(number, stage):
            require_lora_targets(model, stage.lora)


def _require_one_teacher_vocabulary(selections: list[Selection]) -> None:
    found = {
        (*selection.header.tokenizer_fingerprints, str(selection.header.vocab_size))
        for selection in selections
        if not selection.is_text
    }
    if len(found) > 1:
        shown = " and ".join(sorted(" ".join(one) for one in found))
        raise ConfigError(
            f"stages and eval select chains of different vocabularies (tokenizer, logits): {shown}: select one"
        )


def _warn_of_seen(stages: list[StagePlan], heldout: Selection) -> None:
    for stage in stages:
        num_seen = len(np.intersect1d(stage.selection.key_R, heldout.key_R))
        if num_seen:
            warn(
                f"stage {stage.config.name} trains on {num_seen} of the {len(np.unique(heldout.key_R))} chains that it "
                "is evaluated on: add split <> 'heldout' to data.where"
            )


def _stage_plan(config: TrainConfig, index: int, accumulation: int, selection: Selection) -> StagePlan:
    stage = config.stages[index]
    spec = plan_spec(config, index)
    num_epochs = stage.epochs if stage.epochs is not None or stage.max_steps is not None else 1
    with _naming_stage(index, stage):
        num_steps = _num_steps(selection, spec, num_epochs, stage, config.data)
        mix = check_mixes(stage, num_steps)
        check_losses(mix, selection)
        check_temperature(selection, stage)
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
        with_signals=stage.token_weights is not None or any(term.needs_distribution for term in mix.terms),
    )


def _num_steps(
    selection: Selection, spec: PlanSpec, num_epochs: int | None, stage: StageConfig, data: DataConfig
) -> int:
    plans = EpochPlans(selection, spec, num_epochs)
    if num_epochs is None:
        assert stage.max_steps is not None
        return stage.max_steps
    if plans.total_packs() == 0:
        raise ConfigError(f"no chain is read in {num_epochs} epochs: raise data.caches.weight")
    # The last step of a stage may be short; epochs in between follow each other without a gap.
    num_steps = -(-plans.total_packs() // packs_per_step(stage, data))
    return num_steps if stage.max_steps is None else min(num_steps, stage.max_steps)
