"""Caches of the rounds: a model's own chains, and a teacher's view of them, through the builder and its writer.

B requests of a batch, P prompt tokens, T completion tokens
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from benchmarks.engine import TorchEngine, Written, fill, info_of
from benchmarks.rounds.setting import NUM_COMPLETION_TOKENS, VOCAB_SIZE, sample
from stillroom.config import Json, validate_config
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import Request
from teacher_cache.engine.row_layout import Layout
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import load_prompts, num_requests, requests

BATCH = 512
HELDOUT_FRAC = 0.05
# The vocabulary is small enough to keep whole distributions.
CAPTURE = {"codec": "topk-f32", "max_support": VOCAB_SIZE, "nucleus": None, "draws": 0}
LAYOUT = Layout(VOCAB_SIZE, 0)


def build(cache: Path, model: Path, prompts: Path, seed: int, samples: int) -> Path:
    """A cache of chains for each prompt, sampled from the model at temperature 1; made where it is not there yet."""
    if cache.exists():
        return cache
    config = validate_config(
        {
            **_common(cache, model),
            "prompts": {"sources": [_source(prompts)], "heldout_frac": HELDOUT_FRAC},
            "sampling": {
                "temperature": 1.0,
                "top_p": 1.0,
                "max_tokens": NUM_COMPLETION_TOKENS,
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
    fill(config, teacher, wanted, num_requests(config, found), lambda: _engine(model, seed))
    return cache


def rescore(cache: Path, teacher_folder: Path, of: Path) -> Path:
    """A cache of the teacher's distributions on the chains of the cache `of`."""
    if cache.exists():
        return cache
    source = {"kind": "cache", "name": "own", "path": str(of)}
    config = validate_config(
        {**_common(cache, teacher_folder), "completions": {"sources": [source]}}, ScoreConfig, "benchmark"
    )
    teacher = identify_teacher(config.teacher)
    with Completions(config, teacher) as completions:
        fill(config, teacher, completions.requests(), completions.count(), lambda: _engine(teacher_folder, 0))
    return cache


def _engine(folder: Path, seed: int) -> TorchEngine:
    """Samples at temperature 1, or scores, in batches of prompts of one length."""
    model, generator = LlamaForCausalLM.from_pretrained(folder).eval(), torch.Generator().manual_seed(seed)

    def write(requests: list[Request]) -> Written:
        prompts_BP = torch.tensor([list(request.prompt_token_ids) for request in requests])
        if requests[0].completion_token_ids is None:
            ids_BT, lengths_B = sample(model, prompts_BP, generator)
            lengths = lengths_B.tolist()
            ended = [ids_T[length - 1] == 0 for ids_T, length in zip(ids_BT.tolist(), lengths, strict=True)]
            return Written(prompts_BP, ids_BT, lengths, ["stop" if one else "length" for one in ended])
        given = [torch.tensor(request.completion_token_ids or ()) for request in requests]
        ids_BT = pad_sequence(given, batch_first=True)
        return Written(prompts_BP, ids_BT, [len(ids) for ids in given], ["scored"] * len(given))

    return TorchEngine(model, LAYOUT, write, BATCH, info_of("torch", VOCAB_SIZE, 32))


def _common(cache: Path, model: Path) -> Json:
    return {"cache": str(cache), "run": "rounds", "teacher": {"model": str(model)}, "capture": CAPTURE}


def _source(prompts: Path) -> Json:
    return {
        "kind": "jsonl",
        "name": "walks",
        "path": str(prompts),
        "prompt_field": "question",
        "reference_field": "answer",
    }
