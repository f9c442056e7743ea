"""What the configuration asks of vLLM: arguments of its EngineArgs."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from teacher_cache.config import CaptureConfig, TeacherConfig
from teacher_cache.engine_config import EmbeddedConfig
from teacher_cache.vllm_engine.wide_rows import Layout

FREE_MEMORY_FRAC = 0.25
"""Of a CPU's free memory, what the key-value cache gets when nothing is said. vLLM itself would take nine tenths."""

SCORING_CHUNK_TOKENS = 2048
"""Tokens a step when completions are scored and nothing is said: 1.2 GB of logits at a vocabulary of 150,000."""


def engine_args(teacher: TeacherConfig, config: EmbeddedConfig, capture: CaptureConfig, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs. What the configuration leaves None is left to vLLM."""
    asked: Mapping[str, Any] = {
        "revision": teacher.revision,
        "tokenizer_revision": teacher.revision,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "distributed_executor_backend": config.distributed_executor_backend,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
    }
    arguments = {
        "model": teacher.model,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_expert_parallel": config.enable_expert_parallel,
        "enforce_eager": config.enforce_eager,
        "max_logprobs": Layout(capture.max_support, capture.draws, tuple(capture.temperatures)).width,
        # The teacher's own distribution: before penalties, temperature and truncation.
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        **{name: value for name, value in asked.items() if value is not None},
    }
    if config.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gb * 2**30)
    elif on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments["kv_cache_memory_bytes"] = int(FREE_MEMORY_FRAC * _free_memory_bytes())
    if on_cpu:
        # vLLM's CPU sampler cannot draw with a request's own seed while a prompt is cut into chunks.
        arguments["enable_chunked_prefill"] = False
    return arguments


def scoring_args(config: EmbeddedConfig) -> dict[str, Any]:
    """Prompts in chunks, also on a CPU: scoring draws no tokens, and holds the logits of a whole chunk."""
    num_tokens = config.max_num_batched_tokens or SCORING_CHUNK_TOKENS
    return {"enable_chunked_prefill": True, "max_num_batched_tokens": num_tokens}


def allow_whole_prompts(vllm_config: Any, config: EmbeddedConfig) -> None:
    """Without chunks a step must take the longest prompt whole."""
    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if config.max_num_batched_tokens is not None and config.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"engine.max_num_batched_tokens={config.max_num_batched_tokens} is below max_model_len={max_model_len}: "
            "on a CPU prompts are not cut into chunks, raise it or lower engine.max_model_len"
        )
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, max_model_len)


def _free_memory_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
