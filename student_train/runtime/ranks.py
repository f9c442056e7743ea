"""The ranks of a run as each of them sees them: joining them, and sums over all of them. No DeepSpeed.

launching starts them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stillroom.cores import CoreSharing
from stillroom.errors import ConfigError, StillroomError, first_line
from stillroom.log import harmless, note
from student_train.model.student import use_cpu_where_there_is_no_gpu
from student_train.runtime.launching import CONSOLE_VARIABLE, LOST_CODE, PARENT_VARIABLE

JOIN_TIMEOUT = datetime.timedelta(hours=24)
"""The first rank may freeze or retokenise a large cache while the others wait."""
TRAINING_ADVICE = (
    "Lower data.pack_tokens or engine.chunk_tokens, set engine.gradient_checkpointing, or raise engine.zero_stage"
)
RANK_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}


class RanksLost(StillroomError):
    """Another rank is gone: rarely the cause, nearly always a consequence."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = LOST_CODE if PARENT_VARIABLE in os.environ else 1


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def tell(self, line: str) -> None:
        """Shows a line of this rank where the first rank's output is shown."""
        shown = os.environ.get(CONSOLE_VARIABLE)
        if self.is_first or shown is None:
            note(line)
        else:
            # The carriage return and the erasing code clear what the first rank's bar left on the line.
            start = "\r\x1b[2K" if os.isatty(int(shown)) else ""
            os.write(int(shown), f"{start}{harmless(line)}\n".encode())

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.num_ranks > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Maxima over all ranks, float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.num_ranks == 1:
            return values
        # float64 holds token counts exactly up to 2^53; float32 would round them above 16 million.
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, op=operation)
        return [float(value) for value in reduced.tolist()]


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the ranks that a launcher started (its RANK, WORLD_SIZE, ... variables), or makes a world of one.

    Raises StillroomError if they cannot be joined, or instead of torch's error when a GPU runs out of memory; RanksLost
    when another rank is gone.
    """
    environ_before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        with warnings.catch_warnings(), memory_advice(TRAINING_ADVICE):
            # Deprecations and advice between these libraries: nothing that a user could act upon.
            warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|peft)\.")
            # numpy.finfo warns while denormals are flushed.
            warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
            # Gradients of unlikely tokens and their squares fall below 1e-38. Arithmetic on such numbers is ten times
            # slower: 0.5 s instead of 0.04 s for AdamW on 28M of them. Threads started from here on inherit this.
            torch.set_flush_denormal(True)
            ranks = _join()
            with _core_sharing() if ranks.device.type == "cpu" else contextlib.nullcontext():
                yield ranks
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RanksLost(f"lost contact with another rank, which has ended: {first_line(error)}") from error
        raise
    finally:
        torch.set_flush_denormal(False)
        # Otherwise torch warns at exit.
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in environ_before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Raises StillroomError with `advice` instead of torch's error when a GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StillroomError(f"{first_line(error)} {advice}") from error


def _core_sharing() -> CoreSharing:
    num_threads = torch.get_num_threads()
    # Large enough that torch splits it over all threads.
    return CoreSharing(num_threads, lambda: torch.zeros(2**15 * num_threads).add_(1))


def _join() -> Ranks:
    use_cpu_where_there_is_no_gpu()
    use_cuda = torch.cuda.is_available()
    alone = "RANK" not in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: start one rank per GPU"
        )
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if use_cuda else "gloo"
    # Without it DeepSpeed starts `numactl` in every backward pass of ZeRO 3 on a CPU.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if alone:
        # DeepSpeed reads the variables; a store in memory needs no port.
        os.environ.update(RANK_VARIABLES)
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, timeout=JOIN_TIMEOUT)
        except ValueError as error:
            raise StillroomError(
                f"cannot join the ranks that the launcher's variables describe: {first_line(error)}"
            ) from error
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
