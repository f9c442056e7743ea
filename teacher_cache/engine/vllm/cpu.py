"""vLLM on a CPU: whether compiling the model pays, and how much memory the key-value cache takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cores import CoreSharing
from stillroom.errors import ConfigError
from stillroom.log import format_count, format_duration, note
from stillroom.schema.records import stable_hash
from teacher_cache.config import EmbeddedConfig
from teacher_cache.engine.vllm.arguments import new_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FREE_MEMORY_FRAC = 0.25
"""Largest share of a CPU's free memory that the key-value cache takes by default; vLLM's own default is 0.9."""
DEFAULT_BLOCK_SIZE = 128
"""Tokens per block of the key-value cache on a CPU."""

COMPILE_S_PER_LAYER = 2.5
BREAK_EVEN_TOKENS = 130_000
"""Measured on two cores (benchmarks/results/start.md). Both the compilation and what it saves per token grow with the
number of layers, so the break-even is a number of tokens whatever the model."""


def cpu_start(
    model: str, num_layers: int, *, enforce_eager: bool | None, is_compiled: bool, tokens_left: float | None
) -> tuple[bool, str]:
    """Whether to start without compiling, and the line that says so."""
    seconds = format_duration(COMPILE_S_PER_LAYER * num_layers)
    if enforce_eager:
        return True, f"loading {model} without compiling it (engine.enforce_eager)"
    if is_compiled:
        return False, f"loading {model} with its saved compilation"
    if enforce_eager is None and tokens_left is not None and tokens_left < BREAK_EVEN_TOKENS:
        left = f"about {format_count(tokens_left)} tokens left do not repay {seconds} of compiling"
        return True, f"loading {model} without compiling it: {left}"
    return False, f"loading {model} and compiling it for this CPU (about {seconds}, once)"


def cpu_config(
    arguments: dict[str, Any], config: EmbeddedConfig, scores: bool, tokens_left: float | None
) -> tuple["VllmConfig", Path | None]:
    """The VllmConfig, and the file to create once the model is compiled (None: it is not compiled)."""
    import torch
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors

    # vLLM's key for saved compilations names no instruction set: machines that share a home would share kernels.
    capability = {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    arguments |= {"additional_config": {**arguments.get("additional_config", {}), **capability}}
    vllm_config = fitted_config(arguments, config, scores)
    folder = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "torch_aot_compile"
    marker = folder / f"stillroom-{stable_hash(str(aot_compile_hash_factors(vllm_config)))}"
    model = vllm_config.model_config
    eager, line = cpu_start(
        arguments["model"],
        model.get_total_num_hidden_layers(),
        enforce_eager=config.enforce_eager,
        is_compiled=marker.exists(),
        tokens_left=tokens_left,
    )
    note(line)
    if not eager:
        return vllm_config, marker
    compile_nothing()
    return vllm_config if model.enforce_eager else fitted_config(
        arguments | {"enforce_eager": True}, config, scores
    ), None


def compile_nothing() -> None:
    """No kernel either for ranks, which vLLM compiles at the first request whatever enforce_eager says."""
    import torch._dynamo.config

    # A minute on a small machine.
    torch._dynamo.config.disable = True


def fitted_config(arguments: Mapping[str, Any], config: EmbeddedConfig, scores: bool) -> "VllmConfig":
    """With a step and a key-value cache that fit a CPU. Raises ConfigError for a step that is too small."""
    vllm_config = new_config(arguments)
    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if not scores:
        # Prompts are not split on a CPU: one step must take the longest one whole.
        if config.max_num_batched_tokens is not None and config.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"engine.max_num_batched_tokens={config.max_num_batched_tokens} is below max_model_len={max_model_len}:"
                " on a CPU prompts are not split into chunks, raise it or lower engine.max_model_len"
            )
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, max_model_len)
    # Either may be set: kv_cache_gb, or vLLM's own VLLM_CPU_KVCACHE_SPACE.
    if vllm_config.cache_config.kv_cache_memory_bytes is None:
        vllm_config.cache_config.kv_cache_memory_bytes = _kv_cache_bytes(vllm_config)
    return vllm_config


def _kv_cache_bytes(vllm_config: "VllmConfig") -> int:
    """What `max_num_seqs` chains of `max_model_len` tokens need, within FREE_MEMORY_FRAC of what is free."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    limit = int(FREE_MEMORY_FRAC * free_memory_bytes())
    if model.has_inner_state:
        # Recurrent layers keep states of other sizes than keys and values.
        return limit
    itemsize = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    # 2: keys and values.
    token_bytes = (
        2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size() * itemsize
    )
    # vLLM 0.33 decides later, when it knows how attention is computed.
    block_size = max(cache.block_size, DEFAULT_BLOCK_SIZE)
    blocks_per_chain = -(-model.max_model_len // block_size)
    # vLLM holds one block back.
    num_blocks = vllm_config.scheduler_config.max_num_seqs * blocks_per_chain + 1
    return min(limit, num_blocks * block_size * token_bytes)


def free_memory_bytes() -> int:
    """Memory that a program may take without swapping."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def core_sharing() -> CoreSharing:
    """Shares the cores between vLLM and our own threads."""
    import torch

    num_threads = torch.get_num_threads()
    # Large enough that torch splits it over all threads.
    return CoreSharing(num_threads, lambda: torch.zeros(2**15 * num_threads).add_(1))
