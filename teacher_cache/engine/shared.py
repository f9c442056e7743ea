"""One engine for several builds in a row: started by the first that has something to do, stopped after the last."""

from collections.abc import Callable
from typing import Self

from teacher_cache.engine.api import Engine, EngineInfo, Outcome, Request


class SharedEngine:
    """A context manager that is an Engine to each build: `close` leaves the engine running for the next one."""

    def __init__(self) -> None:
        self._started: Engine | None = None
        self._tokens_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started is not None:
            self._started.close()

    def start(self, start_engine: Callable[[], Engine]) -> Engine:
        """The engine for the next build, which `start_engine` starts if none runs yet."""
        if self._started is None:
            self._started = start_engine()
        self._tokens_before = self._started.num_tokens
        return self

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._engine.info

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the present build."""
        return self._engine.num_tokens - self._tokens_before

    @property
    def num_unfinished(self) -> int:
        """Requests not yet answered."""
        return self._engine.num_unfinished

    def has_room(self) -> bool:
        """Whether to submit another request."""
        return self._engine.has_room()

    def submit(self, request: Request) -> None:
        """Accepts a request."""
        self._engine.submit(request)

    def step(self) -> list[Outcome]:
        """Advances generation."""
        return self._engine.step()

    def close(self) -> None:
        """Does nothing: another build may follow."""

    @property
    def _engine(self) -> Engine:
        assert self._started is not None
        return self._started
