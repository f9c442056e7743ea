"""Matrix products of a language model head, forward and backward, one chunk of tokens at a time in reused memory.

In: hidden states and the head's weights. Out: one [chunk, V] buffer of logits at a time, which the caller replaces with
dL/dlogits and hands back; it becomes gradients of hidden, weight, bias and LoRA pair. Memory: one [chunk, V] buffer in
float32 (another in the weight's dtype if that is half precision, and another if logits are capped) and the gradients
that are needed.

    N loss tokens, C tokens of a chunk, V vocabulary, H hidden, R LoRA rank
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.schema.records import Int64
from student_train.config.run import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS


@dataclass(frozen=True)
class LogitMap:
    """What a model does between its last hidden states and its logits, besides the head's product z.

    Attributes:
        hidden_scale: factor on the hidden states before the head and its adapter (MiniCPM).
        scale: factor on z (Cohere, Granite, Falcon-H1).
        cap: logits = cap tanh(scale z / cap) (Gemma 2); None is scale z.
    """

    hidden_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None


PLAIN = LogitMap()


@dataclass(frozen=True)
class HeadInputs:
    """z = hidden W^T (+ bias) (+ lora_hidden lora_weight^T); logits are z, or `logit_map` of it.

    Attributes:
        hidden_NH: final hidden states of the loss tokens; cast to the weight's dtype.
        weight_VH: float32, bfloat16, float16 or float64.
        lora_hidden_NR: A x times the LoRA scaling.
        lora_weight_VR: B; products of the pair run in float32.
        chunk_tokens: None is CPU_CHUNK_TOKENS or GPU_CHUNK_TOKENS.
        logit_map: its hidden_scale is in hidden_NH and lora_hidden_NR already.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    lora_hidden_NR: Tensor | None = None
    lora_weight_VR: Tensor | None = None
    chunk_tokens: int | None = None
    logit_map: LogitMap = PLAIN

    def __post_init__(self) -> None:
        assert self.hidden_NH.dim() == 2
        assert self.hidden_NH.shape[1] == self.weight_VH.shape[1]
        assert (self.lora_hidden_NR is None) == (self.lora_weight_VR is None)
        assert self.chunk_tokens is None or self.chunk_tokens > 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden_NH, self.weight_VH, self.bias_V, self.lora_hidden_NR, self.lora_weight_VR

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, reductions and accumulated gradients: float32, or float64 for a float64 weight."""
        return torch.float64 if self.weight_VH.dtype == torch.float64 else torch.float32


class HeadChunks:
    """Buffers of one pass over the head: call `logits`, turn them into dL/dlogits in place, call `accumulate`.

    Attributes:
        gradients: in the order of HeadInputs.tensors, in HeadInputs.dtype; None if not needed. The weight's exists from
            the first chunk on.
    """

    def __init__(
        self, head: HeadInputs, needs_grad: tuple[bool, ...] = (False,) * 5, cuts: Int64 | None = None
    ) -> None:
        """`cuts` are the ascending places where chunks may begin and end, 0 and N among them; None is everywhere."""
        self._head = head
        self.dtype = head.dtype
        device, num_vocab = head.hidden_NH.device, head.weight_VH.shape[0]
        default = CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS
        self._spans = _spans(head.hidden_NH.shape[0], head.chunk_tokens or default, cuts)
        chunk_tokens = max((stop - start for start, stop in self._spans), default=1)
        self._logits_CV = torch.zeros(chunk_tokens, num_vocab, dtype=head.dtype, device=device)
        # Half-precision logits, and later dL/dlogits in the same memory.
        self._half_CV = (
            None
            if head.weight_VH.dtype == head.dtype
            else torch.zeros_like(self._logits_CV, dtype=head.weight_VH.dtype)
        )
        # d logits / dz, which cannot be read from dL/dlogits.
        # A factor without a cap is the slope itself, and needs no buffer.
        self._slope_CV = torch.zeros_like(self._logits_CV) if head.logit_map.cap and any(needs_grad) else None
        self._lora_weight_VR = None if head.lora_weight_VR is None else head.lora_weight_VR.detach().to(head.dtype)
        self._needs_weight = needs_grad[1]
        # The first chunk's product becomes the weight's gradient: zeros [V, H] would be written only to be added to.
        now = (needs_grad[0], needs_grad[1] and not self._spans, *needs_grad[2:])
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=head.dtype, memory_format=torch.contiguous_format)
            if is_needed and tensor is not None
            else None
            for tensor, is_needed in zip(head.tensors, now, strict=True)
        ]

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk, in order."""
        yield from self._spans

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [C, V] of tokens start..stop-1, valid until the next call."""
        head = self._head
        logits_CV = self._logits_CV[: stop - start]
        if self._half_CV is None:
            torch.mm(self._hidden(start, stop), head.weight_VH.t(), out=logits_CV)
        else:
            half_CV = self._half_CV[: stop - start]
            logits_CV.copy_(torch.mm(self._hidden(start, stop), head.weight_VH.t(), out=half_CV))
        if head.bias_V is not None:
            logits_CV.add_(head.bias_V)
        if head.lora_hidden_NR is not None and self._lora_weight_VR is not None:
            logits_CV.addmm_(head.lora_hidden_NR[start:stop].to(head.dtype), self._lora_weight_VR.t())
        self._map(logits_CV)
        return logits_CV

    def _map(self, z_CV: Tensor) -> None:
        """Turns z into logits in place, and keeps their slope where a gradient will need it."""
        scale, cap = self._head.logit_map.scale, self._head.logit_map.cap
        if cap is not None:
            tanh_CV = z_CV.mul_(scale / cap).tanh_()
            if self._slope_CV is not None:
                # d/dz of cap tanh(scale z / cap) is scale (1 - tanh^2).
                torch.mul(tanh_CV, tanh_CV, out=self._slope_CV[: len(z_CV)]).neg_().add_(1.0).mul_(scale)
            tanh_CV.mul_(cap)
        elif scale != 1.0:
            z_CV.mul_(scale)

    @torch.no_grad()
    def accumulate(self, start: int, stop: int, grad_CV: Tensor) -> None:
        """Adds to `gradients` what follows from `grad_CV` = dL/dlogits of tokens start..stop-1, which it consumes."""
        head = self._head
        if self._slope_CV is not None:
            grad_CV.mul_(self._slope_CV[: stop - start])
        elif head.logit_map.scale != 1.0:
            grad_CV.mul_(head.logit_map.scale)
        grad_hidden, _, grad_bias, grad_lora_hidden, grad_lora_weight = self.gradients
        if self._half_CV is None:
            if grad_hidden is not None:
                torch.mm(grad_CV, head.weight_VH, out=grad_hidden[start:stop])
            self._add_to_weight(grad_CV, start, stop)
        elif grad_hidden is not None or self._needs_weight:
            half_CV = self._half_CV[: stop - start].copy_(grad_CV)
            if grad_hidden is not None:
                grad_hidden[start:stop] = half_CV @ head.weight_VH
            self._add_to_weight(half_CV, start, stop)
        if grad_bias is not None:
            grad_bias += grad_CV.sum(dim=0)
        if grad_lora_hidden is not None and self._lora_weight_VR is not None:
            grad_lora_hidden[start:stop] = grad_CV @ self._lora_weight_VR
        if grad_lora_weight is not None and head.lora_hidden_NR is not None:
            grad_lora_weight.addmm_(grad_CV.t(), head.lora_hidden_NR[start:stop].to(head.dtype))

    def _add_to_weight(self, grad_CV: Tensor, start: int, stop: int) -> None:
        if not self._needs_weight:
            return
        total_VH, hidden_CH = self.gradients[1], self._hidden(start, stop)
        if total_VH is not None and total_VH.dtype == grad_CV.dtype:
            total_VH.addmm_(grad_CV.t(), hidden_CH)
            return
        product_VH = grad_CV.t() @ hidden_CH
        # Multiplied in half precision, but summed over chunks in float32.
        self.gradients[1] = product_VH.to(self.dtype) if total_VH is None else total_VH.add_(product_VH)

    def _hidden(self, start: int, stop: int) -> Tensor:
        return self._head.hidden_NH[start:stop].to(self._head.weight_VH.dtype)


def _spans(num_tokens: int, chunk_tokens: int, cuts: Int64 | None) -> list[tuple[int, int]]:
    """(start, stop) of chunks of at most `chunk_tokens`, longer only where the next cut is further away.

    All about as long, because products of few tokens are slow: 9 tokens in chunks of 4 are 3, 3 and 3.
    With chunks of 4 and cuts at 0, 3, 5, 10: (0, 3), (3, 5), (5, 10).
    """
    spans, start = [], 0
    even_tokens = math.ceil(num_tokens / max(1, math.ceil(num_tokens / chunk_tokens)))
    while start < num_tokens:
        stop = min(start + even_tokens, num_tokens)
        if cuts is not None:
            # The last cut that fits, or the next one where a chunk of text is longer than a chunk of tokens.
            place = max(int(np.searchsorted(cuts, stop, "right")) - 1, int(np.searchsorted(cuts, start, "right")))
            stop = int(cuts[place])
        spans.append((start, stop))
        start = stop
    return spans
