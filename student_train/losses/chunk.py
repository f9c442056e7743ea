"""A mix of losses on one chunk of logits: nats of each token and term, and the gradient in the logits' place.

In: logits [C, V] and the targets of the same tokens. Out: values [C, J], token weights [C]; `logits_CV` then holds the
gradient of their weighted sum. Cost: one pass over the chunk (`sparse_softmax.py`); a second, with a second buffer,
where distributions are compared at another temperature than 1 and the mix also holds what is always taken at 1.

    C tokens of a chunk, V vocabulary, K support, M draws, B = K + 1 buckets, F = K + M + 1 buckets with drawn ids apart
    J terms, E = 2 extra slots: the sampled token and the teacher's rank-0 token (only that there is a support)

One chunk of logits: log-softmax read at a few slots and over all the rest, and the gradient put in their place.

In: logits [C, V], the support of each token, some more slots to read. Out: log q at the slots and of the tail; then,
given dL/dlog q for each, dL/dlogits in the same memory. Cost: four passes over [C, V] and no second buffer.

For any L = f({log q_i} at slots i, log q_r), q_r the mass outside the support S, with g = df/dlog q and G = sum of
all g (u = logits / tau):

    dL/du_j = g_j - q_j G                   on S
    dL/du_j = q_j (g_r / q_r - G)           off S           (a slot off S, such as a drawn token, adds its own g_j)

because dlog q_i/du_j = [i = j] - q_j and dlog q_r/du_j = [j not in S] q_j/q_r - q_j.

The tail is summed over the ids off S after writing -inf on S: 1 - sum_S q would lose all its digits where S holds
nearly everything, and be negative in half of the cases. q_j/q_r is kept as e_j/sum(e) with e = exp(u - max off S),
which is exact even where q_r itself underflows.

    C tokens of a chunk, V vocabulary, K ids kept apart from the tail (stored and drawn), E extra slots, S = K + E slots
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.divergences import LossMix, LossTerm, bucket_loss, sampled_tail_loss, weighted_sum
from student_train.losses.targets import (
    NO_MASS,
    SparseTargets,
    distinct_draws,
    draws_at_temperature,
    in_support,
    split_tail,
    teacher_buckets,
)


@dataclass(frozen=True)
class OpenChunk:
    """A chunk between reading and writing back; its logits are gone, `exp_CV` stands in their memory.

    Attributes:
        exp_CV: exp(u - max off S), 0 on S.
        slot_ids_CS: int64, support then extra slots; support padding may repeat ids, and be read like extra slots.
        is_support_CK: which support slots are real.
        student_CS: log q at the slots.
        student_tail_C: log q_r; -inf where the support is the whole vocabulary.
        tail_sum_C: sum of exp_CV.
        tail_scale_C: exp(max off S - logsumexp u), so that q_j = exp_CV * tail_scale_C off S.
    """

    exp_CV: Tensor
    slot_ids_CS: Tensor
    is_support_CK: Tensor
    student_CS: Tensor
    student_tail_C: Tensor
    tail_sum_C: Tensor
    tail_scale_C: Tensor

    @property
    def student_support_CK(self) -> Tensor:
        """log q at the support slots, padding included."""
        return self.student_CS[:, : self.is_support_CK.shape[1]]

    @property
    def student_extra_CE(self) -> Tensor:
        """log q at the extra slots."""
        return self.student_CS[:, self.is_support_CK.shape[1] :]


def open_chunk(scaled_logits_CV: Tensor, ids_CK: Tensor, is_support_CK: Tensor, extra_ids_CE: Tensor) -> OpenChunk:
    """Read log q at the slots and over the tail. Consumes `scaled_logits_CV` (float32 or float64, logits / tau).

    ids_CK and extra_ids_CE are int64; `is_support_CK` is False on padding, whose ids may repeat any id.
    """
    u_CV = scaled_logits_CV
    slot_ids_CS = torch.cat([ids_CK, extra_ids_CE], dim=1)
    u_CS = u_CV.gather(1, slot_ids_CS)
    # Adding rather than writing -inf: a padding slot that repeats a support id adds 0 and cannot undo the mask.
    u_CV.scatter_add_(1, ids_CK, torch.zeros_like(u_CS[:, : ids_CK.shape[1]]).masked_fill_(is_support_CK, -torch.inf))
    # The clamp turns a row of nothing but -inf (K = V) into exp(-inf) = 0 where -inf - -inf would be nan.
    max_C = u_CV.amax(dim=1).clamp_(min=torch.finfo(u_CV.dtype).min)
    exp_CV = u_CV.sub_(max_C.unsqueeze(1)).exp_()
    tail_sum_C = exp_CV.sum(dim=1)
    u_tail_C = max_C + tail_sum_C.log()
    u_support_CK = u_CS[:, : ids_CK.shape[1]].masked_fill(~is_support_CK, -torch.inf)
    logsumexp_C = torch.cat([u_support_CK, u_tail_C.unsqueeze(1)], dim=1).logsumexp(dim=1)
    return OpenChunk(
        exp_CV=exp_CV,
        slot_ids_CS=slot_ids_CS,
        is_support_CK=is_support_CK,
        student_CS=u_CS - logsumexp_C.unsqueeze(1),
        student_tail_C=u_tail_C - logsumexp_C,
        tail_sum_C=tail_sum_C,
        tail_scale_C=(max_C - logsumexp_C).exp(),
    )


def close_chunk(chunk: OpenChunk, grad_CS: Tensor, grad_tail_C: Tensor, temperature: float) -> Tensor:
    """dL/dlogits [C, V], in the memory of `chunk.exp_CV`, from dL/dlog q at the slots and dL/dlog q_r.

    Consumes the chunk. `grad_tail_C` is 0 where there is no tail.
    """
    total_C = grad_CS.sum(dim=1) + grad_tail_C
    tail_share_C = torch.where(chunk.tail_sum_C > 0.0, grad_tail_C / chunk.tail_sum_C, 0.0)
    off_support_C = (tail_share_C - chunk.tail_scale_C * total_C) / temperature
    grad_CV = chunk.exp_CV.mul_(off_support_C.unsqueeze(1))

    num_support = chunk.is_support_CK.shape[1]
    softmax_CK = chunk.student_CS[:, :num_support].exp() * chunk.is_support_CK
    slot_grad_CS = grad_CS.clone()
    slot_grad_CS[:, :num_support] -= softmax_CK * total_C.unsqueeze(1)
    return grad_CV.scatter_add_(1, chunk.slot_ids_CS, slot_grad_CS.div_(temperature))


SAMPLED, RANK_0 = 0, 1
"""Extra slots by number."""


@dataclass(frozen=True)
class _Sides:
    """Teacher and student at one temperature, as log probabilities; NO_MASS where a bucket holds nothing.

    Without draws the two kinds of buckets are the same, and the draws' tensors have no columns.
    """

    teacher_CB: Tensor
    student_CB: Tensor
    teacher_CF: Tensor
    student_CF: Tensor
    draw_weights_CM: Tensor
    teacher_CM: Tensor
    student_CM: Tensor


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
        sides = None if soft is None else _sides(targets, soft)
        values_CJ = torch.stack([_term_loss(term, targets, sides, hard) for term in mix.terms], dim=1)
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
    ids_CS, is_apart_CS = _apart(targets)
    extra_ids_CE = torch.cat([targets.sampled_ids_N.unsqueeze(1), targets.ids_NK[:, :1].long()], dim=1)
    is_soft = any(not term.is_cross_entropy for term in mix.terms)
    is_hard = any(term.is_cross_entropy for term in mix.terms) or mix.focal_gamma is not None
    if is_soft and (targets.temperature == 1.0 or not is_hard):
        scaled_CV = logits_CV if targets.temperature == 1.0 else logits_CV.div_(targets.temperature)
        soft = open_chunk(scaled_CV, ids_CS, is_apart_CS, extra_ids_CE)
        return soft, soft if is_hard else None
    at_tau = open_chunk(logits_CV / targets.temperature, ids_CS, is_apart_CS, extra_ids_CE) if is_soft else None
    return at_tau, open_chunk(logits_CV, ids_CS[:, :0], is_apart_CS[:, :0], extra_ids_CE)


def _apart(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """(ids_CS int64, bool [C, S]): the ids that are kept apart from the tail, S = K + M: the support's, then drawn."""
    ids_CK, is_support_CK, draws = targets.ids_NK.long(), in_support(targets), targets.draws
    if draws is None:
        return ids_CK, is_support_CK
    return torch.cat([ids_CK, draws.ids_NM.long()], 1), torch.cat([is_support_CK, distinct_draws(targets, draws)], 1)


def _hard_logprobs(name: str, hard: OpenChunk) -> Tensor:
    """log q [C] of the token that the named cross-entropy is against."""
    return hard.student_extra_CE[:, {"cross_entropy": SAMPLED, "cross_entropy_argmax": RANK_0}[name]]


def _term_loss(term: LossTerm, targets: SparseTargets, sides: _Sides | None, hard: OpenChunk | None) -> Tensor:
    """Nats [C] of one term, times temperature^2 where it compares distributions."""
    if term.is_cross_entropy:
        assert hard is not None
        return -_hard_logprobs(term.name, hard)
    assert sides is not None
    if term.estimates_tail and targets.draws is not None:
        value_C = sampled_tail_loss(
            term, sides.teacher_CB, sides.student_CB, sides.draw_weights_CM, sides.teacher_CM, sides.student_CM
        )
    elif term.splits_tail:
        value_C = bucket_loss(term, sides.teacher_CF, sides.student_CF)
    else:
        value_C = bucket_loss(term, sides.teacher_CB, sides.student_CB)
    return value_C * targets.temperature**2


def _sides(targets: SparseTargets, soft: OpenChunk) -> _Sides:
    """Both sides in buckets. The student's whole tail is the sum of its parts, so that nothing is subtracted."""
    num_support, dtype = targets.num_support, soft.student_CS.dtype
    has_rest_C1 = (soft.student_tail_C != -torch.inf).unsqueeze(1)
    is_bucket_CF = torch.cat([soft.is_support_CK, has_rest_C1], dim=1)
    student_CF = torch.cat([soft.student_support_CK, soft.student_tail_C.unsqueeze(1)], dim=1)
    student_CF = torch.where(is_bucket_CF, student_CF, NO_MASS)
    is_drawn_CM, has_tail_C1 = is_bucket_CF[:, num_support:-1], is_bucket_CF[:, num_support:].any(dim=1, keepdim=True)
    student_tail_C1 = student_CF[:, num_support:].logsumexp(dim=1, keepdim=True)
    student_CB = torch.cat([student_CF[:, :num_support], torch.where(has_tail_C1, student_tail_C1, NO_MASS)], dim=1)
    is_bucket_CB = torch.cat([is_bucket_CF[:, :num_support], has_tail_C1], dim=1)
    teacher_CB = torch.where(is_bucket_CB, teacher_buckets(targets, dtype), NO_MASS)
    if targets.draws is None:
        empty_C0 = student_CB[:, :0]
        return _Sides(teacher_CB, student_CB, teacher_CB, student_CB, empty_C0, empty_C0, empty_C0)
    weights_CM, teacher_CM = draws_at_temperature(targets, targets.draws, dtype)
    teacher_CF = torch.where(
        is_bucket_CF, split_tail(teacher_CB, torch.where(is_drawn_CM, teacher_CM, NO_MASS)), NO_MASS
    )
    student_CM = soft.student_support_CK[:, num_support:]
    return _Sides(teacher_CB, student_CB, teacher_CF, student_CF, weights_CM, teacher_CM, student_CM)


def _token_weights(targets: SparseTargets, mix: LossMix, hard: OpenChunk | None, values_CJ: Tensor) -> Tensor:
    """The targets' weights [C] (1 by default) times the focal factor (1 - q(sampled))^gamma, without gradient."""
    weights_C = (
        values_CJ.new_ones(values_CJ.shape[0]) if targets.weights_N is None else targets.weights_N.to(values_CJ.dtype)
    )
    if mix.focal_gamma is None:
        return weights_C
    assert hard is not None
    missed_C = -torch.expm1(_hard_logprobs("cross_entropy", hard).detach())
    return weights_C * missed_C.clamp(min=0.0) ** mix.focal_gamma


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
