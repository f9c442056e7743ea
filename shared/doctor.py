"""What a machine has of what a program needs, and the command that mends what is missing. Imports none of it.

A Finding is one line: `ok`, `missing` (the program will fail) or `optional` (something will be slower or not possible).
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.config import Json

NVIDIA_SMI_TIMEOUT_S = 20.0
COMPILER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`mend` is the command that changes it, None where there is nothing to do."""

    name: str
    state: str
    value: str
    mend: str | None = None


def diagnosis(findings: Sequence[Finding]) -> Json:
    """JSON-ready: all findings, and `ok` unless something is missing."""
    return {"ok": all(one.state != "missing" for one in findings), "findings": [asdict(one) for one in findings]}


def diagnosis_lines(found: Json) -> list[str]:
    """One line a finding, and what mends it."""
    marks = {"ok": "ok", "missing": "MISSING", "optional": "-"}
    lines = []
    for one in found["findings"]:
        mend = f"  ({one['mend']})" if one["mend"] and one["state"] != "ok" else ""
        lines.append(f"{marks[one['state']]:8} {one['name']:18} {one['value']}{mend}")
    return lines


def find_python() -> Finding:
    """The interpreter that runs this."""
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def find_package(name: str, otherwise: str, mend: str) -> Finding:
    """A distribution by its name, and what state its absence is."""
    installed = package_version(name)
    return Finding(name, otherwise, "not installed", mend) if installed is None else Finding(name, "ok", installed)


def package_version(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_gpus() -> list[Finding]:
    """NVIDIA GPUs as the driver lists them; one `optional` finding where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Finding("gpu", "optional", "none (no nvidia-smi): everything runs on the CPU")]
    query = ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return [Finding("gpu", "optional", "nvidia-smi does not answer", "look at dmesg and restart the driver")]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines() if line.count(",") == 3]
    if said.returncode != 0 or not rows:
        reason = (said.stdout or said.stderr).strip().splitlines()
        return [Finding("gpu", "optional", f"none that the driver lists: {reason[0] if reason else 'no answer'}")]
    return [_gpu(number, *row) for number, row in enumerate(rows)]


def find_compiler(reason: str) -> Finding:
    """A C++ compiler; `reason` says what needs it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Finding("c++ compiler", "missing", f"none: {reason}", "apt-get install g++")
    said = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S, check=False
    )
    return Finding("c++ compiler", "ok", said.stdout.splitlines()[0] if said.stdout else compiler)


def find_headers(reason: str) -> Finding:
    """Python's C headers; `reason` says what needs them."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Finding("python headers", "ok", str(header.parent))
    return Finding("python headers", "missing", f"no {header}: {reason}", "apt-get install python3-dev")


def find_cpu() -> Finding:
    """Cores and memory."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("cpu", "ok", f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory")


def find_disk(low_gb: float, reason: str) -> Finding:
    """Space where the program was started; `reason` says what takes it."""
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    if free_gb < low_gb:
        return Finding("disk", "optional", f"{free_gb:.0f} GB free here: {reason}")
    return Finding("disk", "ok", f"{free_gb:.0f} GB free here")


def _gpu(number: int, name: str, total_mib: str, free_mib: str, driver: str) -> Finding:
    try:
        memory = f"{int(total_mib) / 1024:.0f} GiB, {int(free_mib) / 1024:.0f} free"
    except ValueError:
        # A part of a GPU, and GPUs that share the host's memory, have no number of their own.
        memory = "memory unknown"
    return Finding(f"gpu {number}", "ok", f"{name}, {memory}, driver {driver}")
