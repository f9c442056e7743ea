"""Ranks on one machine: `run --nproc N` starts this program N times, as torchrun would, and ends as they end.

Under an external launcher (torchrun, deepspeed, srun with its variables) the program is a rank already. A rank ends
when its parent does, and a failed rank ends the others.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from shared.errors import ConfigError
from shared.log import console

POLL_S = 0.1
GRACE_S = 10.0
"""How long the other ranks may take to fail by themselves before they are ended."""

PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "STUDENT_TRAIN_PARENT"

Rank = subprocess.Popen[str]


def is_rank() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ


def launch(num_ranks: int, arguments: Sequence[str]) -> int:
    """Runs `student-train ARGUMENTS` as `num_ranks` ranks and returns the exit code of the first that failed, or 0.

    Signals are passed on. What the first rank says is shown; another is heard only when it alone failed.
    """
    if is_rank():
        raise ConfigError("--nproc has no effect under a launcher (RANK is set): leave it out")
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(num_ranks)]
        port = _free_port()
        ranks: list[Rank] = []
        stack.callback(_end, ranks)
        for rank in range(num_ranks):
            ranks.append(_start(rank, num_ranks, arguments, port, logs[rank]))
        with _forwarding(ranks):
            failed = _wait(ranks)
        if failed is None:
            return 0
        # Every rank meets a mistake in the configuration; the first one's word is enough.
        if ranks[failed].returncode != ranks[0].poll():
            logs[failed].seek(0)
            said = logs[failed].read().strip() or f"ended by signal {-ranks[failed].returncode}"
            console.print(f"rank {failed} of {num_ranks}: {said}", markup=False, soft_wrap=True)
        code = ranks[failed].returncode
        return code if code > 0 else 1


def end_with_parent() -> None:
    """In a rank that `launch` started: the kernel kills it when the launching process is gone, however it went."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)


def _start(rank: int, num_ranks: int, arguments: Sequence[str], port: int, log: IO[str]) -> Rank:
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
    output = None if rank == 0 else log
    # A session of its own: Ctrl-C reaches a rank through `launch` alone, once.
    return subprocess.Popen(
        [sys.executable, "-m", "student_train.cli", *arguments],
        env=environ,
        stdout=output,
        stderr=output,
        start_new_session=True,
        text=True,
    )


def _wait(ranks: Sequence[Rank]) -> int | None:
    """The number of the rank that failed first, None when all ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [number for number, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            deadline_s = time.monotonic() + GRACE_S
            while time.monotonic() < deadline_s and any(rank.poll() is None for rank in ranks):
                time.sleep(POLL_S)
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


@contextlib.contextmanager
def _forwarding(ranks: Sequence[Rank]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {one: signal.signal(one, forward) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
