"""A cache of the tiny teacher's own distributions, scored by dense transformers without vLLM."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from stillroom.schema.records import Capture, Message, Prompt, prompt_id_of, scored_sample_id_of
from teacher_cache.building.build import Build
from teacher_cache.config import ScoreConfig
from teacher_cache.engine.api import EngineInfo, Finished, Outcome, Request
from teacher_cache.engine.teacher import identify_teacher
from tests.helpers.tiny import MAX_POSITIONS, VOCAB_SIZE, make_tiny_adapter, make_tiny_teacher, merged

K = 8


class DenseScores:
    """Implements teacher_cache.engine.api.Engine for completions."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._queue: list[Request] = []
        self.num_tokens = 0
        self.info = EngineInfo(VOCAB_SIZE, MAX_POSITIONS, "exact", {}, {})

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    def has_room(self) -> bool:
        return len(self._queue) < 64

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def step(self) -> list[Outcome]:
        request = self._queue.pop(0)
        assert request.completion_token_ids is not None
        ids = [*request.prompt_token_ids, *request.completion_token_ids]
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids])).logits[0, len(request.prompt_token_ids) - 1 : -1]
        logprobs_TV = logits.double().log_softmax(-1).numpy()
        given_T = np.array(request.completion_token_ids, np.int32)
        sampled_T = logprobs_TV[np.arange(len(given_T)), given_T]
        order_TK = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :K]
        self.num_tokens += len(given_T)
        capture = Capture(
            token_ids_T=given_T,
            sampled_logprob_T=sampled_T.astype(np.float32),
            sampled_rank_T=((logprobs_TV > sampled_T[:, None]).sum(axis=1) + 1).astype(np.int32),
            topk_ids_TK=order_TK.astype(np.int32),
            topk_logprobs_TK=np.take_along_axis(logprobs_TV, order_TK, axis=1).astype(np.float32),
            entropy_T=-(np.exp(logprobs_TV) * logprobs_TV).sum(axis=1).astype(np.float32),
        )
        return [Finished(request, capture, "scored")]

    def close(self) -> None:
        self._queue.clear()


def make_scored_cache(
    folder: Path, num_chains: int = 12, *, has_adapter: bool = False
) -> tuple[Path, LlamaForCausalLM]:
    """Writes `teacher`, `cache` and perhaps `adapter` below `folder`; returns the teacher's folder and the model in
    float32.
    """
    teacher = make_tiny_teacher(folder / "teacher")
    adapter = make_tiny_adapter(folder / "adapter", teacher) if has_adapter else None
    model = merged(teacher, adapter).eval()
    model.set_attn_implementation("eager")
    config = ScoreConfig.model_validate(
        {
            "cache": folder / "cache",
            "run": "dense",
            "teacher": {"model": str(teacher), "adapter": None if adapter is None else str(adapter)},
            "completions": {"sources": [{"kind": "cache", "name": "none", "path": folder / "none"}]},
            "capture": {"codec": "topk-f32", "max_support": K, "draws": 0, "nucleus": None},
            "shard": {"row_group_tokens": 100},
        }
    )
    identified = identify_teacher(config.teacher)
    rng = np.random.default_rng(0)
    requests = []
    for number in range(num_chains):
        messages = (Message("user", f"question {number}"),)
        prompt = Prompt(prompt_id_of(messages), messages, "dense", "train")
        # The tokenizer has fewer tokens than the model has rows.
        ids = rng.integers(3, 300, rng.integers(5, 40)).tolist()
        cut = int(rng.integers(1, 5))
        sample_id = scored_sample_id_of(identified.record.fingerprint, ids[:cut], ids[cut:])
        requests.append(Request(prompt, ids[:cut], 0, None, {}, len(ids) - cut, sample_id, ids[cut:]))
    build = Build(config, identified, "w0")
    try:
        build.run(requests, len(requests), lambda: DenseScores(model))
    finally:
        build.close()
    return teacher, model
