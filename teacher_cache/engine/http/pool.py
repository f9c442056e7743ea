"""Endpoints that share a queue of requests: dispatch, retries, and endpoints that are excluded and come back.

Runs in one event loop. An endpoint in trouble is excluded and checked again after growing pauses until it serves the
same teacher again; its chains go back to the queue.

Shape legend: T completion tokens.
"""

import asyncio
import dataclasses
import queue
import random
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import note, warn
from stillroom.schema.records import Capture
from teacher_cache.config import ServerConfig
from teacher_cache.engine.api import FINISH_REASONS, EngineInfo, Finished, Outcome, Request, seed_of_draws
from teacher_cache.engine.http.client import HttpClient, Refused, Unavailable
from teacher_cache.engine.http.handshake import (
    KEY_STATUS,
    Entropy,
    Expected,
    KeyRefused,
    Served,
    check_server,
    key_refused,
    score_tokens,
)
from teacher_cache.engine.http.wire import MALFORMED, UNKNOWN_RANK, CompletionsApi, Form, Rows

BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0

MAX_TROUBLES = 3
"""Consecutive error statuses, without a chain in between, after which an endpoint is excluded."""
OPEN_POLL_S = 0.1
STRAGGLER_S = 3.0
"""How much longer than for the first endpoint a build waits for the others before it starts."""


class Endpoint:
    """One server, in use or excluded. `num_in_flight` chains are requested from it; `num_tokens` arrived so far;
    `is_busy` from when it is excluded as overloaded until its next chain.
    """

    def __init__(self, http: HttpClient, expected: Expected, handshake_s: float) -> None:
        self.http = http
        self.handshake_s = handshake_s
        self.url = http.url
        self.served: Served | None = None
        self.problem = "has not answered yet"
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
        """Whether it gets requests."""
        return self.served is not None

    async def connect(self) -> Served:
        """What it serves. Raises ConfigError if it does not fit, Unavailable if it cannot be reached."""
        try:
            # Chains may wait silently for minutes in a queue; a dead endpoint must show sooner.
            async with asyncio.timeout(self.handshake_s):
                served = await check_server(self.http, self.expected)
        except TimeoutError:
            problem = f"does not finish the checks within engine.handshake_s={self.handshake_s:g} s"
            self.exclude(problem)
            raise Unavailable(problem, was_sent=True) from None
        except (ConfigError, Unavailable) as error:
            self.exclude(str(error))
            raise
        self._num_troubles = 0
        self._down.clear()
        self.served = served
        return served

    async def wait_until_down(self) -> None:
        """Returns when it is excluded."""
        await self._down.wait()

    def exclude(self, problem: str) -> None:
        """Stops using it until it fits again; the pause before the next check grows each time."""
        self.problem = problem
        self._num_failures += 1
        self.served = None
        # Wakes _keep, which reconnects.
        self._down.set()

    def backoff_s(self) -> float:
        """Pause before the next check: doubles with every failure since its last chain, with jitter."""
        return pause_s(self._num_failures, self._jitter)

    def note_success(self) -> None:
        """A chain arrived."""
        self.is_busy = False
        self._num_troubles = self._num_failures = 0

    def note_trouble(self, error: Unavailable) -> None:
        """A chain failed: excludes the endpoint at a broken connection or after MAX_TROUBLES."""
        self._num_troubles += 1
        if error.status is None or self._num_troubles >= MAX_TROUBLES:
            self.is_busy = error.is_busy
            self.exclude(str(error))

    async def run(self, served: Served, request: Request, max_tokens: int) -> Outcome:
        """Generates or scores. Raises Refused, Unavailable, or KeyRefused if the API key is no longer accepted."""
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
            raise Unavailable(f"sent an unexpected answer: {problem}", was_sent=True, status=200) from error

    async def _generate(self, served: Served, request: Request, max_tokens: int) -> Outcome:
        rows, finish_reason, started_s = Rows(served.form), None, time.monotonic()
        body = served.api.generation(served.model, request, served.form, max_tokens)
        try:
            async for event in self.http.stream(served.api.path, body):
                for choice in event["choices"]:
                    num_before = rows.num_tokens
                    if choice["token_ids"]:
                        served.api.read(choice, rows)
                    self.num_tokens += rows.num_tokens - num_before
                    finish_reason = choice["finish_reason"] or finish_reason
            if finish_reason not in FINISH_REASONS:
                # A server that shuts down ends its chains with `abort`, which is not the chain's fault.
                raise Unavailable(f"ended the chain with {finish_reason!r}", was_sent=True, status=200)
            capture = await self._with_ranks(served, request, rows.capture())
        except BaseException as error:
            # The chain will be retried, so its tokens were not progress.
            self.num_tokens -= rows.num_tokens
            # For a status before the first token, "after 0 tokens" would add nothing.
            if isinstance(error, Unavailable) and error.was_sent and (error.status is None or rows.num_tokens):
                raise error.after(rows.num_tokens, time.monotonic() - started_s) from error
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
        """/v1/completions reports no rank of a token outside the candidates: scoring the chain gives those."""
        # A chain with NaN fails in `_outcome`: scoring it would cost a prefill for nothing.
        unknown_T = (capture.sampled_rank_T == UNKNOWN_RANK) & ~np.isnan(capture.sampled_logprob_T)
        if not unknown_T.any():
            return capture
        prompt = list(request.prompt_token_ids)
        ids = [*prompt, *capture.token_ids_T.tolist()]
        # Zero candidates: the token itself is always reported, with its rank.
        none = Form(0, self.expected.vocab_size)
        scored = await score_tokens(self.http, CompletionsApi(), served.model, ids, len(prompt), none)
        # Scoring rounds differently from generation, but a token outside the candidates must keep a rank above k.
        rank_T = np.maximum(scored.sampled_rank_T, self.expected.k + 1)
        return dataclasses.replace(
            capture, sampled_rank_T=np.where(unknown_T, rank_T, capture.sampled_rank_T).astype(np.int32)
        )


@dataclass(slots=True)
class Job:
    """A request in the pool. `num_attempts` counts tries that an endpoint may have worked on, `num_waits` those that a
    busy one turned away.
    """

    request: Request
    num_attempts: int = 0
    num_waits: int = 0


class EndpointPool:
    """Endpoints and their queue. Everything but `num_tokens`, `info` and `raise_if_lost` runs in the event loop."""

    def __init__(
        self,
        config: ServerConfig,
        expected: Expected,
        api_key: str | None,
        answers: "queue.SimpleQueue[Outcome | BaseException]",
    ) -> None:
        self._config, self._expected, self._api_key, self._answers = config, expected, api_key, answers
        self._endpoints: list[Endpoint] = []
        self._jobs: deque[Job] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._came_up = asyncio.Event()
        self._misfit: ConfigError | None = None
        self._max_model_len = 0
        self._entropy: Entropy | None = None
        self._noted_busy: set[str] = set()
        self._none_since_s: float | None = time.monotonic()
        self._jitter = random.Random()

    @property
    def num_tokens(self) -> int:
        return sum(endpoint.num_tokens for endpoint in self._endpoints)

    async def open(self) -> None:
        """Starts with the endpoints that fit at the first check; if there is none, waits for the first."""
        for url in self._config.endpoints:
            http = HttpClient(url, self._api_key, self._config.stall_s)
            self._endpoints.append(Endpoint(http, self._expected, self._config.handshake_s))
        await self._first_tries()
        while not any(endpoint.is_up for endpoint in self._endpoints):
            self.raise_if_lost()
            self._raise_misfit()
            await asyncio.sleep(OPEN_POLL_S)
        lengths = {one.url: one.served.max_model_len for one in self._endpoints if one.served is not None}
        self._max_model_len = self._common_length(lengths)
        self._entropy = self._common_entropy()
        for endpoint in self._endpoints:
            # Whoever comes back must give this kind of entropy.
            endpoint.expected = dataclasses.replace(self._expected, entropy=self._entropy)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Connections last: a cancelled task still closes its stream on the way out.
        for endpoint in self._endpoints:
            await endpoint.http.__aexit__(None, None, None)

    def info(self) -> EngineInfo:
        served = {one.url: one.served for one in self._endpoints if one.served is not None}
        versions = sorted({one.version for one in served.values()})
        assert self._entropy is not None, "the pool is not open"
        return EngineInfo(
            vocab_size=self._expected.vocab_size,
            max_model_len=self._max_model_len,
            entropy=self._entropy,
            software={"vllm": ", ".join(versions)},
            settings={
                "max_model_len": self._max_model_len,
                "sampler": "plugin" if self._entropy == "exact" else "vllm",
                "served": {url: {"model": one.model, "path": one.api.path} for url, one in served.items()},
            },
        )

    def offer(self, job: Job) -> None:
        """Queues a job: a new one at the end, a retried one at the front."""
        if job.num_attempts + job.num_waits:
            # In front: a chain that was begun should not wait behind a million new ones.
            self._jobs.appendleft(job)
        else:
            self._jobs.append(job)
        self._dispatch()

    def raise_if_lost(self) -> None:
        """Raises StillroomError if no endpoint was usable for `give_up_minutes`."""
        since_s = self._none_since_s
        # An overloaded endpoint that still works on chains is slow, not lost.
        if any(one.is_up or (one.is_busy and one.num_in_flight) for one in self._endpoints):
            return
        if since_s is None or time.monotonic() - since_s < 60 * self._config.give_up_minutes:
            return
        problems = "; ".join(f"{endpoint.url} {endpoint.problem}" for endpoint in self._endpoints)
        raise StillroomError(
            f"no endpoint was usable for {self._config.give_up_minutes:g} minutes ({problems}): fix that and run the "
            "same command again to resume"
        )

    def _dispatch(self) -> None:
        """Gives jobs to the least busy endpoints."""
        while self._jobs:
            free = [one for one in self._endpoints if one.is_up and one.num_in_flight < self._config.max_in_flight]
            if not free:
                return
            # Chains differ in length by orders of magnitude: balance what is open, not what was sent.
            endpoint = min(free, key=lambda one: one.num_in_flight)
            # Counted before the task runs, or this loop would give one endpoint everything.
            endpoint.num_in_flight += 1
            self._start(self._run(endpoint, self._jobs.popleft()))

    async def _run(self, endpoint: Endpoint, job: Job) -> None:
        try:
            outcome = await self._try(endpoint, job)
        finally:
            endpoint.num_in_flight -= 1
        if outcome is not None:
            self._answers.put(outcome)
        self._dispatch()

    async def _try(self, endpoint: Endpoint, job: Job) -> Outcome | None:
        """The outcome, None if the job goes back to the queue."""
        request, served = job.request, endpoint.served
        # Excluded between dispatch and start.
        if served is None:
            self.offer(job)
            return None
        room = self._max_model_len - len(request.prompt_token_ids)
        try:
            outcome = await endpoint.run(served, request, min(request.max_tokens, room))
        except Refused as error:
            return request.failure("refused", str(error))
        except KeyRefused as error:
            self._answers.put(error)
            return None
        except Unavailable as error:
            return self._after_trouble(endpoint, job, error)
        endpoint.note_success()
        # A chain that finishes at an excluded endpoint also shows that it works: restart the clock.
        self._none_since_s = None if any(one.is_up for one in self._endpoints) else time.monotonic()
        return outcome

    def _after_trouble(self, endpoint: Endpoint, job: Job, error: Unavailable) -> Outcome | None:
        # Chains that break off together exclude their endpoint once.
        was_up = endpoint.is_up
        if was_up:
            endpoint.note_trouble(error)
        if was_up and not endpoint.is_up:
            self._note_down(endpoint)
        # A busy server did no work, so only other errors count against the chain, which may be what kills servers.
        if error.is_busy:
            job.num_waits += 1
        else:
            job.num_attempts += error.was_sent
        if job.num_attempts >= self._config.max_attempts:
            return job.request.failure("engine_error", f"after {job.num_attempts} attempts {endpoint.url} {error}")
        pause = max(pause_s(job.num_attempts + job.num_waits, self._jitter), min(error.retry_after_s, MAX_BACKOFF_S))
        # The chain pauses, not the loop: others are dispatched meanwhile.
        asyncio.get_running_loop().call_later(pause, self.offer, job)
        return None

    async def _first_tries(self) -> None:
        """Checks every endpoint, and waits for all, or STRAGGLER_S longer than for the first that fits."""
        tries = {asyncio.get_running_loop().create_task(self._first_try(one)): one for one in self._endpoints}
        for first, endpoint in tries.items():
            self._start(self._keep(endpoint, first))
        first_up_s: float | None = None
        while waiting := [one for one in tries if not one.done()]:
            if any(endpoint.is_up for endpoint in self._endpoints):
                first_up_s = first_up_s or time.monotonic()
                if time.monotonic() - first_up_s >= STRAGGLER_S:
                    break
            else:
                self.raise_if_lost()
            await asyncio.wait(waiting, timeout=OPEN_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        self._raise_misfit()
        for one in waiting:
            note(f"{tries[one].url} has not answered yet: starting without it")

    async def _first_try(self, endpoint: Endpoint) -> None:
        try:
            await self._connect(endpoint)
        except ConfigError as error:
            self._misfit = error
            if self._max_model_len:
                # The build has started without it.
                warn(f"excluded: {error}")
        except Unavailable as error:
            note(f"{endpoint.url} {error}: retrying until it answers")

    async def _keep(self, endpoint: Endpoint, first: "asyncio.Task[None]") -> None:
        """Reconnects the endpoint whenever it is down after its first check, until the pool closes."""
        await first
        reported, is_quiet = endpoint.problem, False
        while True:
            if endpoint.is_up:
                await endpoint.wait_until_down()
                reported, is_quiet = endpoint.problem, endpoint.is_busy
            await asyncio.sleep(endpoint.backoff_s())
            try:
                await self._connect(endpoint)
            except KeyRefused as error:
                self._misfit = error
                self._answers.put(error)
                return
            except (ConfigError, Unavailable) as error:
                if isinstance(error, ConfigError):
                    self._misfit = error
                if str(error) != reported:
                    warn(f"excluded: {error}" if isinstance(error, ConfigError) else f"{endpoint.url} {error}")
                    is_quiet = False
                reported = str(error)
            else:
                if not is_quiet:
                    note(f"{endpoint.url} is connected")

    async def _connect(self, endpoint: Endpoint) -> None:
        served = await endpoint.connect()
        if self._entropy not in (None, served.entropy):
            # It was checked before the pool had settled on one kind of entropy.
            endpoint.served = None
            served = await endpoint.connect()
        if served.max_model_len < self._max_model_len:
            problem = (
                f"{endpoint.url} came back with max_model_len {served.max_model_len}, but the build was started with "
                f"{self._max_model_len}: start it with --max-model-len {self._max_model_len}"
            )
            endpoint.exclude(problem)
            raise ConfigError(problem)
        if not endpoint.is_busy:
            # A busy endpoint must first finish a chain: it may answer checks and no requests.
            self._none_since_s = None
        self._dispatch()

    def _note_down(self, endpoint: Endpoint) -> None:
        left = sum(one.is_up for one in self._endpoints)
        others = f"{left} of {len(self._endpoints)} endpoints continue"
        if not endpoint.is_busy:
            note(f"{endpoint.url} {endpoint.problem}: excluded and retried, {others}")
        elif endpoint.url not in self._noted_busy:
            # Noted once: it may come and go with every chain.
            self._noted_busy.add(endpoint.url)
            slower = "overloaded, sending requests more slowly (lower engine.max_in_flight to send fewer)"
            note(f"{endpoint.url} {endpoint.problem}: {slower}, {others}")
        if not left and self._none_since_s is None:
            self._none_since_s = time.monotonic()

    def _raise_misfit(self) -> None:
        if self._misfit is not None:
            raise self._misfit

    def _common_length(self, lengths: dict[str, int]) -> int:
        if self._config.max_model_len is not None:
            return min(self._config.max_model_len, *lengths.values())
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{url} {length}" for url, length in lengths.items())
            raise ConfigError(f"the endpoints allow chains of different lengths ({listed}): set engine.max_model_len")
        return next(iter(lengths.values()))

    def _common_entropy(self) -> Entropy:
        kinds = {one.url: one.served.entropy for one in self._endpoints if one.served is not None}
        if len(set(kinds.values())) > 1:
            having, lacking = (", ".join(url for url in kinds if kinds[url] == kind) for kind in ("exact", "support"))
            raise ConfigError(
                f"{having} has stillroom's sampler plugin and {lacking} does not, so entropies would differ in kind: "
                "pip install stillroom on all of them, or list only one kind in engine.endpoints"
            )
        return next(iter(kinds.values()))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        # asyncio's loop holds tasks weakly: without this set one could be collected while it runs.
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # A bug of ours: end the build instead of losing the task.
            self._answers.put(error)


def pause_s(num_failures: int, jitter: random.Random) -> float:
    """Exponential backoff with jitter: half of the pause is random, so that clients do not all return at once."""
    # Busy servers are asked without limit, and 2.0 ** 1024 overflows.
    longest_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(max(num_failures - 1, 0), 64))
    return longest_s * jitter.uniform(0.5, 1.0)


def _outcome(request: Request, capture: Capture, finish_reason: str) -> Outcome:
    if np.isnan(capture.topk_logprobs_TK).any() or np.isnan(capture.sampled_logprob_T).any():
        return request.failure("not_finite", "the model's log probabilities hold NaN: check its dtype and weights")
    return Finished(request, capture, finish_reason)
