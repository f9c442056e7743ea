"""Caches and students of different vocabularies: real tokenizers trained on the spot, chains that spell real text."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from stillroom.schema.records import Signals, stable_hash
from tests.helpers.caches import EOS_ID, THINK_END_ID, CacheShape, Chain, SyntheticCache, write_chains
from tests.helpers.students import make_student
from tests.helpers.tiny_tokenizer import CORPUS, metaspace, save

THINK_END = "</think>"
WORDS = CORPUS[0].split(" ")
NUM_PADDING = 40
"""Rows of the teacher's logits that no token has."""


def byte_bpe(vocab_size: int, special: list[str], *, lowercase: bool = False, digits: bool = False) -> Tokenizer:
    """A byte-level BPE; `digits` keeps digits apart."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, level]) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def teacher_tokenizer(folder: Path, vocab_size: int = 300) -> Any:
    """Splits characters that are not Latin; <think> and </think> are tokens, ids 1 and 2 those of synthetic caches."""
    special = ["<|im_start|>", "<|im_end|>", THINK_END, "<think>"]
    return AutoTokenizer.from_pretrained(save(byte_bpe(vocab_size, special), folder, markers=()))


def student_folder(folder: Path, kind: str) -> Path:
    """A small student whose tokenizer is `bytes` (both marks are its own), `pieces` (SentencePiece) or `lower`."""
    markers: tuple[str, ...] = ()
    if kind == "pieces":
        tokenizer = metaspace()
    else:
        markers = ("<think>", THINK_END) if kind == "bytes" else ()
        tokenizer = byte_bpe(360, ["<pad>", "<|im_start|>", "<|im_end|>"], lowercase=kind == "lower", digits=True)
    made = AutoTokenizer.from_pretrained(save(tokenizer, folder / "tokenizer", markers))
    return make_student(folder / "student", vocab_size=400, tokenizer=made)


def text_of(row: int, num_words: int = 12) -> str:
    """What chain number `row` says."""
    rng = np.random.default_rng([1, row])
    return " ".join(WORDS[number] for number in rng.integers(0, len(WORDS), num_words))


def make_text_cache(
    root: Path, tokenizer: Any, num_chains: int = 40, codec: str = "topk-f32", name: str = "text"
) -> SyntheticCache:
    """Chains of text_of() with the reasoning closed in the middle. Every tenth was cut off; support: 4 tokens and a
    tail, the sampled token nearly always among them. Logits are wider than the vocabulary.
    """
    chains = [make_chain(tokenizer, row, name) for row in range(num_chains)]
    return write_text_chains(root, tokenizer, chains, codec, name)


def write_text_chains(
    root: Path, tokenizer: Any, chains: list[Chain], codec: str = "topk-f32", name: str = "text"
) -> SyntheticCache:
    """Chains of make_chain()."""
    shape = CacheShape(codec=codec, vocab_size=len(tokenizer) + NUM_PADDING, max_support=4, tokenizer=name)
    return write_chains(root, shape, chains, tokenizer)


def make_chain(tokenizer: Any, row: int, name: str = "text") -> Chain:
    """Chain number `row`, as make_text_cache() says."""
    rng = np.random.default_rng([2, row])
    first, second = text_of(row), text_of(row + 1000)
    ids = [*tokenizer.encode(first), THINK_END_ID, *tokenizer.encode(second)]
    has_ended = row % 10 != 9
    # Cut off where it may be in the middle of a character.
    token_ids = np.array([*ids, EOS_ID] if has_ended else ids[:-1], np.int32)
    prompt = f"question {row // 2}"
    said = tokenizer.decode(token_ids[: len(token_ids) - has_ended].tolist())
    return Chain(
        row=row,
        sample_id=stable_hash(name, row),
        sample_index=row % 2,
        source="sums",
        split="heldout" if row % 8 == 7 else "train",
        prompt=prompt,
        text=said,
        prompt_ids=np.array(tokenizer.encode(prompt), np.int32),
        token_ids=token_ids,
        signals=_signals(token_ids, len(tokenizer) + NUM_PADDING, rng),
        finish_reason="stop" if has_ended else "length",
        correct=True,
    )


def _signals(token_ids: Any, vocab_size: int, rng: np.random.Generator) -> Signals:
    num_tokens, k = len(token_ids), 4
    ids_TK = np.argsort(rng.random((num_tokens, vocab_size)), axis=1)[:, :k].astype(np.int32)
    is_inside_T = rng.random(num_tokens) < 0.9
    place_T = rng.integers(0, k, num_tokens)
    hit_T = (ids_TK == token_ids[:, None]).any(axis=1)
    put_T = is_inside_T & ~hit_T
    ids_TK[put_T, place_T[put_T]] = token_ids[put_T]
    probs_TK = -np.sort(-rng.dirichlet(np.full(k, 0.5), num_tokens) * 0.95)
    is_sampled_TK = ids_TK == token_ids[:, None]
    found_T = is_sampled_TK.any(axis=1)
    sampled_T = np.where(found_T, (probs_TK * is_sampled_TK).sum(axis=1), 0.01)
    entropy_T = -(probs_TK * np.log(np.maximum(probs_TK, 1e-30))).sum(axis=1)
    return Signals(
        topk_n_T=np.full(num_tokens, k, np.int32),
        topk_ids_N=ids_TK.reshape(-1),
        topk_logprobs_N=np.log(np.maximum(probs_TK, 1e-12)).astype(np.float32).reshape(-1),
        tail_logmass_T=np.full(num_tokens, np.log(0.05), np.float32),
        sampled_logprob_T=np.log(np.maximum(sampled_T, 1e-12)).astype(np.float32),
        sampled_rank_T=np.where(found_T, is_sampled_TK.argmax(axis=1) + 1, k + 1).astype(np.int32),
        entropy_T=entropy_T.astype(np.float32),
    )
