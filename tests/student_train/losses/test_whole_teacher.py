"""Exact divergences from hidden states and head, against dense ones in float64 over the whole vocabulary."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillroom.errors import ConfigError
from student_train.losses import LossMix, SparseTargets, fused_loss
from student_train.losses.divergences import CrossEntropy, Divergence, ForwardKL
from student_train.losses.head_chunks import PLAIN, LogitMap
from student_train.losses.whole_teacher import TeacherHead, WholeTeacher
from tests.helpers.dense_losses import DIVERGENCES, N, V, head_tensors, per_id, sparse, teacher_logprobs

PLACES = np.array([0, 1, 4, 5, 6, 9, 12])
EXACT = [replace(loss, tail="exact") for loss in {type(one): one for one in DIVERGENCES}.values()]


def teacher(num_vocab: int = V, logit_map: LogitMap = PLAIN) -> tuple[WholeTeacher, torch.Tensor]:
    """Hidden states of 7 of the 13 tokens, and their logits [P, V]."""
    generator = torch.Generator().manual_seed(5)
    hidden_PD = torch.randn(len(PLACES), 11, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(num_vocab, 11, generator=generator, dtype=torch.float64)
    z_PV = logit_map.scale * (logit_map.hidden_scale * hidden_PD) @ weight_VD.t()
    logits_PV = z_PV if logit_map.cap is None else logit_map.cap * torch.tanh(z_PV / logit_map.cap)
    return WholeTeacher(PLACES, hidden_PD, TeacherHead(weight_VD, None, logit_map)), logits_PV


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", EXACT, ids=lambda loss: loss.name)
def test_value_and_gradient_are_the_dense_ones(loss: Divergence, temperature: float) -> None:
    """Beside a cross-entropy and stored entries, in chunks that cut anywhere, at any temperature, as a scaled sum."""
    whole, logits_PV = teacher(logit_map=LogitMap(hidden_scale=0.7, scale=1.5, cap=6.0))
    hidden_NH, weight_VH = head_tensors()
    weights_N = torch.linspace(0.2, 1.4, N, dtype=torch.float64)
    targets = replace(
        sparse(teacher_logprobs()),
        weights_N=weights_N,
        whole=replace(whole, temperature=temperature, scale=1.7),
    )
    # The stored entries stay at temperature 1.
    mix = LossMix((replace(loss, weight=0.6), CrossEntropy(0.3)))
    sums = fused_loss(hidden_NH, weight_VH, targets, mix, chunk_tokens=5)
    sums.loss_sum.backward()
    dense_hidden, dense_weight = (one.detach().clone().requires_grad_() for one in (hidden_NH, weight_VH))
    logits_NV = dense_hidden @ dense_weight.t()
    log_p = (logits_PV / temperature).log_softmax(dim=1)
    values_P = per_id(loss, log_p, (logits_NV[PLACES] / temperature).log_softmax(dim=1)).sum(dim=1) * temperature**2
    ce_N = torch.nn.functional.cross_entropy(logits_NV, targets.sampled_ids_N, reduction="none")
    expected = (weights_N[PLACES] * 1.7 * values_P).sum()
    (0.6 * expected + 0.3 * (weights_N * ce_N).sum()).backward()
    assert float(sums.term_sums_J[0]) == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(hidden_NH.grad, dense_hidden.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(weight_VH.grad, dense_weight.grad, rtol=1e-8, atol=1e-10)


def test_alone_and_with_focal_weights() -> None:
    """Without any other loss nothing of the stored entries is read; text alone is enough."""
    whole, logits_PV = teacher()
    hidden_NH, weight_VH = head_tensors()
    sampled_N = torch.arange(N)
    targets = replace(SparseTargets.text_alone(sampled_N), whole=whole)
    grads = []
    for gamma in (None, 2.0):
        fused_loss(hidden_NH, weight_VH, targets, LossMix((ForwardKL(tail="exact"),), gamma)).loss_sum.backward()
        grads.append((hidden_NH.grad, weight_VH.grad))
        hidden_NH.grad = weight_VH.grad = None
    logits_NV = hidden_NH @ weight_VH.t()
    values_P = (logits_PV.softmax(1) * (logits_PV.log_softmax(1) - logits_NV[PLACES].log_softmax(1))).sum(1)
    q_P = logits_NV.softmax(1)[PLACES, PLACES].detach()
    for weights_P, found in zip((torch.ones_like(q_P), (1 - q_P) ** 2), grads, strict=True):
        expected = torch.autograd.grad((weights_P * values_P).sum(), (hidden_NH, weight_VH), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_student_with_padded_vocabulary_and_empty_targets() -> None:
    """Ids that the teacher does not have are one bucket of nearly no mass, so that the reverse KL is finite."""
    whole, logits_PV = teacher(num_vocab=V - 4)
    hidden_NH, weight_VH = head_tensors()
    for loss in EXACT:
        targets = replace(SparseTargets.text_alone(torch.arange(N)), whole=whole)
        sums = fused_loss(hidden_NH, weight_VH, targets, LossMix((loss,)))
        log_q = (hidden_NH @ weight_VH.t())[PLACES].log_softmax(dim=1)
        log_q = torch.cat([log_q[:, : V - 4], log_q[:, V - 4 :].logsumexp(1, keepdim=True)], dim=1)
        log_p = torch.cat([logits_PV.log_softmax(1), torch.full((len(PLACES), 1), -32.0)], dim=1)
        expected = per_id(loss, log_p, log_q).sum().detach()
        assert float(sums.loss_sum.detach()) == pytest.approx(float(expected), rel=1e-6)
        empty = replace(targets, whole=replace(whole, places=PLACES[:0], hidden_PD=whole.hidden_PD[:0]))
        nothing = fused_loss(hidden_NH, weight_VH, empty, LossMix((loss,)))
        assert float(nothing.loss_sum.detach()) == 0.0
        assert torch.autograd.grad(nothing.loss_sum, hidden_NH)[0].abs().max() == 0.0
    with pytest.raises(ConfigError, match="tail: exact needs the teacher's hidden states"):
        fused_loss(hidden_NH, weight_VH, replace(targets, whole=None), LossMix((EXACT[0],)))
