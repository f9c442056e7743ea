"""Tiny students made on the spot, and the tokenizer and cache that go with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from student_train.model.student import use_cpu_where_there_is_no_gpu
from tests.helpers.caches import EOS_ID, NUM_SPECIAL

VOCAB_SIZE = 300


def make_tokenizer(vocab_size: int = VOCAB_SIZE, first_ordinary: str = "w") -> PreTrainedTokenizerFast:
    """Words w0, w1, ...: the vocabulary of synthetic caches, special tokens included."""
    words = {f"{first_ordinary if number >= NUM_SPECIAL else 'w'}{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{EOS_ID}", unk_token="w0")
    made.add_special_tokens({"additional_special_tokens": ["w2"]})
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def make_student(
    folder: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    heads: int = 4,
    tied: bool = True,
    tokenizer: Any = None,
) -> Path:
    """Writes a Llama of 2 layers and width 32 with random weights, in well under a second. Returns the folder."""
    logging.disable_progress_bar()
    use_cpu_where_there_is_no_gpu()
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer(min(vocab_size, VOCAB_SIZE))).save_pretrained(folder)
    return folder
