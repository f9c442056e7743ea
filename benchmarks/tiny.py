"""Tiny languages for benchmarks: one token a character, models trained on the spot, caches of what they write.

B sequences of a batch, L their length, P prompt tokens, T completion tokens, V vocabulary
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.engine import TorchEngine, Written, fill, info_of
from stillroom.config import Json, validate_config
from student_train.model.folder import atomic_folder, save_model
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import Request
from teacher_cache.engine.row_layout import Layout
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import load_prompts, num_requests, requests

END, UNKNOWN = "<end>", "<unknown>"
END_ID = 0
NO_TARGET = -100
BATCH = 512
HELDOUT_FRAC = 0.05


@dataclass(frozen=True)
class Language:
    """Characters, and the most tokens that a completion has, its end included."""

    characters: str
    num_completion_tokens: int
    max_length: int = 64

    @property
    def vocab_size(self) -> int:
        """Ids: the end, the unknown, the characters."""
        return len(self.characters) + 2

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a character."""
        words = {word: number for number, word in enumerate([END, UNKNOWN, *self.characters])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
        made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return made

    def make_model(self, folder: Path, *, layers: int, width: int, seed: int) -> Path:
        """A Llama with random weights in a folder with its tokenizer."""
        if not folder.exists():
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // 32),
                num_key_value_heads=max(1, width // 32),
                max_position_embeddings=self.max_length,
                bos_token_id=None,
                eos_token_id=END_ID,
                pad_token_id=None,
            )
            with atomic_folder(folder) as temp:
                save_model(LlamaForCausalLM(config), self.make_tokenizer(), temp)
        return folder

    def train_teacher(self, folder: Path, texts: list[tuple[str, str]], batch: int) -> Path:
        """A teacher of two layers of width 128, trained on prompts and completions in order, where it is not there."""
        if folder.exists():
            return folder
        start = self.make_model(folder.with_name(f"{folder.name}-start"), layers=2, width=128, seed=0)
        model, tokenizer = LlamaForCausalLM.from_pretrained(start), self.make_tokenizer()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        num_steps = len(texts) // batch
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / num_steps)) / 2
            chosen = texts[step * batch : (step + 1) * batch]
            ids = [[*tokenizer.encode(prompt + chain), END_ID] for prompt, chain in chosen]
            batch_BL = pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
            targets_BL = pad_sequence(
                [
                    torch.tensor([*[NO_TARGET] * len(prompt), *one[len(prompt) :]])
                    for one, (prompt, _) in zip(ids, chosen, strict=True)
                ],
                batch_first=True,
                padding_value=NO_TARGET,
            )
            logits_BLV = model(input_ids=batch_BL).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with atomic_folder(folder) as temp:
            save_model(model, tokenizer, temp)
        return folder

    @torch.no_grad()
    def sample(self, model: Any, prompts_BP: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Completions [B, T] at temperature 1, and the tokens of each up to its end [B]."""
        cache, new_BL, parts = None, prompts_BP, []
        for _ in range(self.num_completion_tokens):
            output = model(input_ids=new_BL, past_key_values=cache, use_cache=True)
            cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
            new_BL = torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator)
            parts.append(new_BL)
        ids_BT = torch.cat(parts, dim=1)
        # Tokens before the first end, and the end itself.
        lengths_B = (((ids_BT == END_ID).cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=self.num_completion_tokens)
        return ids_BT, lengths_B

    def write(self, model: Any, prompts: list[str], seed: int) -> list[str]:
        """Completions of prompts of one length, sampled at temperature 1, without their ends."""
        tokenizer = self.make_tokenizer()
        prompts_BP = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
        ids_BT, lengths_B = self.sample(model, prompts_BP, torch.Generator().manual_seed(seed))
        return [
            str(tokenizer.decode(ids[:length], skip_special_tokens=True))
            for ids, length in zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)
        ]

    def build(self, cache: Path, model: Path, sources: list[Json], seed: int, samples: int) -> Path:
        """A cache of chains for each prompt, sampled from the model at temperature 1; made where it is not there."""
        if cache.exists():
            return cache
        config = validate_config(
            {
                **self._common(cache, model),
                "prompts": {"sources": sources, "heldout_frac": HELDOUT_FRAC},
                "sampling": {
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "max_tokens": self.num_completion_tokens,
                    "samples": samples,
                    "seed": seed,
                },
            },
            BuildConfig,
            "benchmark",
        )
        teacher = identify_teacher(config.teacher)
        found = load_prompts(config.prompts).prompts
        wanted = requests(config, found, teacher.tokenizer, teacher.record.fingerprint)
        fill(config, teacher, wanted, num_requests(config, found), lambda: self._engine(model, seed))
        return cache

    def rescore(self, cache: Path, teacher_folder: Path, of: Path) -> Path:
        """A cache of the teacher's distributions on the chains of the cache `of`."""
        if cache.exists():
            return cache
        source = {"kind": "cache", "name": "own", "path": str(of)}
        config = validate_config(
            {**self._common(cache, teacher_folder), "completions": {"sources": [source]}}, ScoreConfig, "benchmark"
        )
        teacher = identify_teacher(config.teacher)
        with Completions(config, teacher) as completions:
            wanted, number = completions.requests(), completions.count()
            fill(config, teacher, wanted, number, lambda: self._engine(teacher_folder, 0))
        return cache

    def _engine(self, folder: Path, seed: int) -> TorchEngine:
        """Samples at temperature 1, or scores, in batches of prompts of one length."""
        model, generator = LlamaForCausalLM.from_pretrained(folder).eval(), torch.Generator().manual_seed(seed)

        def write(requests: list[Request]) -> Written:
            prompts_BP = torch.tensor([list(request.prompt_token_ids) for request in requests])
            if requests[0].completion_token_ids is None:
                ids_BT, lengths_B = self.sample(model, prompts_BP, generator)
                lengths = lengths_B.tolist()
                ended = [ids_T[length - 1] == END_ID for ids_T, length in zip(ids_BT.tolist(), lengths, strict=True)]
                return Written(prompts_BP, ids_BT, lengths, ["stop" if one else "length" for one in ended])
            given = [torch.tensor(request.completion_token_ids or ()) for request in requests]
            ids_BT = pad_sequence(given, batch_first=True)
            return Written(prompts_BP, ids_BT, [len(ids) for ids in given], ["scored"] * len(given))

        layout, info = Layout(self.vocab_size, 0), info_of("torch", self.vocab_size, self.max_length)
        return TorchEngine(model, layout, write, BATCH, info)

    def _common(self, cache: Path, model: Path) -> Json:
        # The vocabulary is small enough to keep whole distributions.
        capture = {"codec": "topk-f32", "max_support": self.vocab_size, "nucleus": None, "draws": 0}
        return {"cache": str(cache), "run": "tiny", "teacher": {"model": str(model)}, "capture": capture}


def jsonl_source(name: str, path: Path) -> Json:
    """A prompt source of `question` and `answer`."""
    return {
        "kind": "jsonl",
        "name": name,
        "path": str(path),
        "prompt_field": "question",
        "reference_field": "answer",
    }
