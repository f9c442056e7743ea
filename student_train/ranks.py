"""The processes of a run: which one this is, sums over all of them, and how they are joined. No DeepSpeed."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shared.errors import ConfigError, StillroomError, first_line
from student_train.launch import RanksLost
from student_train.model import use_cpu_where_there_is_no_gpu

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
