"""What programs with vLLM find imported: as little may be read of its settings, and no thread started."""

import gc
import importlib
import os
import pkgutil

import teacher_cache
from teacher_cache.engine.vllm.fit import ADAPTER, ARRAYS, ENGINE, misfit, plugin_misfit
from teacher_cache.engine.vllm.process import QUIET_ENVIRONMENT

# As in program_imports.
gc.disable()
os.environ.update(QUIET_ENVIRONMENT)
for name in (
    *("datasets", "transformers.models.llama.modeling_llama", "vllm.v1.engine.llm_engine"),
    *("vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.serve"),
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "vllm.model_executor.model_loader"),
    *(module.name for module in pkgutil.walk_packages(teacher_cache.__path__, f"{teacher_cache.__name__}.")),
):
    importlib.import_module(name)
# Their source is parsed once.
for facts in (ENGINE, ARRAYS, ADAPTER):
    misfit(facts)
plugin_misfit()
gc.freeze()
gc.enable()
