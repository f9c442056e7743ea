"""Runs a Hugging Face folder, compressed or not, in vLLM, on a GPU if there is one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The engine in this process: its memory is then this process's.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Distributions come from the engine as it is, without any plugin.
os.environ["VLLM_PLUGINS"] = ""

import numpy as np
import torch
import vllm
from protocol import Array, serve_runtime
from vllm import LLM, SamplingParams

NUM_LOGPROBS = 512
"""Most likely tokens at each position: vLLM makes Python objects of all of them."""
KV_CACHE_BYTES = 1 << 30
MAX_MODEL_TOKENS = 4096


class Vllm:
    """An engine without prefix caching, which would skip the prefill that is measured."""

    def __init__(self, folder: Path, threads: int | None, is_quick: bool) -> None:
        if threads is not None:
            # Otherwise it takes every core, whatever OMP_NUM_THREADS says.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._num_logprobs = min(NUM_LOGPROBS, config.get("text_config", config)["vocab_size"])
        engine: Any = LLM
        self._llm = engine(
            str(folder),
            dtype=_precision(config),
            # Compiling takes minutes on a CPU.
            enforce_eager=is_quick,
            enable_prefix_caching=False,
            max_logprobs=self._num_logprobs,
            max_model_len=min(MAX_MODEL_TOKENS, config.get("max_position_embeddings", MAX_MODEL_TOKENS)),
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            disable_log_stats=True,
        )

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """The most likely tokens; a prompt's log probabilities are of the token itself and of the top ones."""
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self._num_logprobs, flat_logprobs=True, detokenize=False
        )
        [output] = self._llm.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)
        found: Any = output.prompt_logprobs
        # Position 0 has none, and the token after the last position is the generated one: position t is entry t + 1.
        starts = [found.start_indices[position + 1] + 1 for position in positions]
        rows = [slice(start, start + self._num_logprobs) for start in starts]
        return {
            "ids": np.array([found.token_ids[row] for row in rows], np.int32),
            "logprobs": np.array([found.logprobs[row] for row in rows], np.float32),
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """All prompts in one batch."""
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        return [list(map(int, output.outputs[0].token_ids)) for output in outputs]


def _precision(config: dict[str, Any]) -> str:
    """As stored on a CPU, where vLLM would run float32 in bfloat16 by itself. Two of its kernels know no float32: those
    of 4 bits, and on processors with AMX those of 8 bits.
    """
    if torch.cuda.is_available():
        return "auto"
    groups = (config.get("quantization_config") or {}).get("config_groups", {})
    is_4_bit = any(one["weights"]["num_bits"] == 4 for one in groups.values())
    is_without_float32 = is_4_bit or (groups and torch.cpu._is_amx_tile_supported())
    return "bfloat16" if is_without_float32 else config.get("dtype") or config.get("torch_dtype") or "auto"


if __name__ == "__main__":
    serve_runtime(Vllm, {"vllm": vllm.__version__, "torch": torch.__version__})
