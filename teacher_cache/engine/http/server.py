"""ServerEngine: one or several vLLM servers as one engine, and `check_endpoints` for `plan` and `doctor`.

A thread runs the event loop that keeps every endpoint busy (engine.http.pool). Needs neither vllm nor torch.
"""

import asyncio
import queue
import resource
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError
from stillroom.models import has_weights
from stillroom.schema.manifest import Teacher
from teacher_cache.config import CaptureConfig, ServerConfig
from teacher_cache.engine.api import EngineInfo, Outcome, Request, refusal
from teacher_cache.engine.http.client import HttpClient, Unavailable, read_api_key
from teacher_cache.engine.http.handshake import Expected, check_server
from teacher_cache.engine.http.pool import EndpointPool, Job
from teacher_cache.engine.teacher import IdentifiedTeacher

NUM_OTHER_FILES = 256
"""Files besides connections: shards, libraries, the judge's pipes."""

STEP_S = 0.2
"""Longest time that a step waits for a chain."""
MAX_SILENCE_S = 20.0
"""A build waits for a server that is loading; `plan` and `doctor` do not."""


class ServerEngine:
    """vLLM servers as one engine. Implements teacher_cache.engine.api.Engine."""

    def __init__(
        self,
        config: ServerConfig,
        teacher: Teacher,
        tokenizer: Any,
        capture: CaptureConfig,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Waits until an endpoint serves the teacher.

        Raises ConfigError if one serves something else or lacks a flag or the plugin, StillroomError if none answers
        within `give_up_minutes`. `extra` is sampling.vllm, which the servers must accept.
        """
        api_key = read_api_key(config.api_key_env, "engine.api_key_env")
        expected = _expected_of(config, teacher, tokenizer, capture, extra or {})
        _allow_connections(config)
        self._config = config
        self._answers: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._num_open = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._pool = EndpointPool(config, expected, api_key, self._answers)
        # The loop has a thread of its own: streams are read while the build's thread makes requests and waits.
        self._thread = threading.Thread(target=self._loop.run_forever, name="server engine", daemon=True)
        self._thread.start()
        try:
            self._wait(self._pool.open())
            self._info = self._pool.info()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the endpoints that answered at the start share."""
        return self._info

    @property
    def num_tokens(self) -> int:
        """Completion tokens received so far, without those of chains that broke off."""
        return self._pool.num_tokens

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet answered."""
        return self._num_open

    def has_room(self) -> bool:
        """Whether fewer requests are open than all endpoints take at once, plus one endpoint's share in reserve."""
        return self._num_open < self._config.max_in_flight * (len(self._config.endpoints) + 1)

    def submit(self, request: Request) -> None:
        """Hands a request to the event loop, or queues its refusal."""
        self._num_open += 1
        refused = refusal(request, self._info)
        if refused is not None:
            self._answers.put(refused)
        else:
            self._loop.call_soon_threadsafe(self._pool.offer, Job(request))

    def step(self) -> list[Outcome]:
        """Waits briefly for finished chains. Raises StillroomError if no endpoint is left."""
        if not self._num_open:
            return []
        outcomes = list(self._available())
        if not outcomes:
            # Outcomes from before the error were returned first.
            if self._error is not None:
                raise self._error
            self._pool.raise_if_lost()
        self._num_open -= len(outcomes)
        return outcomes

    def close(self) -> None:
        """Cancels open requests, which the servers notice, and ends the thread."""
        if self._closed:
            return
        self._closed = True
        self._wait(self._pool.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, coroutine: Coroutine[Any, Any, None]) -> None:
        waiting = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            waiting.result()
        except BaseException:
            # After a Ctrl-C the coroutine must not continue in the other thread.
            waiting.cancel()
            raise

    def _available(self) -> Iterator[Outcome]:
        """All available outcomes, or one that arrives within STEP_S; stops at an error."""
        timeout_s = STEP_S
        while self._error is None:
            try:
                answer = self._answers.get(timeout=timeout_s) if timeout_s else self._answers.get_nowait()
            except queue.Empty:
                return
            if isinstance(answer, BaseException):
                self._error = answer
            else:
                yield answer
            timeout_s = 0.0


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """State of one endpoint in a line; `max_model_len` is None if a build cannot use it."""

    url: str
    summary: str
    max_model_len: int | None


def check_endpoints(
    config: ServerConfig,
    teacher: IdentifiedTeacher,
    capture: CaptureConfig,
    extra: Mapping[str, Any] | None = None,
) -> list[EndpointStatus]:
    """What each endpoint serves, or why a build could not use it. Raises ConfigError if the API key is missing."""
    key = read_api_key(config.api_key_env, "engine.api_key_env")
    expected = _expected_of(config, teacher.record, teacher.tokenizer, capture, extra or {})

    async def check_all() -> list[EndpointStatus]:
        return await asyncio.gather(*(_check(url, key, expected) for url in config.endpoints))

    return asyncio.run(check_all())


def _expected_of(
    config: ServerConfig, teacher: Teacher, tokenizer: Any, capture: CaptureConfig, extra: Mapping[str, Any]
) -> Expected:
    """What every endpoint must serve."""
    return Expected(
        model=config.model,
        api_key_env=config.api_key_env,
        max_model_len=config.max_model_len,
        k=min(capture.max_support, teacher.vocab_size),
        draws=capture.draws,
        temperatures=tuple(capture.temperatures),
        vocab_size=teacher.vocab_size,
        tokenizer=tokenizer,
        extra=extra,
        is_adapter=_is_adapter(teacher),
    )


def _is_adapter(teacher: Teacher) -> bool | None:
    if teacher.adapter is not None:
        return True
    folder = Path(teacher.model)
    # Without weights the served name is the teacher's identity, whatever it stands for.
    return None if folder.is_dir() and not has_weights(folder) else False


def _allow_connections(config: ServerConfig) -> None:
    """Every chain in flight is an open connection, and many systems limit a process to 1024 unless it asks for more."""
    needed = config.max_in_flight * len(config.endpoints) + NUM_OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"engine.max_in_flight={config.max_in_flight} on {len(config.endpoints)} endpoints needs {needed} open "
            f"files, but this system allows {hard}: lower it or raise ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _check(url: str, key: str | None, expected: Expected) -> EndpointStatus:
    async with HttpClient(url, key, MAX_SILENCE_S) as http:
        try:
            served = await check_server(http, expected)
        except Unavailable as error:
            return EndpointStatus(url, f"cannot be used now: {error}", None)
        except ConfigError as error:
            return EndpointStatus(url, f"does not fit: {str(error).removeprefix(url).strip()}", None)
    summary = (
        f"serves {served.model}, max_model_len {served.max_model_len}, vllm {served.version}, {served.api.path}, "
        f"{'entropy of the candidates alone (no plugin)' if served.form.layout is None else 'sampler plugin'}"
    )
    return EndpointStatus(url, summary, served.max_model_len)
