"""Ranks on one machine: `run --nproc N` starts this program N times, as torchrun would, and ends as they end.

Under an external launcher (torchrun, deepspeed, srun with its variables) the program is a rank already. A rank ends
when its parent does, and a failed rank ends the others: what they then say of lost peers is not taken for the cause.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.errors import ConfigError, StillroomError
from shared.interrupt import SIGNALS
from shared.log import console

POLL_S = 0.1
GRACE_S = 10.0
"""How long the other ranks may take to end by themselves, once one has failed, before they are ended."""
INTERRUPTED = 130
LOST_CODE = 86
"""A rank that `launch` started ends with it when it ended because another one did; nobody else sees it."""
TAIL_LINES = 20

PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "STUDENT_TRAIN_PARENT"

Rank = subprocess.Popen[bytes]


class RanksLost(StillroomError):
    """Another rank is gone: seldom the cause, nearly always what it did to the others."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = LOST_CODE if PARENT_VARIABLE in os.environ else 1


@dataclass(frozen=True)
class Ended:
    """A rank that ended by itself: its exit code, or minus the signal that killed it."""

    rank: int
    code: int


@dataclass
class _Asked:
    """Whether someone asked the ranks to stop."""

    to_stop: bool = False


def is_rank() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ


def launch(num_ranks: int, command: Sequence[str]) -> int:
    """Runs `command` as `num_ranks` ranks and returns the exit code: 0, 130 after an interruption, or the cause's.

    Signals are passed on. What the first rank says is shown as it comes; the others write logs, of which the end is
    shown where one of them is the cause of a failure, with the path of the whole.
    """
    if is_rank():
        raise ConfigError("--nproc has no effect under a launcher (RANK is set): leave it out")
    logs = Path(tempfile.mkdtemp(prefix="student-train-ranks-"))
    ranks: list[Rank] = []
    try:
        with _forwarding(ranks) as asked:
            with _blocked():
                port = _free_port()
                ranks += [_start(rank, num_ranks, command, port, logs) for rank in range(num_ranks)]
            ended = _wait(ranks)
    finally:
        _end(ranks)
    cause = find_cause(ended)
    code = _exit_code(cause, asked.to_stop)
    said = None if cause is None or code == INTERRUPTED else _account(cause, num_ranks, logs)
    if said is None:
        shutil.rmtree(logs, ignore_errors=True)
    else:
        console.print(said, markup=False, soft_wrap=True)
    return code


def find_cause(ended: Sequence[Ended]) -> Ended | None:
    """Of the ranks in the order in which they ended, the one that is to blame; None where all ended well.

    Mistakes and damage (2, 3) come first, then a kill from outside, then other errors; an abort, as NCCL's watchdog
    makes it, and lost peers are what a failure elsewhere looks like. Every rank meets a mistake in the configuration,
    so of equal codes the first rank's is taken, which has been shown already.
    """
    failed = [one for one in ended if one.code != 0]
    if not failed:
        return None
    cause = min(failed, key=lambda one: _blame(one.code))
    return next((one for one in failed if one.rank == 0 and one.code == cause.code in (2, 3)), cause)


def end_with_parent() -> None:
    """In a rank that `launch` started: the kernel kills it when the launching process is gone, however it went."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)


def _blame(code: int) -> int:
    """0 is the most."""
    if code in (2, 3):
        return 0
    if code == INTERRUPTED:
        return 4
    if code == LOST_CODE:
        return 5
    if code == -signal.SIGABRT:
        return 3
    return 1 if code < 0 else 2


def _exit_code(cause: Ended | None, was_asked: bool) -> int:
    if cause is None:
        return 0
    # One that ends at once is lost to the others, and a second Ctrl-C may find it on its way out.
    by_signal = cause.code in (LOST_CODE, -signal.SIGINT, -signal.SIGTERM, -signal.SIGABRT)
    if cause.code == INTERRUPTED or (was_asked and by_signal):
        return INTERRUPTED
    return cause.code if 0 < cause.code != LOST_CODE else 1


def _account(cause: Ended, num_ranks: int, logs: Path) -> str | None:
    """What happened to the rank to blame; None where it has been said already."""
    who = f"rank {cause.rank} of {num_ranks}"
    if cause.code >= 0:
        how = f"{who} ended with exit code {cause.code}"
    else:
        name = signal.Signals(-cause.code).name
        how = f"{who} was killed by {name}"
        if cause.code == -signal.SIGKILL:
            how += ": if nobody did, the machine ran out of memory (fewer ranks, or engine.zero_stage 3, take less)"
    if cause.rank == 0:
        return how if cause.code < 0 else None
    path = _log_path(logs, cause.rank)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = [line for line in lines if line.strip()][-TAIL_LINES:]
    if not tail:
        return f"{how} and said nothing"
    return "\n".join([f"{how}; {path} ends:", *(f"  {line}" for line in tail)])


def _start(rank: int, num_ranks: int, command: Sequence[str], port: int, logs: Path) -> Rank:
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_VARIABLE: str(os.getpid()),
    }
    environ = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks)), **os.environ, **variables}
    # A session of its own: Ctrl-C reaches a rank through `launch` alone, once.
    if rank == 0:
        return subprocess.Popen(command, env=environ, start_new_session=True)
    with _log_path(logs, rank).open("wb") as log:
        return subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)


def _log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def _wait(ranks: Sequence[Rank]) -> list[Ended]:
    """The ranks that ended by themselves, in the order in which they did."""
    ended: list[Ended] = []
    deadline_s: float | None = None
    while len(ended) < len(ranks) and (deadline_s is None or time.monotonic() < deadline_s):
        known = {one.rank for one in ended}
        for number, rank in enumerate(ranks):
            code = rank.poll()
            if number not in known and code is not None:
                ended.append(Ended(number, code))
        if deadline_s is None and any(one.code != 0 for one in ended):
            deadline_s = time.monotonic() + GRACE_S
        time.sleep(POLL_S)
    return ended


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


@contextlib.contextmanager
def _forwarding(ranks: Sequence[Rank]) -> Iterator[_Asked]:
    asked = _Asked()

    def forward(number: int, frame: FrameType | None) -> None:
        asked.to_stop = True
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {one: signal.signal(one, forward) for one in SIGNALS}
    try:
        yield asked
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait, here until the block ends and in processes started in it until StopRequest lets them through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
