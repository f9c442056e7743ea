"""Two students on the same prompts: paired differences with intervals, and whether they could be chance.

Pairs carry far more than two separate shares: prompts differ in difficulty much more than students do.
"""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
MAX_CELLS = 20_000_000
"""Drawn numbers in memory at a time."""


class Interval(BaseModel):
    """A mean with its 95% bootstrap interval (percentiles; Efron 1979)."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Resamples `values`, which are one number a prompt. None without values."""
    if not values:
        return None
    values_N = np.asarray(values, np.float64)
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


def sign_test(wins_a: int, wins_b: int) -> float:
    """Probability of a split at least as uneven if both were as good: McNemar's exact test, two-sided.

    Only prompts that one answered right and the other wrong count. 8 against 2: 2 (1 + 10 + 45) / 2^10 = 0.109.
    """
    num = wins_a + wins_b
    # Integers to the end: 2^num overflows a float beyond a thousand.
    tail = sum(math.comb(num, number) for number in range(min(wins_a, wins_b) + 1))
    return min(1.0, float(2 * tail / 2**num))


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and tail."""
    if not values:
        return None
    found = np.quantile(np.asarray(values, np.float64), [0.5, 0.9, 0.99])
    return dict(zip(("p50", "p90", "p99"), map(float, found), strict=True))
