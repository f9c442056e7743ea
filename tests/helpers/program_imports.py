"""What the programs of tests.helpers.programs find imported. Nothing here starts a thread or reads their settings."""

import gc
import importlib
import pkgutil

import student_train
import teacher_cache
from student_train.model.student import use_cpu_where_there_is_no_gpu

# Nothing that is imported is garbage.
gc.disable()
# DeepSpeed looks for an accelerator when it is imported.
use_cpu_where_there_is_no_gpu()
for name in (
    *("datasets", "deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "peft"),
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)
for package in (student_train, teacher_cache):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "vllm" not in module.name and "plugin" not in module.name:
            importlib.import_module(module.name)
# Forked processes would go through all these objects, and copy their pages, whenever they collect garbage.
gc.freeze()
gc.enable()
