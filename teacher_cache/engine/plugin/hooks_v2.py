"""The plugin's hooks into vLLM's second model runner (`v1/worker/gpu/`: GPUs).

Its sampler, its rejection sampler (speculative decoding) and its prompt scorer each call `compute_topk_scores` on raw
logits, by a name of their own module. Requests are noted as they come; while one of the three runs, the rows to come
are known, and the replaced function takes them in order.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample import logprob, prompt_logprob
from vllm.v1.worker.gpu.sample import sampler as gpu_sampler
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from teacher_cache.engine.plugin.batch import Asked, Batch, asked_of
from teacher_cache.engine.plugin.signals import Rows


@dataclass(slots=True)
class _Coming:
    """Rows that are still to be taken; None: only rows of requests that ask for nothing."""

    batch: Batch | None = None
    num_taken: int = 0

    def take(self, num_rows: int) -> Batch | None:
        """The next rows, in the order in which vLLM works through its chunks."""
        if self.batch is None:
            return None
        start, self.num_taken = self.num_taken, self.num_taken + num_rows
        taken = self.batch.slice(start, self.num_taken)
        return taken if any(taken.asked_N) else None


_coming = _Coming()
_asked_by_slot: WeakKeyDictionary[Any, dict[int, Asked | None]] = WeakKeyDictionary()
"""For each sampler and prompt scorer: the requests by their slot in the runner's state."""

_add_request = Sampler.add_request
_call = Sampler.__call__
_verify = RejectionSampler.__call__
_add_prompt = PromptLogprobsWorker.add_request
_prompt_logprobs = PromptLogprobsWorker.compute_prompt_logprobs
_scores = logprob.compute_topk_scores


def install() -> None:
    """Puts the hooks in place, where fit.RUNNER_2 holds."""
    Sampler.add_request = _add_request_noted  # type: ignore[method-assign]
    Sampler.__call__ = _call_with_signals  # type: ignore[method-assign]
    RejectionSampler.__call__ = _verify_with_signals  # type: ignore[method-assign]
    PromptLogprobsWorker.add_request = _add_prompt_noted  # type: ignore[method-assign]
    PromptLogprobsWorker.compute_prompt_logprobs = _prompts_with_signals  # type: ignore[method-assign]
    # Each has imported the function by name, so replacing it in its own module would change nothing.
    for module in (gpu_sampler, prompt_logprob, rejection_sampler):
        module.compute_topk_scores = scores_with_signals  # type: ignore[attr-defined]


@contextlib.contextmanager
def expecting(batch: Batch | None) -> Iterator[None]:
    """Rows that compute_topk_scores will be called with, in one piece or several, while the context lasts."""
    before, num_before = _coming.batch, _coming.num_taken
    _coming.batch, _coming.num_taken = batch, 0
    try:
        yield
    finally:
        _coming.batch, _coming.num_taken = before, num_before


def scores_with_signals(
    logits: Tensor,
    num_logprobs: int,
    sampled_token_ids: Tensor,
    cu_num_logits: list[int] | Tensor | None = None,
    logprob_token_ids_state: Any = None,
    expanded_idx_mapping: Tensor | None = None,
    max_per_req_token_ids: int = 0,
    logits_mode: bool = False,
) -> LogprobsTensors:
    """compute_topk_scores of vLLM, with the requested rows in their places."""
    batch = _coming.take(len(logits))
    if batch is None or logits_mode or max_per_req_token_ids:
        return _scores(
            logits,
            num_logprobs,
            sampled_token_ids,
            cu_num_logits,
            logprob_token_ids_state,
            expanded_idx_mapping,
            max_per_req_token_ids,
            logits_mode,
        )
    rows = batch.rows(logits, sampled_token_ids.long(), num_logprobs, _plain)
    return LogprobsTensors(
        # vLLM's own ids are as wide as the sampled ones.
        logprob_token_ids=rows.ids.to(sampled_token_ids.dtype),
        logprobs=rows.logprobs,
        selected_token_ranks=rows.ranks,
        cu_num_generated_tokens=None if isinstance(cu_num_logits, Tensor) else cu_num_logits,
        cu_num_generated_tokens_tensor=cu_num_logits if isinstance(cu_num_logits, Tensor) else None,
    )


def _plain(logits_NV: Tensor, sampled_N: Tensor, num_logprobs: int) -> Rows:
    tensors = _scores(logits_NV, num_logprobs, sampled_N)
    return Rows(tensors.logprob_token_ids.int(), tensors.logprobs, tensors.selected_token_ranks)


def _add_request_noted(self: Any, req_idx: int, sampling_params: Any) -> None:
    asked = asked_of(sampling_params.extra_args, sampling_params.logprobs, sampling_params.seed)
    # Also where nothing is asked: a slot that is used again must forget its last request.
    _asked_by_slot.setdefault(self, {})[req_idx] = asked
    _add_request(self, req_idx, sampling_params)


def _add_prompt_noted(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
    asked = asked_of(sampling_params.extra_args, sampling_params.prompt_logprobs, sampling_params.seed)
    _asked_by_slot.setdefault(self, {})[req_idx] = asked
    _add_prompt(self, req_id, req_idx, sampling_params)


def _call_with_signals(self: Any, logits: Tensor, input_batch: Any) -> Any:
    with expecting(_sampled_batch(self, len(logits), input_batch)):
        return _call(self, logits, input_batch)


def _verify_with_signals(
    self: Any, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None, invalid_drafts: Any = None
) -> Any:
    # Adaptive verification drops rows on the device: nobody here knows which are left.
    batch = None if self.enable_adaptive_verification else _sampled_batch(self.sampler, len(logits), input_batch)
    with expecting(batch):
        return _verify(self, logits, input_batch, draft_logits, invalid_drafts)


def _prompts_with_signals(
    self: Any,
    logits_fn: Any,
    hidden_states: Tensor,
    input_batch: Any,
    all_token_ids: Tensor,
    num_computed_tokens: Tensor,
    prompt_lens: Any,
) -> dict[str, LogprobsTensors]:
    batch = None
    if self.logprobs_mode == "raw_logprobs":
        # A row a token of the step; one that predicts no prompt token is computed and dropped.
        lengths = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
        places = input_batch.positions[: input_batch.num_tokens]
        batch = batch_of(_asked_by_slot.get(self, {}), input_batch.idx_mapping_np, lengths, places)
    with expecting(batch):
        return _prompt_logprobs(
            self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )


def _sampled_batch(sampler: Any, num_rows: int, input_batch: Any) -> Batch | None:
    if sampler.logprobs_mode != "raw_logprobs":
        return None
    lengths = np.diff(input_batch.cu_num_logits_np[: input_batch.num_reqs + 1])
    if int(lengths.sum()) != num_rows:
        return None
    places = input_batch.positions[input_batch.logits_indices]
    return batch_of(_asked_by_slot.get(sampler, {}), input_batch.idx_mapping_np, lengths, places)


def batch_of(by_slot: dict[int, Asked | None], slots: Any, lengths: Any, positions_N: Tensor) -> Batch | None:
    """Rows of requests in `slots`, `lengths` rows each, at `positions_N`; None where none of them asks for anything."""
    asked = [by_slot.get(int(slot)) for slot in slots]
    if not any(asked):
        return None
    asked_N = [one for one, num in zip(asked, lengths, strict=True) for _ in range(num)]
    return Batch(asked_N, positions_N.to(torch.int64) + 1) if len(asked_N) == len(positions_N) else None
