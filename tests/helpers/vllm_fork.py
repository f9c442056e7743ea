"""vLLM's engine process, forked from the process that asks for it: vLLM's build for CPUs would start an interpreter and
import everything again.
"""

import multiprocessing
from multiprocessing.context import ForkProcess
from types import SimpleNamespace


def fork_engines() -> None:
    """From now on engines that this process starts are forked from it."""
    from vllm.v1.engine import utils

    vars(utils)["get_mp_context"] = lambda: SimpleNamespace(
        Process=_EngineProcess, Queue=multiprocessing.get_context("fork").Queue
    )


class _EngineProcess(ForkProcess):
    def run(self) -> None:
        _forget_plugins()
        super().run()


def _forget_plugins() -> None:
    """As in a new interpreter, which has to find and load them itself."""
    from vllm import plugins
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from teacher_cache.engine.plugin import register

    plugins.plugins_loaded = False
    if register._unwrapped:
        WorkerWrapperBase.init_device = register._unwrapped.pop()  # type: ignore[method-assign]
