"""A tiny teacher made on the spot: a Llama of two layers with random weights and the byte-level tokenizer of
tiny_tokenizer. Its distributions are skewed enough to look like a model's.
"""

from pathlib import Path
from typing import Any

from tests.helpers.tiny_tokenizer import byte_level, save

VOCAB_SIZE = 400
"""Rows of the embedding; the tokenizer has fewer tokens, as usual."""
MAX_POSITIONS = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}


def make_tiny_teacher(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Writes a Hugging Face folder that transformers and vLLM load, in about a second. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(folder, LlamaForCausalLM, LlamaConfig(**SHAPE, num_hidden_layers=layers), seed)


def make_tiny_experts(folder: Path, seed: int = 0) -> Path:
    """The same with four experts in each layer, of which a token uses two."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    }
    return _save(folder, Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **experts, num_hidden_layers=2), seed)


def _save(folder: Path, make: Any, config: Any, seed: int) -> Path:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    save(byte_level(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config).float()
    with torch.no_grad():
        # Tokens that end a chain or its reasoning come up often: a random model alone would hardly ever stop.
        for token in (tokenizer.eos_token, "</think>"):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] *= 1.5
    model.save_pretrained(folder)
    return folder


def make_tiny_adapter(folder: Path, teacher: Path, seed: int = 1, **settings: Any) -> Path:
    """Writes a random LoRA adapter of the teacher, by peft. Returns the folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    # Two ranks: all are applied, padded to the largest.
    usual = {"r": 4, "rank_pattern": {"v_proj": 9}, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**{**usual, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # peft begins with zeros, with which the adapter changes nothing.
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def merged(teacher: Path, adapter: Path | None) -> Any:
    """The teacher as transformers computes it, in float32, with the adapter in its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
