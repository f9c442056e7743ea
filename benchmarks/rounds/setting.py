"""Walks on a map with a checker: the teacher, its chains, and students that know the same 16 rooms.

Who comes into a room from another one may go on to three of the sixteen, by a map of 256 entries that nobody is told.
A prompt names the first two rooms, a chain goes on for twelve: `da` -> `kcpmbgkaofil`. It is right if each of its steps
stands on the map; the checker is a condition in SQL, here and in the caches.

The teacher, trained on the spot, chooses among the three evenly and rarely leaves the map. Students are smaller, and
learn the map little by little: a step off the map here and there ruins a chain of twelve.

    B sequences of a batch, P prompt tokens, T completion tokens, V vocabulary
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny import Language

ROOMS = "abcdefghijklmnop"
NUM_EXITS = 3
NUM_STEPS = 12
NUM_PROMPT_TOKENS = 2
LANGUAGE = Language(ROOMS, NUM_STEPS + 1)
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


def ensure_teacher(folder: Path, num_steps: int) -> Path:
    """The teacher, trained on walks where it is not there yet."""
    found = walks(TEACHER_BATCH * num_steps, seed=0)
    texts = [(walk[:NUM_PROMPT_TOKENS], walk[NUM_PROMPT_TOKENS:]) for walk in found]
    return LANGUAGE.train_teacher(folder, texts, TEACHER_BATCH)


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
    tokenizer = LANGUAGE.make_tokenizer()
    prompts = PROMPTS * SCORED_SAMPLES
    prompts_BP = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    ids_BT, lengths_B = LANGUAGE.sample(model, prompts_BP, torch.Generator().manual_seed(seed))
    logq_BTV, logp_BTV = (
        one(input_ids=torch.cat([prompts_BP, ids_BT], dim=1)).logits[:, NUM_PROMPT_TOKENS - 1 : -1].log_softmax(dim=2)
        for one in (model, teacher)
    )
    kl_BT = (logq_BTV.exp() * (logq_BTV - logp_BTV)).sum(dim=2)
    is_inside_BT = torch.arange(LANGUAGE.num_completion_tokens) < lengths_B[:, None]
    chains = [ids[:length] for ids, length in zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)]
    right = sum(
        is_right(prompt, str(tokenizer.decode(ids, skip_special_tokens=True)))
        for prompt, ids in zip(prompts, chains, strict=True)
    )
    return Score(right / len(prompts), float(kl_BT[is_inside_BT].double().mean()))
