"""vLLM's own engine arguments and sampling parameters in a configuration: `engine.vllm` and `sampling.vllm`.

Any name of the installed vLLM is accepted except those below, which teacher-cache sets itself or which would break the
capture. A name counts as safe once its chains were compared with a dense computation (docs/switches.md); the rest is
unknown, which is said once at the start. Imports nothing of vLLM.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from stillroom.config import nearest_name
from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.schema.records import stable_hash
from teacher_cache.engine.vllm.fit import fields_of

INSTEAD_OF_REPLICAS = (
    "start more with --join or --on ray, or serve them (vllm serve --data-parallel-size N) with engine.kind: server"
)
REPLICAS = f"vLLM's embedded engine gives the first replica every chain and never ends: {INSTEAD_OF_REPLICAS}"
NO_EFFECT = "it would have no effect: "
TEXT = NO_EFFECT + "text is decoded here, from all tokens"

ENGINE_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("model", "tokenizer", "model_weights"), "use teacher.model"),
    **dict.fromkeys(("revision", "tokenizer_revision", "code_revision"), "use teacher.revision"),
    "trust_remote_code": "use teacher.trust_remote_code",
    **{
        name: f"use engine.{name}"
        for name in (
            *("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"),
            *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "quantization"),
            *("distributed_executor_backend", "kv_cache_dtype", "enforce_eager"),
        )
    },
    "kv_cache_memory_bytes": "use engine.kv_cache_gb",
    "seed": "use sampling.seed: each chain has its own",
    "max_logprobs": "it follows from capture",
    "logprobs_mode": "the stored distributions are the teacher's own, raw_logprobs",
    "hf_token": "a configuration is copied into manifests: set the environment variable HF_TOKEN",
    **dict.fromkeys(
        ("runner", "convert", "pooler_config", "tokens_only", "diffusion_config"), "the teacher must generate tokens"
    ),
    **dict.fromkeys(("enable_prompt_embeds", "enable_trace_replay"), NO_EFFECT + "prompts and chains are token ids"),
    **dict.fromkeys(
        ("generation_config", "override_generation_config"), NO_EFFECT + "all sampling parameters are in sampling"
    ),
    **dict.fromkeys(
        ("return_sampling_mask", "enable_return_routed_experts", "aux_output_config"), NO_EFFECT + "it is not captured"
    ),
    **dict.fromkeys(
        ("served_model_name", "stream_interval", "disable_log_stats", "use_tqdm_on_load", "log_config_file"),
        NO_EFFECT + "chains come out whole, in this process",
    ),
    **dict.fromkeys(
        ("enable_lora", "max_loras", "max_lora_rank", "default_mm_loras", "max_cpu_loras", "lora_target_modules"),
        "use teacher.adapter, which every chain then uses",
    ),
    **dict.fromkeys(
        (
            *("data_parallel_size", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local"),
            *("data_parallel_address", "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_backend"),
            *("data_parallel_external_lb", "data_parallel_multi_port_external_lb"),
            *("enable_elastic_ep", "elastic_ep_max_dp_size", "dp_sync_interval", "disable_nccl_for_dp_synchronization"),
        ),
        REPLICAS,
    ),
}
LORA = frozenset(
    {
        *("fully_sharded_loras", "lora_dtype", "specialize_active_lora", "enable_tower_connector_lora"),
        *("enable_mixed_moe_lora_format", "enable_moe_shared_loras", "max_lora_cls_labels"),
    }
)
"""Engine arguments without effect where there is no adapter."""
SAMPLING_REFUSED: Mapping[str, str] = {
    **{
        name: f"use sampling.{name}"
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")
    },
    "n": "use sampling.samples",
    **dict.fromkeys(
        (
            *("logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
            *("logprob_token_ids", "flat_logprobs"),
        ),
        "log probabilities follow from capture",
    ),
    **dict.fromkeys(
        (
            *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "detokenize"),
            "output_text_buffer_length",
        ),
        TEXT,
    ),
    **dict.fromkeys(
        ("output_kind", "stream_interval", "skip_clone", "routed_experts_prompt_start", "stream"),
        NO_EFFECT + "chains come out whole",
    ),
    "extra_args": "the capture uses it",
    **dict.fromkeys(
        ("structured_outputs", "response_format"),
        "its mask changes the logits that the capture reads: their log probabilities would be those of the mask",
    ),
    **dict.fromkeys(
        (
            *("echo", "suffix", "use_beam_search", "length_penalty", "prompt", "model", "messages", "stream_options"),
            *("vllm_xargs", "truncate_prompt_tokens", "truncation_side", "add_special_tokens", "prompt_embeds"),
            *("return_token_ids", "return_tokens_as_token_ids", "return_token_offsets", "best_of"),
        ),
        "it is not a sampling parameter",
    ),
    "trace_decode_token_ids": "it forces tokens instead of sampling: use teacher-cache score",
}

ENGINE_SAFE = frozenset(
    {
        *("enable_prefix_caching", "prefix_caching_hash_algo", "block_size", "num_gpu_blocks_override"),
        *("scheduling_policy", "async_scheduling", "max_num_scheduled_tokens", "scheduler_reserve_full_isl"),
        *("disable_cascade_attn", "skip_tokenizer_init", "load_format", "reasoning_config", "speculative_config"),
        *("optimization_level", "use_fp64_gumbel", "max_num_active_seqs", "additional_config"),
        *("lora_dtype", "fully_sharded_loras"),
    }
)
SAMPLING_SAFE = frozenset(
    {
        *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty"),
        *("bad_words", "allowed_token_ids", "logit_bias", "repetition_detection", "thinking_token_budget"),
        "skip_reading_prefix_cache",
    }
)
"""Run on the CPU engine with vLLM 0.32: every log probability and entropy equals a dense computation's
(`python -m benchmarks.switches`)."""

ENGINE_KEEPS = frozenset(
    {
        *("enable_prefix_caching", "prefix_caching_hash_algo", "block_size", "num_gpu_blocks_override", "swap_space"),
        *("cpu_offload_gb", "cpu_offload_params", "offload_backend", "offload_group_size", "offload_num_in_group"),
        *("offload_prefetch_step", "offload_params", "kv_offloading_size", "kv_offloading_backend"),
        *("max_num_scheduled_tokens", "long_prefill_token_threshold", "enable_chunked_prefill", "scheduling_policy"),
        *("async_scheduling", "scheduler_reserve_full_isl", "prefill_schedule_interval", "max_num_queued_reqs"),
        *("max_num_queued_tokens", "max_num_active_seqs", "watermark", "download_dir", "load_format"),
        *("safetensors_load_strategy", "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size"),
        *("model_loader_extra_config", "ignore_patterns", "pt_load_map_location", "max_parallel_loading_workers"),
        *("attention_backend", "moe_backend", "linear_backend", "mamba_backend", "all2all_backend"),
        *("disable_custom_all_reduce", "disable_cascade_attn", "disable_sliding_window", "enable_eplb", "eplb_config"),
        *("compilation_config", "optimization_level", "performance_mode", "cudagraph_capture_sizes"),
        *("max_cudagraph_capture_size", "kernel_config", "enable_flashinfer_autotune", "numa_bind", "numa_bind_nodes"),
        *("numa_bind_cpus", "device_ids", "ray_workers_use_nsight", "profiler_config", "logging_config", "log_level"),
        *(
            "collect_detailed_traces",
            "otlp_traces_endpoint",
            "kv_cache_metrics",
            "cudagraph_metrics",
            "enable_mfu_metrics",
        ),
        *("prefill_context_parallel_size", "decode_context_parallel_size", "distributed_timeout_seconds"),
        *("cpu_distributed_timeout_seconds", "enable_sleep_mode", "shutdown_timeout", "skip_tokenizer_init"),
        *("tokenizer_mode", "aggregate_engine_logging", "additional_config", "enable_dbo", "ubatch_size"),
        *("fully_sharded_loras", "specialize_active_lora"),
    }
)
"""They decide where and how fast tokens are computed. All others are part of run and sample ids."""
NEUTRAL: Mapping[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "min_tokens": 0,
    **dict.fromkeys(
        (
            *("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias", "thinking_token_budget"),
            *("repetition_detection", "watermarking"),
        )
    ),
}
"""vLLM's defaults: off is off, and changes no id."""
WATCHED = frozenset({"stop", "stop_token_ids", "ignore_eos", "repetition_detection", "skip_reading_prefix_cache"})
"""Sampling parameters that move no probability, so that the mean log probability still has its bound (writer.watch)."""
MOVING = frozenset({"logits_processors", "temperature", "repetition_penalty", *NEUTRAL}) - WATCHED
"""Engine arguments, and parameters of an API, with which it has none."""


def refused(block: str, names: Iterable[str]) -> str | None:
    """One line for the first name that `engine.vllm` or `sampling.vllm` does not take, else None."""
    table = ENGINE_REFUSED if block == "engine" else SAMPLING_REFUSED
    for name in names:
        if name in table or name.startswith("_"):
            return f"{name} cannot be set here: {table.get(name, 'it is internal')}"
    return None


def check_names(block: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a name that the installed vLLM does not have. Without vLLM nothing is known."""
    # Parsing vLLM's source takes longer than all else that a configuration needs.
    if not (names := [*names]):
        return
    where = ("engine.arg_utils", "EngineArgs") if block == "engine" else ("sampling_params", "SamplingParams")
    known = fields_of(*where)
    table = ENGINE_REFUSED if block == "engine" else SAMPLING_REFUSED
    usable = [name for name in known if name not in table]
    for name in names if known else ():
        if name not in known:
            # One that belongs elsewhere may be what was meant: vllm.gpu_memory_utilisation.
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": {close[0]} cannot be set here: {table[close[0]]}" if close and close[0] in table else None
            raise ConfigError(f"{block}.vllm: the installed vLLM has no {name!r}{hint or nearest_name(name, usable)}")


def note_unknown(block: str, names: Iterable[str]) -> None:
    """Says which of them nobody has compared with a dense computation."""
    if unknown := sorted(set(names) - (ENGINE_SAFE if block == "engine" else SAMPLING_SAFE)):
        note(f"{block}.vllm: {', '.join(unknown)} is not tested with the capture (docs/switches.md)")


def effective(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`sampling.vllm` without what is off."""
    return {name: value for name, value in sampling.items() if name not in NEUTRAL or value not in (NEUTRAL[name], [])}


def changing(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `engine.vllm` that may change tokens."""
    return {name: value for name, value in engine.items() if name not in ENGINE_KEEPS}


def identity_of(teacher_fingerprint: str, switches: Mapping[str, Any]) -> str:
    """What identifies the teacher of a scored row: the fingerprint, and engine arguments that may change tokens."""
    return stable_hash("switches", teacher_fingerprint, switches) if switches else teacher_fingerprint
