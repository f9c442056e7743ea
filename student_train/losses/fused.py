"""Losses on a sparse teacher, fused with the language model head and chunked over tokens.

In: hidden states [N, H], the head's weight [V, H], sparse targets, a mix of named losses. Out: sums in nats, of which
the total carries gradients to hidden, weight, bias and a LoRA pair on the head.
Cost: the three matrix products of plain cross-entropy (two with a frozen head or frozen body, one without gradient),
and one [chunk, V] buffer instead of three [N, V] ones. The gradient is computed in the forward pass, chunk by chunk,
and kept (hidden [N, H] and weight [V, H], float32), so backward is one multiplication (the plan of Liger Kernel,
arXiv 2410.10989).

Only 2 + K + E numbers a token, log q at the slots of a loss and of its tail, pass through autograd; `sparse_softmax.py`
carries their gradient to all V logits in closed form. Divergences therefore are plain formulas in `divergences.py`.

    N loss tokens, C tokens of a chunk, V vocabulary, H hidden, R LoRA rank, K support, E extra slots, J terms
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import ConfigError
from student_train.losses.divergences import LossMix, weighted_sum
from student_train.losses.head_chunks import HeadChunks, HeadInputs
from student_train.losses.targets import SparseTargets
from student_train.losses.token_losses import chunk_losses


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens; divide once, after the all-reduce.

    Attributes:
        loss_sum: float32 scalar, sum over terms and tokens of term weight x token weight x nats; has the gradient.
        num_tokens: N.
        weight_sum: float32 scalar, sum of the token weights (focal factor included); no gradient.
        term_sums: float32 scalar for each term by name, token weights in and term weight out, so that
            loss_sum = sum over terms of term weight x term sum; no gradient. Distribution losses carry temperature^2.
    """

    loss_sum: Tensor
    num_tokens: int
    weight_sum: Tensor
    term_sums: dict[str, Tensor]


def fused_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    mix: LossMix,
    *,
    bias_V: Tensor | None = None,
    lora_hidden_NR: Tensor | None = None,
    lora_weight_VR: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> LossSums:
    """All losses of `mix` at once, of logits = hidden W^T (+ bias) (+ lora_hidden lora_weight^T), never materialised.

    hidden and weight may be float32, bfloat16, float16 or float64; matrix products run in the weight's dtype,
    everything else and the accumulated gradients in float32 (float64 for float64). `lora_hidden_NR` is A x with the
    LoRA scaling in it, `lora_weight_VR` is B. Gradients go to those inputs that require them, and are not computed
    under no_grad. Call backward once: it consumes the gradients.

    Raises:
        ConfigError: the targets lack what a loss of the mix needs.
    """
    head = HeadInputs(hidden_NH, weight_VH, bias_V, lora_hidden_NR, lora_weight_VR, chunk_tokens)
    return sums_of(mix, targets, *fused_loss_tensors(head, targets, mix))


def sums_of(
    mix: LossMix, targets: SparseTargets, loss_sum: Tensor, term_sums_J: Tensor, weight_sum: Tensor
) -> LossSums:
    """Give the plain tensors of `fused_loss_tensors` their names."""
    return LossSums(loss_sum, targets.num_tokens, weight_sum, dict(zip(mix.names, term_sums_J.unbind(), strict=True)))


def fused_loss_tensors(head: HeadInputs, targets: SparseTargets, mix: LossMix) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, term_sums_J, weight_sum): what `fused_loss` names, as plain tensors that module hooks understand."""
    refuse_missing(mix, targets)
    # Decided here: inside an autograd function `ctx.needs_input_grad` stays true under no_grad.
    needs_grad = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in head.tensors
    )
    if not any(needs_grad):
        return _forward(HeadChunks(head), targets, mix, with_gradient=False)
    sums: tuple[Tensor, Tensor, Tensor] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        *head.tensors, head.chunk_tokens, targets, mix, needs_grad
    )
    return sums


def refuse_missing(mix: LossMix, targets: SparseTargets) -> None:
    """Raise ConfigError where the targets lack what a loss of the mix needs."""
    for term in mix.terms:
        if term.needs_distribution and not term.needs_draws and targets.num_support == 0:
            raise ConfigError(
                f"{term.name} needs the teacher's distribution and these targets hold none: use cross_entropy"
            )
        if term.needs_draws and targets.draws is None:
            raise ConfigError(
                f"{term.name} needs draws from the tail, which this cache does not hold: use forward_kl_stored_tail"
            )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        lora_hidden_NR: Tensor | None,
        lora_weight_VR: Tensor | None,
        chunk_tokens: int | None,
        targets: SparseTargets,
        mix: LossMix,
        needs_grad: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = HeadInputs(hidden_NH, weight_VH, bias_V, lora_hidden_NR, lora_weight_VR, chunk_tokens)
        chunks = HeadChunks(head, needs_grad)
        loss_sum, term_sums_J, weight_sum = _forward(chunks, targets, mix, with_gradient=True)
        ctx.mark_non_differentiable(term_sums_J, weight_sum)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in head.tensors]
        ctx.save_for_backward(*chunks.gradients)
        return loss_sum, term_sums_J, weight_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, or the weight's gradient would exist twice; a second backward (retain_graph) is then refused by
        # autograd's version check. The product comes before the cast, so that fp16 loss scales do not overflow.
        gradients = [
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def _forward(
    chunks: HeadChunks, targets: SparseTargets, mix: LossMix, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, term_sums_J, weight_sum) over all chunks; the gradient, if asked for, stays in `chunks.gradients`."""
    term_sums_J = torch.zeros(len(mix.terms), dtype=chunks.dtype, device=targets.ids_NK.device)
    weight_sum = torch.zeros((), dtype=chunks.dtype, device=targets.ids_NK.device)
    # Precision is chosen here, not by an enclosing autocast.
    with torch.autocast(targets.ids_NK.device.type, enabled=False):
        for start, stop in chunks.spans():
            logits_CV = chunks.logits(start, stop)
            values_CJ, weights_C = chunk_losses(
                logits_CV, targets.narrow(start, stop), mix, with_gradient=with_gradient
            )
            term_sums_J += (weights_C.unsqueeze(1) * values_CJ).sum(dim=0)
            weight_sum += weights_C.sum()
            if with_gradient:
                chunks.accumulate(start, stop, logits_CV)
    return weighted_sum(mix, term_sums_J), term_sums_J, weight_sum
