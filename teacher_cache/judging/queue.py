"""Judges answers while a build generates.

In: answers and references. Out: verdicts. A program that hangs keeps a judge busy for tens of seconds, so a build never
waits for one: answers queue up, and finished verdicts are committed whenever a shard closes. Answers that do not fit
into the queue, or are not judged when the build is interrupted, have no verdict, which is how `teacher-cache judge`
finds them.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

from stillroom.judging.answers import Verdict
from stillroom.judging.judges import check_kind, require_judge
from stillroom.judging.process import JudgeProcess
from stillroom.schema.records import Prompt
from teacher_cache.writer.verdicts import JudgedSample

MAX_WAITING = 10_000
"""Answers that may wait during a build: tens of MB of text."""
POLL_S = 0.2
"""How soon `hurry` is noticed."""
LLM = "llm"
"""Judge of prompts whose chains wait for a language model; which one is named on the command line."""


def judge_of(prompt: Prompt) -> str | None:
    """The kind of judge that the prompt's source asks for and a build can run."""
    kind = prompt.metadata.get("judge")
    return None if kind is None or kind == LLM else str(kind)


def require_judges(prompts: Iterable[Prompt]) -> None:
    """Raises StillroomError, before anything is generated, if a judge that prompts name cannot work here."""
    kinds = {kind for prompt in prompts if (kind := judge_of(prompt)) is not None}
    for kind in sorted(kinds):
        check_kind(kind)
        require_judge(kind)


class JudgeQueue:
    """Judges of one build. `put`, `finished` and `wait` are for one thread, `hurry` and `close` for any."""

    def __init__(
        self,
        num_processes: int,
        max_waiting: int = MAX_WAITING,
        on_verdict: Callable[[str, bool], None] | None = None,
    ) -> None:
        """Starts no process before the first answer arrives. `on_verdict` hears at once, in a judge's thread, whether
        an answer is right; False also if nobody could tell.
        """
        self.num_left = 0
        """Answers left to `teacher-cache judge`."""
        self._max_waiting = max_waiting
        self._judges = Judges(num_processes)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="judge")
        self._pending: dict[Future[JudgedSample | None], None] = {}
        self._done: deque[Future[JudgedSample | None]] = deque()
        self._hurried = False
        self._on_verdict = on_verdict or (lambda _sample_id, _correct: None)

    def put(self, sample_id: str, prompt: Prompt, answer: str | None, truncated: bool = False) -> None:
        """Queues an answer; does nothing for a prompt without a judge."""
        kind = judge_of(prompt)
        if kind is None:
            return
        if len(self._pending) >= self._max_waiting:
            # Finished verdicts that wait for their shard to close take no room.
            self._settle()
        if self._hurried or len(self._pending) >= self._max_waiting:
            self.num_left += 1
            self._on_verdict(sample_id, False)
            return
        future = self._threads.submit(
            self._judge, sample_id, kind, answer, prompt.reference, prompt.metadata, truncated
        )
        self._pending[future] = None

    def finished(self) -> list[JudgedSample]:
        """New verdicts since the last call. Raises StillroomError if a judge cannot work."""
        judged: list[JudgedSample] = []
        self._settle()
        while self._done:
            # Looked at before it is taken: an error must stay in the queue for the next call.
            error = self._done[0].exception()
            if error is not None and judged:
                # Hand over the good verdicts first; the next call raises the error.
                break
            future = self._done.popleft()
            if error is not None:
                raise error
            verdict = future.result()
            self.num_left += verdict is None
            judged += [] if verdict is None else [verdict]
        return judged

    def wait(self) -> None:
        """Waits until everything is judged or `hurry` is called; the rest is left to `teacher-cache judge`."""
        for future in self._pending:
            while not self._hurried and not future.done():
                wait_for([future], POLL_S)
        # Those that are being checked cannot be cancelled: `close` kills their processes.
        for future in [future for future in self._pending if not future.done()]:
            future.cancel()
            del self._pending[future]
            self.num_left += 1

    def hurry(self) -> None:
        """Leaves answers that are not judged yet to `teacher-cache judge`."""
        self._hurried = True

    def close(self) -> None:
        """Ends the processes, even in the middle of a check."""
        self._hurried = True
        # Threads wait for their processes: killed in between, they need not finish their checks.
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._judges.kill()
        self._threads.shutdown(wait=True)
        self._judges.close()

    def _settle(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            del self._pending[future]
            self._done.append(future)

    def _judge(
        self,
        sample_id: str,
        kind: str,
        answer: str | None,
        reference: str | None,
        metadata: Mapping[str, Any],
        truncated: bool,
    ) -> JudgedSample | None:
        if self._hurried:
            return None
        correct = None
        try:
            verdict = self._judges.judge(kind, answer, reference, metadata, truncated)
            correct = verdict.correct
        finally:
            # Also of a judge that broke: `finished` raises its error later.
            self._on_verdict(sample_id, correct is True)
        return JudgedSample(sample_id, kind, verdict)


class Judges:
    """Judge processes that threads share. Processes, because math checks keep their time limit with SIGALRM, which
    needs a main thread, and a regular expression can backtrack forever.
    """

    def __init__(self, num_processes: int) -> None:
        self._all = [JudgeProcess() for _ in range(num_processes)]
        self._free: queue.SimpleQueue[JudgeProcess] = queue.SimpleQueue()
        for judge in self._all:
            self._free.put(judge)

    def __len__(self) -> int:
        return len(self._all)

    def prepare(self, kinds: Sequence[str]) -> None:
        for judge in self._all:
            judge.prepare(kinds)

    def judge(
        self, kind: str, answer: str | None, reference: str | None, metadata: Mapping[str, Any], truncated: bool
    ) -> Verdict:
        # Blocks until a process is free.
        judge = self._free.get()
        try:
            return judge.judge(kind, answer, reference, metadata, truncated)
        finally:
            self._free.put(judge)

    def kill(self) -> None:
        """Ends running checks; their callers get an undecided verdict."""
        for judge in self._all:
            judge.kill()

    def close(self) -> None:
        for judge in self._all:
            judge.close()
