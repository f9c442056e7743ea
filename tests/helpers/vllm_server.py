"""A real `vllm serve` on a free port of the loopback."""

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.environment import python_path

BIN = Path(sys.executable).parent
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
    """Starts a server of `model` with its log in `folder`, and yields it when it answers; ends it after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=_environment(folder) | environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process, folder / "serve.log")
        yield Server(url, process.pid)
    finally:
        _end(process)


def _environment(folder: Path) -> dict[str, str]:
    fast = {
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **fast, **python_path(_distribution_named_vllm(folder))}


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


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        assert process.poll() is None, f"vllm serve ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline_s, f"vllm serve does not answer:\n{log.read_text()[-4000:]}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and its engine, which is a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
