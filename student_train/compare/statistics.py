"""Students on the same prompts: paired differences with intervals, and whether they could be chance.

Pairs carry far more than two separate shares: prompts differ in difficulty much more than students do.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""Limits of a share of right answers, and of a difference between two."""
MAX_CELLS = 20_000_000
"""Drawn numbers in memory at a time."""


class Interval(BaseModel):
    """A mean with its 95% interval, by the bootstrap (percentiles; Efron 1979).

    Equal values have nothing to resample: the interval is then `exact` for values with known limits, else unknown.
    """

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float | None
    high: float | None
    method: Literal["bootstrap", "exact", "unknown"] = "bootstrap"

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is as good a guess: it is inside, or nothing is known."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean_interval(values: Sequence[float], limits: tuple[float, float] | None = None, seed: int = 0) -> Interval | None:
    """Resamples `values`, which are one number a prompt and lie within `limits`. None without values."""
    if not values:
        return None
    values_N = np.asarray(values, np.float64)
    if (values_N == values_N[0]).all():
        return constant_interval(float(values_N[0]), len(values_N), limits)
    # Seeded, so that the same answers always give the same interval.
    rng = np.random.default_rng(seed)
    # In parts: 10,000 resamples of 100,000 prompts would be 8 GB.
    part = max(1, MAX_CELLS // len(values_N))
    means = np.concatenate(
        [
            values_N[rng.integers(0, len(values_N), (min(part, NUM_RESAMPLES - first), len(values_N)))].mean(axis=1)
            for first in range(0, NUM_RESAMPLES, part)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=float(values_N.mean()), low=float(low), high=float(high))


def constant_interval(value: float, num: int, limits: tuple[float, float] | None) -> Interval:
    """The interval of `num` equal values, which resampling cannot give: what prompts outside the sample may hold."""
    if limits is None:
        return Interval(mean=value, low=None, high=None, method="unknown")
    # If a share p of all prompts differs, none of n does with probability (1 - p)^n: at 95% p is at most
    # 1 - 0.05^(1/n), about 3/n ("rule of three"). 200 prompts: 1.5%.
    most = -math.expm1(math.log(1 - CONFIDENCE) / num)
    low, high = (value + most * (limit - value) for limit in limits)
    return Interval(mean=value, low=low, high=high, method="exact")


def sign_test(wins_a: int, wins_b: int) -> float:
    """Probability of a split at least as uneven if both were as good: McNemar's exact test, two-sided.

    Only prompts that one answered right and the other wrong count. 8 against 2: 2 (1 + 10 + 45) / 2^10 = 0.109.
    """
    num = wins_a + wins_b
    # Integers to the end: 2^num overflows a float beyond a thousand.
    tail = sum(math.comb(num, number) for number in range(min(wins_a, wins_b) + 1))
    return min(1.0, float(2 * tail / 2**num))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values as they count where several differences are tested at once (Holm 1979).

    0.01, 0.04, 0.03: the smallest times 3, the next times 2, never below one before it: 0.03, 0.06, 0.06.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - place)))
        adjusted[number] = largest
    return adjusted


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and tail."""
    if not values:
        return None
    found = np.quantile(np.asarray(values, np.float64), [0.5, 0.9, 0.99])
    return dict(zip(("p50", "p90", "p99"), map(float, found), strict=True))
