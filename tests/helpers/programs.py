"""The two programs, forked from a process that has imported torch, DeepSpeed and the like: seconds less than an
interpreter each. All else is as in an interpreter of their own: arguments, environment, folder, streams, signals, exit
code. vLLM is not among the imports: it reads its settings while it is imported.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.helpers import ROOT

TIMEOUT_S = 300
IMPORTS = "tests.helpers.program_imports"
STREAMS = ("stdout", "stderr")
PROGRAMS = {"teacher-cache": "teacher_cache.cli", "student-train": "student_train.cli"}


class Program:
    """A program that was started: `argv` begins with the name of one of the two."""

    def __init__(self, argv: list[str], *, cwd: Path = ROOT, environ: Mapping[str, str] = os.environ) -> None:
        self.argv = argv
        self._streams = Path(tempfile.mkdtemp(prefix="program-"))
        for name in STREAMS:
            (self._streams / name).touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([IMPORTS])
        self.process: ForkServerProcess = context.Process(target=_run, args=(argv, cwd, dict(environ), self._streams))
        self.process.start()

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """By SIGKILL; its children may end a moment later."""
        self.process.kill()
        self.communicate()

    def wait(self, expect: int) -> str:
        """What it wrote to stdout; fails with its stderr where it ends with another exit code than `expect`."""
        code, out, err = self.communicate()
        assert code == expect, f"{self.argv} ended with {code}:\n{err[-4000:]}"
        return out

    def communicate(self) -> tuple[int, str, str]:
        """Waits for the end: exit code, stdout, stderr."""
        self.process.join(TIMEOUT_S)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        out, err = ((self._streams / name).read_text(encoding="utf-8") for name in STREAMS)
        shutil.rmtree(self._streams)
        assert code is not None, f"{self.argv} did not end within {TIMEOUT_S} s:\n{err[-4000:]}"
        return code, out, err


def _run(argv: list[str], cwd: Path, environ: dict[str, str], streams: Path) -> None:
    """In the forked process."""
    assert IMPORTS in sys.modules, "a module that fails to import is skipped in silence"
    for descriptor, name in enumerate(STREAMS, 1):
        opened = os.open(streams / name, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    __import__(PROGRAMS[argv[0]], fromlist=["main"]).main()


def run_interpreter(argv: list[str], *, cwd: Path, environ: Mapping[str, str]) -> str:
    """The stdout of one of the two programs in an interpreter of its own; fails with its stderr."""
    command = [sys.executable, "-m", PROGRAMS[argv[0]], *argv[1:]]
    ended = subprocess.run(
        command, cwd=cwd, env=dict(environ), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert ended.returncode == 0, f"{argv} ended with {ended.returncode}:\n{ended.stderr[-4000:]}"
    return ended.stdout
