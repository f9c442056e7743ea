"""Judges in a process of their own, so that no answer can hang, crash or exhaust the program that asks.

    with JudgeProcess() as judge:
        judge.prepare(["math"])
        verdict = judge.judge("math", answer, reference, metadata)

A check that takes longer than DEADLINE_S or dies is undecided, and the next one gets a fresh process. Safe to share
between threads, one check at a time. The process ends with its parent, however that ends.

`python -m stillroom.judging.process` is the process itself: one JSON object a line on stdin, one on stdout.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import IO, Any, Self

from stillroom.children import follow_parent
from stillroom.errors import StillroomError
from stillroom.judging.answers import Verdict, undecided
from stillroom.judging.gym_tasks import child_environment
from stillroom.judging.judges import check_kind, import_judge, judge_answer
from stillroom.judging.sandbox import TOTAL_TIMEOUT_S

DEADLINE_S = 20.0
"""Of one check; unit tests have TOTAL_TIMEOUT_S and some more."""
START_TIMEOUT_S = 120.0
"""Of loading what a kind needs."""
MEMORY_BYTES = 16 << 30
"""Address space of the process; sympy is known to ask for more than there is."""


class JudgeProcess:
    """One process that judges; started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._killed = False
        self._prepared: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, kinds: Iterable[str]) -> None:
        """Loads what these kinds need.

        Raises ConfigError for an unknown kind, StillroomError for a missing package or where code cannot be isolated.
        """
        with self._lock:
            for kind in kinds:
                check_kind(kind)
                self._prepare(kind)

    def judge(
        self,
        kind: str,
        answer: str | None,
        reference: str | None,
        metadata: Mapping[str, Any],
        truncated: bool = False,
    ) -> Verdict:
        """The verdict on one answer as stillroom.judging.judges.judge_answer gives it, undecided after DEADLINE_S."""
        check_kind(kind)
        request = {
            "kind": kind,
            "answer": answer,
            "reference": reference,
            "metadata": dict(metadata),
            "truncated": truncated,
        }
        deadline_s = TOTAL_TIMEOUT_S + DEADLINE_S if kind == "code" else DEADLINE_S
        with self._lock:
            if not self._killed:
                self._prepare(kind)
            reply = None if self._killed else self._ask(request, deadline_s)
        return undecided("the check ran out of time or memory") if reply is None else Verdict(**reply)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def kill(self) -> None:
        """Ends the process for good, from any thread: a check that is running, or comes later, is undecided."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def _prepare(self, kind: str) -> None:
        if kind in self._prepared and self._process is not None and self._process.poll() is None:
            return
        reply = self._ask({"prepare": kind}, START_TIMEOUT_S)
        if reply is None and self._killed:
            return
        if reply is None:
            raise StillroomError(f"judge {kind} did not start within {START_TIMEOUT_S:.0f} s")
        if reply["error"] is not None:
            raise StillroomError(reply["error"])
        self._prepared.add(kind)

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The reply; None, and no process any more, when there is none in time."""
        # It may have died since the last check, of memory for instance.
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], timeout_s)
            # select sees the pipe, not Python's buffer: one reply a request keeps that buffer empty in between.
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        # Late or dead: a process that is still busy with an old answer must not answer the next question.
        if not line:
            self._stop()
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start(self) -> "subprocess.Popen[str]":
        self._stop()
        self._process = subprocess.Popen(
            # -P: modules in the working folder must not stand in for packages.
            [sys.executable, "-P", "-m", "stillroom.judging.process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=child_environment(),
            # A Ctrl-C is for the parent, which then ends this one.
            start_new_session=True,
        )
        if self._killed:
            # It was said while this one started.
            self._process.kill()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._prepared.clear()
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answers one request a line until the stream ends."""
    for line in requests:
        request = json.loads(line)
        reply = _prepare(request["prepare"]) if "prepare" in request else _judge(request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _prepare(kind: str) -> dict[str, Any]:
    try:
        import_judge(kind)
    except StillroomError as error:
        return {"error": str(error)}
    return {"error": None}


def _judge(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        verdict = judge_answer(**request)
    except Exception as error:  # noqa: BLE001 - checkers of many authors meet text of a model; what one chokes on is undecided
        verdict = undecided(f"the check failed: {type(error).__name__}")
    return asdict(verdict)


def _main() -> None:
    follow_parent(int(sys.argv[1]))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    # setrlimit raises above the hard limit.
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    # What a checker prints must not be taken for a reply.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    _main()
