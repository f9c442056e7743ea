"""Targets of every kind: hybrid ones with draws from the tail, text alone, tails stored as zero, and missing parts.

N loss tokens, V vocabulary, M draws
"""

import math
from dataclasses import replace

import pytest
import torch

from shared.errors import ConfigError
from student_train.losses.divergences import LOSS_NAMES, LossMix, LossName, LossTerm
from student_train.losses.fused import fused_loss
from student_train.losses.targets import SparseTargets, TailDraws
from tests.dense_losses import N, V, head_tensors, sparse, support_mask, teacher_logprobs, with_draws

BUCKET_NAMES = tuple(name for name in LOSS_NAMES if name.endswith("_tail_bucket"))


def test_draws_estimate_the_dense_kl_without_bias() -> None:
    # Every tail token as one draw that stands for its own probability is the expectation over single draws.
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    is_outside_NV = ~support_mask(targets.ids_NK, targets.logprobs_NK, V)
    ids_NV = torch.arange(V).expand(N, V)
    expectation = TailDraws(ids_NV, dense_NV.exp() * is_outside_NV, dense_NV)
    hidden_NH, weight_VH = head_tensors()
    mix = LossMix((LossTerm("forward_kl_sampled_tail"),))
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1)
    dense = (dense_NV.exp() * (dense_NV - log_q_NV)).sum()
    sums = fused_loss(hidden_NH, weight_VH, replace(targets, draws=expectation), mix)
    torch.testing.assert_close(sums.loss_sum, dense)
    grads = torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH))
    torch.testing.assert_close(grads, torch.autograd.grad(dense, (hidden_NH, weight_VH), retain_graph=True))

    # And 20,000 real draws land within four standard errors of it (the seed is fixed).
    many = with_draws(targets, dense_NV, 20_000)
    assert many.draws is not None
    in_tail_NM = (dense_NV - log_q_NV).detach().gather(1, many.draws.ids_NM) * many.draws.weights_NM * 20_000
    error = (in_tail_NM.std(dim=1) / math.sqrt(20_000)).norm()
    assert abs((fused_loss(hidden_NH, weight_VH, many, mix).loss_sum - dense).item()) < 4 * error.item()


def test_draws_without_logprobs_differ_by_a_constant() -> None:
    dense_NV = teacher_logprobs()
    known, unknown = (with_draws(sparse(dense_NV), dense_NV, logprobs=flag) for flag in (True, False))
    mix = LossMix((LossTerm("forward_kl_sampled_tail"),))
    gaps, grads = [], []
    for seed in (0, 5):
        hidden_NH, weight_VH = head_tensors(seed)
        losses = [fused_loss(hidden_NH, weight_VH, targets, mix).loss_sum for targets in (known, unknown)]
        gaps.append((losses[1] - losses[0]).item())
        grads.append([torch.autograd.grad(loss, weight_VH)[0] for loss in losses])
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9)
    assert gaps[0] > 0.1
    torch.testing.assert_close(grads[0][0], grads[0][1])


def test_stored_tail_of_zero_keeps_reverse_kl_finite() -> None:
    dense_NV = teacher_logprobs()
    targets = replace(sparse(dense_NV), tail_logmass_N=torch.full((N,), -torch.inf))
    hidden_NH, weight_VH = head_tensors()
    sums = fused_loss(hidden_NH, weight_VH, targets, LossMix(tuple(LossTerm(name) for name in BUCKET_NAMES)))
    sums.loss_sum.backward()
    assert weight_VH.grad is not None
    assert math.isfinite(sums.loss_sum.item())
    assert bool(weight_VH.grad.isfinite().all())


def test_text_alone_is_plain_cross_entropy() -> None:
    hidden_NH, weight_VH = head_tensors()
    ids_N = torch.arange(N)
    sums = fused_loss(hidden_NH, weight_VH, SparseTargets.text_alone(ids_N), LossMix((LossTerm("cross_entropy"),)))
    dense = torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.t(), ids_N, reduction="sum")
    torch.testing.assert_close(sums.loss_sum, dense)
    torch.testing.assert_close(
        torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH)), torch.autograd.grad(dense, (hidden_NH, weight_VH))
    )


def test_missing_targets_are_refused() -> None:
    dense_NV = teacher_logprobs()
    targets = replace(sparse(dense_NV), reference_ids_N=None)
    hidden_NH, weight_VH = head_tensors()
    text = SparseTargets.text_alone(targets.sampled_ids_N)
    unknown = with_draws(targets, dense_NV, logprobs=False).at_temperature(2.0, torch.zeros(N))
    cases: list[tuple[LossName, SparseTargets, str]] = [
        ("forward_kl_tail_bucket", text, "hold none: use cross_entropy"),
        ("cross_entropy_argmax", text, "hold none: use cross_entropy"),
        ("forward_kl_sampled_tail", targets, "does not hold: use forward_kl_stored_tail"),
        ("forward_kl_sampled_tail", unknown, "use temperature 1"),
        ("cross_entropy_reference", targets, "needs a reference text"),
    ]
    for name, given, message in cases:
        with pytest.raises(ConfigError, match=message):
            fused_loss(hidden_NH, weight_VH, given, LossMix((LossTerm(name),)))
