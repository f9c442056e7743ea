"""What this machine has of what a student needs, and the command that mends what is missing: `student-train doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.config import Json

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "duckdb", "deltalake", "pyarrow")
OPTIONAL_PACKAGES = ("tensorboard", "flash-attn", "lm-eval")
INSTALL = "pip install 'stillroom[student]'"
LOW_DISK_GB = 20.0


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, missing (training will fail) or optional; `mend` the command that changes it."""

    name: str
    state: str
    value: str
    mend: str | None = None


def diagnose() -> Json:
    """All findings, and `ok` unless something is missing."""
    findings = [
        Finding("python", "ok", platform.python_version()),
        *(_package(name, "missing", INSTALL) for name in PACKAGES),
        *(_package(name, "optional", f"pip install {name}") for name in OPTIONAL_PACKAGES),
        *_gpus(),
        _compiler(),
        _headers(),
        _communication_op(),
        _cpu(),
        _disk(),
    ]
    return {"ok": all(one.state != "missing" for one in findings), "findings": [asdict(one) for one in findings]}


def _package(name: str, otherwise: str, mend: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, otherwise, "not installed", mend)


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


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Finding("c++ compiler", "missing", "none: DeepSpeed builds an operator", "apt-get install g++")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding("c++ compiler", "ok", said.stdout.splitlines()[0] if said.stdout else compiler)


def _headers() -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Finding("python headers", "ok", str(header.parent))
    return Finding("python headers", "missing", f"no {header}", "apt-get install python3-dev")


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


def _cpu() -> Finding:
    return Finding("cpu", "ok", f"{os.cpu_count()} cores, {_memory_gib():.0f} GiB memory")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _disk() -> Finding:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    if free_gb < LOW_DISK_GB:
        return Finding("disk", "optional", f"{free_gb:.0f} GB free here: checkpoints take 14 bytes a trained parameter")
    return Finding("disk", "ok", f"{free_gb:.0f} GB free here")
