"""What this machine has of what a student needs, and the command that mends what is missing: `student-train doctor`."""

import importlib.util
import os
import shutil
from pathlib import Path

from stillroom.config import Json
from stillroom.program import (
    Finding,
    diagnosis,
    find_compiler,
    find_cpu,
    find_disk,
    find_headers,
    find_package,
    find_python,
)

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "duckdb", "deltalake", "pyarrow")
OPTIONAL_PACKAGES = ("tensorboard", "flash-attn")
INSTALL = "pip install 'stillroom[student]'"
LOW_DISK_GB = 20.0


def diagnose() -> Json:
    """All findings, and `ok` unless something is missing."""
    return diagnosis(
        [
            find_python(),
            *(find_package(name, "missing", INSTALL) for name in PACKAGES),
            *(find_package(name, "optional", f"pip install {name}") for name in OPTIONAL_PACKAGES),
            *_gpus(),
            find_compiler("DeepSpeed builds an operator"),
            find_headers("DeepSpeed builds an operator"),
            _communication_op(),
            find_cpu(),
            find_disk(LOW_DISK_GB, "checkpoints take 14 bytes a trained parameter"),
        ]
    )


def _gpus() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        mend = "pip install torch  # a build for CUDA, not the CPU one" if has_driver else None
        return [Finding("gpu", "optional", "none that torch can use: training runs on the CPU", mend)]
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(Finding(f"gpu {number}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return found


def _communication_op() -> Finding:
    """DeepSpeed's shared-memory operator for ranks on a CPU, compiled at the first start where it is not built."""
    name = "communication op"
    if (spec := importlib.util.find_spec("deepspeed")) is None or spec.origin is None:
        return Finding(name, "optional", "DeepSpeed is not installed", INSTALL)
    if list((Path(spec.origin).parent / "ops" / "comm").glob("deepspeed_shm_comm_op*.so")):
        return Finding(name, "ok", "built")
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    if list(cache.glob("**/deepspeed_shm_comm_op*.so")):
        return Finding(name, "ok", f"built, in {cache}")
    return Finding(name, "optional", "not built: the first start on a CPU compiles it, about 45 s")
