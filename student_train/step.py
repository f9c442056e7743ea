"""One optimizer step: this rank's packs of the global batch, their losses and gradients, and what all ranks saw of it.

J losses of the mix
"""

import random
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from schemas.records import stable_hash
from shared.errors import StillroomError
from shared.interrupt import StopRequest
from student_train.engine import Engine
from student_train.evaluate import to_device
from student_train.losses.divergences import LossMix
from student_train.losses.token_weights import weighed
from student_train.metrics_log import StepRecord, short_name
from student_train.prepare import StagePlan
from student_train.ranks import Ranks
from student_train.schedule import learning_rate, target_view
from student_train.stage_config import stage_key
from student_train.streaming.pack import Pack, TargetView
from student_train.streaming.stream import PackStream

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
