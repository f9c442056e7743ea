"""Targets of every kind: hybrid ones with draws from the tail, text alone, tails stored as zero, and missing parts.

N loss tokens, V vocabulary, M draws
"""

import math
from dataclasses import replace

import pytest
import torch

from stillroom.errors import ConfigError
from student_train.losses.divergences import (
    CrossEntropy,
    CrossEntropyArgmax,
    Divergence,
    ForwardKL,
    HeadLoss,
    ReverseKL,
)
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix
from student_train.losses.targets import SparseTargets, TailDraws
from tests.helpers.dense_losses import (
    DIVERGENCES,
    N,
    V,
    head_tensors,
    loss_id,
    sparse,
    support_mask,
    teacher_logprobs,
    with_draws,
)

ESTIMATED = tuple(loss for loss in DIVERGENCES if loss.tail == "stored" and not isinstance(loss, ReverseKL))


def every_tail_id(targets: SparseTargets, dense_NV: torch.Tensor) -> TailDraws:
    """Each id outside the support once, weighing its own probability; ids of the support as padding."""
    is_outside_NV = ~support_mask(targets.ids_NK, targets.logprobs_NK, V)
    return TailDraws(torch.arange(V).expand(N, V), dense_NV.exp() * is_outside_NV, dense_NV)


@pytest.mark.parametrize("loss", ESTIMATED, ids=loss_id)
def test_draws_estimate_the_dense_divergence_without_bias(loss: Divergence) -> None:
    # Every tail token as one draw that stands for its own probability is the expectation over single draws.
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    hidden_NH, weight_VH = head_tensors()
    mix = LossMix((loss,))
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1)
    dense = loss.between(dense_NV, log_q_NV).sum()
    sums = fused_loss(hidden_NH, weight_VH, replace(targets, draws=every_tail_id(targets, dense_NV)), mix)
    torch.testing.assert_close(sums.loss_sum, dense)
    grads = torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH))
    torch.testing.assert_close(grads, torch.autograd.grad(dense, (hidden_NH, weight_VH), retain_graph=True))

    # And 20,000 real draws land within four standard errors of it (the seed is fixed).
    values = [
        fused_loss(hidden_NH, weight_VH, with_draws(targets, dense_NV, 2500, seed=seed), mix) for seed in range(8)
    ]
    totals = torch.stack([one.loss_sum.detach() for one in values])
    assert abs((totals.mean() - dense).item()) < 4 * (totals.std() / math.sqrt(8)).item()


@pytest.mark.parametrize("loss", [one for one in ESTIMATED if one.name != "forward_kl"], ids=loss_id)
def test_a_student_that_is_wrong_about_a_rare_token_makes_no_estimate_wild(loss: Divergence) -> None:
    """In float32, a drawn id at e^-60 that the student is sure of: by t log t it would cost e^60 times its weight."""
    hidden_NH = torch.eye(1).requires_grad_()
    weight_VH = torch.zeros(8, 1)
    weight_VH[7] = 60.0
    one, far = torch.zeros(1, 1), torch.tensor([[-60.0]])
    draws = TailDraws(torch.tensor([[7]]), torch.full((1, 1), 1e-3), far)
    targets = SparseTargets(
        torch.zeros(1, 1, dtype=torch.int64), one, torch.tensor([math.log(1e-3)]), torch.zeros(1).long(), draws=draws
    )
    sums = fused_loss(hidden_NH, weight_VH.requires_grad_(), targets, LossMix((loss,)))
    sums.loss_sum.backward()
    assert weight_VH.grad is not None
    assert 0.5 < sums.loss_sum.item() < 3.0
    assert bool(weight_VH.grad.isfinite().all())


def test_drawn_ids_bring_the_reverse_kl_nearer_to_the_dense_one() -> None:
    """Finer buckets never lower an f-divergence, and with every id of the tail drawn it is the dense one."""
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    hidden_NH, weight_VH = head_tensors()
    mix = LossMix((ReverseKL(),))

    def value(given: SparseTargets) -> float:
        # Row 0 keeps a single stored entry whatever `sparse` is asked for.
        return fused_loss(hidden_NH[1:], weight_VH, given.narrow(1, N), mix).loss_sum.item()

    values = [value(targets), *(value(with_draws(targets, dense_NV, num_draws)) for num_draws in (1, 4, 16))]
    assert values == sorted(set(values))
    dense = value(sparse(dense_NV, V))
    assert values[-1] < dense
    assert value(replace(targets, draws=every_tail_id(targets, dense_NV))) == pytest.approx(dense)


def test_draws_that_seem_to_hold_more_than_the_tail_stay_finite() -> None:
    """Codes of 8 bits round each log probability: the drawn ids' sum may be above the tail's own."""
    dense_NV = teacher_logprobs()
    targets = with_draws(sparse(dense_NV), dense_NV)
    assert targets.draws is not None
    heavy = replace(targets, draws=replace(targets.draws, logprobs_NM=targets.draws.logprobs_NM + 1.0))
    hidden_NH, weight_VH = head_tensors()
    sums = fused_loss(hidden_NH, weight_VH, heavy, LossMix((ReverseKL(),)))
    exact = fused_loss(hidden_NH, weight_VH, targets, LossMix((ReverseKL(),)))
    # Not the 32 nats that a tail without any mass would cost.
    assert abs((sums.loss_sum - exact.loss_sum).item()) < 3.0 * N


def test_a_draw_of_a_stored_id_adds_no_entry() -> None:
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    ids_N1, logprobs_N1 = targets.ids_NK[:, :1].long(), targets.logprobs_NK[:, :1]
    again = replace(targets, draws=TailDraws(ids_N1, torch.full((N, 1), 0.1), logprobs_N1))
    hidden_NH, weight_VH = head_tensors()
    mix = LossMix((ReverseKL(),))
    expected = fused_loss(hidden_NH, weight_VH, targets, mix)
    torch.testing.assert_close(fused_loss(hidden_NH, weight_VH, again, mix).loss_sum, expected.loss_sum)


def test_stored_tail_of_zero_keeps_reverse_kl_finite() -> None:
    dense_NV = teacher_logprobs()
    targets = replace(sparse(dense_NV), tail_logmass_N=torch.full((N,), -torch.inf))
    hidden_NH, weight_VH = head_tensors()
    sums = fused_loss(hidden_NH, weight_VH, targets, LossMix((ForwardKL(), ReverseKL())))
    sums.loss_sum.backward()
    assert weight_VH.grad is not None
    assert math.isfinite(sums.loss_sum.item())
    assert bool(weight_VH.grad.isfinite().all())


def test_text_alone_is_plain_cross_entropy() -> None:
    hidden_NH, weight_VH = head_tensors()
    ids_N = torch.arange(N)
    sums = fused_loss(hidden_NH, weight_VH, SparseTargets.text_alone(ids_N), LossMix((CrossEntropy(),)))
    dense = torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.t(), ids_N, reduction="sum")
    torch.testing.assert_close(sums.loss_sum, dense)
    torch.testing.assert_close(
        torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH)), torch.autograd.grad(dense, (hidden_NH, weight_VH))
    )


def test_missing_targets_are_refused() -> None:
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    hidden_NH, weight_VH = head_tensors()
    text = SparseTargets.text_alone(targets.sampled_ids_N)
    losses: tuple[HeadLoss, ...] = (ForwardKL(), CrossEntropyArgmax())
    for loss in losses:
        with pytest.raises(ConfigError, match="hold none: use cross_entropy"):
            fused_loss(hidden_NH, weight_VH, text, LossMix((loss,)))
