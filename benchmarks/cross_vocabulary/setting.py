"""A teacher, its chains, and students with its vocabulary or another one.

The teacher is that of benchmarks.quality. Its chains of at most 56 tokens end where it ends them. The other vocabulary
has 1,536 ids instead of 1,024 and keeps digits apart, so ids, merges and pre-tokenisation all differ.

    R chains, P prompt tokens, T completion tokens
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.caches import Chains, build_cache, kept_chains
from benchmarks.quality.corpus import read_corpus
from benchmarks.quality.students import make_small
from benchmarks.quality.teacher import CORPUS_CHARS, EOS_TOKEN, Training, ensure_teacher
from stillroom.pieces import vocabulary_of
from student_train.data.text import HuggingFaceText
from student_train.model.folder import atomic_folder

OTHER_VOCAB_SIZE = 1536
LOG2 = math.log(2.0)


@dataclass(frozen=True)
class Setting:
    """What every arm of the benchmark shares."""

    folder: Path
    teacher: Path
    model: Any
    tokenizer: Any
    other: Any
    chains: Chains

    @functools.cached_property
    def texts(self) -> list[str]:
        """What each chain says, without its end."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.completions]

    @functools.cached_property
    def prompts(self) -> list[str]:
        """The prompts as the chat template renders them."""
        return [self.tokenizer.decode(ids) for ids in self.chains.prompts_RP.tolist()]

    @functools.cached_property
    def completions(self) -> list[list[int]]:
        """The teacher's ids of each chain, its end included."""
        return [ids[:length] for ids, length in zip(self.chains.completions_RT.tolist(), self.lengths, strict=True)]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each chain."""
        assert self.chains.lengths_R is not None
        return [int(length) for length in self.chains.lengths_R.tolist()]

    @functools.cached_property
    def has_ended(self) -> list[bool]:
        """Whether the teacher ended a chain itself."""
        return [ids[-1] == self.tokenizer.eos_token_id for ids in self.completions]

    @property
    def cache(self) -> Path:
        """The teacher's chains with their distributions, captured as a build does by default."""
        return self.folder / "cache"


def open_setting(folder: Path, teacher_steps: int) -> Setting:
    """Teacher, chains, tokenizers and cache in `folder`, made where they are not there yet (two minutes)."""
    teacher = ensure_teacher(folder / "teacher", Training(num_steps=teacher_steps))
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    chains = _chains(folder / "chains.npz", model, tokenizer)
    setting = Setting(folder, teacher, model, tokenizer, _other_tokenizer(folder / "other"), chains)
    if not setting.cache.exists():
        build_cache(setting.cache, teacher, model, chains, {})
    return setting


def make_student(setting: Setting, seed: int, *, same_vocabulary: bool) -> Path:
    """Two layers of width 96 with random weights, in a folder with its tokenizer."""
    folder = setting.folder / f"student-{'same' if same_vocabulary else 'other'}-{seed}"
    if same_vocabulary:
        return make_small(folder, setting.tokenizer, seed)
    return make_small(folder, setting.other, seed, OTHER_VOCAB_SIZE)


@torch.no_grad()
def bits_per_byte(setting: Setting, model: Any, *, same_vocabulary: bool) -> float:
    """Bits that `model` needs for each byte of the teacher's held-out chains, their ends included.

    In the teacher's vocabulary a chain is the ids that the teacher sampled, in another one the student's own encoding.
    """
    nats, num_bytes = 0.0, 0
    prompts, completions = encoded(setting, same_vocabulary=same_vocabulary)
    for number in heldout_numbers(setting):
        ids_L = torch.tensor(prompts[number] + completions[number])
        logprobs_LV = model(input_ids=ids_L[None]).logits[0].log_softmax(dim=1)
        first = len(prompts[number])
        nats -= float(logprobs_LV[first - 1 : -1].gather(1, ids_L[first:, None]).sum())
        num_bytes += len(setting.texts[number].encode())
    return nats / LOG2 / num_bytes


def encoded(setting: Setting, *, same_vocabulary: bool) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, completions) of all chains as ids of a vocabulary; chains that ended have their end token."""
    if same_vocabulary:
        return setting.chains.prompts_RP.tolist(), setting.completions
    text = HuggingFaceText(setting.other, OTHER_VOCAB_SIZE)
    ids = text.encode_completions(setting.texts)
    ends = [[text.end_id] if ended else [] for ended in setting.has_ended]
    return text.encode_prompts(setting.prompts), [one + end for one, end in zip(ids, ends, strict=True)]


def heldout_numbers(setting: Setting) -> list[int]:
    """Held-out chains that are valid UTF-8: half a character has no encoding in another vocabulary."""
    first = len(setting.completions) - setting.chains.num_heldout
    return [n for n in range(first, len(setting.texts)) if setting.texts[n] and "\ufffd" not in setting.texts[n]]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token by id; special tokens stand for none."""
    vocabulary = vocabulary_of(tokenizer)
    return [b"" if one in vocabulary.special else data for one, data in enumerate(vocabulary.bytes_by_id())]


def _chains(path: Path, model: Any, tokenizer: Any) -> Chains:
    """What the teacher writes, up to its first end."""
    chains = kept_chains(path, model, tokenizer)
    is_end_RT = chains.completions_RT == tokenizer.eos_token_id
    # Tokens before the first end, and the end itself.
    lengths_R = ((is_end_RT.cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=is_end_RT.shape[1])
    return replace(chains, lengths_R=lengths_R)


def _other_tokenizer(folder: Path) -> Any:
    if not folder.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=OTHER_VOCAB_SIZE,
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(read_corpus(0, CORPUS_CHARS), trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
        made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with atomic_folder(folder) as temp:
            made.save_pretrained(temp)
    return AutoTokenizer.from_pretrained(folder)
