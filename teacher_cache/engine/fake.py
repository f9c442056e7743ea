"""Synthetic engine for tests and benchmarks: realistic distributions, no model.

Everything behind the engine runs for real: rows, codec, shards, commits, resumption. A chain is a pure function of its
request's seed, so a build that was killed and resumed has the same rows as an uninterrupted one.

Shape legend: T completion tokens, K candidates, M draws, C contexts, P candidates per context.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request, refusal

NUM_CONTEXTS = 512
CANDIDATES_PER_CONTEXT = 4
"""In multiples of K: the pool from which a context takes its K candidates."""
MEAN_CERTAIN_FRAC = 0.6
"""Fraction of tokens with a nearly certain prediction, as in reasoning models."""
MAX_IN_FLIGHT = 64
MAX_FINISHED_A_STEP = 8


class FakeEngine:
    """Implements teacher_cache.engine.api.Engine; about 100,000 tok/s at k=64."""

    def __init__(
        self,
        vocab_size: int,
        k: int,
        *,
        max_model_len: int = 4096,
        mean_tokens: int = 200,
        eos_id: int | None = None,
        draws: int = 0,
        temperatures: Sequence[float] = (),
        step_s: float = 0.0,
        refuse: Callable[[Request], str | None] | None = None,
    ) -> None:
        """`draws` and `temperatures` as in CaptureConfig; `eos_id` ends chains that stop; every step sleeps `step_s`;
        `refuse` returns a message for a request that should fail. `vocab_size` must be at least 8 k.
        """
        if vocab_size < 2 * CANDIDATES_PER_CONTEXT * k:
            raise ValueError(f"vocab_size={vocab_size} is too small for k={k}: it must be at least 8 k")
        self._k, self._mean_tokens, self._eos_id = k, mean_tokens, eos_id
        self._step_s, self._refuse = step_s, refuse
        self._vocab_size, self._draws, self._temperatures = vocab_size, draws, tuple(temperatures)
        self._queue: deque[Request] = deque()
        self._num_tokens = 0
        self._contexts_CP = _contexts(vocab_size, CANDIDATES_PER_CONTEXT * k)
        self.info = EngineInfo(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            entropy="support",
            software={"fake": "1"},
            settings={"max_model_len": max_model_len},
        )

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far."""
        return self._num_tokens

    @property
    def num_unfinished(self) -> int:
        """Requests not yet answered."""
        return len(self._queue)

    def has_room(self) -> bool:
        """Whether fewer than MAX_IN_FLIGHT requests are waiting."""
        return len(self._queue) < MAX_IN_FLIGHT

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self._queue.append(request)

    def step(self) -> list[Outcome]:
        """Finishes a few requests."""
        if self._step_s:
            time.sleep(self._step_s)
        num = min(MAX_FINISHED_A_STEP, len(self._queue))
        return [self._outcome(self._queue.popleft()) for _ in range(num)]

    def close(self) -> None:
        """Drops waiting requests."""
        self._queue.clear()

    def _outcome(self, request: Request) -> Outcome:
        refused = refusal(request, self.info)
        if refused is not None:
            return refused
        message = None if self._refuse is None else self._refuse(request)
        if message is not None:
            return request.failure("refused", message)
        given = request.completion_token_ids
        if given is not None:
            # Seeded by the tokens, so that a chain that is scored twice gets the same numbers.
            capture = self._capture(np.random.default_rng(list(given)), len(given), ends=False, given=given)
            self._num_tokens += len(given)
            return Finished(request, capture, "scored")
        # From the request alone, so that a chain is the same in every batch, worker and resumed build.
        rng = np.random.default_rng(request.seed)
        room = min(request.max_tokens, self.info.max_model_len - len(request.prompt_token_ids))
        # A lognormal's mean is exp(mu + sigma^2 / 2), here 1: lengths have the mean that was asked for.
        wanted = max(1, int(self._mean_tokens * rng.lognormal(-0.125, 0.5)))
        stops = wanted <= room
        capture = self._capture(rng, min(wanted, room), ends=stops)
        self._num_tokens += len(capture.token_ids_T)
        return Finished(request, capture, "stop" if stops else "length")

    def _capture(
        self, rng: np.random.Generator, num_tokens: int, *, ends: bool, given: Sequence[int] | None = None
    ) -> Capture:
        ids_TK = self._candidates(rng, num_tokens)
        if ends and self._eos_id is not None:
            # If eos is a candidate already, swap it with the first one so that ids stay distinct.
            ids_TK[-1][ids_TK[-1] == self._eos_id] = ids_TK[-1, 0]
            ids_TK[-1, 0] = self._eos_id
        logprobs_TK = _logprobs(rng, num_tokens, self._k)
        probs_TK = np.exp(logprobs_TK.astype(np.float64))
        # The distribution function inverted: as many candidates as lie below a uniform number come before the drawn
        # one.
        drawn_T = (np.cumsum(probs_TK, axis=1) < rng.random(num_tokens)[:, None]).sum(axis=1)
        # The candidates' mass ends below 1; a draw beyond it becomes the last candidate.
        column_T = np.minimum(drawn_T, self._k - 1)
        if ends:
            # A chain that stops has sampled the end-of-sequence token, which stands first.
            column_T[-1] = 0
        tokens = np.arange(num_tokens)
        if given is not None:
            # If a given token is a candidate already, swap it with the drawn one so that ids stay distinct.
            drawn_ids_T, given_T = ids_TK[tokens, column_T], np.array(given, np.int32)
            ids_TK = np.where(ids_TK == given_T[:, None], drawn_ids_T[:, None], ids_TK)
            ids_TK[tokens, column_T] = given_T
        draw_ids_TM, draw_logprobs_TM = self._tail_draws(rng, ids_TK, probs_TK)
        return Capture(
            token_ids_T=ids_TK[tokens, column_T],
            sampled_logprob_T=logprobs_TK[tokens, column_T],
            sampled_rank_T=(column_T + 1).astype(np.int32),
            topk_ids_TK=ids_TK,
            topk_logprobs_TK=logprobs_TK,
            draw_ids_TM=draw_ids_TM,
            draw_logprobs_TM=draw_logprobs_TM,
            log_partitions_TS=self._log_partitions(probs_TK),
        )

    def _tail_draws(
        self, rng: np.random.Generator, ids_TK: Int32, probs_TK: npt.NDArray[np.float64]
    ) -> tuple[Int32, Float32] | tuple[None, None]:
        """Draws from a tail that is uniform over all other ids."""
        if not self._draws:
            return None, None
        num_others = self._vocab_size - self._k
        places_TM = rng.integers(0, num_others, (len(ids_TK), self._draws))
        # Skip stored ids in ascending order, which maps j to the j-th id that is not among the k.
        ids_TM = places_TM.astype(np.int32)
        for column_T in np.sort(ids_TK, axis=1).T:
            ids_TM += ids_TM >= column_T[:, None]
        logprob_T = np.log(np.maximum(1.0 - probs_TK.sum(axis=1), 1e-30) / num_others)
        return ids_TM, np.repeat(logprob_T[:, None], self._draws, axis=1).astype(np.float32)

    def _log_partitions(self, probs_TK: npt.NDArray[np.float64]) -> Float32 | None:
        """log sum_v p_v^(1/tau) of the same distribution."""
        if not self._temperatures:
            return None
        num_others = self._vocab_size - self._k
        other_T = np.maximum(1.0 - probs_TK.sum(axis=1), 1e-30) / num_others
        sums = [
            np.log((probs_TK ** (1 / tau)).sum(axis=1) + num_others * other_T ** (1 / tau))
            for tau in self._temperatures
        ]
        return np.stack(sums, axis=1).astype(np.float32)

    def _candidates(self, rng: np.random.Generator, num_tokens: int) -> Int32:
        """Distinct ids per token: consecutive places of one context."""
        num_places = self._contexts_CP.shape[1]
        context_T = rng.integers(0, NUM_CONTEXTS, num_tokens)
        start_T = rng.integers(0, num_places, num_tokens)
        place_TK = (start_T[:, None] + np.arange(self._k)[None, :]) % num_places
        ids_TK: Int32 = self._contexts_CP[context_T[:, None], place_TK]
        return ids_TK


def _contexts(vocab_size: int, num_places: int) -> Int32:
    """Ids [C, P], distinct within a context. Small ids are more frequent, as in tokenizers ordered by frequency."""
    rng = np.random.default_rng(0)
    weights = 1.0 / (np.arange(vocab_size) + 10.0)
    # The smallest of exponentials divided by weights are a draw by weight without replacement.
    keys = rng.exponential(size=(NUM_CONTEXTS, vocab_size)) / weights
    return np.argpartition(keys, num_places, axis=1)[:, :num_places].astype(np.int32)


def _logprobs(rng: np.random.Generator, num_tokens: int, k: int) -> Float32:
    """Descending logprobs [T, K] float32: a certain or uncertain first token, then a noisy power law, then a tail."""
    certain_T = rng.random(num_tokens) < MEAN_CERTAIN_FRAC
    rest_T = np.where(certain_T, rng.beta(1.0, 60.0, num_tokens), rng.beta(3.0, 3.0, num_tokens))
    power_T = rng.uniform(1.2, 2.2, num_tokens)
    gaps_TK = rng.exponential(size=(num_tokens, k)) / (1.0 + np.arange(k))
    falling_TK = -power_T[:, None] * np.cumsum(gaps_TK, axis=1)
    weights_TK = np.exp(falling_TK)
    weights_TK[:, 0] = 0.0
    kept_T = rest_T * (1.0 - rng.beta(1.0, 30.0, num_tokens))
    probs_TK = kept_T[:, None] * weights_TK / np.maximum(weights_TK.sum(axis=1), 1e-300)[:, None]
    probs_TK[:, 0] = 1.0 - rest_T
    # An uncertain first token may not be the largest, but ranks are by probability.
    probs_TK = -np.sort(-probs_TK, axis=1)
    logprobs_TK: Float32 = np.log(np.maximum(probs_TK, 1e-30)).astype(np.float32)
    return logprobs_TK
