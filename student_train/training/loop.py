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
import shutil
import time

import torch

from stillroom.config import Json
from stillroom.log import format_plural, note
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.model.student import return_freed_memory
from student_train.planning.plan import RunPlan, prepare
from student_train.runtime import checkpoint
from student_train.runtime.checkpoint import CheckpointState
from student_train.runtime.cost import Session
from student_train.runtime.metrics_log import require_tensorboard
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import FINISHED, RunFolder, is_finished, summarise
from student_train.training.stage import StageRun


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


def train_stage(run: StageRun, stop: StopRequest) -> tuple[CheckpointState, bool]:
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


def _rewind(run: RunFolder, config: TrainConfig, step: int) -> None:
    """Makes the checkpoint after `step` the last one. Raises DataError, or ConfigError for a change it forbids."""
    state = checkpoint.find_step(run.checkpoints, step)
    run.open(config, has_learnt=True, rewound_to=state)
    checkpoint.rewind(run.checkpoints, state)


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
