"""A small teacher with the manners of a large one, trained on the spot, and the chains that it writes.

Four layers of width 192 over 1,024 ids, trained for two minutes. Its logits are divided by 0.36 in the head, which
makes its distributions about as sharp as those of large models: `top_mass` of the result says how sharp.

    B sequences of a batch, L tokens of one, R chains, P prompt tokens, T completion tokens
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.corpus import read_corpus
from student_train.model.folder import atomic_folder, save_model

VOCAB_SIZE = 1024
SHARPNESS = 0.36
"""What the teacher's logits are divided by."""
EOS_TOKEN = "<|end|>"
CORPUS_CHARS = 6_000_000
NUM_PROMPT_TOKENS = 8
NUM_COMPLETION_TOKENS = 56
BATCH_CHAINS = 256


@dataclass(frozen=True)
class Training:
    """How the teacher is trained."""

    num_steps: int = 300
    batch: int = 16
    length: int = 128
    learning_rate: float = 3e-3


def ensure_teacher(folder: Path, training: Training) -> Path:
    """The teacher's Hugging Face folder, made in about two minutes where it is not there yet."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    texts = read_corpus(0, CORPUS_CHARS)
    tokenizer = _train_tokenizer(texts)
    model = LlamaForCausalLM(model_config(num_layers=4, width=192, tied=False))
    ids = torch.tensor([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]])
    _train(model, ids, training)
    with torch.no_grad():
        model.lm_head.weight.div_(SHARPNESS)
    with atomic_folder(folder) as temp:
        save_model(model, tokenizer, temp)
    return folder


def model_config(num_layers: int, width: int, *, tied: bool) -> LlamaConfig:
    """A Llama over the benchmark's vocabulary."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 48,
        num_key_value_heads=width // 48,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


@torch.no_grad()
def write_chains(model: Any, tokenizer: Any, num_chains: int, seed: int) -> tuple[Tensor, Tensor]:
    """prompts [R, P] out of the corpus, and what the teacher writes after them at temperature 1, [R, T]; both int64."""
    generator = torch.Generator().manual_seed(seed)
    starts = _prompts(tokenizer, num_chains, seed)
    chains = []
    for prompts_BP in starts.split(BATCH_CHAINS):
        ids_BL, cache, new_BL = prompts_BP, None, prompts_BP
        for _ in range(NUM_COMPLETION_TOKENS):
            output = model(input_ids=new_BL, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probs_BV = output.logits[:, -1].float().softmax(dim=1)
            # Chains of one length pack evenly; the end of a text inside one is a token like any other.
            new_BL = torch.multinomial(probs_BV, 1, generator=generator)
            ids_BL = torch.cat([ids_BL, new_BL], dim=1)
        chains.append(ids_BL)
    ids_RL = torch.cat(chains)
    return ids_RL[:, :NUM_PROMPT_TOKENS], ids_RL[:, NUM_PROMPT_TOKENS:]


def _prompts(tokenizer: Any, num: int, seed: int) -> Tensor:
    """Different beginnings [num, P] of texts of the corpus."""
    found: dict[tuple[int, ...], None] = {}
    for text in read_corpus(seed + 1, CORPUS_CHARS):
        for line in text.split("\n\n"):
            ids = tuple(tokenizer.encode(line.strip()))[:NUM_PROMPT_TOKENS]
            if len(ids) == NUM_PROMPT_TOKENS:
                found[ids] = None
            if len(found) == num:
                return torch.tensor(list(found))
    raise ValueError(f"the corpus has {len(found)} different beginnings, {num} were asked for")


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def _train(model: LlamaForCausalLM, ids: Tensor, training: Training) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    offsets_L = torch.arange(training.length)
    for step in range(training.num_steps):
        progress = step / training.num_steps
        warmup, decay = min(1.0, 20 * progress + 0.01), (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * warmup * decay
        starts_B = torch.randint(len(ids) - training.length, (training.batch,), generator=generator)
        batch_BL = ids[starts_B[:, None] + offsets_L]
        loss = model(input_ids=batch_BL, labels=batch_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
