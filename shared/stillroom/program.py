"""What the two programs' command lines have in common: the version, exit codes, results, and how a program ends.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).

A polite end: the first Ctrl-C or SIGTERM asks for it, the second one stops at once.

What a machine has of what a program needs, and the command that mends what is missing. Imports none of it.

A Finding is one line: `ok`, `missing` (the program will fail) or `optional` (something will be slower or not possible).
"""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from stillroom.errors import StillroomError
from stillroom.log import note

if TYPE_CHECKING:
    from stillroom.config import Json


FAILED, DAMAGED, INTERRUPTED = 1, 3, 130
STDOUT = 1

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def new_program(name: str, text: str) -> typer.Typer:
    """A program whose commands are still to come; it knows `--version` and shell completion."""
    app = typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def _main(
        show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    ) -> None:
        if show_version:
            print(version("stillroom"))
            raise typer.Exit

    return app


def print_result(result: "Json", lines: list[str], as_json: bool) -> None:
    """A command's result on stdout: one JSON object for programs, or lines for people."""
    print(json.dumps(result) if as_json else "\n".join(lines), flush=True)


def run_program(app: typer.Typer, name: str, resumable: Sequence[str]) -> None:
    """Runs a command: one line for a user's mistake, and the right exit code; `resumable` commands say how to go on."""
    try:
        app(prog_name=name)
    except StillroomError as error:
        note(f"{name}: {error}")
        sys.exit(error.exit_code)
    except SystemExit as end:
        _leave_quietly(end)
        if end.code == INTERRUPTED and sys.argv[1:2] and sys.argv[1] in resumable:
            note(f"interrupted; this goes on: {shlex.join([name, *sys.argv[1:]])}")
        raise


def _leave_quietly(end: SystemExit) -> None:
    """Ends the program as a broken pipe ends any other, without a word, if `end` came of one: `stats CACHE | head`."""
    if isinstance(end.__context__, BrokenPipeError):
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        sys.exit(128 + signal.SIGPIPE)


SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = b"\nstopping: what is at hand is finished and saved first (again to stop at once)\n"
STDERR = 2
TOGETHER_S = 1.0
"""Signals so close are one: a scheduler signals all processes of a job, and a launcher among them passes it on."""


class StopRequest:
    """While entered, turns the first signal into `is_set`; the second raises KeyboardInterrupt. Main thread only.

    With `at_once` the first one raises already, until `finish_first` says that there is something to finish; whatever
    else goes wrong on the way out (a library left half imported) is then a KeyboardInterrupt too.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.is_set = False
        self._at_once = at_once
        self._asked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._on_signal) for one in SIGNALS}
            # A program may be started with them blocked, so that none arrives before this can answer it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        if self._at_once and self.is_set and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def finish_first(self) -> None:
        """From here on the first signal lets what is at hand be finished."""
        self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_set, now_s = self.is_set, time.monotonic()
        if was_set and now_s - self._asked_s < TOGETHER_S:
            return
        self.is_set, self._asked_s = True, now_s
        if was_set or self._at_once:
            raise KeyboardInterrupt
        try:
            # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
            os.write(STDERR, ANNOUNCEMENT)
        except OSError:
            # Nobody reads any more: that is no reason not to save.
            return


NVIDIA_SMI_TIMEOUT_S = 20.0
COMPILER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`mend` is the command that changes it, None where there is nothing to do."""

    name: str
    state: str
    value: str
    mend: str | None = None


def diagnosis(findings: Sequence[Finding]) -> "Json":
    """JSON-ready: all findings, and `ok` unless something is missing."""
    return {"ok": all(one.state != "missing" for one in findings), "findings": [asdict(one) for one in findings]}


def diagnosis_lines(found: "Json") -> list[str]:
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
