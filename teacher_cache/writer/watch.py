"""Checks whether tokens can be samples of the teacher, by the log probabilities and entropies that are captured anyway.

An engine that ignores its sampling settings fills a cache with noise and reports no error: on a CPU, vLLM's n-gram
speculation forgets the temperature. The distributions it returns are right all the same, so its tokens give it away.

For a token x drawn from p, E[log p(x)] = -H(p). Temperatures below 1, top-k, top-p and min-p move probability to more
probable tokens, which only raises it. So d = log p(x) + H(p) has a mean of at least 0 whatever came before, and sums of
d over correlated tokens of one chain are a submartingale: sqrt(sum d²) is their standard error without any correction.

Shape legend: T tokens, K captured candidates.
"""

import math

import numpy as np
import numpy.typing as npt

from stillroom.log import format_plural
from stillroom.schema.records import Capture
from teacher_cache.engine.api import Finished
from teacher_cache.engine.switches import MOVING, WATCHED

NUM_ERRORS = 8.0
"""exp(-8²/2) = 1e-14 a look. As |sum d| is at most sqrt(n · sum d²), nothing is said before 64 tokens; noise, some 12
nats below, is noticed within 100.
"""
MARGIN_NATS = 0.1
"""More than any rounding of stored numbers; smaller differences are rounding."""
MIN_NATS = -50.0
"""Bounds d: a token without probability in float32 has -inf."""
BLOCK_TOKENS = 1 << 16
"""Tokens judged together. A server that goes wrong after a million good ones must not hide behind them."""


class SampleWatch:
    """Sums over the chains of one process."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._clear()

    def problem(self, finished: Finished) -> str | None:
        """Adds a chain. Returns one line if the tokens of the present block cannot be the teacher's."""
        if not is_watched(finished):
            return None
        if self._num_tokens >= BLOCK_TOKENS:
            self._clear()
        logprob_T = finished.capture.sampled_logprob_T.astype(np.float64)
        entropy_T = max_entropy(finished.capture, self._vocab_size)
        excess_T = np.maximum(logprob_T + entropy_T, MIN_NATS)
        self._num_chains += 1
        self._num_tokens += len(excess_T)
        # Bounded as the excess is, or one token of -inf would make the printed mean -inf.
        self._logprob += float(np.maximum(logprob_T, MIN_NATS).sum())
        self._entropy += float(entropy_T.sum())
        self._excess += float(excess_T.sum())
        self._squares += float((excess_T**2).sum())
        limit = NUM_ERRORS * math.sqrt(self._squares) + MARGIN_NATS * self._num_tokens
        return self._line() if self._excess < -limit else None

    def _clear(self) -> None:
        self._num_chains = self._num_tokens = 0
        self._logprob = self._entropy = self._excess = self._squares = 0.0

    def _line(self) -> str:
        num = self._num_tokens
        over = f"{num:,} tokens of {format_plural(self._num_chains, 'chain')}"
        least, error = -self._entropy / num, NUM_ERRORS * math.sqrt(self._squares) / num
        return (
            f"the tokens cannot be the teacher's: over {over} the mean log probability is {self._logprob / num:.2f}, "
            f"and samples of the teacher have at least {least:.2f} (minus the mean entropy), within {error:.2f}. These "
            "chains were not saved; committed ones are kept. The engine's sampler ignores its settings: turn off its "
            "speculative decoding and custom logits processors, then run the same command again"
        )


def is_watched(finished: Finished) -> bool:
    """Whether the chain was generated in a way that cannot lower the mean log probability."""
    # Each of the others can prefer improbable tokens without anything being wrong.
    sampling = finished.request.sampling
    return (
        finished.request.completion_token_ids is None
        and sampling.get("temperature", 1.0) <= 1.0
        and sampling.get("repetition_penalty", 1.0) == 1.0
        and WATCHED.issuperset(sampling.get("vllm", ()))
        and MOVING.isdisjoint(sampling.get("engine", ()))
    )


def max_entropy(capture: Capture, vocab_size: int) -> npt.NDArray[np.float64]:
    """The exact entropies [T], or upper bounds where only K candidates are known: the rest spread evenly."""
    if capture.entropy_T is not None:
        return capture.entropy_T.astype(np.float64)
    logprobs_TK = capture.topk_logprobs_TK.astype(np.float64)
    probs_TK = np.exp(logprobs_TK)
    known_T = -(probs_TK * np.maximum(logprobs_TK, MIN_NATS)).sum(axis=1)
    # Rounded probabilities may add up to more than 1, and the logarithm of nothing is not a number.
    tail_T = np.clip(1.0 - probs_TK.sum(axis=1), 1e-12, 1.0)
    return np.asarray(known_T + tail_T * np.log(max(1, vocab_size - probs_TK.shape[1]) / tail_T))
