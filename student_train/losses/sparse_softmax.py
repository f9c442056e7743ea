"""One chunk of logits: log-softmax read at a few slots and over all the rest, and the gradient put in their place.

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
