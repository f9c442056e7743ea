"""Environments for tools that cannot live beside the project's transformers and torch: made once by uv, then kept.

They lie below $STILLROOM_ENVIRONMENTS, or else the user's cache folder, each named after its pinned requirements, and
appear whole: a temporary folder, filled under a lock, then renamed.
"""

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import format_duration, note
from stillroom.storage.paths import TEMP_SUFFIX
from student_train.export.formats import PROJECT
from student_train.export.processes import run_noting

REQUIREMENTS = Path(__file__).parent / "requirements"
FOLDER_VARIABLE = "STILLROOM_ENVIRONMENTS"
# A build for CUDA beside a torch for CPU breaks transformers, and text needs none of them.
OVERRIDES = "".join(f"{name}; sys_platform == 'never'\n" for name in ("torchaudio", "torchcodec", "torchvision"))


def python_of(environment: str) -> Path:
    """The interpreter of an environment, which is made now if there is none.

    Raises ConfigError without uv, StillroomError where the packages cannot be installed.
    """
    if environment == PROJECT:
        return Path(sys.executable)
    folder = folder_of(environment)
    python = folder / "bin" / "python"
    # Environments appear whole, so one that is there needs no lock.
    if python.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock")):
        # Another process may have made it meanwhile.
        if not python.exists():
            _make(environment, folder)
    return python


def folder_of(environment: str) -> Path:
    """Where an environment lies: its name says which requirements and which Python it has."""
    requirements = (REQUIREMENTS / f"{environment}.txt").read_bytes()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(requirements + version.encode()).hexdigest()[:8]
    root = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom" / "environments"
    return (Path(root) if root else cache) / f"{environment}-{digest}"


def _make(environment: str, folder: Path) -> None:
    uv = _uv()
    started_s = time.monotonic()
    note(f"making the environment for {environment} in {folder} (1 to 2 GB, once)")
    temp = folder.with_name(f".{folder.name}{TEMP_SUFFIX}")
    shutil.rmtree(temp, ignore_errors=True)
    environ = _uv_environ()
    overrides = folder.with_suffix(".overrides")
    overrides.write_text(OVERRIDES, encoding="utf-8")
    target = ["--override", str(overrides), *_torch_flags(environ)]
    requirements = str(REQUIREMENTS / f"{environment}.txt")
    try:
        # Relocatable: it is renamed once it is whole.
        _run([uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, str(temp)], environ)
        python = str(temp / "bin" / "python")
        _run([uv, "pip", "install", "--quiet", "--python", python, *target, "--requirements", requirements], environ)
        # One whose interpreter is gone (an upgraded Python) links to nothing: python_of found no program in it.
        shutil.rmtree(folder, ignore_errors=True)
        temp.rename(folder)
    finally:
        overrides.unlink()
        shutil.rmtree(temp, ignore_errors=True)
    note(f"{folder.name} is ready, in {format_duration(time.monotonic() - started_s)}")


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise ConfigError("this format's tools live in an environment that uv makes, and uv is missing: pip install uv")
    return found


def _run(command: list[str], environ: dict[str, str]) -> None:
    ended = run_noting(command, environ, "installing")
    if ended.code != 0:
        why = " ".join(" ".join(ended.lines).split())[-400:]
        raise StillroomError(
            f"the environment could not be made: {why}. It needs the package index once: check the network, or point "
            "UV_FIND_LINKS at a folder of wheels, and run the same command again"
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("waiting for another process that makes the same environment")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _torch_flags(environ: dict[str, str]) -> list[str]:
    """torch for this machine: without a GPU the CPU build, from a wheel folder that holds it or else torch's own
    index.
    """
    import torch

    links = [Path(unquote(urlparse(link).path)) for link in environ.get("UV_FIND_LINKS", "").split(",") if link]
    has_wheel = any(any(folder.glob("torch-*+cpu-*.whl")) for folder in links if folder.is_dir())
    if torch.cuda.is_available() or "UV_TORCH_BACKEND" in environ or has_wheel:
        return []
    return ["--torch-backend", "cpu"]


def _uv_environ() -> dict[str, str]:
    """With pip's indexes, wheel folders and certificate, which uv does not read by itself.

    As variables, not arguments: an index address may hold a password.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    pip: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for option, value in re.findall(rf"^{re.escape(section)}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
            pip[option] = str(ast.literal_eval(value))
    wanted = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_EXTRA_INDEX_URL": " ".join(pip.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "SSL_CERT_FILE": pip.get("cert", ""),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if pip.get("extra-index-url") else "",
    }
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**own, **{name: value for name, value in wanted.items() if value and name not in own}}
