"""`doctor`: checks what a machine has of what a program needs, and names the command that installs what is missing.

Each program lists its checks; this module holds the checks that both share, and the report. It imports none of the
packages that it looks for.
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
from typing import Any, Literal

TIMEOUT_S = 20.0
"""A driver in trouble may hang nvidia-smi forever."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line: `ok`, `missing` (the program will fail) or `optional` (something is slower or unavailable). `fix` is a
    command, None if there is nothing to do.
    """

    name: str
    state: Literal["ok", "missing", "optional"]
    value: str
    fix: str | None = None


def report(checks: Sequence[Check]) -> dict[str, Any]:
    """JSON-ready: all checks, and `ok` unless something is missing."""
    return {"ok": all(one.state != "missing" for one in checks), "checks": [asdict(one) for one in checks]}


def report_lines(result: dict[str, Any]) -> list[str]:
    """One line per check, with the command that fixes it."""
    marks = {"ok": "ok", "missing": "MISSING", "optional": "-"}
    return [
        f"{marks[one['state']]:8} {one['name']:18} {one['value']}"
        + (f"  ({one['fix']})" if one["fix"] and one["state"] != "ok" else "")
        for one in result["checks"]
    ]


def package_version(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_package(name: str, fix: str, needed_for: str | None = None) -> Check:
    """A distribution by its name. It is optional if `needed_for` says what it is needed for."""
    installed = package_version(name)
    if installed is not None:
        return Check(name, "ok", installed)
    if needed_for is None:
        return Check(name, "missing", "not installed", fix)
    return Check(name, "optional", f"not installed: needed for {needed_for}", fix)


def check_machine(compiles: str, low_disk_gb: float, fills: str) -> list[Check]:
    """Python, compiler and headers for what `compiles`, cores, memory, and disk space for what `fills` it."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    has_header = header.exists()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    is_low = free_gb < low_disk_gb
    return [
        Check("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        _check_compiler(compiles),
        Check("python headers", "ok", str(header.parent))
        if has_header
        else Check("python headers", "missing", f"no {header}: {compiles}", "apt-get install python3-dev"),
        Check("cpu", "ok", f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory"),
        Check("disk", "optional" if is_low else "ok", f"{free_gb:.0f} GB free here{f': {fills}' if is_low else ''}"),
    ]


def check_gpus() -> list[Check]:
    """NVIDIA GPUs as the driver lists them; one `optional` check if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Check("gpu", "optional", "none (no nvidia-smi): everything runs on the CPU")]
    query = ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run([program, *query], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return [Check("gpu", "optional", "nvidia-smi does not answer", "look at dmesg and restart the driver")]
    rows = [[cell.strip() for cell in line.split(",")] for line in ended.stdout.splitlines() if line.count(",") == 3]
    if ended.returncode != 0 or not rows:
        reason = (ended.stdout or ended.stderr).strip().splitlines()
        return [Check("gpu", "optional", f"none listed by the driver: {reason[0] if reason else 'no answer'}")]
    return [_gpu(number, *row) for number, row in enumerate(rows)]


def _gpu(number: int, name: str, total_mib: str, free_mib: str, driver: str) -> Check:
    try:
        memory = f"{int(total_mib) / 1024:.0f} GiB, {int(free_mib) / 1024:.0f} free"
    except ValueError:
        # MIG slices and GPUs that share the host's memory report no number.
        memory = "memory unknown"
    return Check(f"gpu {number}", "ok", f"{name}, {memory}, driver {driver}")


def _check_compiler(compiles: str) -> Check:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Check("c++ compiler", "missing", f"none: {compiles}", "apt-get install g++")
    ended = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return Check("c++ compiler", "ok", ended.stdout.splitlines()[0] if ended.stdout else compiler)
