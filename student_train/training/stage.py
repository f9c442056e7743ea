"""One stage from its beginning, or from its last checkpoint: what each step of the loop needs of it."""

import contextlib
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from stillroom.log import Progress
from stillroom.program import StopRequest
from stillroom.schema.records import stable_hash
from student_train.config.run import TrainConfig
from student_train.data.attached import Attached
from student_train.data.pack import FeatureView, Pack, TargetView, apply_token_weights, feature_weights, to_torch
from student_train.exporting import export_stage, initial_folder
from student_train.losses.fused_head import LossSums
from student_train.losses.mix import LossMix
from student_train.model.adversarial import disturbed_packs
from student_train.model.importance import calibration_of
from student_train.model.prune import prune_folder
from student_train.model.student import DTYPES, LossesBelow, load_student
from student_train.model.taps import load_teacher
from student_train.planning.plan import RunPlan, StagePlan
from student_train.runtime import checkpoint
from student_train.runtime.checkpoint import CheckpointState
from student_train.runtime.cost import Session
from student_train.runtime.engine import Engine
from student_train.runtime.metrics_log import MetricsLog, StepRecord
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.runtime.start import open_start
from student_train.schedule import learning_rate, mix_at, target_view
from student_train.training.health import Health
from student_train.training.heldout import Heldout

RSS_UNIT_BYTES = 1024  # ru_maxrss counts KiB on Linux


@dataclass(frozen=True)
class Step:
    """What is decided before an optimizer step, and when the step began."""

    mix: LossMix
    view: TargetView
    learning_rate: float
    epoch: int
    started_s: float
    stall_before_s: float
    is_disturbed: npt.NDArray[np.bool_]
    """bool, by pack of the global batch: whether its prompts are shifted."""


class StageRun:
    """One stage from its beginning, or from its last checkpoint: engine, stream, logs, and what a checkpoint says."""

    def __init__(
        self,
        config: TrainConfig,
        plan: RunPlan,
        stage: StagePlan,
        state: CheckpointState | None,
        ranks: Ranks,
        session: Session | None,
    ) -> None:
        """Loads the student; `state` is the run's last one. The first rank has a session."""
        self.ranks, self._session = ranks, session
        self._config, self._plan, self._stage = config, plan, stage
        self._folder = RunFolder(config.run)
        here = state if state is not None and state.stage == stage.index else None
        if state is not None and here is None and ranks.is_first:
            # This stage starts from the weights that the one before exports.
            folder = export_stage(config, state)
            _prune(folder, config, plan, stage)
        ranks.barrier()
        self._teacher = None
        if stage.features is not None:
            self._teacher = load_teacher(stage.features, ranks.device, DTYPES[config.engine.precision])
        self.engine = self._load_engine(here)
        # Before the checkpoint is loaded: these are the weights that the stage starts from.
        self._attached = self._with_start()
        self._stream = stage.stream(ranks.rank, ranks.num_ranks, ranks.tell)
        if here is not None:
            checkpoint.load(self._folder.checkpoints, self.engine, here, ranks)
            self._stream.load_state_dict(here.stream)
        self._health = Health(config, stage, ranks, here.num_skipped if here is not None else 0)
        self._heldout = Heldout(config, plan, stage, state, ranks)
        # Steps count within the stage; tokens and seconds over the whole run.
        self._step = here.step if here is not None else 0
        self._saved_step = here.step if here is not None else None
        self._num_loss_tokens = state.num_loss_tokens if state is not None else 0
        self._train_s = state.train_s if state is not None else 0.0
        self._num_tokens = 0
        # Of the packs of a step whose prompts were shifted: how much their loss rose, and their weight.
        self._rise = self._disturbed_weight = 0.0
        if here is not None:
            self._health.require_finite(self.engine, self._step)
        self._open = contextlib.ExitStack()
        self._log: MetricsLog | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._open.callback(self.engine.close)
        self._open.enter_context(self._stream)
        if self.ranks.is_first:
            board = self._folder.root / "tensorboard" if self._config.tensorboard else None
            steps_before = sum(one.num_steps for one in self._plan.stages[: self._stage.index])
            self._log = self._open.enter_context(MetricsLog(self._folder.metrics_path, board, steps_before, self._step))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the progress of the steps taken inside."""
        if not self.ranks.is_first:
            yield
            return
        with Progress(f"train {self._stage.config.name}", self._stage.num_steps, "steps", self._step) as self._bar:
            yield

    @property
    def is_untrained(self) -> bool:
        """Whether an evaluation before any step is due: of the run, or of a stage that moves away from wrong chains."""
        is_watched = self._stage.index == 0 or self._stage.right is not None
        return self._config.eval is not None and is_watched and self._step == 0

    @property
    def is_done(self) -> bool:
        return self._step >= self._stage.num_steps

    @property
    def is_time_to_evaluate(self) -> bool:
        every = self._config.eval.every_steps if self._config.eval is not None else None
        return self._config.eval is not None and (self.is_done or (every is not None and self._step % every == 0))

    @property
    def is_time_to_save(self) -> bool:
        return self._step % self._config.checkpoint.every_steps == 0

    def begin_step(self) -> Step:
        """Seeds the generators and returns the step's settings."""
        stage, index = self._stage, self._step
        started_s, stall_before_s = time.perf_counter(), self._stream.stats.stall_s
        seed_generators(self._config.seed, stage.index, index, self.ranks.rank)
        self._rise = self._disturbed_weight = 0.0
        mix = mix_at(stage.config, index, stage.num_steps, self._heldout.remaining)
        header = stage.selection.header
        return Step(
            mix=mix,
            view=target_view(
                stage.config, header.temperatures, mix, index, stage.num_steps, has_draws=header.draws > 0
            ),
            learning_rate=learning_rate(stage.config, index, stage.num_steps),
            epoch=int(self._stream.state_dict()["epoch"]),
            started_s=started_s,
            stall_before_s=stall_before_s,
            is_disturbed=disturbed_packs(
                stage.config.adversarial, self._config.seed, stage.index, index, stage.packs_per_step
            ),
        )

    def next_packs(self) -> list[Pack]:
        """This rank's packs of the next global batch, at least one."""
        weights = self._stage.config.token_weights
        packs = [self._attached.to(next(self._stream)) for _ in range(self._stage.accumulation)]
        if self._step + 1 == self._stage.num_steps:
            # A stage's last batch may be short. All ranks leave out what follows the last pack that any of them learns.
            num_learnt = max((number for number, pack in enumerate(packs, 1) if pack.num_loss_tokens), default=1)
            packs = packs[: int(self.ranks.max([float(num_learnt)])[0])]
        return [apply_token_weights(pack, weights) for pack in packs]

    def weigh(self, packs: list[Pack]) -> tuple[float, FeatureView | None]:
        """Weight of all loss tokens of the global batch, and how its features enter the losses.

        Raises StillroomError where the weight is 0.
        """
        weights = [sum(float(pack.weights_N.sum(dtype=np.float64)) for pack in packs)]
        if self._teacher is not None:
            weights += [sum(found) for found in zip(*map(feature_weights, packs), strict=True)]
        total, *of_features = self.ranks.sum(weights)
        self._health.require_weight(total, self._step + 1)
        if self._teacher is None:
            return total, None
        scales = [total / weight if weight else 0.0 for weight in of_features]
        return total, FeatureView(self._teacher, scales[0], scales[1])

    def loss(self, step: Step, number: int, pack: Pack, features: FeatureView | None) -> LossSums:
        """Sums of the losses of this rank's pack `number` of a step, with gradient; disturbed first where it is due."""
        config, num_ranks = self._stage.config.adversarial, self.ranks.num_ranks
        inputs = to_torch(pack, self.ranks.device, step.view, features)
        # The packs that all ranks take now: pack n of rank r is number n x ranks + r of the batch.
        is_due = step.is_disturbed[number * num_ranks : (number + 1) * num_ranks]
        if config is None or not is_due.any():
            return self.engine.loss(inputs, step.mix)
        # On all ranks, because ZeRO-3 gathers weights from all; where it is not due, the pack is learned as it is.
        shifted, before = self.engine.disturbed(inputs, step.mix, config)
        if not is_due[self.ranks.rank]:
            return self.engine.loss(inputs, step.mix)
        losses = self.engine.loss(shifted, step.mix)
        self._rise += float(losses.loss_sum.detach() - before)
        self._disturbed_weight += float(pack.weights_N.sum(dtype=np.float64))
        return losses

    def finish_step(
        self,
        step: Step,
        packs: list[Pack],
        sums: list[float],
        total_weight: float,
        stop: StopRequest,
        *,
        is_applied: bool,
    ) -> bool:
        """Logs the step; `sums` are this rank's, of the loss and of each term. Whether a rank was asked to stop.

        Raises StillroomError for a loss that is not finite, and where nothing is learnt.
        """
        ranks, stage = self.ranks, self._stage
        # Empty packs only keep ranks together in a run's last step.
        read = [pack for pack in packs if pack.num_loss_tokens]
        counts = [sum(pack.num_tokens for pack in read), sum(pack.num_loss_tokens for pack in read)]
        stall_s = self._stream.stats.stall_s - step.stall_before_s
        loss, *terms, num_tokens, num_loss_tokens, rise, disturbed_weight, num_stops = ranks.sum(
            [*sums, *map(float, counts), self._rise, self._disturbed_weight, float(stop.is_set)]
        )
        worst_stall_s, memory_gib = ranks.max([stall_s, memory_used_gib(ranks.device)])
        # Measured after the collectives: they wait for the slowest rank, whose time is the step's.
        step_s = time.perf_counter() - step.started_s
        self._step += 1
        self._num_tokens += int(num_tokens)
        self._num_loss_tokens += int(num_loss_tokens)
        self._train_s += step_s
        weights = {term.name: term.weight for term in step.mix.all} | self.engine.balance_weight
        record = StepRecord(
            stage=stage.config.name,
            stage_number=stage.index,
            step=self._step,
            epoch=step.epoch,
            loss=loss / total_weight,
            parts={name: term / total_weight for name, term in zip(weights, terms, strict=True)},
            weights=weights,
            temperature=step.view.temperature,
            learning_rate=step.learning_rate,
            grad_norm=self.engine.grad_norm if is_applied else None,
            skipped=not is_applied,
            num_tokens=int(num_tokens),
            num_loss_tokens=int(num_loss_tokens),
            tokens_per_s=num_tokens / step_s,
            stall_frac=worst_stall_s / step_s,
            memory_gib=memory_gib,
            step_s=step_s,
            time_s=self._train_s,
            adversarial_rise=rise / disturbed_weight if disturbed_weight else None,
        )
        # Of all ranks' losses, so that all of them stop here.
        self._health.require_loss("loss", record.loss, self._step)
        self._log_step(record)
        self._health.require_learning(is_applied, self._step)
        return num_stops > 0

    def _log_step(self, record: StepRecord) -> None:
        if self._session is not None:
            self._session.add(record.num_tokens)
        if self._log is not None and self._bar is not None:
            self._log.write(record)
            self._bar.update(self._step, self._num_tokens, record.notes(self._config.engine.precision))
            if self.is_done:
                # Before the evaluation that follows prints its own.
                self._bar.print_now()

    def evaluate(self) -> None:
        """Measures the held-out loss."""
        self._heldout.evaluate(self.engine, self._step, self._health, self._log)

    def keep_best(self) -> None:
        """Marks this step's checkpoint as the best one, if its held-out loss is the lowest."""
        self._heldout.keep_best(self._state().tag)

    def save(self) -> CheckpointState:
        """Writes a checkpoint, unless this step has one."""
        state = self._state()
        if self._saved_step != self._step:
            self._health.require_finite(self.engine, self._step)
            # Only finite states get here: a broken one would become the latest, from which every resume fails.
            checkpoint.save(self._folder.checkpoints, self.engine, state, self._config.checkpoint.keep_last, self.ranks)
            self._saved_step = self._step
        return state

    def _state(self) -> CheckpointState:
        return CheckpointState(
            stage=self._stage.index,
            stage_name=self._stage.config.name,
            step=self._step,
            num_steps=self._stage.num_steps,
            num_ranks=self.ranks.num_ranks,
            zero_stage=self._config.engine.zero_stage,
            stream=self._stream.state_dict(),
            num_loss_tokens=self._num_loss_tokens,
            train_s=self._train_s,
            num_skipped=self._health.num_skipped,
            best=self._heldout.best,
            heldout=self._heldout.progress,
        )

    def _with_start(self) -> Attached:
        """What is attached to packs, with the log probabilities of the student as the stage starts from it."""
        stage = self._stage
        needs = stage.mix.reads_start
        if needs == "nothing":
            return stage.attached
        start = open_start(
            self._folder.start_of(stage.config.name),
            stage.selection,
            stage.spec,
            self.engine.slots,
            self.ranks,
            with_distribution=needs == "distribution",
        )
        return replace(stage.attached, start=start)

    def _load_engine(self, here: CheckpointState | None) -> Engine:
        config, stage = self._config, self._stage
        below = None
        if stage.mix.features:
            assert stage.features is not None
            below = LossesBelow(stage.mix.features, stage.features.first.hidden_size, config.seed)
        student = load_student(
            config.student,
            initial_folder(config, stage.index),
            stage.config,
            config.engine,
            seed=config.seed,
            vocab_size=self._plan.vocabulary.num_ids,
            below=below,
        )
        universal = checkpoint.needs_universal(here, self.ranks.num_ranks)
        return Engine(student, stage.config, config.engine, self.ranks, stage.accumulation, universal=universal)


def _prune(folder: Path, config: TrainConfig, plan: RunPlan, stage: StagePlan) -> None:
    """Writes the pruned model that the stage starts from, where it asks for one."""
    asked = stage.config.prune
    if asked is None:
        return
    out = RunFolder(config.run).pruned_for(stage.config.name)
    num_ids = plan.vocabulary.num_ids
    prune_folder(
        folder,
        out,
        asked,
        config.student,
        lambda: calibration_of(stage.selection, stage.spec, asked.calibration_tokens, num_ids),
    )


def seed_generators(seed: int, stage: int, step: int, rank: int) -> None:
    """Seeds every global generator for one step of one rank: a resumed run then drops out the same units."""
    # 60 bits: torch takes a signed 64-bit seed.
    number = int(stable_hash("step", seed, stage, step, rank)[:15], 16)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - a library may draw from the global generator
    torch.manual_seed(number)


def memory_used_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30
