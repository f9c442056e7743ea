"""A mix of losses on one chunk of logits: nats of each token and term, and the gradient in the logits' place.

In: logits [C, V] and the targets of the same tokens. Out: values [C, J], token weights [C]; `logits_CV` then holds the
gradient of their weighted sum. Cost: one pass over the chunk (`sparse_softmax.py`); a second, with a second buffer,
where distributions are compared at another temperature than 1 and the mix also holds what is always taken at 1.

    C tokens of a chunk, V vocabulary, K support, B = K + 1 buckets, M draws, J terms
    E extra slots: M draws, the sampled token, the teacher's rank-0 token, the reference token (the last two if given)
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.divergences import LossMix, LossTerm, bucket_loss, forward_kl_sampled_tail, weighted_sum
from student_train.losses.sparse_softmax import OpenChunk, close_chunk, open_chunk
from student_train.losses.targets import NO_MASS, SparseTargets, draws_at_temperature, in_support, teacher_buckets


def chunk_losses(
    logits_CV: Tensor, targets: SparseTargets, mix: LossMix, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(values_CJ, weights_C): nats without any weight, and the token weights with the focal factor in.

    Consumes `logits_CV`, float32 or float64: afterwards it holds d(sum_C weights_C sum_J term weight x
    value)/dlogits, or nothing of use without gradient.
    """
    soft, hard = _open(logits_CV, targets, mix)
    opened = [chunk for chunk in (soft, None if hard is soft else hard) if chunk is not None]
    leaves = [leaf for chunk in opened for leaf in (chunk.student_CS, chunk.student_tail_C)]
    # Hooks of our own, or an enclosing gradient checkpoint or offload would catch these few numbers.
    with torch.set_grad_enabled(with_gradient), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        for leaf in leaves:
            leaf.requires_grad_(with_gradient)
        values_CJ = torch.stack([_term_loss(term, targets, soft, hard) for term in mix.terms], dim=1)
        weights_C = _token_weights(targets, mix, hard, values_CJ)
        loss_sum = (weights_C * weighted_sum(mix, values_CJ)).sum()
        grads = torch.autograd.grad(loss_sum, leaves, materialize_grads=True) if with_gradient else ()
    if with_gradient:
        closed = [
            close_chunk(chunk, grads[2 * i], grads[2 * i + 1], targets.temperature if chunk is soft else 1.0)
            for i, chunk in enumerate(opened)
        ]
        if len(closed) == 2:
            logits_CV.add_(closed[0])
    return values_CJ.detach(), weights_C


def _open(logits_CV: Tensor, targets: SparseTargets, mix: LossMix) -> tuple[OpenChunk | None, OpenChunk | None]:
    """(soft, hard): log q at the targets' temperature and at 1, None where the mix needs none, one object where equal.

    Where both exist apart, the hard one has the memory of `logits_CV` and the soft one its own.
    """
    ids_CK, is_support_CK, extra_ids_CE = targets.ids_NK.long(), in_support(targets), _extra_ids(targets)
    is_soft = any(not term.is_cross_entropy for term in mix.terms)
    is_hard = any(term.is_cross_entropy for term in mix.terms) or mix.focal_gamma is not None
    if is_soft and (targets.temperature == 1.0 or not is_hard):
        scaled_CV = logits_CV if targets.temperature == 1.0 else logits_CV.div_(targets.temperature)
        soft = open_chunk(scaled_CV, ids_CK, is_support_CK, extra_ids_CE)
        return soft, soft if is_hard else None
    at_tau = open_chunk(logits_CV / targets.temperature, ids_CK, is_support_CK, extra_ids_CE) if is_soft else None
    return at_tau, open_chunk(logits_CV, ids_CK[:, :0], is_support_CK[:, :0], extra_ids_CE)


def _extra_ids(targets: SparseTargets) -> Tensor:
    """int64 [C, E]."""
    columns = [targets.sampled_ids_N.unsqueeze(1), targets.ids_NK[:, :1].long()]
    if targets.draws is not None:
        columns.insert(0, targets.draws.ids_NM.long())
    if targets.reference_ids_N is not None:
        columns.append(targets.reference_ids_N.unsqueeze(1))
    return torch.cat(columns, dim=1)


def _hard_logprobs(name: str, targets: SparseTargets, hard: OpenChunk) -> Tensor:
    """log q [C] of the token that the named cross-entropy is against."""
    sampled = 0 if targets.draws is None else targets.draws.ids_NM.shape[1]
    column = {"cross_entropy": sampled, "cross_entropy_argmax": sampled + 1, "cross_entropy_reference": -1}[name]
    return hard.student_extra_CE[:, column]


def _term_loss(term: LossTerm, targets: SparseTargets, soft: OpenChunk | None, hard: OpenChunk | None) -> Tensor:
    """Nats [C] of one term, times temperature^2 where it compares distributions."""
    if term.is_cross_entropy:
        assert hard is not None
        return -_hard_logprobs(term.name, targets, hard)
    assert soft is not None
    teacher_CB, student_CB = _buckets(targets, soft)
    if term.uses_draws and targets.draws is not None:
        draw_weights_CM, teacher_CM = draws_at_temperature(targets, targets.draws, student_CB.dtype)
        student_CM = soft.student_extra_CE[:, : draw_weights_CM.shape[1]]
        value_C = forward_kl_sampled_tail(teacher_CB, student_CB, draw_weights_CM, student_CM, teacher_CM)
    else:
        value_C = bucket_loss(term, teacher_CB, student_CB)
    return value_C * targets.temperature**2


def _buckets(targets: SparseTargets, soft: OpenChunk) -> tuple[Tensor, Tensor]:
    """(teacher_CB, student_CB), NO_MASS on padding, and in the tail where the support is the whole vocabulary."""
    has_tail_C1 = (soft.student_tail_C != -torch.inf).unsqueeze(1)
    is_bucket_CB = torch.cat([soft.is_support_CK, has_tail_C1], dim=1)
    student_CB = torch.cat([soft.student_support_CK, soft.student_tail_C.unsqueeze(1)], dim=1)
    teacher_CB = teacher_buckets(targets, student_CB.dtype)
    return torch.where(is_bucket_CB, teacher_CB, NO_MASS), torch.where(is_bucket_CB, student_CB, NO_MASS)


def _token_weights(targets: SparseTargets, mix: LossMix, hard: OpenChunk | None, values_CJ: Tensor) -> Tensor:
    """The targets' weights [C] (1 by default) times the focal factor (1 - q(sampled))^gamma, without gradient."""
    weights_C = (
        values_CJ.new_ones(values_CJ.shape[0]) if targets.weights_N is None else targets.weights_N.to(values_CJ.dtype)
    )
    if mix.focal_gamma is None:
        return weights_C
    assert hard is not None
    missed_C = -torch.expm1(_hard_logprobs("cross_entropy", targets, hard).detach())
    return weights_C * missed_C.clamp(min=0.0) ** mix.focal_gamma


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
