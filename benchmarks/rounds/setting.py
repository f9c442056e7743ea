"""Chained sums modulo 10 with a checker: the teacher, its chains, and students that read the same 19 characters.

A prompt `7+5-8+3*2=` has five digits and is worked from the left; the chain `7+5=2;2-8=4;4+3=7;7*2=4#4` shows every
step, so that a mistake is carried on. The right answer follows from the prompt: `ends_with(text, '#' || reference)` is
the checker, in SQL as here.

The teacher, trained on the spot, hardly errs, and sees a mistake: after a wrong result it writes `!` and the right one
(`7+5=3!2;`). It was shown mistakes to correct, but not taught to make them, so its own chains hold hardly any: what to
do after a mistake is to be learnt on the student's states alone. Students are smaller.

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

CHARACTERS = "0123456789+-*=;#!"
END, UNKNOWN = "<end>", "<unknown>"
IGNORED = -100
VOCAB_SIZE = len(CHARACTERS) + 2
NUM_DIGITS = 5
NUM_PROMPT_TOKENS = 2 * NUM_DIGITS
NUM_COMPLETION_TOKENS = 34
"""A chain without corrections has 26, its end included; each takes two."""
MISTAKE_FRAC = 0.3
"""Of the steps that the teacher is shown."""
IS_RIGHT = "ends_with(text, '#' || reference)"
OPERATIONS = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10, "*": lambda a, b: a * b % 10}


@dataclass(frozen=True)
class Problem:
    """A prompt, the chain that solves it, and its answer."""

    prompt: str
    chain: str
    answer: str


def problems(num: int, seed: int) -> list[Problem]:
    """Different problems; those of other seeds are others with near certainty (2 million there are, times ten)."""
    generator = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < num:
        digits = [generator.randrange(10) for _ in range(NUM_DIGITS)]
        signs = [generator.choice("+-*") for _ in digits[1:]]
        value, steps = digits[0], []
        for sign, digit in zip(signs, digits[1:], strict=True):
            result = OPERATIONS[sign](value, digit)
            steps.append(f"{value}{sign}{digit}={result}")
            value = result
        prompt = "".join(f"{digit}{sign}" for digit, sign in zip(digits, [*signs, "="], strict=True))
        found[prompt] = Problem(prompt, ";".join(steps) + f"#{value}", str(value))
    return list(found.values())


def write_prompts(path: Path, found: list[Problem]) -> Path:
    """A JSONL file of prompts and references, as a build reads it."""
    path.write_text("".join(json.dumps({"question": one.prompt, "answer": one.answer}) + "\n" for one in found))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    words = {word: number for number, word in enumerate([END, UNKNOWN, *CHARACTERS])}
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
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        with atomic_folder(folder) as temp:
            save_model(LlamaForCausalLM(config), make_tokenizer(), temp)
    return folder


def with_mistakes(problem: Problem, generator: random.Random) -> tuple[str, list[bool]]:
    """A chain with corrected mistakes, and for each character whether it is one: those are not to be learnt."""
    parts, mistakes = [], []
    *steps, last = problem.chain.split(";")
    step, _, answer = last.partition("#")
    for one in [*steps, step]:
        if generator.random() < MISTAKE_FRAC:
            wrong = (int(one[-1]) + generator.randrange(1, 10)) % 10
            parts.append(f"{one[:-1]}{wrong}!{one[-1]};")
            mistakes += [*[False] * (len(one) - 1), True, False, False, False]
        else:
            parts.append(f"{one};")
            mistakes += [False] * (len(one) + 1)
    return "".join(parts)[:-1] + f"#{answer}", [*mistakes, False]


def ensure_teacher(folder: Path, num_steps: int) -> Path:
    """A teacher of three layers of width 128, trained where it is not there yet."""
    if folder.exists():
        return folder
    start = make_model(folder.with_name(f"{folder.name}-start"), layers=3, width=128, seed=0)
    model = LlamaForCausalLM.from_pretrained(start)
    tokenizer = make_tokenizer()
    ids_BL, targets_BL = _training_ids(problems(64 * num_steps, seed=0), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step, (batch_BL, target_BL) in enumerate(zip(ids_BL.split(64), targets_BL.split(64), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / num_steps)) / 2
        logits_BLV = model(input_ids=batch_BL).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), target_BL[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with atomic_folder(folder) as temp:
        save_model(model, tokenizer, temp)
    return folder


def _training_ids(found: list[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Ids [B, L] of prompts and chains, padded with the end, and targets [B, L]: IGNORED at what is not learnt."""
    generator = random.Random(1)
    made = [(problem.prompt, *with_mistakes(problem, generator)) for problem in found]
    length = max(len(prompt) + len(chain) for prompt, chain, _ in made) + 1
    ids_BL = torch.zeros(len(made), length, dtype=torch.int64)
    targets_BL = torch.full_like(ids_BL, IGNORED)
    for row, (prompt, chain, mistakes) in enumerate(made):
        ids = [*tokenizer.encode(prompt + chain), 0]
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        learnt = [IGNORED if wrong else one for one, wrong in zip(ids[len(prompt) :], [*mistakes, False], strict=True)]
        targets_BL[row, len(prompt) : len(ids)] = torch.tensor(learnt)
    return ids_BL, targets_BL


@torch.no_grad()
def sample(model: Any, prompts_BP: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Completions [B, T] at temperature 1, or greedy without a generator, and the tokens of each up to its end [B]."""
    cache, new_BL, parts = None, prompts_BP, []
    for _ in range(NUM_COMPLETION_TOKENS):
        output = model(input_ids=new_BL, past_key_values=cache, use_cache=True)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
        if generator is None:
            new_BL = logits_BV.argmax(dim=1, keepdim=True)
        else:
            new_BL = torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator)
        parts.append(new_BL)
    ids_BT = torch.cat(parts, dim=1)
    # Tokens before the first end, and the end itself.
    lengths_B = (((ids_BT == 0).cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=NUM_COMPLETION_TOKENS)
    return ids_BT, lengths_B


@dataclass(frozen=True)
class Score:
    """A student on held-out problems; accuracies are shares of right answers."""

    accuracy: float
    """Sampled at temperature 1."""
    greedy_accuracy: float
    reverse_kl: float
    """KL(student | teacher) over the whole vocabulary, nats per token of the chains that the student samples."""


@torch.no_grad()
def score(model: Any, teacher: Any, found: list[Problem], seed: int) -> Score:
    """How often the student is right, and how far it is from the teacher on its own states."""
    tokenizer = make_tokenizer()
    prompts_BP = torch.tensor([tokenizer.encode(one.prompt) for one in found])
    ids_BT, lengths_B = sample(model, prompts_BP, torch.Generator().manual_seed(seed))
    greedy_BT, greedy_lengths_B = sample(model, prompts_BP, None)
    ids_BL = torch.cat([prompts_BP, ids_BT], dim=1)
    logq_BTV, logp_BTV = (
        one(input_ids=ids_BL).logits[:, NUM_PROMPT_TOKENS - 1 : -1].float().log_softmax(dim=2)
        for one in (model, teacher)
    )
    kl_BT = (logq_BTV.exp() * (logq_BTV - logp_BTV)).sum(dim=2)
    is_inside_BT = torch.arange(NUM_COMPLETION_TOKENS) < lengths_B[:, None]
    return Score(
        _accuracy(tokenizer, found, ids_BT, lengths_B),
        _accuracy(tokenizer, found, greedy_BT, greedy_lengths_B),
        float(kl_BT[is_inside_BT].double().mean()),
    )


def _accuracy(tokenizer: Any, found: list[Problem], ids_BT: Tensor, lengths_B: Tensor) -> float:
    right = 0
    for problem, ids, length in zip(found, ids_BT.tolist(), lengths_B.tolist(), strict=True):
        right += tokenizer.decode(ids[:length], skip_special_tokens=True).endswith(f"#{problem.answer}")
    return right / len(found)
