"""`student-train doctor`: what this machine has of what a student needs."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from stillroom.doctor import Check, check_machine, check_package, report

REQUIRED = ("torch", "transformers", "deepspeed", "peft", "safetensors", "duckdb", "deltalake", "pyarrow")
OPTIONAL = {"tensorboard": "TensorBoard logs", "flash-attn": "faster attention on GPUs"}
INSTALL = "pip install 'stillroom[student]'"
LOW_DISK_GB = 20.0


def diagnose() -> dict[str, Any]:
    """All checks, and `ok` unless something is missing."""
    return report(
        [
            *(check_package(name, INSTALL) for name in REQUIRED),
            *(check_package(name, f"pip install {name}", use) for name, use in OPTIONAL.items()),
            *_check_cuda(),
            *check_machine(
                "DeepSpeed builds an operator", LOW_DISK_GB, "checkpoints take 14 bytes per trained parameter"
            ),
            _check_communication_op(),
        ]
    )


def _check_cuda() -> list[Check]:
    """GPUs that torch can use, which may be fewer than the driver lists."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        fix = "pip install torch  # a CUDA build, not the CPU one" if has_driver else None
        return [Check("gpu", "optional", "none that torch can use: training runs on the CPU", fix)]
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        Check(f"gpu {number}", "ok", f"{one.name}, {one.total_memory / 2**30:.0f} GiB")
        for number, one in enumerate(properties)
    ]


def _check_communication_op() -> Check:
    """DeepSpeed's shared-memory operator for ranks on a CPU, which the first start compiles if it is not built."""
    name = "communication op"
    if (spec := importlib.util.find_spec("deepspeed")) is None or spec.origin is None:
        return Check(name, "optional", "DeepSpeed is not installed", INSTALL)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    for folder in (Path(spec.origin).parent / "ops" / "comm", cache):
        if list(folder.glob("**/deepspeed_shm_comm_op*.so")):
            return Check(name, "ok", f"built, in {folder}")
    return Check(name, "optional", "not built: the first start on a CPU compiles it, about 45 s")
