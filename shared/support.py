"""What is kept of the distributions that an engine saw: rank-ordered candidates to supports, tails and draws.

Shape legend: T tokens, K captured candidates, M draws a token, S temperatures; N stored candidates and D stored draws
of all tokens (flat).
"""

import numpy as np
import numpy.typing as npt

from schemas.records import Capture, Draws, Float32, Int32, Signals


def support_of(capture: Capture, max_support: int, nucleus: float | None) -> Signals:
    """Cuts each token's candidates to the smallest prefix with mass >= nucleus, at most max_support entries.

    The tail is what the kept prefix leaves of 1, and at least the captured mass that was cut off: 1 - sum(p) loses its
    digits to cancellation when the tail is small. Entropy is the engine's where it is exact; otherwise that of all
    captured candidates with the rest counted as one further outcome, a lower bound. Draws are kept where the support
    was cut by `max_support`, that is where the tail is more than the nucleus leaves; they are from outside all captured
    candidates, so no more than `max_support` of those may have been captured.
    """
    logprobs_TK = capture.topk_logprobs_TK
    num_captured = logprobs_TK.shape[1]
    probs_TK = np.exp(logprobs_TK.astype(np.float64))
    cumulative_TK = np.cumsum(probs_TK, axis=1)
    limit = min(max_support, num_captured)
    if nucleus is None:
        n_T = np.full(len(logprobs_TK), limit, np.int32)
    else:
        n_T = np.minimum((cumulative_TK[:, :limit] < nucleus).sum(axis=1) + 1, limit).astype(np.int32)
    kept_TK = np.arange(num_captured)[None, :] < n_T[:, None]
    kept_mass_T = np.take_along_axis(cumulative_TK, n_T[:, None].astype(np.int64) - 1, axis=1)[:, 0]
    tail_T = np.maximum(1.0 - kept_mass_T, np.where(kept_TK, 0.0, probs_TK).sum(axis=1))
    entropy_T = capture.entropy_T if capture.entropy_T is not None else _support_entropy(probs_TK, logprobs_TK)
    return Signals(
        topk_n_T=n_T,
        topk_ids_N=capture.topk_ids_TK[kept_TK].astype(np.int32),
        topk_logprobs_N=logprobs_TK[kept_TK].astype(np.float32),
        tail_logmass_T=_log(tail_T).astype(np.float32),
        sampled_logprob_T=capture.sampled_logprob_T.astype(np.float32),
        sampled_rank_T=capture.sampled_rank_T.astype(np.int32),
        entropy_T=entropy_T.astype(np.float32),
        draws=_draws_of(capture, n_T, kept_mass_T, nucleus),
        log_partitions_TS=capture.log_partitions_TS,
    )


def scalars_of(signals: Signals) -> dict[str, float]:
    """Means over the tokens of one chain that SQL reads without opening distributions. NaN-free: T must be >= 1."""
    starts_T = np.cumsum(signals.topk_n_T, dtype=np.int64) - signals.topk_n_T
    return {
        "mean_logprob": float(signals.sampled_logprob_T.mean(dtype=np.float64)),
        "mean_entropy": float(signals.entropy_T.mean(dtype=np.float64)),
        "mean_top1_prob": float(np.exp(signals.topk_logprobs_N[starts_T], dtype=np.float64).mean()),
        "mean_tail_mass": float(np.exp(signals.tail_logmass_T, dtype=np.float64).mean()),
        "mean_support": float(signals.topk_n_T.mean(dtype=np.float64)),
    }


def _support_entropy(probs_TK: npt.NDArray[np.float64], logprobs_TK: Float32) -> npt.NDArray[np.float64]:
    tail_T = np.maximum(1.0 - probs_TK.sum(axis=1), 0.0)
    safe_TK = np.where(probs_TK > 0, logprobs_TK, 0.0)
    return np.asarray(-(probs_TK * safe_TK).sum(axis=1) - tail_T * np.where(tail_T > 0, _log(tail_T), 0.0))


def _draws_of(
    capture: Capture, n_T: Int32, kept_mass_T: npt.NDArray[np.float64], nucleus: float | None
) -> Draws | None:
    """The draws of tokens whose support reached its limit before the nucleus; of the others none."""
    if capture.draw_ids_TM is None or capture.draw_logprobs_TM is None:
        return None
    num_captured, num_draws = capture.topk_ids_TK.shape[1], capture.draw_ids_TM.shape[1]
    cut_T = (n_T == num_captured) & (kept_mass_T < (1.0 if nucleus is None else nucleus))
    # Outside the support there may be no probability to draw from: the engine then says -inf.
    cut_T &= np.isfinite(capture.draw_logprobs_TM).all(axis=1)
    return Draws(
        n_T=np.where(cut_T, num_draws, 0).astype(np.int32),
        ids_D=capture.draw_ids_TM[cut_T].reshape(-1).astype(np.int32),
        logprobs_D=capture.draw_logprobs_TM[cut_T].reshape(-1).astype(np.float32),
    )


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(x)
