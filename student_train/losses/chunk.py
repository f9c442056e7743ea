"""A mix of losses on one chunk of logits: nats of each token and loss, and the gradient in the logits' place.

In: logits [C, V] and the targets of the same tokens. Out: values [C, J], token weights [C]; `logits_CV` then holds the
gradient of their weighted sum. Cost: four passes over [C, V] in its own memory; four more and a second buffer where
distributions are compared at another temperature than 1 and the mix also holds a cross-entropy. Losses with `tail:
exact` add a product with the teacher's head and one more buffer.

Log q is read at a few slots (the support, drawn ids, the sampled and the rank-0 token) and over all the rest, the tail.
For any L = f({log q_i} at slots i, log q_r), q_r the mass outside the support S, with g = df/dlog q and G the sum of
all g (u = logits / tau):

    dL/du_j = g_j - q_j G                   on S
    dL/du_j = q_j (g_r / q_r - G)           off S           (a slot off S, such as the sampled token, adds its own g_j)

because dlog q_i/du_j = [i = j] - q_j and dlog q_r/du_j = [j not in S] q_j/q_r - q_j.

    C tokens of a chunk, V vocabulary, K support, M draws, B = K + 1 buckets, F = K + M + 1 buckets with drawn ids apart
    J losses, E = 2 extra slots, S = K + M + E slots
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.divergences import NO_MASS, Chunked, Compared, Divergence, Drawn, Loss, Paired, Seen
from student_train.losses.mix import LossMix
from student_train.losses.targets import (
    SparseTargets,
    distinct_draws,
    draws_at_temperature,
    in_support,
    split_tail,
    teacher_buckets,
)
from student_train.losses.whole_teacher import ExactValues, exact_values

SAMPLED, RANK_0 = 0, 1
"""Extra slots by number."""


def chunk_losses(
    logits_CV: Tensor, targets: SparseTargets, mix: LossMix, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(values_CJ, weights_C): nats without any weight, and the token weights with the focal factor in.

    Consumes `logits_CV`, float32 or float64: afterwards it holds d(sum_C weights_C sum_J term weight x
    value)/dlogits, or nothing of use without gradient.
    """
    # Before `_open`, which consumes the logits.
    exact = _exact(logits_CV, targets, mix, with_gradient=with_gradient)
    soft, hard = _open(logits_CV, targets, mix)
    opened = [chunk for chunk in (soft, None if hard is soft else hard) if chunk is not None]
    leaves = [leaf for chunk in opened for leaf in (chunk.student_CS, chunk.student_tail_C)]
    # Hooks of our own, or an enclosing gradient checkpoint or offload would catch these few numbers.
    with torch.set_grad_enabled(with_gradient), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        for leaf in leaves:
            leaf.requires_grad_(with_gradient)
        seen = Seen(
            compared=None if soft is None else _compare(targets, soft),
            sampled_N=None if hard is None else hard.student_extra_CE[:, SAMPLED],
            argmax_N=None if hard is None or targets.num_support == 0 else hard.student_extra_CE[:, RANK_0],
            chunks=None if targets.chunks is None else Chunked(targets.chunks.ids_N, targets.chunks.logprobs_N),
            spoken=targets.spoken,
            is_negative_N=targets.is_negative_N,
            pairs=targets.pairs if isinstance(targets.pairs, Paired) else None,
        )
        # One column for each exact loss, in the order in which the mix lists them.
        from_exact = iter(() if exact is None else exact.nats_CJ.unbind(dim=1))
        values = [next(from_exact) if term.needs_hidden else term.nats(seen) for term in mix.terms]
        applied = [_where_it_applies(term, value_C, seen, mix) for term, value_C in zip(mix.terms, values, strict=True)]
        values_CJ = torch.stack(applied, dim=1)
        weights_C = _token_weights(targets, mix, seen, values_CJ)
        loss_sum = (weights_C * weighted_sum(mix, values_CJ)).sum()
        grads: Sequence[Tensor] = ()
        if with_gradient and loss_sum.requires_grad:
            # Some mixes leave a leaf unread (cross-entropy has no use for the tail): its gradient is 0, not None.
            grads = torch.autograd.grad(loss_sum, leaves, materialize_grads=True)
        elif with_gradient:
            # Exact losses alone have their gradient already; what was opened gives the focal factor.
            grads = [torch.zeros_like(leaf) for leaf in leaves]
    if with_gradient:
        closed = [
            close_chunk(chunk, grads[2 * i], grads[2 * i + 1], targets.temperature if chunk is soft else 1.0)
            for i, chunk in enumerate(opened)
        ]
        if len(closed) == 2:
            # closed[1] is in logits_CV already: the hard chunk owns that memory (see _open).
            logits_CV.add_(closed[0])
        if exact is not None:
            # Wrong chains have no divergence from the teacher, unless it corrects them.
            is_wrong_C = None if mix.corrects_negatives else targets.is_negative_N
            exact_weights_C = weights_C if is_wrong_C is None else weights_C.masked_fill(is_wrong_C, 0.0)
            exact.add_gradient(logits_CV if closed else logits_CV.zero_(), exact_weights_C)
    return values_CJ.detach(), weights_C


def _where_it_applies(term: Loss, value_C: Tensor, seen: Seen, mix: LossMix) -> Tensor:
    is_for_all = term.applies_to == "all" or (mix.corrects_negatives and not term.imitates_token)
    if seen.is_negative_N is None or is_for_all:
        # Without wrong chains, a loss for them alone is zero.
        return torch.zeros_like(value_C) if term.applies_to == "wrong" else value_C
    return value_C.where(seen.is_negative_N == (term.applies_to == "wrong"), 0.0)


def weighted_sum(mix: LossMix, values_XJ: Tensor) -> Tensor:
    """sum_J of the losses' weights times `values_XJ` [..., J]. Python numbers, so that no copy waits for a GPU."""
    parts = [term.weight * value_X for term, value_X in zip(mix.terms, values_XJ.unbind(dim=-1), strict=True)]
    return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class OpenChunk:
    """A chunk between reading and writing back; its logits are gone, `exp_CV` stands in their memory.

    Attributes:
        exp_CV: exp(u - max off S), 0 on S.
        slot_ids_CS: int64, support and drawn ids, then extra slots; padding may repeat ids, and reads like extra slots.
        is_support_CK: which of the first slots are apart from the tail.
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
    # The tail is summed over the ids off S: 1 - sum_S q would lose all its digits where S holds nearly everything.
    # Adding -inf rather than writing it: a padding slot that repeats a support id adds 0 and cannot undo the mask.
    u_CV.scatter_add_(1, ids_CK, torch.zeros_like(u_CS[:, : ids_CK.shape[1]]).masked_fill_(is_support_CK, -torch.inf))
    # The clamp turns a row of nothing but -inf (K = V) into exp(-inf) = 0 where -inf - -inf would be nan.
    max_C = u_CV.amax(dim=1).clamp_(min=torch.finfo(u_CV.dtype).min)
    exp_CV = u_CV.sub_(max_C.unsqueeze(1)).exp_()
    tail_sum_C = exp_CV.sum(dim=1)
    u_tail_C = max_C + tail_sum_C.log()
    # A padding slot repeats some id, whose mass would otherwise count twice.
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
    # q_j/q_r as e_j/sum(e) is exact even where q_r itself underflows.
    tail_share_C = torch.where(chunk.tail_sum_C > 0.0, grad_tail_C / chunk.tail_sum_C, 0.0)
    off_support_C = (tail_share_C - chunk.tail_scale_C * total_C) / temperature
    grad_CV = chunk.exp_CV.mul_(off_support_C.unsqueeze(1))

    num_support = chunk.is_support_CK.shape[1]
    softmax_CK = chunk.student_CS[:, :num_support].exp() * chunk.is_support_CK
    slot_grad_CS = grad_CS.clone()
    slot_grad_CS[:, :num_support] -= softmax_CK * total_C.unsqueeze(1)
    # Added rather than written: the sampled token's extra slot may be an id of the support.
    return grad_CV.scatter_add_(1, chunk.slot_ids_CS, slot_grad_CS.div_(temperature))


def read_slots(logits_CV: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor, Tensor]:
    """(sampled [C], at the support's and the drawn ids [C, K + M], over all others [C]): log q at temperature 1.

    Consumes the logits.
    """
    ids_CS, is_apart_CS = _apart(targets)
    opened = open_chunk(logits_CV, ids_CS, is_apart_CS, targets.sampled_ids_N.unsqueeze(1))
    return opened.student_extra_CE[:, SAMPLED], opened.student_support_CK, opened.student_tail_C


def _open(logits_CV: Tensor, targets: SparseTargets, mix: LossMix) -> tuple[OpenChunk | None, OpenChunk | None]:
    """(soft, hard): log q at the targets' temperature and at 1, None where the mix needs none, one object where equal.

    Where they differ, the hard one has the memory of `logits_CV` and the soft one its own.
    """
    ids_CS, is_apart_CS = _apart(targets)
    extra_ids_CE = torch.cat([targets.sampled_ids_N.unsqueeze(1), targets.ids_NK[:, :1].long()], dim=1)
    is_soft = [isinstance(term, Divergence) for term in mix.terms if not term.needs_hidden]
    # all() of nothing is true: exact losses alone open the logits only for the focal factor.
    needs_soft, needs_hard = any(is_soft), not all(is_soft) or mix.focal_gamma is not None
    if not needs_soft and not needs_hard:
        return None, None
    if needs_soft and (targets.temperature == 1.0 or not needs_hard):
        scaled_CV = logits_CV if targets.temperature == 1.0 else logits_CV.div_(targets.temperature)
        soft = open_chunk(scaled_CV, ids_CS, is_apart_CS, extra_ids_CE)
        return soft, soft if needs_hard else None
    at_tau = open_chunk(logits_CV / targets.temperature, ids_CS, is_apart_CS, extra_ids_CE) if needs_soft else None
    # Cross-entropies compare no buckets: no id needs to be apart from the tail.
    return at_tau, open_chunk(logits_CV, ids_CS[:, :0], is_apart_CS[:, :0], extra_ids_CE)


def _exact(logits_CV: Tensor, targets: SparseTargets, mix: LossMix, *, with_gradient: bool) -> ExactValues | None:
    terms = tuple(term for term in mix.terms if isinstance(term, Divergence) and term.needs_hidden)
    if not terms:
        return None
    assert targets.whole is not None
    with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        return exact_values(logits_CV, targets.whole, terms, with_gradient=with_gradient)


def _apart(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """(int64 ids, bool) [C, K + M]: the support's ids, then the drawn ones, and whether each is apart from the tail."""
    ids_CK, is_support_CK, draws = targets.ids_NK.long(), in_support(targets), targets.draws
    if draws is None:
        return ids_CK, is_support_CK
    return torch.cat([ids_CK, draws.ids_NM.long()], 1), torch.cat([is_support_CK, distinct_draws(targets, draws)], 1)


def _compare(targets: SparseTargets, soft: OpenChunk) -> Compared:
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
    start_CB, start_CF = _start_buckets(targets, is_bucket_CF, has_tail_C1, dtype)
    if targets.draws is None:
        return Compared(targets.temperature, teacher_CB, student_CB, None, start_CB)
    weights_CM, teacher_CM = draws_at_temperature(targets, targets.draws, dtype)
    split_CF = split_tail(teacher_CB, torch.where(is_drawn_CM, teacher_CM, NO_MASS))
    draws = Drawn(
        weights_NM=weights_CM,
        teacher_NM=teacher_CM,
        student_NM=soft.student_support_CK[:, num_support:],
        teacher_NF=torch.where(is_bucket_CF, split_CF, NO_MASS),
        student_NF=student_CF,
        start_NF=start_CF,
    )
    return Compared(targets.temperature, teacher_CB, student_CB, draws, start_CB)


def _start_buckets(
    targets: SparseTargets, is_bucket_CF: Tensor, has_tail_C1: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The student's start in the buckets [C, B] and [C, F] of the student."""
    start = targets.start
    if start is None:
        return None, None
    drawn = [] if start.draws_NM is None else [start.draws_NM]
    start_CF = torch.cat([start.support_NK, *drawn, start.rest_N.unsqueeze(1)], dim=1).to(dtype)
    start_CF = torch.where(is_bucket_CF, start_CF, NO_MASS)
    num_support = targets.num_support
    tail_C1 = torch.where(has_tail_C1, start_CF[:, num_support:].logsumexp(dim=1, keepdim=True), NO_MASS)
    return torch.cat([start_CF[:, :num_support], tail_C1], dim=1), start_CF


def _token_weights(targets: SparseTargets, mix: LossMix, seen: Seen, values_CJ: Tensor) -> Tensor:
    """The targets' weights [C] (1 by default) times the focal factor (1 - q(sampled))^gamma, without gradient."""
    weights_C = (
        values_CJ.new_ones(values_CJ.shape[0]) if targets.weights_N is None else targets.weights_N.to(values_CJ.dtype)
    )
    if mix.focal_gamma is None:
        return weights_C
    assert seen.sampled_N is not None
    # 1 - q without cancellation where the student is nearly certain.
    missed_C = -torch.expm1(seen.sampled_N.detach())
    # Rounding can put log q above 0, and a broken power of a negative number is nan.
    return weights_C * missed_C.clamp(min=0.0) ** mix.focal_gamma


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
