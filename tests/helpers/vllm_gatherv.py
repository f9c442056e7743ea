"""What vLLM's communicator for CPUs lacks (0.32): gathers of unequal sizes, over which replicas exchange tokens of a
mixture of experts. `add_plugin` has a vLLM that finds `folder` on its path load it in each of its processes.
"""

from pathlib import Path
from typing import Any


def add_plugin(folder: Path) -> None:
    info = folder / "gatherv-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gatherv\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngatherv = tests.helpers.vllm_gatherv:register\n")


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = _all_gatherv  # type: ignore[method-assign]
    CpuCommunicator.reduce_scatterv = _reduce_scatterv  # type: ignore[method-assign]


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    import torch

    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = sizes or [len(input_)] * self.world_size
    # gloo gathers equal shapes only.
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([one[:size] for one, size in zip(gathered, sizes, strict=True)])


def _reduce_scatterv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    import torch

    assert dim == 0
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    sizes = sizes or [len(total) // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group].contiguous()
