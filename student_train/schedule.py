"""What changes from one optimizer step to the next: learning rate, loss weights and temperature.

`step` counts from 0 to `num_steps` - 1 in a stage. Elastic weights follow `remaining` instead: the held-out loss
divided by what it was when the stage began, at most 1.
"""

import math
import sys
from collections.abc import Sequence

from student_train.config.stage import LossConfig, ScheduleConfig, StageConfig
from student_train.data.pack import TargetView
from student_train.losses.divergences import FeatureLoss, HeadLoss
from student_train.losses.mix import LossMix
from student_train.losses.names import make_loss

TAID_SCHEDULE = ScheduleConfig(kind="linear", start=0.4, end=1.0)
"""arXiv 2501.16937 begins at 0.4 and ends at the teacher."""


def learning_rate(stage: StageConfig, step: int, num_steps: int) -> float:
    """Rises linearly to the peak over the warm-up, then falls to its minimum at the last step.

    With 100 steps and 10 of warm-up, step 0 has a tenth of the peak, step 9 the peak, step 99 the minimum. A single
    step has the peak.
    """
    if num_steps == 1:
        return stage.learning_rate
    num_warmup = round(stage.warmup_frac * num_steps)
    if step < num_warmup:
        return stage.learning_rate * (step + 1) / num_warmup
    # + 1: the step after the warm-up is already below the peak, and the last one reaches the minimum.
    progress = (step + 1 - num_warmup) / max(1, num_steps - num_warmup)
    if stage.lr_schedule == "constant":
        share = 1.0
    elif stage.lr_schedule == "linear":
        share = 1.0 - progress
    else:
        share = (1.0 + math.cos(math.pi * progress)) / 2.0
    # The share of a constant schedule is 1 everywhere, so its minimum must not count.
    low = stage.min_lr_frac if stage.lr_schedule != "constant" else 0.0
    return stage.learning_rate * (low + (1.0 - low) * share)


def scheduled(value: float | ScheduleConfig, step: int, num_steps: int, remaining: float = 1.0) -> float:
    """Value of a constant or a schedule: `start` at the first step, `end` at the last.

    An elastic value is `start` where `remaining` is 1 and `end` where it is 0.
    """
    if not isinstance(value, ScheduleConfig):
        return value
    # A factor sets the decay per step, so it has no end to reach and the length of the stage does not matter.
    if value.factor is not None:
        return value.start * _power(value.factor, step)
    assert value.end is not None
    if value.kind == "elastic":
        return value.end + (value.start - value.end) * remaining
    progress = step / max(1, num_steps - 1)
    if value.kind == "linear":
        return value.start + (value.end - value.start) * progress
    if value.kind == "cosine":
        return value.end + (value.start - value.end) * (1.0 + math.cos(math.pi * progress)) / 2.0
    # Geometric: the ratio of neighbouring steps is constant.
    return float(value.start * (value.end / value.start) ** progress)


def mix_at(stage: StageConfig, step: int, num_steps: int, remaining: float = 1.0) -> LossMix:
    """The stage's losses with their weights at one step.

    Raises ConfigError for an unknown loss, a setting that a loss does not have, or weights that are all 0.
    """
    losses = [
        make_loss(
            name,
            scheduled(loss.weight, step, num_steps, remaining),
            tail=loss.tail,
            beta=loss.beta,
            alpha=loss.alpha,
            temperature=loss.temperature,
            clip=loss.clip,
            max_ratio=loss.max_ratio,
            max_advantage=loss.max_advantage,
            interpolation=_interpolation(name, loss, step, num_steps),
            layers=None if loss.layers is None else tuple(sorted(loss.layers.items())),
            project=loss.project,
        )
        for name, loss in stage.losses.items()
    ]
    on_head = tuple(loss for loss in losses if isinstance(loss, HeadLoss))
    features = tuple(loss for loss in losses if isinstance(loss, FeatureLoss))
    corrects = stage.negatives is not None and stage.negatives.correct_by_teacher
    return LossMix(on_head, stage.focal_gamma, features, corrects)


def _interpolation(name: str, loss: LossConfig, step: int, num_steps: int) -> float | None:
    asked = TAID_SCHEDULE if name == "taid" and loss.interpolation is None else loss.interpolation
    return None if asked is None else scheduled(asked, step, num_steps)


def target_view(
    stage: StageConfig, stored: Sequence[float], mix: LossMix, step: int, num_steps: int, *, has_draws: bool
) -> TargetView:
    """What the losses read of the targets at one step; `stored` are the temperatures that the cache holds."""
    # Exact losses compute their own softmax at any temperature and need no stored log-partition.
    temperature = temperature_at(stage, None if mix.is_exact else stored, step, num_steps)
    partition = None if temperature == 1.0 or mix.is_exact else list(stored).index(temperature)
    return TargetView(has_draws and mix.reads_draws, temperature, partition, mix.reads_chunks, mix.reads_pairs)


def temperature_at(stage: StageConfig, stored: Sequence[float] | None, step: int, num_steps: int) -> float:
    """Temperature of one step: a constant, or the one among `stored` and 1 that is nearest, by ratio, to a schedule's.

    Between stored temperatures there is no exact distribution: interpolated log-partitions err by 0.03 nats at best.
    `stored` is None where the teacher's whole distribution is known: then a schedule is followed as it is.
    """
    if not isinstance(stage.temperature, ScheduleConfig):
        return stage.temperature
    if stored is None:
        return scheduled(stage.temperature, step, num_steps)
    # Not log(one / wanted): training flushes subnormal numbers to zero, and the ratio may be one.
    wanted = min(max(scheduled(stage.temperature, step, num_steps), sys.float_info.min), sys.float_info.max)
    return min([1.0, *stored], key=lambda one: abs(math.log(one) - math.log(wanted)))


def temperature_steps(stage: StageConfig, stored: Sequence[float] | None, num_steps: int) -> list[tuple[int, float]]:
    """(first step, temperature) of each run of equal temperatures."""
    found: list[tuple[int, float]] = []
    for step in range(num_steps):
        temperature = temperature_at(stage, stored, step, num_steps)
        if not found or found[-1][1] != temperature:
            found.append((step, temperature))
    return found


def check_mixes(stage: StageConfig, num_steps: int) -> LossMix:
    """The mix of the first step. Also checks the extremes: schedules are monotonic, so the last step is one."""
    mix_at(stage, num_steps - 1, num_steps)
    mix_at(stage, num_steps - 1, num_steps, remaining=0.0)
    mix_at(stage, 0, num_steps, remaining=0.0)
    return mix_at(stage, 0, num_steps)


def _power(factor: float, step: int) -> float:
    """factor^step; inf, which no weight may be, where Python would raise OverflowError."""
    try:
        return factor**step
    except OverflowError:
        return math.inf
