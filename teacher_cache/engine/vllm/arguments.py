"""A configuration as vLLM's engine arguments, and vLLM's own configuration made of them."""

import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cache.tensors import read_header
from stillroom.errors import ConfigError
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.adapter import MERGE, WEIGHTS
from teacher_cache.engine.row_layout import Layout
from teacher_cache.engine.switches import INSTEAD_OF_REPLICAS, note_unknown
from teacher_cache.engine.vllm.fit import ADAPTER, HOW_TO_FIT, misfit, source_folder
from teacher_cache.engine.vllm.process import quiet_start, short

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCORING_CHUNK_TOKENS = 2048
"""Default tokens per step when scoring: 1.2 GB of logits at a vocabulary of 150,000."""


def engine_args(teacher: TeacherConfig, config: EmbeddedConfig, capture: CaptureConfig, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs. A setting that is None is left to vLLM.

    Raises ConfigError for a value in `config.vllm` that vLLM's type does not take.
    """
    optional: Mapping[str, Any] = {
        "revision": teacher.revision,
        "tokenizer_revision": teacher.revision,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "distributed_executor_backend": config.distributed_executor_backend,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "enforce_eager": config.enforce_eager,
        "kv_cache_memory_bytes": None if config.kv_cache_gb is None else int(config.kv_cache_gb * 2**30),
        # vLLM's CPU sampler cannot use a request's own seed while a prompt is split into chunks.
        "enable_chunked_prefill": False if on_cpu else None,  # None: vLLM's own default, or engine.vllm's
    }
    return {
        # First: teacher-cache's own arguments cannot be among them.
        **_typed_switches(config),
        "model": teacher.model,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_expert_parallel": config.enable_expert_parallel,
        "max_logprobs": Layout(capture.max_support, capture.draws, tuple(capture.temperatures)).width,
        # The teacher's own distribution: before penalties, temperature and truncation.
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        **{name: value for name, value in optional.items() if value is not None},
    }


def adapter_args(path: str | None, scores: bool) -> dict[str, Any]:
    """Room for one adapter. Raises ConfigError, before weights are loaded, for one that vLLM cannot apply."""
    if path is None:
        return {}
    if (lacking := misfit(ADAPTER)) is not None:
        raise ConfigError(f"teacher.adapter does not fit this vLLM: {lacking}: {HOW_TO_FIT}")
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    ranks = sorted(typing.get_args(MaxLoRARanks))
    try:
        helper = PEFTHelper.from_local_dir(path, None)
        rank = max([helper.r, *helper.rank_pattern.values()])
        # vLLM allocates one of these ranks; matrices of a smaller one are padded with zeros.
        max_rank = next((one for one in ranks if one >= rank), ranks[-1])
        helper.validate_legal(LoRAConfig(max_lora_rank=max_rank))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher.adapter: vLLM cannot apply {path} ({short(error)}): {MERGE}") from error
    names = sorted(read_header(Path(path) / WEIGHTS))
    if scores and any("lm_head" in name for name in names):
        raise ConfigError(f"teacher.adapter: vLLM does not score with an adapter of lm_head ({path}): {MERGE}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank, "lora_target_modules": names}


def check_values(config: EmbeddedConfig, sampling: Mapping[str, Any]) -> None:
    """Raises ConfigError for values of `engine.vllm` and `sampling.vllm` that this vLLM does not take. Checks nothing
    where vLLM is not installed.
    """
    # The import takes seconds.
    if source_folder() is None or not (config.vllm or sampling):
        return
    with quiet_start():
        from teacher_cache.engine.vllm.values import typed

        typed("engine", config.vllm)
        typed("sampling", sampling)


def _typed_switches(config: EmbeddedConfig) -> dict[str, Any]:
    if not config.vllm:
        return {}
    from teacher_cache.engine.vllm.values import typed

    return typed("engine", config.vllm)


def check_switches(
    config: EmbeddedConfig, sampling: Sequence[Mapping[str, Any]], *, on_cpu: bool, scores: bool
) -> None:
    """Raises ConfigError for what cannot work here, and says what nobody has compared."""
    from teacher_cache.engine.vllm.values import cpu_problem

    is_random = any(one.get("temperature", 1.0) > 0 for one in sampling)
    if on_cpu and (problem := cpu_problem(config.vllm, scores=scores, is_random=is_random)) is not None:
        raise ConfigError(f"engine.vllm: {problem}")
    note_unknown("engine", config.vllm)
    note_unknown("sampling", [name for one in sampling for name in one.get("vllm", ())])


def scoring_args(config: EmbeddedConfig) -> dict[str, Any]:
    """Scoring samples no tokens, so prompts can be split on a CPU too; it holds the logits of a whole chunk."""
    num_tokens = config.max_num_batched_tokens or SCORING_CHUNK_TOKENS
    return {"enable_chunked_prefill": True, "max_num_batched_tokens": num_tokens}


def new_config(arguments: Mapping[str, Any]) -> "VllmConfig":
    """vLLM's own configuration. Raises its ValueError for arguments that it refuses, ConfigError for VLLM_DP_SIZE."""
    if (num_replicas := os.environ.get("VLLM_DP_SIZE", "1")) != "1":
        # Each step would wait for all of them, also for a worker whose build has ended.
        raise ConfigError(f"VLLM_DP_SIZE={num_replicas} ties workers together: unset it, and {INSTEAD_OF_REPLICAS}")
    from vllm.engine.arg_utils import EngineArgs

    vllm_config = EngineArgs(**arguments).create_engine_config()
    if (lora := vllm_config.lora_config) is not None:
        lora.target_modules = _adapted_modules(vllm_config, lora.target_modules or ())
    return vllm_config


def _adapted_modules(vllm_config: "VllmConfig", names: Sequence[str]) -> list[str]:
    """Modules of the adapter by the names that vLLM's model gives them, in place of the names of its matrices.

    Left to itself vLLM adapts the output head too, and its path for that counts on one row per chain: while it scores,
    which takes a row per token, it crashes on a CPU.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name
    from vllm.model_executor.model_loader.utils import get_model_cls

    # As vLLM renames the adapter's matrices when it loads them.
    mapper = getattr(get_model_cls(vllm_config.model_config), "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    modules = {parse_fine_tuned_lora_name(name, renames)[0] for name in names}
    # All experts are one module.
    experts = {"experts"} if any(".experts" in name for name in modules) else set()
    return sorted(experts | {name.rpartition(".")[2] for name in modules})
