"""Losses on the student's own chains, on wrong chains and with moving targets, against dense float64 autograd.

N loss tokens, V vocabulary, K support
"""

from dataclasses import replace

import pytest
import torch

from stillroom.errors import ConfigError
from student_train.losses.divergences import CrossEntropy, ForwardKL, HeadLoss, ReverseKL, Spoken
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix
from student_train.losses.own_words import DPO, TAID, PolicyGradient, StartKL, Unlikelihood
from student_train.losses.targets import SparseTargets
from tests.helpers.dense_losses import (
    OWN_WORDS,
    K,
    N,
    V,
    head_tensors,
    loss_id,
    sparse,
    teacher_logprobs,
    with_draws,
    with_own_words,
)
from tests.student_train.losses.test_fused_losses import assert_same_as_dense


def targets_of(num_support: int = K, padding: int = 0, num_vocab: int = V, *, has_draws: bool = True) -> SparseTargets:
    dense_NV = teacher_logprobs(num_vocab=num_vocab)
    targets = sparse(dense_NV, num_support, padding)
    return with_own_words(with_draws(targets, dense_NV) if has_draws else targets, dense_NV)


@pytest.mark.parametrize("loss", OWN_WORDS, ids=loss_id)
@pytest.mark.parametrize(
    ("num_support", "padding", "num_vocab"), [(K, 3, V), (1, 0, V), (5, 0, 6)], ids=["padded", "k1", "k=v-1"]
)
@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["flat-student", "sharp-student"])
def test_each_loss_agrees_with_dense_autograd(
    loss: HeadLoss, num_support: int, padding: int, num_vocab: int, scale: float
) -> None:
    targets = targets_of(num_support, padding, num_vocab)
    assert_same_as_dense((loss,), teacher_logprobs(num_vocab=num_vocab), targets, scale=scale)


def test_all_of_them_in_one_pass() -> None:
    losses = {loss.name: loss for loss in reversed(OWN_WORDS)}
    assert_same_as_dense(tuple(losses.values()), teacher_logprobs(), targets_of(padding=2))


def test_other_losses_leave_wrong_chains_alone() -> None:
    targets = targets_of()
    assert targets.is_negative_N is not None
    hidden_NH, weight_VH = head_tensors()
    mix = LossMix((ForwardKL(), CrossEntropy()))
    among = fused_loss(hidden_NH, weight_VH, targets, mix)
    kept_N = (~targets.is_negative_N).double()
    without = fused_loss(hidden_NH, weight_VH, replace(targets, is_negative_N=None, weights_N=kept_N), mix)
    torch.testing.assert_close(among.term_sums_J, without.term_sums_J)
    assert among.weight_sum.item() == N
    # On request the teacher's distributions correct them, while the token that came is still not imitated.
    corrected = fused_loss(hidden_NH, weight_VH, targets, replace(mix, corrects_negatives=True))
    everywhere = fused_loss(hidden_NH, weight_VH, replace(targets, is_negative_N=None), mix)
    torch.testing.assert_close(corrected.term_sums_J, torch.stack([everywhere.term_sums_J[0], among.term_sums_J[1]]))


def test_policy_gradient_at_the_behaviour_is_that_of_the_reverse_kl() -> None:
    """Over all tokens by their probability, one step from the behaviour is the dense reverse KL's gradient."""
    dense_NV = teacher_logprobs()
    hidden_NH, weight_VH = head_tensors()
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1)
    (wanted,) = torch.autograd.grad((log_q_NV.exp() * (log_q_NV - dense_NV)).sum(), weight_VH)
    found = torch.zeros_like(weight_VH)
    for token in range(V):
        ids_N = torch.full((N,), token)
        behaviour_N = log_q_NV[:, token].detach()
        targets = replace(
            sparse(dense_NV),
            sampled_ids_N=ids_N,
            weights_N=behaviour_N.exp(),
            spoken=Spoken(dense_NV[:, token], behaviour_N),
        )
        mix = LossMix((PolicyGradient(max_advantage=1e3),))
        found += torch.autograd.grad(fused_loss(hidden_NH, weight_VH, targets, mix).loss_sum, weight_VH)[0]
        hidden_NH, weight_VH = head_tensors()
    torch.testing.assert_close(found, wanted)


def test_taid_moves_from_the_student_to_the_teacher() -> None:
    targets = targets_of(has_draws=False)
    hidden_NH, weight_VH = head_tensors()
    values = {}
    for interpolation in (0.0, 0.5, 1.0):
        mix = LossMix((TAID(interpolation=interpolation),))
        values[interpolation] = fused_loss(hidden_NH, weight_VH, targets, mix).loss_sum.item()
    forward = fused_loss(hidden_NH, weight_VH, targets, LossMix((ForwardKL(),))).loss_sum.item()
    assert abs(values[0.0]) < 1e-12
    assert 0.0 < values[0.5] < values[1.0]
    assert values[1.0] == pytest.approx(forward)


def test_a_certain_student_still_unlearns_in_float32() -> None:
    targets = replace(targets_of(), sampled_ids_N=torch.zeros(N, dtype=torch.long))
    targets = replace(targets, is_negative_N=torch.ones(N, dtype=torch.bool))
    hidden_NH = torch.ones(N, 1)
    weight_VH = torch.zeros(V, 1)
    weight_VH[0] = 40.0
    weight_VH.requires_grad_()
    sums = fused_loss(hidden_NH, weight_VH, targets, LossMix((Unlikelihood(),)))
    sums.loss_sum.backward()
    assert weight_VH.grad is not None
    assert bool(weight_VH.grad.isfinite().all())
    assert 0.0 < sums.loss_sum.item() < 15.0 * N


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (PolicyGradient(), "policy_gradient needs the behaviour's log probabilities"),
        (DPO(), "dpo needs the log probabilities of the student's start"),
        (StartKL(), "start_kl needs the log probabilities of the student's start"),
    ],
)
def test_losses_refuse_targets_without_what_they_need(loss: HeadLoss, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fused_loss(*head_tensors(), sparse(teacher_logprobs()), LossMix((ReverseKL(), loss)))
