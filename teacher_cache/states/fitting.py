"""Scales and low-rank bases of a feature set, fitted on calibration states.

Shape legend: N calibration tokens, D channels, R coefficients, V vocabulary.
"""

import numpy as np
import numpy.typing as npt

from stillroom.cache.feature_codec import Basis, VectorCodec
from stillroom.cache.features import Head
from stillroom.schema.records import Float32

Float64 = npt.NDArray[np.float64]
RIDGE = 1e-4
"""Added to the metric, relative to its mean diagonal, so that channels without influence can be inverted."""
METRIC_TOKENS = 1024
"""Tokens whose distributions make the metric of the last hidden state."""
LEAST_SIZE = 0.05
"""Least scale of a coefficient, relative to the median one. A channel that is 0 in all calibration states and not in a
later one would otherwise take all the codes of that token. Small ones still err less than the median one.
"""


def fit_codec(
    states_ND: Float32, bits: int, rank: int | None, metric_DD: Float64 | None = None
) -> tuple[VectorCodec, float]:
    """A codec for such states, and the share of their variance that its basis loses.

    With `rank` the basis minimises the mean squared error, or with `metric_DD` that of x' metric x. A basis of full
    rank loses nothing, but rounds in its own directions instead of in those of the channels.
    """
    if rank is None:
        return VectorCodec(bits, _typical(states_ND)), 0.0
    mean_D = states_ND.mean(axis=0, dtype=np.float64)
    centred_ND = states_ND.astype(np.float64) - mean_D
    root_DD = np.eye(len(mean_D)) if metric_DD is None else _root(metric_DD)
    # The principal components of x L lose least in the metric L L'.
    weighted_ND = centred_ND @ root_DD
    _, vectors_DD = np.linalg.eigh(weighted_ND.T @ weighted_ND)
    # eigh sorts by rising eigenvalue.
    best_DR = vectors_DD[:, : -rank - 1 : -1]
    encode_DR, vectors_RD = root_DD @ best_DR, np.linalg.solve(root_DD.T, best_DR).T
    lost_ND = centred_ND - centred_ND @ encode_DR @ vectors_RD
    basis = Basis(mean_D.astype(np.float32), vectors_RD.astype(np.float32), encode_DR.astype(np.float32))
    scale_R = _typical((centred_ND @ encode_DR).astype(np.float32))
    return VectorCodec(bits, scale_R, basis), _relative(lost_ND, centred_ND)


def error_frac(codec: VectorCodec, states_ND: Float32) -> float:
    """Squared error of decoded states relative to their variance."""
    decoded_ND = codec.decode(codec.encode(states_ND), len(states_ND))
    return _relative(decoded_ND - states_ND, states_ND - states_ND.mean(axis=0))


def head_metric(states_ND: Float32, head: Head) -> Float64:
    """Mean Fisher information of a state: x' F x / 2 is the KL divergence that an error of x causes, to second order.

    F = scale^2 mean_n W' S_n (diag(p_n) - p_n p_n') S_n W, where S_n is the slope of the cap at each logit.
    """
    states_ND = states_ND[:: max(1, len(states_ND) // METRIC_TOKENS)]
    sum_V, means_ND = np.zeros(len(head.weight_VD)), []
    # In pieces: the logits of a thousand tokens over a large vocabulary are half a gigabyte.
    for first in range(0, len(states_ND), 64):
        logits_NV = head.logits(states_ND[first : first + 64])
        probs_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
        probs_NV /= probs_NV.sum(axis=1, keepdims=True)
        # The slope 1 - tanh^2, read off logits that are cap tanh(z / cap).
        slope_NV = 1.0 if head.softcap is None else 1.0 - np.square(logits_NV / np.float32(head.softcap))
        sum_V += (probs_NV * np.square(slope_NV)).sum(axis=0)
        means_ND.append((probs_NV * slope_NV) @ head.weight_VD)
    expected_ND = np.concatenate(means_ND).astype(np.float64)
    # Ids that nobody predicts carry no information, and V x D products are what this costs.
    used_V = sum_V > 1e-9 * sum_V.sum()
    used_UD = head.weight_VD[used_V].astype(np.float64)
    second_DD = (used_UD * (sum_V[used_V] / len(states_ND))[:, None]).T @ used_UD
    metric_DD: Float64 = head.logit_scale**2 * (second_DD - expected_ND.T @ expected_ND / len(states_ND))
    return metric_DD


def _typical(coefficients_NR: Float32) -> Float32:
    """Geometric mean of each coefficient's root mean square and its maximum; of one that is always 0 something above 0.

    Of three choices the one with the least KL on SmolLM2: 4.3e-4, with either alone 5.5e-4 and 5.1e-4; with no scale
    per channel 1.5e-2.
    """
    rms_R = np.sqrt(np.square(coefficients_NR, dtype=np.float64).mean(axis=0))
    size_R = np.sqrt(rms_R * np.abs(coefficients_NR).max(axis=0))
    least = max(LEAST_SIZE * float(np.median(size_R)), 1e-6 * float(size_R.max()), 1e-12)
    typical_R: Float32 = np.maximum(size_R, least).astype(np.float32)
    return typical_R


def _relative(error_ND: npt.NDArray[np.floating], centred_ND: npt.NDArray[np.floating]) -> float:
    """Squared error relative to variance. States that are all alike have none: 0 if they are kept, else 1."""
    error, variance = (float(np.square(one).sum(dtype=np.float64)) for one in (error_ND, centred_ND))
    return error / variance if variance else float(error > 0)


def _root(metric_DD: Float64) -> Float64:
    """L with L L' = metric, made positive definite."""
    size = len(metric_DD)
    # A teacher that is certain everywhere has no metric.
    ridge = RIDGE * max(np.trace(metric_DD) / size, 0.0) or 1.0
    while True:
        try:
            return np.linalg.cholesky((metric_DD + metric_DD.T) / 2 + ridge * np.eye(size))
        except np.linalg.LinAlgError:
            # Where nearly all tokens are certain, the difference of two float32 moments has negative directions.
            ridge *= 10
