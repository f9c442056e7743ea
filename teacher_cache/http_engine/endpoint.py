"""One endpoint at work: a chain generated or scored as one conversation, and whether the endpoint may be asked at all.

Shape legend: T completion tokens.
"""

import asyncio
import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from schemas.records import Capture
from shared.errors import ConfigError
from teacher_cache.http_engine.answer_rows import MALFORMED, UNKNOWN_RANK, Form, Rows
from teacher_cache.http_engine.form_check import Expected, score_tokens
from teacher_cache.http_engine.handshake import KEY_STATUS, Served, key_refused, shake_hands
from teacher_cache.http_engine.http_client import HttpClient, Unavailable
from teacher_cache.http_engine.wire import CompletionsApi
from teacher_cache.requests import Failed, Finished, Outcome, Request, seed_of_draws

BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0

NUM_TROUBLES_TO_LEAVE_OUT = 3
"""Error statuses in a row, without a chain in between, after which an endpoint is asked for its health first."""


class Endpoint:
    """A server that is `up` or left out. `num_in_flight` chains are being asked for; `num_tokens` came so far;
    `is_busy` from when it is left out for having too much to do until a chain comes.
    """

    def __init__(self, http: HttpClient, expected: Expected) -> None:
        self.http = http
        self.url = http.url
        self.served: Served | None = None
        self.problem = "was not asked yet"
        self.num_in_flight = 0
        self.num_tokens = 0
        self.is_busy = False
        self.expected = expected
        self._num_troubles = 0
        self._num_failures = 0
        self._jitter = random.Random()
        self._down = asyncio.Event()

    @property
    def is_up(self) -> bool:
        """Whether chains may be asked of it."""
        return self.served is not None

    async def connect(self) -> Served:
        """What it serves. Raises ConfigError where it serves something else, Unavailable where it cannot be asked."""
        try:
            served = await shake_hands(self.http, self.expected)
        except (ConfigError, Unavailable) as error:
            self.leave_out(str(error))
            raise
        self._num_troubles = 0
        self._down.clear()
        self.served = served
        return served

    async def wait_until_down(self) -> None:
        """Returns when it was left out."""
        await self._down.wait()

    def leave_out(self, problem: str) -> None:
        """Not to be asked until it fits again; each time the pause before that grows."""
        self.problem = problem
        self._num_failures += 1
        self.served = None
        self._down.set()

    def backoff_s(self) -> float:
        """Pause before it is tried again: doubles with every failure since its last chain, with jitter."""
        return pause_s(self._num_failures, self._jitter)

    def note_success(self) -> None:
        """A chain came."""
        self.is_busy = False
        self._num_troubles = self._num_failures = 0

    def note_trouble(self, error: Unavailable) -> None:
        """A chain did not come; leaves the endpoint out where more than one answer looks wrong."""
        self._num_troubles += 1
        if error.status is None or self._num_troubles >= NUM_TROUBLES_TO_LEAVE_OUT:
            self.is_busy = error.is_busy
            self.leave_out(str(error))

    async def ask(self, served: Served, request: Request, max_tokens: int) -> Outcome:
        """Generates or scores. Raises Refused or Unavailable, KeyRefused where the API key is no longer taken."""
        try:
            if request.completion_token_ids is not None:
                return await self._score(served, request, request.completion_token_ids)
            return await self._generate(served, request, max_tokens)
        except Unavailable as error:
            if error.status in KEY_STATUS:
                raise key_refused(self.url, self.expected) from error
            raise
        except MALFORMED as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            raise Unavailable(f"answers something else: {problem}", was_sent=True, status=200) from error

    async def _generate(self, served: Served, request: Request, max_tokens: int) -> Outcome:
        rows, finish_reason = Rows(served.form), None
        body = served.api.generation(served.model, request, served.form, max_tokens)
        try:
            async for event in self.http.stream(served.api.path, body):
                for choice in event["choices"]:
                    num_before = rows.num_tokens
                    if choice["token_ids"]:
                        served.api.read(choice, rows)
                    self.num_tokens += rows.num_tokens - num_before
                    finish_reason = choice["finish_reason"] or finish_reason
            if finish_reason not in ("stop", "length"):
                # A server that is stopped ends its chains with `abort`: that says nothing about the chain.
                raise Unavailable(f"ended the chain with {finish_reason!r}", was_sent=True, status=200)
            capture = await self._with_ranks(served, request, rows.capture())
        except BaseException:
            # The chain will be asked for again: its tokens were not progress.
            self.num_tokens -= rows.num_tokens
            raise
        return _outcome(request, capture, finish_reason)

    async def _score(self, served: Served, request: Request, completion: Sequence[int]) -> Outcome:
        prompt = list(request.prompt_token_ids)
        ids = [*prompt, *completion]
        seed = seed_of_draws(request)
        capture = await score_tokens(self.http, served.api, served.model, ids, len(prompt), served.form, seed)
        self.num_tokens += len(completion)
        return _outcome(request, capture, "scored")

    async def _with_ranks(self, served: Served, request: Request, capture: Capture) -> Capture:
        """/v1/completions tells no rank of a token outside the candidates: those are asked for by scoring the chain."""
        unknown_T = (capture.sampled_rank_T == UNKNOWN_RANK) & ~np.isnan(capture.sampled_logprob_T)
        if not unknown_T.any():
            return capture
        prompt = list(request.prompt_token_ids)
        ids = [*prompt, *capture.token_ids_T.tolist()]
        # No candidates beside the actual token, whose rank is told with it.
        none = Form(0, self.expected.vocab_size)
        scored = await score_tokens(self.http, CompletionsApi(), served.model, ids, len(prompt), none)
        # The pass that reads a chain rounds otherwise than the one that wrote it: outside means outside.
        rank_T = np.maximum(scored.sampled_rank_T, self.expected.k + 1)
        return dataclasses.replace(
            capture, sampled_rank_T=np.where(unknown_T, rank_T, capture.sampled_rank_T).astype(np.int32)
        )


def pause_s(num_failures: int, jitter: random.Random) -> float:
    """Exponential backoff with jitter: half of the pause is random, so that clients do not all return at once."""
    longest_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** max(num_failures - 1, 0))
    return longest_s * jitter.uniform(0.5, 1.0)


def _outcome(request: Request, capture: Capture, finish_reason: str) -> Outcome:
    if np.isnan(capture.topk_logprobs_TK).any() or np.isnan(capture.sampled_logprob_T).any():
        return Failed(request, "not_finite", "the model's log probabilities hold NaN: check its dtype and weights")
    return Finished(request, capture, finish_reason)
