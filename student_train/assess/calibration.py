"""Whether a student is as often right as it is sure: bins of confidence and their expected calibration error (ECE)."""

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

NUM_BINS = 10

Array = npt.NDArray[np.float64]


class Bin(BaseModel):
    """Predictions with a confidence between `low` and `high`; means are None where there are none."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    num: int
    confidence: float | None
    accuracy: float | None


class Calibration(BaseModel):
    """`ece` is the mean of |accuracy - confidence| over the bins, weighted by their predictions (Guo et al. 2017)."""

    model_config = ConfigDict(frozen=True)

    num: int
    ece: float
    bins: list[Bin]


class CalibrationSums:
    """Counts and sums of NUM_BINS equal bins of confidence."""

    def __init__(self) -> None:
        self._num_B, self._confidence_B, self._correct_B = (np.zeros(NUM_BINS) for _ in range(3))

    def add(self, confidence_N: Array, correct_N: Array) -> None:
        """Confidences from 0 to 1, and 1 or 0 for right and wrong."""
        # A confidence of 1 belongs to the last bin.
        bin_N = np.clip((confidence_N * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        self._num_B += np.bincount(bin_N, minlength=NUM_BINS)
        self._confidence_B += np.bincount(bin_N, confidence_N, NUM_BINS)
        self._correct_B += np.bincount(bin_N, correct_N, NUM_BINS)

    def result(self) -> Calibration | None:
        """None where nothing was added."""
        num = int(self._num_B.sum())
        if not num:
            return None
        some_B = np.maximum(self._num_B, 1)
        confidence_B, accuracy_B = self._confidence_B / some_B, self._correct_B / some_B
        bins = [
            Bin(
                low=number / NUM_BINS,
                high=(number + 1) / NUM_BINS,
                num=int(self._num_B[number]),
                confidence=float(confidence_B[number]) if self._num_B[number] else None,
                accuracy=float(accuracy_B[number]) if self._num_B[number] else None,
            )
            for number in range(NUM_BINS)
        ]
        ece = float((np.abs(accuracy_B - confidence_B) * self._num_B).sum() / num)
        return Calibration(num=num, ece=ece, bins=bins)
