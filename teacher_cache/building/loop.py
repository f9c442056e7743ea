"""The generation loop: keeps the engine full of requests that are not done, and records what becomes of them."""

import time
from collections.abc import Callable, Iterable, Iterator

from stillroom.errors import StillroomError
from stillroom.program import StopRequest
from teacher_cache.engine.api import Engine, Failure, Outcome, Request
from teacher_cache.scrub.chains import ChainCheck
from teacher_cache.workers.joining import WAIT_S, Wait
from teacher_cache.writer.recorder import Recorder

SHOW_INTERVAL_S = 0.25
VERDICT_WAIT_S = 0.05
"""Like WAIT_S, where it depends on a judge of this process."""


class Pending:
    """Requests that are not done, read one ahead, with failures of loading in between."""

    def __init__(self, requests: Iterable[Request | Failure | Wait], is_done: Callable[[str], bool]) -> None:
        self.num_skipped = 0
        self._seen: set[str] = set()
        self._remaining = self._undone(requests, is_done)
        # One ahead: whether anything is left must be known before a model is loaded.
        self._next = next(self._remaining, None)

    def is_empty(self) -> bool:
        return self._next is None

    def is_waiting(self) -> bool:
        """Whether the next one depends on something that is still to come."""
        return isinstance(self._next, Wait) and self._next is not Wait.READY

    def waits_for_verdicts(self) -> bool:
        """Whether it depends on what this process judges."""
        return self._next is Wait.VERDICTS

    def pop(self) -> Request | Failure | Wait | None:
        """The next one, None at the end. WAIT: ask again later."""
        popped, self._next = self._next, next(self._remaining, None) if self._next is not None else None
        return popped

    def _undone(
        self, requests: Iterable[Request | Failure | Wait], is_done: Callable[[str], bool]
    ) -> Iterator[Request | Failure | Wait]:
        for request in requests:
            if isinstance(request, Wait):
                yield request
                continue
            # Commits compare a shard with visible rows only, so a repeat within a shard would go unnoticed.
            if is_done(request.sample_id) or request.sample_id in self._seen:
                self.num_skipped += 1
            else:
                self._seen.add(request.sample_id)
                yield request


class Loop:
    """Keeps the engine full and records its outcomes; `stopped` says why it ended early."""

    def __init__(
        self,
        engine: Engine,
        pending: Pending,
        recorder: Recorder,
        max_consecutive: int | None,
        stop: StopRequest,
        check: ChainCheck | None = None,
    ) -> None:
        self.stopped: str | None = None
        self._check = check
        self._engine, self._pending, self._recorder = engine, pending, recorder
        self._max_consecutive, self._stop = max_consecutive, stop
        self._consecutive = 0

    def __iter__(self) -> Iterator[None]:
        """Yields every SHOW_INTERVAL_S, for progress, and once at the end."""
        shown_s = 0.0
        while self.stopped is None and (self._fill() or self._engine.num_unfinished):
            if self._pending.is_waiting() and not self._engine.num_unfinished:
                # Nothing is put into the recorder, so nothing else would tell that it has ended.
                self._recorder.check()
                if not self._pending.waits_for_verdicts():
                    # What is finished here is all that keeps others waiting in turn.
                    self._recorder.flush()
                time.sleep(VERDICT_WAIT_S if self._pending.waits_for_verdicts() else WAIT_S)
            for outcome in self._step():
                if isinstance(outcome, Failure) and self._check is not None:
                    outcome = self._check.failure(outcome)
                self._count(outcome)
                self._recorder.put(outcome)
            if time.monotonic() - shown_s >= SHOW_INTERVAL_S:
                yield
                shown_s = time.monotonic()
        yield

    def _fill(self) -> bool:
        """Submits while the engine has room; False once everything is submitted."""
        while self._engine.has_room() and not self._pending.is_empty():
            request = self._pending.pop()
            if request is Wait.READY:
                continue
            if isinstance(request, Wait):
                return True
            if isinstance(request, Failure):
                self._recorder.put(request)
            elif request is not None:
                self._engine.submit(request)
        return not self._pending.is_empty()

    def _step(self) -> list[Outcome]:
        try:
            outcomes = self._engine.step()
        except StillroomError:
            # Ctrl-C reaches the engine's processes too, so after it a dead engine is expected.
            if not self._stop.is_set:
                raise
            outcomes = []
        if self._stop.is_set:
            self.stopped = "interrupted"
        return outcomes

    def _count(self, outcome: Outcome) -> None:
        self._consecutive = self._consecutive + 1 if isinstance(outcome, Failure) else 0
        limit = self._max_consecutive
        if isinstance(outcome, Failure) and limit is not None and self._consecutive >= limit and self.stopped is None:
            self.stopped = (
                f"{self._consecutive} prompts in a row failed, the last with: {outcome.message} "
                "(failures.max_consecutive is the limit; failed prompts are retried with --retry-failures)"
            )
