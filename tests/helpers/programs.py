"""The programs, forked from a process that has imported torch, DeepSpeed and the like: seconds less than an interpreter
each. All else is as in an interpreter of their own: arguments, environment, folder, streams, signals, exit code. The
ranks of a training are forked in the same way from their launcher, ours or DeepSpeed's. vLLM reads its settings while
it is imported, so what runs it is forked from another process, itself forked, which has imported vLLM as well.
"""

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tests.helpers import ROOT

TIMEOUT_S = 300
IMPORTS, VLLM_IMPORTS = "tests.helpers.program_imports", "tests.helpers.vllm_imports"
LAUNCHERS = ("student_train.runtime.launching", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
"""They start `python -m MODULE` by subprocess.Popen."""
STREAMS = ("stdout", "stderr")
PROGRAMS = {
    "teacher-cache": "teacher_cache.cli",
    "student-train": "student_train.cli",
}
FAST_ENGINE = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""vLLM compiles nothing: the tiny model is generated sooner than compiled."""


class Program:
    """A program that was started: `argv` begins with a name of `PROGRAMS` or the module whose `main` it is."""

    def __init__(
        self, argv: list[str], *, cwd: Path = ROOT, environ: Mapping[str, str] = os.environ, with_vllm: bool = False
    ) -> None:
        self.argv = argv
        self._streams = _make_streams()
        self._written: tuple[str, str] | None = None
        arguments = (argv, cwd, dict(environ), self._streams)
        self.process: ForkServerProcess | _ProcessWithVllm
        if with_vllm:
            self.process = _ProcessWithVllm(*arguments)
            return
        self.process = _forked(_run, arguments)

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stderr_so_far(self) -> str:
        return (self._streams / "stderr").read_text(encoding="utf-8")

    def kill(self) -> None:
        """By SIGKILL, unless it has ended; its children may end a moment later."""
        self.process.kill()
        self.communicate()

    def wait(self, expect: int) -> str:
        """What it wrote to stdout; fails with its stderr where it ends with another exit code than `expect`."""
        code, out, err = self.communicate()
        assert code == expect, f"{self.argv} ended with {code}:\n{err[-4000:]}"
        return out

    def communicate(self) -> tuple[int, str, str]:
        """Waits for the end: exit code, stdout, stderr. May be called again."""
        self.process.join(TIMEOUT_S)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self._written = self._written or _read_streams(self._streams)
        out, err = self._written
        assert code is not None, f"{self.argv} did not end within {TIMEOUT_S} s:\n{err[-4000:]}"
        return code, out, err


def run_with_vllm(argv: list[str], *, cwd: Path = ROOT, environ: Mapping[str, str] | None = None) -> str:
    """The stdout of a program that may start a vLLM engine, which compiles nothing; fails with its stderr."""
    return program_with_vllm(argv, cwd=cwd, environ=environ).wait(expect=0)


def program_with_vllm(argv: list[str], *, cwd: Path = ROOT, environ: Mapping[str, str] | None = None) -> Program:
    """The same while it runs, as the leader of a process group."""
    return Program(argv, cwd=cwd, environ={**os.environ, **FAST_ENGINE, **(environ or {})}, with_vllm=True)


class _VllmParent:
    """A process that has imported vLLM and forks; it ends when this one does."""

    def __init__(self) -> None:
        self._connection, there = multiprocessing.Pipe()
        _forked(_fork_with_vllm, (there,))
        there.close()
        self._exit_codes: dict[int, int | None] = {}
        # multiprocessing waits for its processes at exit, this one for the end of the connection.
        atexit.register(self._connection.close)

    def fork(self, arguments: tuple[Any, ...]) -> int:
        """Starts `_run` and returns its process id."""
        self._connection.send(arguments)
        while True:
            pid, code = self._receive()
            if code is None:
                return pid

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        deadline_s = time.monotonic() + timeout_s
        while self._exit_codes[pid] is None and self._connection.poll(max(0.0, deadline_s - time.monotonic())):
            self._receive()
        return self._exit_codes[pid]

    def _receive(self) -> tuple[int, int | None]:
        pid, code = self._connection.recv()
        self._exit_codes[pid] = code
        return pid, code


class _ProcessWithVllm:
    """What `Program` needs of a multiprocessing.Process."""

    def __init__(self, *arguments: Any) -> None:
        self.pid: int | None = _vllm_parent().fork(arguments)

    @property
    def exitcode(self) -> int | None:
        assert self.pid is not None
        return _vllm_parent().exit_code(self.pid, 0.0)

    def join(self, timeout: float) -> None:
        assert self.pid is not None
        _vllm_parent().exit_code(self.pid, timeout)

    def kill(self) -> None:
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _forked(target: Callable[..., None], arguments: tuple[Any, ...]) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTS])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


@functools.cache
def _vllm_parent() -> _VllmParent:
    return _VllmParent()


def _fork_with_vllm(requests: Connection) -> None:
    """Answers each request with (process id, None), and each end of a process with (process id, exit code)."""
    os.environ.update(FAST_ENGINE)
    importlib.import_module(VLLM_IMPORTS)
    running: dict[int, ForkProcess] = {}
    with contextlib.suppress(EOFError):
        while True:
            for ready in wait([requests, *running]):
                if ready is requests:
                    process = multiprocessing.get_context("fork").Process(target=_run, args=requests.recv())
                    process.start()
                    running[process.sentinel] = process
                    requests.send((process.pid, None))
                else:
                    assert isinstance(ready, int)
                    process = running.pop(ready)
                    process.join()
                    requests.send((process.pid, process.exitcode))


def _make_streams() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="program-"))
    for name in STREAMS:
        (folder / name).touch()
    return folder


def _read_streams(folder: Path) -> tuple[str, str]:
    out, err = ((folder / name).read_text(encoding="utf-8") for name in STREAMS)
    shutil.rmtree(folder)
    return out, err


def _run(argv: list[str], cwd: Path, environ: dict[str, str], streams: Path) -> None:
    """In the forked process."""
    for descriptor, name in enumerate(STREAMS, 1):
        opened = os.open(streams / name, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    assert IMPORTS in sys.modules, "a module that fails to import is skipped in silence"
    if VLLM_IMPORTS not in sys.modules:
        for launcher in LAUNCHERS:
            vars(sys.modules[launcher])["subprocess"] = SimpleNamespace(Popen=ForkedPython)
    else:
        os.setsid()
        # As a new interpreter would.
        sys.path.extend(environ["PYTHONPATH"].split(os.pathsep))
    os.chdir(cwd)
    # What TMPDIR said in the first process.
    tempfile.tempdir = None
    _become(argv, environ)


def _become(argv: list[str], environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.import_module(PROGRAMS.get(argv[0], argv[0])).main()


class ForkedPython:
    """What the launchers need of subprocess.Popen, without the seconds that an interpreter spends on imports."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **streams: Any) -> None:
        argv = list(command[command.index("-m") + 1 :])
        outputs = (streams.get("stdout"), streams.get("stderr"))
        self._process = multiprocessing.get_context("fork").Process(target=_be_python, args=(argv, env, outputs))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            assert self.pid is not None
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _be_python(argv: list[str], environ: Mapping[str, str], outputs: tuple[IO[bytes] | None, ...]) -> None:
    os.setsid()
    for descriptor, stream in enumerate(outputs, 1):
        if stream is not None:
            os.dup2(stream.fileno(), descriptor)
    # The launcher's handler forwards; a new interpreter would have the default.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _become(argv, environ)
