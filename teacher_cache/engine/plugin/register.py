"""stillroom's vLLM plugin (entry point `vllm.general_plugins`): signals of the whole distribution, at the sampler.

vLLM calls `register` in each of its processes. Nothing changes until a worker prepares its device; then the functions
in which its model runner, of either generation, turns logits into logprobs are wrapped. A request without our
`extra_args` gets what vLLM gives; one with them (engine.row_layout) gets its own rows in place of vLLM's top k.

The wrapped functions are private, so they are used only where this vLLM has the version and the signatures that were
read and tested. Otherwise nothing is wrapped, rows come without their mark, and whoever needs them sees that.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import vllm
from vllm.v1.worker.worker_base import WorkerWrapperBase

VLLM_VERSION = "0.32.0"

logger = logging.getLogger("vllm.stillroom")

_init_device = WorkerWrapperBase.init_device


def register() -> str | None:
    """Prepares the workers of this process, and of those forked from it. Returns why not, else None."""
    reason = version_mismatch() or signature_mismatch({WorkerWrapperBase.init_device: ["self"]})
    if reason is None:
        WorkerWrapperBase.init_device = _init_device_with_signals  # type: ignore[method-assign]
        _let_saved_compilations_load()
    else:
        logger.warning("stillroom's sampler plugin does not fit this vLLM: %s", reason)
    return reason


def install() -> None:
    """Wraps both runners in this process; a second time does nothing. A runner that does not fit is left alone."""
    from teacher_cache.engine.plugin import hooks_v1, hooks_v2

    for runner in (hooks_v1, hooks_v2):
        reason = runner.install()
        if reason is not None:
            logger.warning("stillroom's sampler plugin is not active in a model runner: %s", reason)
        else:
            # For a server's log; embedded, vLLM logs warnings alone.
            logger.info("stillroom's sampler plugin is active: %s", runner.__name__)


def version_mismatch() -> str | None:
    """Why this vLLM is not the one that the plugin was written for, or None."""
    if vllm.__version__.split("+")[0] == VLLM_VERSION:
        return None
    return f"it was written for vllm {VLLM_VERSION}, this is {vllm.__version__}"


def signature_mismatch(expected: Mapping[Callable[..., Any], Sequence[str]]) -> str | None:
    """The first function whose parameters differ from those given, in words, or None."""
    for function, parameters in expected.items():
        found = list(inspect.signature(function).parameters)
        if found != list(parameters):
            return f"{function.__qualname__} has parameters {found} instead of {list(parameters)}"
    return None


def _init_device_with_signals(self: WorkerWrapperBase) -> None:
    install()
    _init_device(self)  # type: ignore[no-untyped-call]


def _let_saved_compilations_load() -> None:
    """vLLM calls `finalize_loading` on every compilation it loads, but only those of its own backend have it. On a CPU
    it compiles with torch's backend, whose compilations are complete once read; without this each start compiles again.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    def finalize_loading(self: BundledAOTAutogradSerializableCallable, vllm_config: object) -> None: ...

    BundledAOTAutogradSerializableCallable.finalize_loading = finalize_loading  # type: ignore[attr-defined]
