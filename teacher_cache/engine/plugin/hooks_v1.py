"""The plugin's hooks into vLLM's first model runner (`v1/worker/gpu_model_runner.py`: the CPU, and GPUs on request).

`_sample`, `_get_logprobs_tensors` (speculative decoding) and `_get_prompt_logprobs_dict` all end in the sampler's
`compute_logprobs` and `gather_logprobs`. While one of the first three runs, the rows of logits to come are known; the
last two then hand on raw logits and turn them into rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from teacher_cache.engine.plugin.batch import Asked, Batch, asked_of
from teacher_cache.engine.plugin.signals import Rows


@dataclass(slots=True)
class _Coming:
    """The rows that the sampler is about to see; None: only rows of requests that ask for nothing."""

    batch: Batch | None = None


_coming = _Coming()
_sample = GPUModelRunner._sample
_prompt_logprobs = GPUModelRunner._get_prompt_logprobs_dict
_speculated = RejectionSampler._get_logprobs_tensors
_compute = Sampler.compute_logprobs
_gather = Sampler.gather_logprobs


def install() -> None:
    """Puts the hooks in place, where fit.RUNNER_1 holds."""
    GPUModelRunner._sample = _sample_with_signals  # type: ignore[method-assign]
    GPUModelRunner._get_prompt_logprobs_dict = _prompts_with_signals  # type: ignore[method-assign]
    RejectionSampler._get_logprobs_tensors = _speculated_with_signals  # type: ignore[method-assign]
    Sampler.compute_logprobs = staticmethod(_logits_or_logprobs)  # type: ignore[method-assign]
    Sampler.gather_logprobs = staticmethod(_gather_with_signals)  # type: ignore[method-assign]


@contextlib.contextmanager
def _expecting(batch: Batch | None) -> Iterator[None]:
    # Handed over in a module variable, because vLLM's functions in between take no further argument.
    before, _coming.batch = _coming.batch, batch
    try:
        yield
    finally:
        _coming.batch = before


def _sample_with_signals(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
    with _expecting(None if logits is None else _sampled_batch(self, len(logits), spec_decode_metadata)):
        return _sample(self, logits, spec_decode_metadata)


def _sampled_batch(runner: Any, num_rows: int, spec_decode_metadata: Any) -> Batch | None:
    """One row a request; with speculation one a draft token and one more. None where nobody asks or nothing fits."""
    batch = runner.input_batch
    metadata = batch.sampling_metadata
    if runner.model_config.logprobs_mode != "raw_logprobs" or metadata.logprob_token_ids:
        return None
    asked = [_asked(runner.requests[req_id].sampling_params, prompt=False) for req_id in batch.req_ids]
    if not any(asked):
        return None
    if spec_decode_metadata is None:
        # Of the tokens that a request has in this step, the last one's logits are sampled from.
        last = runner.query_start_loc.gpu[1 : len(asked) + 1] - 1
    else:
        last = spec_decode_metadata.logits_indices
        drafts = spec_decode_metadata.num_draft_tokens
        asked = [one for one, num in zip(asked, drafts, strict=True) for _ in range(num + 1)]
    if len(asked) != num_rows:
        return None
    # The logits at position i predict token i + 1, and draws are seeded by the token's own place.
    return Batch(asked, runner.positions[last].long() + 1)


def _speculated_with_signals(
    self: Any,
    max_num_logprobs: int,
    metadata: Any,
    logits: Tensor,
    target_logits: Tensor,
    bonus_logits: Tensor,
    sampled_token_ids: Tensor,
) -> LogprobsTensors:
    """vLLM spreads the rows to [requests, longest draft + 1], reading past a shorter draft; so do their places."""
    batch = _coming.batch
    if batch is not None:
        starts, start = [], 0
        for num in metadata.num_draft_tokens:
            starts.append(start)
            start += num + 1
        spread = [min(one + offset, len(batch) - 1) for one in starts for offset in range(sampled_token_ids.shape[-1])]
        batch = Batch([batch.asked_N[row] for row in spread], batch.positions_N[spread])
    with _expecting(batch):
        return _speculated(self, max_num_logprobs, metadata, logits, target_logits, bonus_logits, sampled_token_ids)


def _prompts_with_signals(
    self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, LogprobsTensors | None]:
    """vLLM goes through its requests one by one; here it is shown one at a time, so that we know which."""
    waiting = self.num_prompt_logprobs
    if not waiting or self.model_config.logprobs_mode != "raw_logprobs":
        return _prompt_logprobs(self, hidden_states, num_scheduled_tokens)
    results: dict[str, LogprobsTensors | None] = {}
    left: dict[str, int] = {}
    try:
        for req_id, num in waiting.items():
            self.num_prompt_logprobs = {req_id: num}
            with _expecting(_prompt_batch(self, req_id, num_scheduled_tokens.get(req_id), hidden_states.device)):
                results |= _prompt_logprobs(self, hidden_states, num_scheduled_tokens)
            # vLLM removes a request once its prompt is done.
            left |= self.num_prompt_logprobs
    finally:
        self.num_prompt_logprobs = waiting
    for req_id in waiting.keys() - left.keys():
        del waiting[req_id]
    return results


def _prompt_batch(runner: Any, req_id: str, num_scheduled: int | None, device: torch.device) -> Batch | None:
    """Hidden state i predicts token i + 1; the sampler sees as many rows of this chunk as have one."""
    if num_scheduled is None:
        return None
    request = runner.requests[req_id]
    asked = _asked(request.sampling_params, prompt=True)
    if asked is None:
        return None
    # Chunked prefill: this step's rows begin where the ones before ended.
    first = request.num_computed_tokens + 1
    return Batch([asked] * num_scheduled, torch.arange(first, first + num_scheduled, device=device))


def _asked(params: Any, *, prompt: bool) -> Asked | None:
    if params is None:
        return None
    return asked_of(params.extra_args, params.prompt_logprobs if prompt else params.logprobs, params.seed)


def _logits_or_logprobs(logits: Tensor) -> Tensor:
    if _coming.batch is None:
        return _compute(logits)
    # The sampler changes float32 logits in place afterwards; other types it copies first.
    return logits.clone() if logits.dtype == torch.float32 else logits


def _gather_with_signals(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
    batch = _coming.batch
    if batch is None:
        return _gather(logprobs, num_logprobs, token_ids)
    # A prompt's last token predicts none of it, so there may be a row less than tokens.
    rows = batch.slice(0, len(logprobs)).rows(logprobs, token_ids, num_logprobs, _plain)
    return LogprobsTensors(rows.ids, rows.logprobs, rows.ranks)


def _plain(logits_NV: Tensor, sampled_N: Tensor, num_logprobs: int) -> Rows:
    tensors = _gather(_compute(logits_NV), num_logprobs, sampled_N)
    return Rows(tensors.logprob_token_ids, tensors.logprobs, tensors.selected_token_ranks)
