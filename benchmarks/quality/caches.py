"""The teacher's chains as caches, one a kind of target: the same chains, the same builder, other captures.

R chains, P prompt tokens, T completion tokens of one
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine import TorchEngine, Written, fill, info_of
from benchmarks.quality.teacher import write_chains
from stillroom.cache.catalog import Catalog
from stillroom.config import Json, validate_config
from stillroom.schema.records import Message, Prompt, prompt_id_of, sample_id_of
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Request
from teacher_cache.engine.row_layout import Layout
from teacher_cache.engine.teacher import IdentifiedTeacher, identify_teacher
from teacher_cache.inspect.stats import cache_stats

NUM_TRAIN, NUM_HELDOUT = 1536, 192
SAMPLING = {"temperature": 1.0}
STEP_CHAINS = 64


@dataclass(frozen=True)
class Chains:
    """What the teacher wrote: prompts [R, P] and completions [R, T], int64; the last `num_heldout` are held out.

    `lengths_R` (None: all of T) says how many tokens count of a chain; one whose last is the end token ended by itself.
    """

    prompts_RP: Tensor
    completions_RT: Tensor
    num_heldout: int
    lengths_R: Tensor | None = None


def kept_chains(path: Path, model: Any, tokenizer: Any) -> Chains:
    """What the teacher writes, kept, as its prompts come from packages that may change until the next call."""
    if not path.exists():
        prompts_RP, completions_RT = write_chains(model, tokenizer, NUM_TRAIN + NUM_HELDOUT, seed=1)
        np.savez(path, prompts=prompts_RP.numpy(), completions=completions_RT.numpy())
    with np.load(path) as kept:
        return Chains(torch.from_numpy(kept["prompts"]), torch.from_numpy(kept["completions"]), NUM_HELDOUT)


def build_cache(folder: Path, teacher_folder: Path, model: Any, chains: Chains, capture: Json) -> float:
    """Fills a cache through teacher_cache.building; bytes a token of its shards."""
    config = validate_config(
        {
            "cache": str(folder),
            "run": "quality",
            "teacher": {"model": str(teacher_folder)},
            "prompts": {"sources": [{"kind": "jsonl", "name": "own", "path": "none", "prompt_field": "text"}]},
            "sampling": SAMPLING,
            "capture": capture,
        },
        BuildConfig,
        "benchmark",
    )
    teacher = identify_teacher(config.teacher)
    layout = Layout(min(config.capture.max_support, model.config.vocab_size), config.capture.draws)
    requests = list(_requests(teacher, chains))
    info = info_of("replay", model.config.vocab_size, 512)
    replay = functools.partial(_replayed, chains, model.config.eos_token_id)
    fill(config, teacher, requests, len(requests), lambda: TorchEngine(model, layout, replay, STEP_CHAINS, info))
    size = cache_stats(Catalog(folder)).signal_bytes_per_token
    assert size is not None
    return size


def _replayed(chains: Chains, end_id: int, requests: Sequence[Request]) -> Written:
    """The chains that were asked for, which are there already."""
    rows = torch.tensor([int(request.prompt.metadata["number"]) for request in requests])
    completions_RT, lengths_R = chains.completions_RT[rows], chains.lengths_R
    if lengths_R is None:
        lengths, ended = [completions_RT.shape[1]] * len(rows), [False] * len(rows)
    else:
        lengths = lengths_R[rows].tolist()
        ended = [ids_T[length - 1] == end_id for ids_T, length in zip(completions_RT.tolist(), lengths, strict=True)]
    return Written(chains.prompts_RP[rows], completions_RT, lengths, ["stop" if one else "length" for one in ended])


def _requests(teacher: IdentifiedTeacher, chains: Chains) -> Iterator[Request]:
    num_train = len(chains.prompts_RP) - chains.num_heldout
    for number, prompt_ids in enumerate(chains.prompts_RP.tolist()):
        messages = (Message("user", _text(teacher.tokenizer, prompt_ids)),)
        split = "train" if number < num_train else "heldout"
        prompt = Prompt(prompt_id_of(messages), messages, "own", split, metadata={"number": number})
        sample_id = sample_id_of(teacher.record.fingerprint, prompt_ids, SAMPLING, number, 0)
        yield Request(prompt, prompt_ids, 0, number, SAMPLING, chains.completions_RT.shape[1], sample_id)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids))
