"""The processes of a run: which one this is, sums over all of them, and how they are joined. No DeepSpeed.

Ranks on one machine: `run --nproc N` starts this program N times, as torchrun would, and ends as they end.

Under an external launcher (torchrun, deepspeed, srun with its variables) the program is a rank already. A rank ends
when its parent does, and a failed rank ends the others: what they then say of lost peers is not taken for the cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from stillroom.errors import ConfigError, StillroomError, first_line
from stillroom.log import console
from stillroom.program import SIGNALS
from student_train.model.student import use_cpu_where_there_is_no_gpu

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


JOIN_TIMEOUT = datetime.timedelta(hours=24)
"""The first rank may freeze or retokenise a large cache while the others wait."""
RANK_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.num_ranks > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, float64."""
        if self.num_ranks == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def max(self, values: list[float]) -> list[float]:
        """Largest over all ranks, float64."""
        if self.num_ranks == 1:
            return values
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [float(value) for value in largest.tolist()]


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the ranks that a launcher started (its RANK, WORLD_SIZE, ... variables), or makes a world of one.

    Raises StillroomError where they cannot be joined, and in the place of what torch raises when a GPU's memory is
    exhausted; RanksLost when another rank is gone.
    """
    environ_before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        with warnings.catch_warnings():
            # Deprecations and advice between these libraries: nothing that a user could act upon.
            warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|peft)\.")
            # numpy.finfo warns while denormals are flushed.
            warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
            # Gradients of unlikely tokens and their squares fall below 1e-38. Arithmetic on such numbers is ten times
            # slower: 0.5 s instead of 0.04 s for AdamW on 28M of them. Threads started from here on inherit this.
            torch.set_flush_denormal(True)
            yield _join()
    except torch.OutOfMemoryError as error:
        raise StillroomError(
            f"{first_line(error)} Lower data.pack_tokens or engine.chunk_tokens, set engine.gradient_checkpointing, "
            "or raise engine.zero_stage"
        ) from error
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RanksLost(f"the ranks lost each other, one of them ended: {first_line(error)}") from error
        raise
    finally:
        torch.set_flush_denormal(False)
        # So that torch does not warn at exit.
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in environ_before.items():
            if value is None:
                os.environ.pop(name, None)


def _join() -> Ranks:
    use_cpu_where_there_is_no_gpu()
    use_cuda = torch.cuda.is_available()
    alone = "RANK" not in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}: start one rank a GPU"
        )
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if use_cuda else "gloo"
    if alone:
        # DeepSpeed reads the variables; a store in memory needs no port.
        os.environ.update(RANK_VARIABLES)
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, timeout=JOIN_TIMEOUT)
        except ValueError as error:
            raise StillroomError(
                f"the launcher's variables do not name a world to join: {first_line(error)}"
            ) from error
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
