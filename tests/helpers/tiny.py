"""A tiny teacher made on the spot: a Llama of two layers with random weights and the byte-level tokenizer of
tiny_tokenizer. Its distributions are skewed enough to look like a model's.
"""

from pathlib import Path

from tests.helpers.tiny_tokenizer import byte_level, save

VOCAB_SIZE = 400
"""Rows of the embedding; the tokenizer has fewer tokens, as usual."""
MAX_POSITIONS = 256


def make_tiny_teacher(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Writes a Hugging Face folder that transformers and vLLM load, in about a second. Returns the folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    save(byte_level(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        # Tokens that end a chain or its reasoning come up often: a random model alone would hardly ever stop.
        for token in (tokenizer.eos_token, "</think>"):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] *= 1.5
    model.save_pretrained(folder)
    return folder
