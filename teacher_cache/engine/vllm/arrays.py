"""vLLM's log probabilities as arrays: what the sampler computed reaches a Capture without a Python object a candidate.

In: `EngineCoreOutput.new_logprobs`, numpy arrays [n, W] of each engine step. Out: TokenArrays of each completion. vLLM
itself turns these arrays into lists or dictionaries and decodes every candidate to text: 60 to 800 µs a token at k=64
where a copy takes 7. ArrayLogprobs stands in for vLLM's `LogprobsProcessor` for requests with `flat_logprobs=True`.

To be imported only where fit.ARRAYS holds.
"""

from typing import Any, ClassVar

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor

from teacher_cache.engine.vllm.capture import TokenArrays


class ArrayLogprobs(LogprobsProcessor):
    """vLLM's per-request collector of log probabilities, keeping arrays for requests with `flat_logprobs=True`.

    The TokenArrays arrive as `outputs[0].logprobs`, those of prompts that are scored as `prompt_logprobs`. Other
    requests are vLLM's business as before.
    """

    num_tokens: ClassVar[int] = 0
    """Tokens generated in this process, those of unfinished completions included: what progress is measured by."""

    arrays: TokenArrays | None = None
    prompt_arrays: TokenArrays | None = None

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> "ArrayLogprobs":
        processor = super().from_new_request(tokenizer, request)
        assert isinstance(processor, cls)
        params = request.sampling_params
        if params is not None and params.flat_logprobs and params.num_logprobs is not None:
            processor.arrays = TokenArrays(params.num_logprobs)
            processor.logprobs = processor.arrays  # type: ignore[assignment]
            if params.prompt_logprobs is not None:
                processor.prompt_arrays = TokenArrays(params.prompt_logprobs)
                processor.prompt_logprobs = processor.prompt_arrays  # type: ignore[assignment]
        return processor

    def update_from_output(self, output: EngineCoreOutput) -> None:
        if self.arrays is None:
            super().update_from_output(output)
            return
        if output.new_logprobs is not None:
            new = output.new_logprobs
            self.arrays.append(new.logprob_token_ids, new.logprobs, new.sampled_token_ranks)
            ArrayLogprobs.num_tokens += len(new.logprobs)
        if self.prompt_arrays is not None and output.new_prompt_logprobs_tensors is not None:
            # `fit` checks the first three fields; versions add others behind them.
            ids, logprobs, ranks, *_ = output.new_prompt_logprobs_tensors
            self.prompt_arrays.append(ids.numpy(), logprobs.numpy(), ranks.numpy())


def install_arrays() -> None:
    """Puts ArrayLogprobs in place of vLLM's collector."""
    output_processor.LogprobsProcessor = ArrayLogprobs  # type: ignore[attr-defined]


def uninstall_arrays() -> None:
    """Gives vLLM its own collector back, for requests that are added from now on."""
    output_processor.LogprobsProcessor = LogprobsProcessor  # type: ignore[attr-defined]
