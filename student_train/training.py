"""The training loop: packs from the stream, fused losses, one optimizer step after another, stage after stage.

In: a configuration. Out: a run's folder (run_folder.py lists its files). The same call resumes from the last
checkpoint.

A step takes one global batch. Its loss is the sum over the loss tokens of all ranks and packs, divided by the sum of
their weights, so it does not depend on how the batch is spread. A stop request (Ctrl-C, SIGTERM) lets the step finish,
saves and ends; the request travels with the sums of the step, so that all ranks agree on it.

J losses of the mix
"""

import contextlib
import gc
import math
import random
import resource
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from stillroom.config import Json
from stillroom.errors import StillroomError
from stillroom.log import Progress, format_plural, note, warn
from stillroom.program import StopRequest
from stillroom.schema.records import stable_hash
from student_train.config.run import TrainConfig
from student_train.config.stage import stage_key
from student_train.data.attached import Attached
from student_train.data.open import eval_spec
from student_train.data.pack import FeatureView, Pack, TargetView, apply_token_weights, feature_weights, to_torch
from student_train.evaluation import evaluate
from student_train.exporting import export_stage, initial_folder
from student_train.losses.fused_head import LossSums
from student_train.losses.mix import LossMix
from student_train.model.adversarial import disturbed_packs
from student_train.model.importance import calibration_of
from student_train.model.prune import prune_folder
from student_train.model.student import DTYPES, LossesBelow, load_student, return_freed_memory
from student_train.model.taps import load_teacher
from student_train.planning.plan import RunPlan, StagePlan, prepare
from student_train.runtime import checkpoint
from student_train.runtime.checkpoint import Best, CheckpointState, HeldoutProgress
from student_train.runtime.cost import Session
from student_train.runtime.engine import Engine
from student_train.runtime.metrics_log import MetricsLog, StepRecord, require_tensorboard, why_skipped
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import FINISHED, RunFolder, is_finished, summarise
from student_train.runtime.start import open_start
from student_train.schedule import learning_rate, mix_at, target_view

MAX_SKIPPED_IN_A_ROW = 100
"""float16 needs about twenty to find its loss scale."""
RIGHT_TOLERANCE_NATS = 1e-4
"""Smaller rises may come from the order of a sum."""
RSS_UNIT_BYTES = 1024  # ru_maxrss counts KiB on Linux


def train(config: TrainConfig, ranks: Ranks, stop: StopRequest, from_step: int | None = None) -> Json:
    """Trains what is left of the run and returns its summary; called by all ranks together.

    With `from_step` the run first goes back to its checkpoint after that step of the last stage. Raises ConfigError,
    DataError, CorruptError, CacheConflict, and KeyboardInterrupt after a stop request, once the state is saved.
    """
    run, started_s = RunFolder(config.run), time.monotonic()
    if config.tensorboard:
        require_tensorboard()
    with run.lock() if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            if from_step is None:
                run.open(config, has_learnt=checkpoint.latest_state(run.checkpoints) is not None)
            else:
                _rewind(run, config, from_step)
        if from_step is not None:
            # All ranks must read the state that the first one has gone back to.
            ranks.barrier()
        state = checkpoint.latest_state(run.checkpoints)
        if is_finished(state, config):
            if ranks.is_first:
                note(FINISHED)
            return summarise(run, config)
        plan = prepare(config, config.run, ranks.num_ranks, is_first=ranks.is_first, barrier=ranks.barrier)
        if ranks.is_first:
            _announce(plan, state, ranks.num_ranks)
            shutil.rmtree(run.plan_folder, ignore_errors=True)
            # Steps after the checkpoint are taken again: they must not stand in the log twice, nor count if this call
            # is stopped before it reaches them.
            reached = state.place if state is not None else (0, 0)
            run.truncate_metrics(reached)
            run.truncate_evals(reached)
        ranks.barrier()
        calls = run.sessions_path
        with Session(calls, ranks.num_ranks, started_s) if ranks.is_first else contextlib.nullcontext() as session:
            _train_stages(config, plan, state, ranks, stop, session)
    return summarise(run, config)


def _train_stages(
    config: TrainConfig,
    plan: RunPlan,
    state: CheckpointState | None,
    ranks: Ranks,
    stop: StopRequest,
    session: Session | None,
) -> None:
    """All stages that `state` has not finished."""
    for stage in plan.stages:
        if state is not None and (state.stage > stage.index or (state.stage == stage.index and state.stage_is_done)):
            continue
        state, is_stopped = train_stage(StageRun(config, plan, stage, state, ranks, session), stop)
        # DeepSpeed's objects hold each other: left alone, this stage's weights would lie beside the next one's.
        gc.collect()
        return_freed_memory()
        # After the run's very last step nothing is left that a stop could prevent.
        if is_stopped and not (state.stage_is_done and stage is plan.stages[-1]):
            raise KeyboardInterrupt


def train_stage(run: "StageRun", stop: StopRequest) -> tuple[CheckpointState, bool]:
    """Steps, evaluations and checkpoints until the stage ends or a stop is requested.

    Returns the last state, and whether all ranks agreed to stop: what one rank knows decides nothing.
    """
    engine, ranks = run.engine, run.ranks
    is_stopped = False
    with run:
        if run.is_untrained:
            run.evaluate()
        # From here on there are steps to save. Until now a stop request ended the program at once.
        stop.finish_first()
        with run.progress():
            while not (run.is_done or is_stopped):
                step = run.begin_step()
                packs = run.next_packs()
                # Known before the first backward pass, so that every pack is divided by the whole batch's weight.
                total_weight, features = run.weigh(packs)
                num_terms = len(step.mix.all) + len(engine.balance_weight)
                # In float64: sums over a large batch lose digits in float32.
                sums_1J = torch.zeros(1 + num_terms, dtype=torch.float64, device=ranks.device)
                for number, pack in enumerate(packs):
                    losses = run.loss(step, number, pack, features)
                    sums_1J += torch.cat([losses.loss_sum.detach().view(1), losses.term_sums_J])
                    engine.backward(losses.loss_sum, total_weight, is_last=number == len(packs) - 1)
                is_applied = engine.step(step.learning_rate)
                is_stopped = run.finish_step(step, packs, sums_1J.tolist(), total_weight, stop, is_applied=is_applied)
                if run.is_time_to_evaluate:
                    run.evaluate()
                    # Before saving, so that the checkpoint names itself as the best.
                    run.keep_best()
                    run.save()
                elif run.is_time_to_save:
                    run.save()
        state = run.save()
        # Someone may have asked during the last evaluation.
        return state, is_stopped or ranks.sum([float(stop.is_set)])[0] > 0


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
        # Steps and skips count within the stage; the best checkpoint, tokens and seconds over the whole run.
        self._num_skipped = here.num_skipped if here is not None else 0
        self._num_skipped_in_a_row = 0
        self._step = here.step if here is not None else 0
        self._saved_step = here.step if here is not None else None
        self._best = self._comparable(state.best) if state is not None else None
        self._heldout = self._heldout_before(state)
        self._num_loss_tokens = state.num_loss_tokens if state is not None else 0
        self._train_s = state.train_s if state is not None else 0.0
        self._num_tokens = 0
        # Of the packs of a step whose prompts were shifted: how much their loss rose, and their weight.
        self._rise = self._disturbed_weight = 0.0
        if here is not None:
            self._require_finite()
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        remaining = self._heldout.remaining if self._heldout is not None else 1.0
        mix = mix_at(stage.config, index, stage.num_steps, remaining)
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
        """This rank's packs of the next global batch."""
        weights = self._stage.config.token_weights
        packs = [self._attached.to(next(self._stream)) for _ in range(self._stage.accumulation)]
        return [apply_token_weights(pack, weights) for pack in packs]

    def weigh(self, packs: list[Pack]) -> tuple[float, FeatureView | None]:
        """Weight of all loss tokens of the global batch, and how its features enter the losses.

        Raises StillroomError where the weight is 0.
        """
        weights = [sum(float(pack.weights_N.sum(dtype=np.float64)) for pack in packs)]
        if self._teacher is not None:
            weights += [sum(found) for found in zip(*map(feature_weights, packs), strict=True)]
        total, *of_features = self.ranks.sum(weights)
        if not math.isfinite(total):
            raise StillroomError(
                f"{self._key}: the weights of the tokens of step {self._step + 1} add up to {total}: make "
                "token_weights or data.weight less steep"
            )
        if total == 0:
            raise StillroomError(
                f"{self._key}: every token of step {self._step + 1} has weight 0: lower token_weights.tail, or raise "
                "batch_tokens"
            )
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
        if not math.isfinite(record.loss):
            raise StillroomError(f"{self._key}: the loss is {record.loss} at step {self._step}: {self._how_to_go_on()}")
        if self._session is not None:
            self._session.add(int(num_tokens))
        if self._log is not None and self._bar is not None:
            self._log.write(record)
            self._bar.update(self._step, self._num_tokens, record.notes(self._config.engine.precision))
            if self.is_done:
                # Before the evaluation that follows prints its own.
                self._bar.print_now()
        self._require_learning(is_applied)
        return num_stops > 0

    def _require_learning(self, is_applied: bool) -> None:
        """Raises StillroomError if all steps of the stage were skipped, or too many in a row."""
        self._num_skipped += not is_applied
        self._num_skipped_in_a_row = 0 if is_applied else self._num_skipped_in_a_row + 1
        learnt_nothing = self.is_done and self._num_skipped == self._step
        if learnt_nothing or self._num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            count = f"all {self._step}" if learnt_nothing else f"the last {self._num_skipped_in_a_row}"
            precision = self._config.engine.precision
            instead = "bfloat16 or float32" if precision == "float16" else "float32"
            remedy = (
                f"set engine.precision to {instead}" if precision != "float32" else "check the student and the data"
            )
            raise StillroomError(
                f"{self._key}: {count} steps were skipped because {why_skipped(precision)}, and nothing was learned: "
                f"{remedy} and choose another run folder"
            )

    def _require_finite(self) -> None:
        """Raises StillroomError, on all ranks, if weights or moments of any of them are not finite."""
        (num_broken,) = self.ranks.sum([float(not self.engine.is_finite())])
        if num_broken:
            raise StillroomError(
                f"{self._key}: weights or moments are not finite after step {self._step}, so it is not saved: "
                f"{self._how_to_go_on()}"
            )

    def _how_to_go_on(self) -> str:
        """What to do about numbers that are not finite, as a command where there are checkpoints to go back to."""
        key, rate = f"stages.{self._stage.index}.learning_rate", self._stage.config.learning_rate
        states = checkpoint.states_of_last_stage(self._folder.checkpoints)
        steps = [state.step for state in states if state.place < (self._stage.index, self._step)]
        if not steps:
            return f"lower {key} (now {rate:g}) and run again, or raise engine.precision"
        command = f"student-train run {shlex.quote(str(self._folder.config_path))} --from-step {steps[-1]}"
        return (
            f"go back with a lower rate: {command} --set {key}={rate / 2:g} "
            f"({'checkpoints' if len(steps) > 1 else 'the checkpoint'} of step {', '.join(map(str, steps))} "
            f"{'are' if len(steps) > 1 else 'is'} intact)"
        )

    def evaluate(self) -> None:
        """Measures the held-out loss, which elastic weights follow."""
        assert self._plan.heldout is not None
        header = self._plan.heldout.header
        self._require_finite()
        result = evaluate(self.engine.metrics, self._plan.heldout, eval_spec(self._config.data), self.ranks)
        if not math.isfinite(result.loss):
            raise StillroomError(
                f"{self._key}: the held-out loss is {result.loss} after step {self._step}: {self._how_to_go_on()}"
            )
        start = self._heldout.start if self._heldout is not None else result.loss
        self._heldout = HeldoutProgress(selection=header.hash, start=start, now=result.loss)
        right = self._evaluate_right()
        if self._log is not None:
            values, name = {**result.model_dump(), **right}, self._stage.config.name
            where = {"stage": name, "stage_number": self._stage.index, "step": self._step, "where": header.where}
            self._folder.add_eval({**where, "selection": header.hash, **values})
            self._log.write_eval(self._step, values)
            note(f"held-out after step {self._step} of {name}: {result.line()}")
            self._warn_of_right(right)

    def _evaluate_right(self) -> dict[str, float]:
        """Cross-entropy on held-out right chains, in a stage that moves away from wrong ones."""
        right = self._stage.right
        if right is None:
            return {}
        found = evaluate(self.engine.metrics, right, eval_spec(self._config.data), self.ranks)
        return {"right_cross_entropy": found.cross_entropy}

    def _warn_of_right(self, right: dict[str, float]) -> None:
        """Says when moving away from wrong chains has made right ones less likely than at the stage's start."""
        if not right:
            return
        assert self._plan.heldout is not None
        place = self._stage.index, self._plan.heldout.header.hash
        # `eval` may select other chains since the stage began, which are no likelier or less likely by that.
        own = [one for one in self._folder.read_evals() if (one["stage_number"], one["selection"]) == place]
        before, now = own[0].get("right_cross_entropy"), right["right_cross_entropy"]
        note(f"held-out right chains: cross-entropy {now:.4f}" + (f" (at the start {before:.4f})" if before else ""))
        if before is not None and now > before + RIGHT_TOLERANCE_NATS:
            warn(
                f"right chains have become less likely since stage {self._stage.config.name} began: cross-entropy "
                f"{before:.4f} -> {now:.4f} nats: lower the weight of the losses on wrong chains (or their alpha), "
                "raise cross_entropy or start_kl, or choose unlikelihood"
            )

    def keep_best(self) -> None:
        """Marks this step's checkpoint as the best one, if its held-out loss is the lowest."""
        assert self._heldout is not None
        if self._best is None or self._heldout.now < self._best.loss:
            self._best = Best(tag=self._state().tag, loss=self._heldout.now, selection=self._heldout.selection)

    def save(self) -> CheckpointState:
        """Writes a checkpoint, unless this step has one."""
        state = self._state()
        if self._saved_step != self._step:
            self._require_finite()
            # Only finite states get here: a broken one would become the latest, from which every resume fails.
            checkpoint.save(self._folder.checkpoints, self.engine, state, self._config.checkpoint.keep_last, self.ranks)
            self._saved_step = self._step
        return state

    @property
    def _key(self) -> str:
        return stage_key(self._stage.index, self._stage.config.name)

    def _comparable(self, best: Best | None) -> Best | None:
        """The best so far, unless `eval` selects other chains since."""
        heldout = self._plan.heldout
        return best if best is None or heldout is None or best.selection == heldout.header.hash else None

    def _heldout_before(self, state: CheckpointState | None) -> HeldoutProgress | None:
        """The stage's held-out progress so far: it starts where the stage before ended."""
        known, heldout = state.heldout if state is not None else None, self._plan.heldout
        if state is None or known is None or heldout is None or known.selection != heldout.header.hash:
            return None
        return known if state.stage == self._stage.index else known.model_copy(update={"start": known.now})

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
            num_skipped=self._num_skipped,
            best=self._best,
            heldout=self._heldout,
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


def _rewind(run: RunFolder, config: TrainConfig, step: int) -> None:
    """Makes the checkpoint after `step` the last one. Raises DataError, or ConfigError for a change it forbids."""
    state = checkpoint.find_step(run.checkpoints, step)
    run.open(config, has_learnt=True, rewound_to=state)
    checkpoint.rewind(run.checkpoints, state)


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


def _announce(plan: RunPlan, state: CheckpointState | None, num_ranks: int) -> None:
    for line in plan.vocabulary.notes:
        note(line)
    for stage in plan.stages:
        header = stage.selection.header
        note(
            f"stage {stage.config.name}: {format_plural(header.num_chains, 'chain')}, {header.num_tokens} completion "
            f"tokens, {format_plural(stage.num_steps, 'step')} of {format_plural(stage.packs_per_step, 'pack')}"
        )
    ranks = format_plural(num_ranks, "rank")
    if state is not None:
        others = f" (the checkpoint was saved by {state.num_ranks})" if state.num_ranks != num_ranks else ""
        note(f"resuming after step {state.step} of {state.num_steps} of stage {state.stage_name}, on {ranks}{others}")
    elif num_ranks > 1:
        note(f"training on {ranks}")
