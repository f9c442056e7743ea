"""vLLM's log probabilities to Captures: the arrays that `arrays` keeps, or vLLM's own FlatLogprobs.

Shape legend: T completion tokens, K candidates requested, W columns in vLLM's batch (its largest K, and 1), n new
tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logprobs import FlatLogprobs

from stillroom.errors import StillroomError
from stillroom.schema.records import Capture, Float32, Int32
from teacher_cache.engine.row_layout import Layout, capture_of_rows

BLOCK_TOKENS = 128
"""Tokens a block of TokenArrays: what a request wastes at most."""


class TokenArrays:
    """Growing [T, K+1] arrays of one completion: column 0 is the sampled token, 1..K the most probable in order."""

    def __init__(self, k: int) -> None:
        self._width = k + 1
        self._blocks: list[tuple[Int32, Float32, Int32]] = []
        # As if a block were full: the first append makes the first one.
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
