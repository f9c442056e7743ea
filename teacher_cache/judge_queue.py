"""Judging beside a build: answers wait in a bounded queue, processes of their own judge them, nobody waits for one.

A program that hangs takes a judge tens of seconds. The recorder hands answers over and goes on; what is judged by the
time a shard closes is committed then. What does not fit into the queue, or is not judged when the build is interrupted
or killed, has no verdict, and `teacher-cache judge` finds it by that.
"""

import queue
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from schemas.records import Prompt
from shared.judge_process import JudgeProcess
from teacher_cache.judging import JudgedSample, judge_of

MAX_WAITING = 10_000
"""Answers that may wait, some tens of MB of text."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Answer:
    sample_id: str
    kind: str
    answer: str | None
    reference: str | None
    metadata: Mapping[str, Any]


class JudgeQueue:
    """Judges of one build. `put`, `finished` and `wait` are for one thread, `hurry` and `close` for any."""

    def __init__(self, num_processes: int, max_waiting: int = MAX_WAITING) -> None:
        """Starts no process before the first answer comes."""
        self.num_left = 0
        """Answers that were left to `teacher-cache judge`."""
        self._max_waiting = max_waiting
        self._judges = [JudgeProcess() for _ in range(num_processes)]
        self._free: queue.SimpleQueue[JudgeProcess] = queue.SimpleQueue()
        for judge in self._judges:
            self._free.put(judge)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="judge")
        self._pending: dict[Future[JudgedSample | None], None] = {}
        self._done: deque[Future[JudgedSample | None]] = deque()
        self._hurried = False

    def put(self, sample_id: str, prompt: Prompt, answer: str | None) -> None:
        """Hands over an answer; of a prompt without a judge it does nothing."""
        kind = judge_of(prompt)
        if kind is None:
            return
        if len(self._pending) >= self._max_waiting:
            # Verdicts that wait for their shard to close take no answer's place.
            self._settle()
        if self._hurried or len(self._pending) >= self._max_waiting:
            self.num_left += 1
            return
        asked = _Answer(sample_id, kind, answer, prompt.reference, prompt.metadata)
        self._pending[self._threads.submit(self._judge, asked)] = None

    def finished(self) -> list[JudgedSample]:
        """Verdicts that have come since the last call. Raises StillroomError where a judge cannot work."""
        judged: list[JudgedSample] = []
        self._settle()
        while self._done:
            error = self._done[0].exception()
            if error is not None and judged:
                # The next call raises it: what was judged is good.
                break
            future = self._done.popleft()
            if error is not None:
                raise error
            verdict = future.result()
            self.num_left += verdict is None
            judged += [] if verdict is None else [verdict]
        return judged

    def wait(self) -> None:
        """Until everything is judged, or `hurry` says that nobody waits any more; the rest is left to others."""
        while self._pending and not self._hurried and not all(future.done() for future in self._pending):
            time.sleep(POLL_S)
        for future in [future for future in self._pending if not future.done()]:
            future.cancel()
            del self._pending[future]
            self.num_left += 1

    def hurry(self) -> None:
        """What is not judged by now is left to `teacher-cache judge`."""
        self._hurried = True

    def close(self) -> None:
        """Ends the processes, in the middle of a check if need be."""
        self._hurried = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for judge in self._judges:
            judge.kill()
        self._threads.shutdown(wait=True)
        for judge in self._judges:
            judge.close()

    def _settle(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            del self._pending[future]
            self._done.append(future)

    def _judge(self, asked: _Answer) -> JudgedSample | None:
        if self._hurried:
            return None
        judge = self._free.get()
        try:
            verdict = judge.judge(asked.kind, asked.answer, asked.reference, asked.metadata)
        finally:
            self._free.put(judge)
        return JudgedSample(asked.sample_id, asked.kind, verdict)
