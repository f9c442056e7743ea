"""Walks on a map with a checker: the teacher, its chains, and students that know the same 16 rooms.

Who comes into a room from another one may go on to three of the sixteen, by a map of 256 entries that nobody is told.
A prompt names the first two rooms, a chain goes on for twelve: `da` -> `kcpmbgkaofil`. It is right if each of its steps
stands on the map; the checker is a condition in SQL, here and in the caches.

The teacher, trained on the spot, chooses among the three evenly and rarely leaves the map. Students are smaller, and
learn the map little by little: a step off the map here and there ruins a chain of twelve.

    B sequences of a batch, P prompt tokens, T completion tokens, V vocabulary
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from student_train.model.folder import atomic_folder, save_model

ROOMS = "abcdefghijklmnop"
END, UNKNOWN = "<end>", "<unknown>"
VOCAB_SIZE = len(ROOMS) + 2
NUM_EXITS = 3
NUM_STEPS = 12
NUM_PROMPT_TOKENS = 2
NUM_COMPLETION_TOKENS = NUM_STEPS + 1
TEACHER_BATCH = 128
SCORED_SAMPLES = 8


def _draw_map() -> dict[str, list[str]]:
    generator = random.Random(17)
    return {before + room: generator.sample(ROOMS, NUM_EXITS) for before in ROOMS for room in ROOMS}


MAP = _draw_map()
"""The rooms that may follow, by the two rooms before."""
ALLOWED = " ".join(pair + exit for pair, exits in MAP.items() for exit in exits) + " "
IS_RIGHT = (
    f"length(text) = {NUM_STEPS} and len(list_filter(range(1, {NUM_STEPS + 1}), "
    f"lambda i: not contains('{ALLOWED}', (reference || text)[i:i + 2] || ' '))) = 0"
)


PROMPTS = list(MAP)


def walks(num: int, seed: int) -> list[str]:
    """Walks with the two rooms of their prompt."""
    generator = random.Random(seed)
    found = []
    for _ in range(num):
        walk = generator.choice(PROMPTS)
        for _ in range(NUM_STEPS):
            walk += generator.choice(MAP[walk[-2:]])
        found.append(walk)
    return found


def is_right(prompt: str, chain: str) -> bool:
    """The same as IS_RIGHT."""
    walk = prompt + chain
    return len(chain) == NUM_STEPS and all(walk[i + 2] in MAP[walk[i : i + 2]] for i in range(NUM_STEPS))


def write_prompts(path: Path) -> Path:
    """A JSONL file of all prompts, as a build reads it. The checker needs the prompt: it is the reference too."""
    path.write_text("".join(json.dumps({"question": prompt, "answer": prompt}) + "\n" for prompt in PROMPTS))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    words = {word: number for number, word in enumerate([END, UNKNOWN, *ROOMS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def make_model(folder: Path, *, layers: int, width: int, seed: int) -> Path:
    """A Llama with random weights in a folder with its tokenizer."""
    if not folder.exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            num_key_value_heads=max(1, width // 32),
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        with atomic_folder(folder) as temp:
            save_model(LlamaForCausalLM(config), make_tokenizer(), temp)
    return folder


def ensure_teacher(folder: Path, num_steps: int) -> Path:
    """A teacher of two layers of width 128, trained where it is not there yet."""
    if folder.exists():
        return folder
    start = make_model(folder.with_name(f"{folder.name}-start"), layers=2, width=128, seed=0)
    model = LlamaForCausalLM.from_pretrained(start)
    tokenizer = make_tokenizer()
    ids = [[*tokenizer.encode(walk), 0] for walk in walks(TEACHER_BATCH * num_steps, seed=0)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch_BL in enumerate(torch.tensor(ids).split(TEACHER_BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / num_steps)) / 2
        logits_BTV = model(input_ids=batch_BL).logits[:, NUM_PROMPT_TOKENS - 1 : -1]
        targets_BT = batch_BL[:, NUM_PROMPT_TOKENS:]
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with atomic_folder(folder) as temp:
        save_model(model, tokenizer, temp)
    return folder


@torch.no_grad()
def sample(model: Any, prompts_BP: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Completions [B, T] at temperature 1, and the tokens of each up to its end [B]."""
    cache, new_BL, parts = None, prompts_BP, []
    for _ in range(NUM_COMPLETION_TOKENS):
        output = model(input_ids=new_BL, past_key_values=cache, use_cache=True)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
        new_BL = torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator)
        parts.append(new_BL)
    ids_BT = torch.cat(parts, dim=1)
    # Tokens before the first end, and the end itself.
    lengths_B = (((ids_BT == 0).cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=NUM_COMPLETION_TOKENS)
    return ids_BT, lengths_B


@dataclass(frozen=True)
class Score:
    """A student on all prompts, SCORED_SAMPLES chains each, sampled at temperature 1."""

    accuracy: float
    """Share of right chains."""
    reverse_kl: float
    """KL(student | teacher) over the whole vocabulary, nats per token of the chains that the student samples."""


@torch.no_grad()
def score(model: Any, teacher: Any, seed: int) -> Score:
    """How often the student is right, and how far it is from the teacher on its own states."""
    tokenizer = make_tokenizer()
    prompts = PROMPTS * SCORED_SAMPLES
    prompts_BP = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    ids_BT, lengths_B = sample(model, prompts_BP, torch.Generator().manual_seed(seed))
    logq_BTV, logp_BTV = (
        one(input_ids=torch.cat([prompts_BP, ids_BT], dim=1)).logits[:, NUM_PROMPT_TOKENS - 1 : -1].log_softmax(dim=2)
        for one in (model, teacher)
    )
    kl_BT = (logq_BTV.exp() * (logq_BTV - logp_BTV)).sum(dim=2)
    is_inside_BT = torch.arange(NUM_COMPLETION_TOKENS) < lengths_B[:, None]
    chains = [ids[:length] for ids, length in zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)]
    right = sum(
        is_right(prompt, tokenizer.decode(ids, skip_special_tokens=True))
        for prompt, ids in zip(prompts, chains, strict=True)
    )
    return Score(right / len(prompts), float(kl_BT[is_inside_BT].double().mean()))
