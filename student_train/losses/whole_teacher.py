"""The teacher's whole distribution, from its last hidden state and head: exact divergences, one slice at a time.

In: hidden states of P of the N loss tokens, the teacher's head, a chunk of the student's logits. Out: nats of each loss
and token, and their gradient. Cost: one product with the teacher's head for each of the P tokens; SLICE_FRAC of a chunk
is in memory several times over, the gradient of the chunk once.

    C tokens of a chunk, P of them with a hidden state, X of a slice, D teacher's width, V student's vocabulary
    W teacher's vocabulary, J exact losses of the mix
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stillroom.schema.records import Int64
from student_train.losses.divergences import Divergence
from student_train.losses.head_chunks import PLAIN, LogitMap

SLICE_FRAC = 8
"""Tokens of a chunk over tokens of a slice: log p, log q and what autograd keeps of them are about eight tensors."""
ABSENT_LOGMASS = -32.0
"""Log mass of ids that the teacher does not have (rows that pad the student's embeddings): 0 would make the reverse KL
infinite."""


@dataclass(frozen=True)
class TeacherHead:
    """Logits are `logit_map` of hidden W^T (+ bias); the map's hidden_scale multiplies the hidden states."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_map: LogitMap = PLAIN

    @torch.no_grad()
    def logits(self, hidden_XD: Tensor, dtype: torch.dtype) -> Tensor:
        """[X, W] in `dtype`; the product runs in the weight's."""
        scaled_XD = hidden_XD * self.logit_map.hidden_scale
        z_XW = torch.mm(scaled_XD.to(self.weight_VD.dtype), self.weight_VD.t()).to(dtype)
        if self.bias_V is not None:
            z_XW.add_(self.bias_V)
        if self.logit_map.cap is None:
            return z_XW.mul_(self.logit_map.scale)
        return z_XW.mul_(self.logit_map.scale / self.logit_map.cap).tanh_().mul_(self.logit_map.cap)


@dataclass(frozen=True)
class WholeTeacher:
    """Hidden states of some of N loss tokens.

    Attributes:
        places: int64, ascending numbers of those tokens; numpy, so that no slice waits for a GPU.
        hidden_PD: after the teacher's final norm.
        temperature: at which both sides are compared; any is exact.
        scale: multiplies values and gradients: the batch's weight over the weight of its tokens with hidden states, so
            that a loss is the mean over the latter.
    """

    places: Int64
    hidden_PD: Tensor
    head: TeacherHead
    temperature: float = 1.0
    scale: float = 1.0

    def narrow(self, start: int, stop: int) -> WholeTeacher:
        """Of tokens start..stop-1, counted from `start`."""
        first, last = np.searchsorted(self.places, [start, stop])
        return replace(self, places=self.places[first:last] - start, hidden_PD=self.hidden_PD[first:last])


@dataclass(frozen=True)
class ExactValues:
    """Nats [C, J], without loss weights and 0 where there is no hidden state; gradient [P, V] at `rows_P`, with loss
    weights and without token weights.
    """

    nats_CJ: Tensor
    rows_P: Tensor
    grad_PV: Tensor | None

    def add_gradient(self, grad_CV: Tensor, weights_C: Tensor) -> None:
        """Adds the gradient of the weighted sum to `grad_CV`."""
        assert self.grad_PV is not None
        self.grad_PV.mul_(weights_C.index_select(0, self.rows_P).unsqueeze(1))
        grad_CV.index_add_(0, self.rows_P, self.grad_PV)


def exact_values(
    logits_CV: Tensor, whole: WholeTeacher, terms: tuple[Divergence, ...], *, with_gradient: bool
) -> ExactValues:
    """Compares a chunk's logits, which stay as they are, with the teacher's, at the temperature of `whole`."""
    rows_P = torch.from_numpy(np.ascontiguousarray(whole.places)).to(logits_CV.device)
    nats_CJ = logits_CV.new_zeros(len(logits_CV), len(terms))
    grad_PV = logits_CV.new_zeros(len(rows_P), logits_CV.shape[1]) if with_gradient else None
    slice_tokens = -(-len(logits_CV) // SLICE_FRAC)
    for first in range(0, len(rows_P), slice_tokens):
        rows_X = rows_P[first : first + slice_tokens]
        log_p_XW = whole.head.logits(whole.hidden_PD[first : first + slice_tokens], logits_CV.dtype)
        log_p_XW = log_p_XW.div_(whole.temperature).log_softmax(dim=1)
        with torch.set_grad_enabled(with_gradient):
            # index_select copies: the leaf must not share memory with the logits, which the sparse losses overwrite
            # next.
            leaf_XV = logits_CV.index_select(0, rows_X).requires_grad_(with_gradient)
            sides = _one_vocabulary(log_p_XW, (leaf_XV / whole.temperature).log_softmax(dim=1))
            # Gradients of soft targets shrink by 1/tau^2 (Hinton et al., arXiv 1503.02531).
            factor = whole.scale * whole.temperature**2
            nats_XJ = torch.stack([factor * term.between(*sides) for term in terms], dim=1)
            if grad_PV is not None:
                # Python numbers as weights, so that no copy waits for a GPU.
                sums = [term.weight * nats_X.sum() for term, nats_X in zip(terms, nats_XJ.unbind(dim=1), strict=True)]
                (grad_PV[first : first + slice_tokens],) = torch.autograd.grad(torch.stack(sums).sum(), leaf_XV)
        nats_CJ.index_copy_(0, rows_X, nats_XJ.detach())
    return ExactValues(nats_CJ, rows_P, grad_PV)


def _one_vocabulary(log_p_XW: Tensor, log_q_XV: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides over the ids that both have and, where one has more, one bucket of those."""
    num_common = min(log_p_XW.shape[1], log_q_XV.shape[1])
    if log_p_XW.shape[1] == log_q_XV.shape[1]:
        return log_p_XW, log_q_XV
    more_X1 = [one[:, num_common:].logsumexp(dim=1, keepdim=True) for one in (log_p_XW, log_q_XV)]
    # logsumexp of no columns is -inf.
    p_XB, q_XB = (
        torch.cat([one[:, :num_common], more.clamp(min=ABSENT_LOGMASS)], dim=1)
        for one, more in zip((log_p_XW, log_q_XV), more_X1, strict=True)
    )
    return p_XB, q_XB
