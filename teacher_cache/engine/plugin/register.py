"""stillroom's vLLM plugin (entry point `vllm.general_plugins`): signals of the whole distribution, at the sampler.

vLLM calls `register` in each of its processes. Nothing changes until a worker prepares its device; then the functions
in which its model runner, of either generation, turns logits into logprobs are wrapped. A request without our
`extra_args` gets what vLLM gives; one with them (engine.row_layout) gets its own rows in place of vLLM's top k.

The wrapped functions are private, so each is used only where this vLLM's source is as expected (engine.vllm.fit).
Otherwise nothing is wrapped, rows come without their mark, and whoever needs them sees that.
"""

import contextlib
import importlib
import logging
from typing import Any

from teacher_cache.engine.vllm import fit

logger = logging.getLogger("vllm.stillroom")

HOOKS = {1: "teacher_cache.engine.plugin.hooks_v1", 2: "teacher_cache.engine.plugin.hooks_v2"}


def register() -> str | None:
    """Prepares the workers of this process, and of those forked from it. Returns why not, else None."""
    reason = fit.plugin_misfit(runners=())
    if reason is None:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        # A second call in one process must not wrap the wrapper, which would call itself.
        if WorkerWrapperBase.init_device is not _init_device_with_signals:
            _unwrapped.append(WorkerWrapperBase.init_device)
            WorkerWrapperBase.init_device = _init_device_with_signals  # type: ignore[method-assign]
        _let_saved_compilations_load()
    else:
        logger.warning("stillroom's sampler plugin does not fit this vLLM: %s", reason)
    return reason


def install() -> None:
    """Wraps both runners in this process; a second time does nothing. A runner that does not fit is left alone."""
    for number, hooks in HOOKS.items():
        reason = fit.plugin_misfit([number])
        if reason is not None:
            logger.warning("stillroom's sampler plugin is not active in model runner V%d: %s", number, reason)
            continue
        # Only now: a module that vLLM has moved would fail to import.
        importlib.import_module(hooks).install()
        # For a server's log; embedded, vLLM logs warnings alone.
        logger.info("stillroom's sampler plugin is active in model runner V%d", number)


_unwrapped: list[Any] = []
"""vLLM's own init_device, once it is wrapped."""


def _init_device_with_signals(self: Any) -> None:
    install()
    _unwrapped[0](self)


def _let_saved_compilations_load() -> None:
    """vLLM calls `finalize_loading` on every compilation it loads, but only those of its own backend have it. On a CPU
    it compiles with torch's backend, whose compilations are complete once read; without this each start compiles again.
    """

    def finalize_loading(self: object, vllm_config: object) -> None: ...

    # A torch that has moved the class costs a compilation at each start, not the start.
    with contextlib.suppress(ImportError):
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

        BundledAOTAutogradSerializableCallable.finalize_loading = finalize_loading  # type: ignore[attr-defined]
