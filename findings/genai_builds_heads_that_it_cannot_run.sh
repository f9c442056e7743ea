#!/usr/bin/env bash
# onnxruntime-genai 0.18.0: its builder writes a Llama whose heads its own runtime refuses.
#
# `python -m onnxruntime_genai.models.builder` turns a Hugging Face folder into ONNX with attention as
# GroupQueryAttention. For heads of 8 values (hidden size 32, 4 heads) it ends with exit code 0 and a complete folder,
# which loads; the first call fails, because the kernel takes head sizes that are multiples of 16 only. Heads of 16 run.
# A pipeline that converts on one machine and serves on another finds out on the other: run every folder once before it
# is called done, and choose heads of 16, 32, 64, ... where small models are made for tests.
# Seen, onnxruntime 1.32.0, CPU: heads of 8: built, loads, then an error that names head_size; of 16: built, runs.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0 \
  onnx==1.23.2 onnx-ir==1.1.0
cat > "$folder/check.py" <<'PY'
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
vocab = {chr(97 + i) if i < 26 else f"<{i}>": i for i in range(64)}
tokenizer = Tokenizer(models.BPE(vocab, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def outcome(head_size: int) -> str:
    source, out = folder / f"hf{head_size}", folder / f"onnx{head_size}"
    config = LlamaConfig(vocab_size=64, hidden_size=4 * head_size, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=63, bos_token_id=62)
    LlamaForCausalLM(config).save_pretrained(source)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<63>", bos_token="<62>").save_pretrained(source)
    built = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", "fp32",
                            "-e", "cpu"], capture_output=True, text=True)
    if built.returncode:
        return "not built: " + built.stderr.strip().splitlines()[-1]
    model = og.Model(str(out))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=8)
    generator = og.Generator(model, params)
    try:
        generator.append_tokens(np.array([1, 2, 3], np.int32))
        generator.generate_next_token()
    except Exception as error:
        return f"built, loads, then {'an error about head_size' if 'head_size' in str(error) else error}"
    return "built, runs"


found = {size: outcome(size) for size in (8, 16)}
for size, said in found.items():
    print(f"heads of {size}: {said}")
sys.exit(found != {8: "built, loads, then an error about head_size", 16: "built, runs"})
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
