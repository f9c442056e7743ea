"""The teacher's chains as caches, one a kind of target: the same chains, the same builder, other captures.

R chains, T completion tokens of one, V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.teacher import write_chains
from stillroom.cache.catalog import Catalog
from stillroom.config import Json, validate_config
from stillroom.schema.records import Message, Prompt, prompt_id_of, sample_id_of
from teacher_cache.building import Build
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows
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


class ReplayEngine:
    """Chains that are there already, captured with the sampler's own functions. A teacher_cache.engine.api.Engine."""

    def __init__(self, model: Any, chains: Chains, layout: Layout) -> None:
        self._model, self._chains, self._layout = model, chains, layout
        self._waiting: list[Request] = []
        self._num_tokens = 0
        self.info = EngineInfo(
            vocab_size=model.config.vocab_size,
            max_model_len=512,
            entropy="exact",
            software={},
            settings={"kind": "replay"},
        )

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far."""
        return self._num_tokens

    @property
    def num_unfinished(self) -> int:
        """Requests not yet answered."""
        return len(self._waiting)

    def has_room(self) -> bool:
        """Whether a batch is not full."""
        return len(self._waiting) < STEP_CHAINS

    def submit(self, request: Request) -> None:
        """Takes a request."""
        self._waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Captures what waits."""
        requests, self._waiting = self._waiting, []
        if not requests:
            return []
        rows = torch.tensor([int(request.prompt.metadata["number"]) for request in requests])
        completions_RT = self._chains.completions_RT[rows]
        prompts_RP = self._chains.prompts_RP[rows]
        num_prompt, num_tokens = prompts_RP.shape[1], completions_RT.shape[1]
        logits_RLV = self._model(input_ids=torch.cat([prompts_RP, completions_RT], dim=1)).logits
        # The last prompt token predicts the first completion token.
        logits_RTV = logits_RLV[:, num_prompt - 1 : -1]
        lengths_R = self._chains.lengths_R
        lengths = [num_tokens] * len(rows) if lengths_R is None else lengths_R[rows].tolist()
        outcomes: list[Outcome] = []
        for request, logits_TV, ids_T, length in zip(requests, logits_RTV, completions_RT, lengths, strict=True):
            seeds_T = torch.full((length,), request.seed or 0)
            captured = signal_rows(logits_TV[:length], ids_T[:length], self._layout, seeds_T, torch.arange(length))
            capture = capture_of_rows(
                captured.ids.numpy(),
                captured.logprobs.numpy(),
                captured.ranks.numpy().astype(np.int32),
                ids_T[:length].tolist(),
                self._layout.top,
                self._layout,
            )
            has_ended = lengths_R is not None and int(ids_T[length - 1]) == self._model.config.eos_token_id
            outcomes.append(Finished(request, capture, "stop" if has_ended else "length"))
        self._num_tokens += sum(lengths)
        return outcomes

    def close(self) -> None:
        """Nothing to stop."""


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
    build = Build(config, teacher, "w0")
    try:
        requests = list(_requests(teacher, chains))
        build.run(requests, len(requests), lambda: ReplayEngine(model, chains, layout))
    finally:
        build.close()
    size = cache_stats(Catalog(folder)).signal_bytes_per_token
    assert size is not None
    return size


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
