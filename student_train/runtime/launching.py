"""Starts the ranks of a run on this machine, forwards signals to them, and finds out which one to blame. No torch.

`run --nproc N` starts this program N times; under an external launcher (torchrun, deepspeed, srun with its variables)
the program is a rank already. On several hosts (hosts) each has a `launch` of its own, and they meet through torch's
elastic rendezvous (peers). docs/decisions/training.md says why `launch` is not torch's elastic launch.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from stillroom.errors import ConfigError
from stillroom.log import console
from stillroom.program import INTERRUPTED, SIGNALS
from student_train.runtime.peers import Peers

POLL_S = 0.1
GRACE_S = 10.0
"""Once a rank has failed, how long the others may take to end by themselves."""
LOST_CODE = 86
"""Exit code, seen by `launch` alone, of a rank that ended because another one did."""
TAIL_LINES = 20

PARENT_VARIABLE = "STUDENT_TRAIN_PARENT"
CONSOLE_VARIABLE = "STUDENT_TRAIN_CONSOLE"
"""In ranks whose output goes to a log: the number of a file descriptor that leads to the launcher's stderr."""


def launch(num_ranks: int, command: Sequence[str], peers: Peers | None = None) -> int:
    """Runs `command` as `num_ranks` ranks and returns the exit code: 0, 130 after an interruption, or the cause's.

    With `peers` they are this host's share of all ranks, and the cause may be a rank of another host, which shows it.

    Signals are forwarded. The first rank's output is shown live; the others write logs, besides what they `tell`, and
    where one of them caused a failure, the end of its log is shown with the log's path.
    """
    if "RANK" in os.environ:
        raise ConfigError("--nproc has no effect under a launcher (RANK is set): leave it out")
    logs = Path(tempfile.mkdtemp(prefix="student-train-ranks-"))
    ranks: list[subprocess.Popen[bytes]] = []
    was_asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        for rank in ranks:
            rank.send_signal(number)

    # Before the first rank starts: a signal in between must reach those that run.
    handlers = {one: signal.signal(one, forward) for one in SIGNALS}
    try:
        # Blocked while ranks start, here and, until StopRequest lets them through, in the ranks.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        port = _free_port() if peers is None else peers.port
        ranks += [_start(rank, num_ranks, command, port, logs, peers) for rank in range(num_ranks)]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        codes = _wait(ranks, peers)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for one, handler in handlers.items():
            signal.signal(one, handler)
    if peers is not None:
        peers.leave()
        codes = {**peers.codes(), **codes}
    cause = find_cause(codes)
    code = 0 if cause is None else _exit_code(codes[cause], was_asked)
    first = 0 if peers is None else peers.first_rank
    is_shown = cause is not None and cause - first in range(num_ranks) and code != INTERRUPTED
    message = _explain(cause, codes[cause], num_ranks, logs, peers) if cause is not None and is_shown else None
    if message is None:
        shutil.rmtree(logs, ignore_errors=True)
    else:
        console.print(message, markup=False, soft_wrap=True)
    return code


def find_cause(codes: Mapping[int, int]) -> int | None:
    """The rank to blame, of exit codes (minus the signal) by rank in the order in which they ended; None without one.

    Every rank meets a mistake in the configuration: of equal codes the first rank's counts, which has been shown.
    """
    failed = [rank for rank, code in codes.items() if code != 0]
    if not failed:
        return None
    cause = min(failed, key=lambda rank: _innocence(codes[rank]))
    return 0 if codes.get(0) == codes[cause] in (2, 3) else cause


def _innocence(code: int) -> int:
    """Mistakes and damage are causes, then kills from outside, then other errors; the rest follows from those."""
    if code in (2, 3):
        return 0
    # NCCL's watchdog aborts a rank whose peers are gone.
    return {-signal.SIGABRT: 3, INTERRUPTED: 4, LOST_CODE: 5}.get(code, 1 if code < 0 else 2)


def _exit_code(code: int, was_asked: bool) -> int:
    # A rank that stops is lost to the others, and a second Ctrl-C may find one on its way out.
    by_signal = code in (LOST_CODE, -signal.SIGINT, -signal.SIGTERM, -signal.SIGABRT)
    if code == INTERRUPTED or (was_asked and by_signal):
        return INTERRUPTED
    return code if 0 < code != LOST_CODE else 1


def _explain(rank: int, code: int, num_ranks: int, logs: Path, peers: Peers | None) -> str | None:
    """What happened to the rank to blame; None if its own output has said it."""
    message = (
        f"rank {rank} of {num_ranks} " if peers is None else f"rank {rank} of {peers.num_ranks}, on {peers.host}, "
    )
    if code >= 0:
        message += f"ended with exit code {code}"
    else:
        message += f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        message += ": unless someone killed it, the machine ran out of memory (use fewer ranks or engine.zero_stage 3)"
    if rank == 0:
        return message if code < 0 else None
    path = _log_path(logs, rank)
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"{message} without any output"
    return "\n".join([f"{message}; {path} ends:", *(f"  {line}" for line in lines[-TAIL_LINES:])])


def _start(
    local_rank: int, num_ranks: int, command: Sequence[str], port: int, logs: Path, peers: Peers | None
) -> subprocess.Popen[bytes]:
    rank = local_rank if peers is None else peers.first_rank + local_rank
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    environ = {
        # Before os.environ, so that what the user has set wins.
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(num_ranks if peers is None else peers.num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        # As torchrun does: what a run costs counts machines.
        "GROUP_WORLD_SIZE": str(1 if peers is None else peers.num_hosts),
        "MASTER_ADDR": "127.0.0.1" if peers is None else peers.address,
        "MASTER_PORT": str(port),
        PARENT_VARIABLE: str(os.getpid()),
    }
    # A session of its own: Ctrl-C reaches a rank through `launch` only, once.
    if rank == 0:
        return subprocess.Popen(command, env=environ, start_new_session=True)
    shown = os.dup(2)
    environ[CONSOLE_VARIABLE] = str(shown)
    try:
        with _log_path(logs, rank).open("wb") as log:
            return subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, start_new_session=True, pass_fds=[shown]
            )
    finally:
        os.close(shown)


def _log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def _wait(ranks: Sequence[subprocess.Popen[bytes]], peers: Peers | None) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended; without those that a failure leaves hanging."""
    codes: dict[int, int] = {}
    first = 0 if peers is None else peers.first_rank
    own = range(first, first + len(ranks))
    deadline_s = float("inf")
    while not codes.keys() >= set(own) and time.monotonic() < deadline_s:
        for number, rank in zip(own, ranks, strict=True):
            code = rank.poll()
            if code is not None and number not in codes:
                # The order of insertion is the order of ends, which find_cause reads.
                codes[number] = code
                if peers is not None:
                    peers.tell(number, code)
        # Ranks of other hosts count too: these here may hang without them.
        if any(codes.values()) or (peers is not None and any(peers.codes().values())):
            # From the first failure on: later ones do not extend it.
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    return codes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
