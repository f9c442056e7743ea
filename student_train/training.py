"""The training loop: packs from the stream, fused losses, one optimizer step after another, stage after stage.

In: a configuration. Out: a run's folder (runfolder.py says what is in it). The same call goes on from the last
checkpoint.

A step takes one global batch. Its loss is the sum over all loss tokens of all ranks and packs, divided by the sum of
their weights, so it does not depend on how the batch is spread. An interruption (Ctrl-C, SIGTERM) finishes the step
that is being computed, saves and ends; all ranks agree on it, because the request travels with the sums of the step.

One optimizer step: this rank's packs of the global batch, their losses and gradients, and what all ranks saw of it.

J losses of the mix
"""

import contextlib
import gc
import math
import random
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from stillroom.config import Json
from stillroom.errors import StillroomError
from stillroom.log import Progress, format_plural, note
from stillroom.program import StopRequest
from stillroom.schema.records import stable_hash
from student_train.config import TrainConfig, stage_key
from student_train.data.open import eval_spec
from student_train.data.pack import Pack, TargetView, weighed
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.evaluation import EvalResult, evaluate, to_device
from student_train.exporting import export_stage, initial_folder
from student_train.losses.divergences import LossMix
from student_train.model.student import load_student
from student_train.plan import RunPlan, StagePlan, prepare
from student_train.runtime import checkpoint
from student_train.runtime.checkpoint import Best, CheckpointState, HeldoutProgress
from student_train.runtime.engine import Engine
from student_train.runtime.metrics_log import MetricsLog, StepRecord, require_tensorboard, short_name
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder, summarise
from student_train.schedule import learning_rate, mix_at, target_view

RSS_UNIT_BYTES = 1024  # ru_maxrss counts KiB on Linux


@dataclass(frozen=True)
class StepResult:
    """What a step did. `stop` is the same on every rank: someone was asked to stop."""

    record: StepRecord
    stop: bool

    def notes(self) -> dict[str, str]:
        """For the progress line."""
        record = self.record
        parts = {short_name(name): f"{value:.4f}" for name, value in record.parts.items()}
        return {
            "loss": f"{record.loss:.4f}",
            **(parts if len(parts) > 1 else {}),
            **({"tau": f"{record.temperature:g}"} if record.temperature != 1.0 else {}),
            "lr": f"{record.learning_rate:.2e}",
            "stall": f"{100 * record.stall_frac:.0f}%",
            "mem": f"{record.memory_gib:.1f} GiB",
            **({"skipped:": "float16 overflowed"} if record.skipped else {}),
        }


def take_step(
    engine: Engine,
    stream: PackStream,
    stage: StagePlan,
    mix: LossMix,
    step: int,
    seed: int,
    ranks: Ranks,
    stop: StopRequest,
    train_s: float,
) -> StepResult:
    """Takes step number `step` (from 0) of the stage; all ranks together. `train_s`: seconds of the steps before."""
    started_s, stall_before_s = time.perf_counter(), stream.stats.stall_s
    seed_generators(seed, stage.index, step, ranks.rank)
    epoch = int(stream.state_dict()["epoch"])
    packs = [weighed(next(stream), stage.config.token_weights) for _ in range(stage.accumulation)]
    stall_s = stream.stats.stall_s - stall_before_s
    rate = learning_rate(stage.config, step, stage.num_steps)
    # Known before the first backward pass, so that every micro-step can be divided by the whole batch's weight.
    total_weight = ranks.sum([sum(float(pack.weights_N.sum(dtype=np.float64)) for pack in packs)])[0]
    if total_weight == 0:
        raise StillroomError(
            f"{stage_key(stage.index, stage.config.name)}: every token of step {step + 1} has weight 0: lower "
            "token_weights.tail, or raise batch_tokens"
        )
    header = stage.selection.header
    view = target_view(stage.config, header.temperatures, mix, step, stage.num_steps, has_draws=header.draws > 0)
    sums = _accumulate(engine, packs, mix, view, total_weight, ranks, with_signals=stage.with_signals)
    skipped = not engine.step(rate)
    num_tokens, num_loss_tokens = sum(_num_read(pack) for pack in packs), sum(pack.num_loss_tokens for pack in packs)
    totals = ranks.sum([*sums, float(num_tokens), float(num_loss_tokens), float(stop.is_set)])
    worst_stall_s, memory_gib = ranks.max([stall_s, memory_used_gib(ranks.device)])
    step_s = time.perf_counter() - started_s
    record = StepRecord(
        stage=stage.config.name,
        stage_number=stage.index,
        step=step + 1,
        epoch=epoch,
        loss=totals[0] / total_weight,
        parts={name: total / total_weight for name, total in zip(mix.names, totals[1:-3], strict=True)},
        weights={term.name: term.weight for term in mix.terms},
        temperature=view.temperature,
        learning_rate=rate,
        grad_norm=None if skipped else engine.grad_norm,
        skipped=skipped,
        num_tokens=int(totals[-3]),
        num_loss_tokens=int(totals[-2]),
        tokens_per_s=totals[-3] / step_s,
        stall_frac=worst_stall_s / step_s,
        memory_gib=memory_gib,
        step_s=step_s,
        time_s=train_s + step_s,
    )
    return StepResult(record, stop=totals[-1] > 0)


def seed_generators(seed: int, stage: int, step: int, rank: int) -> None:
    """Seeds every global generator for one step of one rank, so that a resumed run drops out the same units."""
    number = int(stable_hash("step", seed, stage, step, rank)[:15], 16)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - a library may draw from the global generator
    torch.manual_seed(number)


def memory_used_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30


def _accumulate(
    engine: Engine,
    packs: list[Pack],
    mix: LossMix,
    view: TargetView,
    total_weight: float,
    ranks: Ranks,
    *,
    with_signals: bool,
) -> list[float]:
    """This rank's sums: the loss, then each term."""
    sums = torch.zeros(1 + len(mix.terms), dtype=torch.float64, device=ranks.device)
    for number, pack in enumerate(packs):
        losses = engine.loss(to_device(pack, ranks.device, with_signals=with_signals, view=view), mix)
        sums += torch.stack([losses.loss_sum.detach(), *losses.term_sums.values()]).double()
        engine.backward(losses.loss_sum, total_weight, is_last=number == len(packs) - 1)
    return [float(value) for value in sums.tolist()]


def _num_read(pack: Pack) -> int:
    return pack.num_tokens if pack.num_loss_tokens else 0


def train(config: TrainConfig, ranks: Ranks, stop: StopRequest) -> Json:
    """Trains what is left of the run and returns its summary; called by all ranks together.

    Raises ConfigError, DataError, CorruptError, CacheConflict, and KeyboardInterrupt when it was asked to stop and has
    saved.
    """
    run = RunFolder(config.run)
    with contextlib.ExitStack() as stack:
        if config.tensorboard:
            require_tensorboard()
        if ranks.is_first:
            stack.enter_context(run.lock())
            run.open(config, has_learnt=checkpoint.latest_state(run.checkpoints) is not None)
        state = checkpoint.latest_state(run.checkpoints)
        if state is not None and state.stage_is_done and state.stage == len(config.stages) - 1:
            if ranks.is_first:
                note(f"the run is finished: {state.tag} is the last step of its last stage; nothing is left to train")
            return summarise(run, config)
        plan = prepare(config, config.run, ranks.num_ranks, is_first=ranks.is_first, barrier=ranks.barrier)
        if ranks.is_first:
            _announce(plan, state, ranks.num_ranks)
            run.truncate_metrics((state.stage, state.step) if state is not None else (0, 0))
        ranks.barrier()
        for stage in plan.stages:
            if state is None or state.stage < stage.index or not (state.stage > stage.index or state.stage_is_done):
                state, is_stopped = _StageRun(config, plan, stage, state, ranks, stop).run()
                # DeepSpeed's objects hold each other: left alone, this stage's weights would lie beside the next one's.
                gc.collect()
                # After the run's very last step nothing is left that a stop could prevent.
                if is_stopped and not (state.stage_is_done and stage is plan.stages[-1]):
                    raise KeyboardInterrupt
    return summarise(run, config)


class _StageRun:
    """One stage from its beginning, or from where its last checkpoint stands."""

    def __init__(
        self,
        config: TrainConfig,
        plan: RunPlan,
        stage: StagePlan,
        state: CheckpointState | None,
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        self._config, self._plan, self._stage, self._ranks, self._stop = config, plan, stage, ranks, stop
        self._run = RunFolder(config.run)
        here = state if state is not None and state.stage == stage.index else None
        if state is not None and here is None and ranks.is_first:
            export_stage(config, state)
        ranks.barrier()
        self._engine = self._make_engine(here)
        self._stream = stage.stream(ranks.rank, ranks.num_ranks)
        if here is not None:
            checkpoint.load(self._run.checkpoints, self._engine, here, ranks)
            self._stream.load_state_dict(here.stream)
        self._step = here.step if here is not None else 0
        self._saved_step = here.step if here is not None else None
        self._best = self._comparable(state.best) if state is not None else None
        self._progress = self._progress_from(state)
        self._num_loss_tokens = state.num_loss_tokens if state is not None else 0
        self._train_s = state.train_s if state is not None else 0.0

    def run(self) -> tuple[CheckpointState, bool]:
        """Steps, evaluations and checkpoints until the stage ends or a stop is asked for.

        Returns the last state, and whether all ranks agreed on a stop; what one rank knows decides nothing.
        """
        stage, ranks = self._stage, self._ranks
        steps_before = sum(one.num_steps for one in self._plan.stages[: stage.index])
        board = self._run.root / "tensorboard" if self._config.tensorboard else None
        with contextlib.ExitStack() as stack:
            stack.callback(self._engine.close)
            stack.enter_context(self._stream)
            log = (
                stack.enter_context(MetricsLog(self._run.metrics_path, board, steps_before, self._step))
                if ranks.is_first
                else None
            )
            if self._config.eval is not None and stage.index == 0 and self._step == 0:
                self._evaluate(log)
            label = f"train {stage.config.name}"
            progress = (
                stack.enter_context(Progress(label, stage.num_steps, "steps", self._step)) if ranks.is_first else None
            )
            num_tokens, is_stopped = 0, False
            self._stop.finish_first()
            while self._step < stage.num_steps and not is_stopped:
                result = self._take_step()
                num_tokens += result.record.num_tokens
                if log is not None and progress is not None:
                    log.write(result.record)
                    progress.update(self._step, num_tokens, result.notes())
                    if self._step == stage.num_steps:
                        # Before the evaluation that follows says its own.
                        progress.print_now()
                self._after_step(log)
                is_stopped = result.stop
            state = self._save()
            # Someone may have asked during the last evaluation.
            return state, is_stopped or ranks.sum([float(self._stop.is_set)])[0] > 0

    def _take_step(self) -> StepResult:
        started_s = time.perf_counter()
        stage = self._stage
        remaining = self._progress.remaining if self._progress is not None else 1.0
        result = take_step(
            self._engine,
            self._stream,
            stage,
            mix_at(stage.config, self._step, stage.num_steps, remaining),
            self._step,
            self._config.seed,
            self._ranks,
            self._stop,
            self._train_s,
        )
        if not math.isfinite(result.record.loss):
            raise StillroomError(
                f"{stage_key(stage.index, stage.config.name)}: the loss is {result.record.loss} at step "
                f"{self._step + 1}: lower learning_rate, or raise engine.precision; the last checkpoint is untouched"
            )
        self._step += 1
        self._num_loss_tokens += result.record.num_loss_tokens
        self._train_s += time.perf_counter() - started_s
        return result

    def _after_step(self, log: MetricsLog | None) -> None:
        config, is_last = self._config, self._step == self._stage.num_steps
        evaluates = config.eval is not None and (
            is_last or (config.eval.every_steps is not None and self._step % config.eval.every_steps == 0)
        )
        if evaluates:
            loss = self._evaluate(log).loss
            if self._best is None or loss < self._best.loss:
                self._best = Best(tag=self._state().tag, loss=loss, selection=self._heldout.header.hash)
        if evaluates or self._step % config.checkpoint.every_steps == 0:
            self._save()

    def _evaluate(self, log: MetricsLog | None) -> EvalResult:
        heldout = self._heldout
        result = evaluate(self._engine.metrics, heldout, eval_spec(self._config.data), self._ranks)
        known = self._progress
        start = known.start if known is not None else result.loss
        self._progress = HeldoutProgress(selection=heldout.header.hash, start=start, now=result.loss)
        if log is not None:
            values = result.model_dump()
            stage = {"stage": self._stage.config.name, "stage_number": self._stage.index, "step": self._step}
            self._run.add_eval({**stage, "where": heldout.header.where, "selection": heldout.header.hash, **values})
            log.write_eval(self._step, values)
            note(f"held-out after step {self._step} of {self._stage.config.name}: {result.line()}")
        return result

    @property
    def _heldout(self) -> Selection:
        assert self._plan.heldout is not None
        return self._plan.heldout

    def _comparable(self, best: Best | None) -> Best | None:
        """The best so far, unless `eval` has chosen other chains since."""
        if best is None or self._plan.heldout is None or best.selection == self._heldout.header.hash:
            return best
        return None

    def _progress_from(self, state: CheckpointState | None) -> HeldoutProgress | None:
        """Held-out progress as the stage goes on with it: a stage begins where the one before it ended."""
        known = state.heldout if state is not None else None
        if known is None or self._plan.heldout is None or known.selection != self._heldout.header.hash:
            return None
        assert state is not None
        return known if state.stage == self._stage.index else known.model_copy(update={"start": known.now})

    def _save(self) -> CheckpointState:
        state = self._state()
        if self._saved_step != self._step:
            checkpoint.save(self._run.checkpoints, self._engine, state, self._config.checkpoint.keep_last, self._ranks)
            self._saved_step = self._step
        return state

    def _state(self) -> CheckpointState:
        return CheckpointState(
            stage=self._stage.index,
            stage_name=self._stage.config.name,
            step=self._step,
            num_steps=self._stage.num_steps,
            num_ranks=self._ranks.num_ranks,
            zero_stage=self._config.engine.zero_stage,
            stream=self._stream.state_dict(),
            num_loss_tokens=self._num_loss_tokens,
            train_s=self._train_s,
            best=self._best,
            heldout=self._progress,
        )

    def _make_engine(self, here: CheckpointState | None) -> Engine:
        config, stage = self._config, self._stage
        student = load_student(
            config.student,
            initial_folder(config, stage.index),
            stage.config,
            config.engine,
            seed=config.seed,
            vocab_size=self._plan.vocabulary.num_ids,
        )
        universal = checkpoint.needs_universal(here, self._ranks.num_ranks)
        return Engine(student, stage.config, config.engine, self._ranks, stage.accumulation, universal=universal)


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
        others = f" (the checkpoint is of {state.num_ranks})" if state.num_ranks != num_ranks else ""
        note(f"going on after step {state.step} of {state.num_steps} of stage {state.stage_name}, on {ranks}{others}")
    elif num_ranks > 1:
        note(f"training on {ranks}")
