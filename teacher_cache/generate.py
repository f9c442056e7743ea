"""Requests through an engine to the recorder: what is done is left out, the engine is kept full, failures are
counted.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from shared.errors import StillroomError
from shared.interrupt import StopRequest
from teacher_cache.intake.sources import LoadFailure
from teacher_cache.recorder import Recorder
from teacher_cache.requests import Engine, Failed, Outcome, Request

SHOW_INTERVAL_S = 0.25


class Pending:
    """Requests that are not done, read one ahead; load failures in between."""

    def __init__(self, requests: Iterable[Request | LoadFailure], is_done: Callable[[str], bool]) -> None:
        self.num_skipped = 0
        self._taken: set[str] = set()
        self._left = self._undone(iter(requests), is_done)
        self._next = next(self._left, None)

    def is_empty(self) -> bool:
        return self._next is None

    def take(self) -> Request | LoadFailure | None:
        """The next one, None at the end."""
        taken, self._next = self._next, next(self._left, None) if self._next is not None else None
        return taken

    def _undone(
        self, requests: Iterator[Request | LoadFailure], is_done: Callable[[str], bool]
    ) -> Iterator[Request | LoadFailure]:
        for request in requests:
            # The same request twice is one row: within a shard nobody would find the second.
            if is_done(request.sample_id) or request.sample_id in self._taken:
                self.num_skipped += 1
            else:
                self._taken.add(request.sample_id)
                yield request


class Loop:
    """Keeps the engine full and hands over what it finishes; `stopped` says why it ended before its work was done."""

    def __init__(
        self,
        engine: Engine,
        pending: Pending,
        recorder: Recorder,
        max_consecutive: int | None,
        stop: StopRequest,
    ) -> None:
        self.stopped: str | None = None
        self._engine, self._pending, self._recorder = engine, pending, recorder
        self._max_consecutive, self._stop = max_consecutive, stop
        self._consecutive = 0

    def __iter__(self) -> Iterator[None]:
        """Comes back SHOW_INTERVAL_S apart, for progress, and once at the end."""
        shown_s = 0.0
        while self.stopped is None and (self._fill() or self._engine.num_unfinished):
            for outcome in self._step():
                self._count(outcome)
                self._recorder.put(outcome)
            if time.monotonic() - shown_s >= SHOW_INTERVAL_S:
                yield
                shown_s = time.monotonic()
        yield

    def _fill(self) -> bool:
        """Submits while the engine has room; whether there is still something to submit."""
        while self._engine.has_room() and not self._pending.is_empty():
            request = self._pending.take()
            if isinstance(request, LoadFailure):
                self._recorder.put(request)
            elif request is not None:
                self._engine.submit(request)
        return not self._pending.is_empty()

    def _step(self) -> list[Outcome]:
        try:
            outcomes = self._engine.step()
        except StillroomError:
            # Ctrl-C reaches the engine's processes too: that they are gone is no news then.
            if not self._stop.is_set:
                raise
            outcomes = []
        if self._stop.is_set:
            self.stopped = "interrupted"
        return outcomes

    def _count(self, outcome: Outcome) -> None:
        self._consecutive = self._consecutive + 1 if isinstance(outcome, Failed) else 0
        limit = self._max_consecutive
        if isinstance(outcome, Failed) and limit is not None and self._consecutive >= limit and self.stopped is None:
            self.stopped = (
                f"{self._consecutive} prompts in a row failed, the last with: {outcome.message} "
                "(failures.max_consecutive is the limit; failed prompts are retried with --retry-failures)"
            )
