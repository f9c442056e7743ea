"""Every loss, value and gradient, against dense float64 autograd over the whole vocabulary.

N loss tokens, H hidden, V vocabulary, K support, R LoRA rank
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_train.losses.divergences import CrossEntropy, ForwardKL, HeadLoss, ReverseKL
from student_train.losses.fused_head import fused_loss
from student_train.losses.head_chunks import PLAIN, LogitMap
from student_train.losses.mix import DEFAULT_MIX, LossMix
from student_train.losses.targets import SparseTargets
from tests.helpers.dense_losses import (
    EVERY_LOSS,
    ONE_OF_EACH,
    H,
    K,
    N,
    V,
    dense_loss,
    head_tensors,
    loss_id,
    sparse,
    teacher_logprobs,
    with_draws,
)


def assert_same_as_dense(
    losses: tuple[HeadLoss, ...],
    dense_NV: Tensor,
    targets: SparseTargets,
    *,
    scale: float = 1.0,
    chunk: int = 4,
    logit_map: LogitMap = PLAIN,
) -> None:
    """Value, every term and both gradients of a mix agree with dense float64 autograd."""
    mix = LossMix(tuple(replace(loss, weight=0.5 + index) for index, loss in enumerate(losses)))
    hidden_NH, weight_VH = head_tensors(num_vocab=dense_NV.shape[1], scale=scale)
    weights_N = torch.ones(N) if targets.weights_N is None else targets.weights_N
    logits_NV = logit_map.scale * (hidden_NH @ weight_VH.t())
    if logit_map.cap is not None:
        logits_NV = logit_map.cap * torch.tanh(logits_NV / logit_map.cap)
    expected_J = torch.stack([(weights_N * dense_loss(loss, logits_NV, dense_NV, targets)).sum() for loss in losses])
    total = torch.stack([(0.5 + index) * value for index, value in enumerate(expected_J)]).sum()
    expected_grads = torch.autograd.grad(total, (hidden_NH, weight_VH))

    sums = fused_loss(hidden_NH, weight_VH, targets, mix, chunk_tokens=chunk, logit_map=logit_map)
    grads = torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH))
    torch.testing.assert_close(sums.loss_sum, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.term_sums_J, expected_J, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(sums.weight_sum, weights_N.double().sum())


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)
@pytest.mark.parametrize("padding", [0, 3])
def test_each_loss_agrees_with_dense_autograd(loss: HeadLoss, padding: int) -> None:
    dense_NV = teacher_logprobs()
    assert_same_as_dense((loss,), dense_NV, with_draws(sparse(dense_NV, padding=padding), dense_NV))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)
@pytest.mark.parametrize(
    ("num_support", "num_vocab"), [(1, V), (5, 6), (6, 7), (30, V)], ids=["k1", "k=v-1", "v-just-over-k", "k-large"]
)
def test_supports_of_every_width(loss: HeadLoss, num_support: int, num_vocab: int) -> None:
    dense_NV = teacher_logprobs(num_vocab=num_vocab)
    assert_same_as_dense((loss,), dense_NV, with_draws(sparse(dense_NV, num_support), dense_NV))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)
def test_last_id_is_in_the_support_and_sampled(loss: HeadLoss) -> None:
    dense_NV = teacher_logprobs()
    dense_NV[:, -1] = 3.0
    dense_NV = torch.log_softmax(dense_NV, dim=1)
    targets = replace(sparse(dense_NV), sampled_ids_N=torch.full((N,), V - 1))
    assert bool((targets.ids_NK == V - 1).any(dim=1).all())
    assert_same_as_dense((loss,), dense_NV, with_draws(targets, dense_NV))


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=loss_id)
@pytest.mark.parametrize("sharpness", [0.0, 12.0], ids=["tail-near-1", "tail-near-0"])
@pytest.mark.parametrize("scale", [0.01, 4.0], ids=["flat-student", "sharp-student"])
def test_extreme_tails(loss: HeadLoss, sharpness: float, scale: float) -> None:
    dense_NV = teacher_logprobs(sharpness=sharpness)
    targets = sparse(dense_NV, 1 if sharpness == 0.0 else K)
    assert_same_as_dense((loss,), dense_NV, with_draws(targets, dense_NV), scale=scale)


def test_all_losses_in_one_pass_with_token_weights() -> None:
    dense_NV = teacher_logprobs()
    targets = with_draws(sparse(dense_NV, padding=2), dense_NV)
    assert_same_as_dense(ONE_OF_EACH, dense_NV, replace(targets, weights_N=torch.linspace(0.0, 2.0, N)))


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("losses", [*((loss,) for loss in EVERY_LOSS), ONE_OF_EACH])
def test_temperature_with_the_exact_log_partition(losses: tuple[HeadLoss, ...], temperature: float) -> None:
    dense_NV = teacher_logprobs()
    log_partition_N = (dense_NV / temperature).logsumexp(dim=1)
    targets = with_draws(sparse(dense_NV, padding=1), dense_NV).at_temperature(temperature, log_partition_N)
    assert_same_as_dense(losses, dense_NV, targets)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("logit_map", [LogitMap(scale=0.3), LogitMap(cap=3.0), LogitMap(scale=1.7, cap=2.0)], ids=str)
@pytest.mark.parametrize("losses", [*((loss,) for loss in EVERY_LOSS), ONE_OF_EACH])
def test_scaled_and_capped_logits(losses: tuple[HeadLoss, ...], logit_map: LogitMap, temperature: float) -> None:
    dense_NV = teacher_logprobs()
    log_partition_N = (dense_NV / temperature).logsumexp(dim=1)
    targets = with_draws(sparse(dense_NV, padding=1), dense_NV).at_temperature(temperature, log_partition_N)
    assert_same_as_dense(losses, dense_NV, targets, logit_map=logit_map, scale=2.0)


def test_temperature_squared_reaches_the_gradient() -> None:
    # At large tau the gradient of tau^2 KL tends to a constant; without tau^2 it would fall a hundredfold here.
    dense_NV = teacher_logprobs()
    norms = []
    for temperature in (10.0, 100.0):
        hidden_NH, weight_VH = head_tensors()
        targets = sparse(dense_NV, V).at_temperature(temperature, (dense_NV / temperature).logsumexp(dim=1))
        mix = LossMix((ForwardKL(),))
        fused_loss(hidden_NH, weight_VH, targets, mix).loss_sum.backward()
        assert hidden_NH.grad is not None
        norms.append(hidden_NH.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


def test_whole_vocabulary_equals_dense_kl() -> None:
    dense_NV = teacher_logprobs()
    logprobs_NV, ids_NV = dense_NV.sort(dim=1, descending=True)
    targets = SparseTargets(ids_NV, logprobs_NV, torch.full((N,), -torch.inf), ids_NV[:, 0])
    hidden_NH, weight_VH = head_tensors()
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1)
    mix = LossMix((ForwardKL(), ReverseKL()))
    sums = fused_loss(hidden_NH, weight_VH, targets, mix)
    forward = (dense_NV.exp() * (dense_NV - log_q_NV)).sum()
    reverse = (log_q_NV.exp() * (log_q_NV - dense_NV)).sum()
    torch.testing.assert_close(sums.term_sums_J, torch.stack([forward, reverse]).detach())
    grads = torch.autograd.grad(sums.loss_sum, (hidden_NH, weight_VH))
    torch.testing.assert_close(grads, torch.autograd.grad(forward + reverse, (hidden_NH, weight_VH)))


@pytest.mark.parametrize("num_support", [1, 3, 9, 27, V])
def test_tail_bucket_is_at_most_dense(num_support: int) -> None:
    dense_NV = teacher_logprobs()
    hidden_NH, weight_VH = head_tensors()
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1)
    sums = fused_loss(hidden_NH, weight_VH, sparse(dense_NV, num_support), LossMix((ForwardKL(),)))
    assert 0.0 < sums.loss_sum.item() <= (dense_NV.exp() * (dense_NV - log_q_NV)).sum().item() + 1e-12


def test_gradients_agree_with_central_differences() -> None:
    """Along random directions of every input, bias and LoRA pair included (`gradcheck` would run backward twice)."""
    dense_NV = teacher_logprobs()
    targets = with_draws(sparse(dense_NV, padding=1), dense_NV).at_temperature(2.0, (dense_NV / 2).logsumexp(dim=1))
    generator = torch.Generator().manual_seed(2)
    extras = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((V,), (N, 3), (V, 3))]
    inputs = (*head_tensors(), *(extra.requires_grad_() for extra in extras))
    mix = LossMix(ONE_OF_EACH)

    def loss(tensors: tuple[Tensor, ...]) -> Tensor:
        hidden_NH, weight_VH, bias_V, lora_NR, lora_VR = tensors
        return fused_loss(
            hidden_NH, weight_VH, targets, mix, bias_V=bias_V, lora_hidden_NR=lora_NR, lora_weight_VR=lora_VR
        ).loss_sum

    grads = torch.autograd.grad(loss(inputs), inputs)
    step = 1e-6
    with torch.no_grad():
        for index, (tensor, grad) in enumerate(zip(inputs, grads, strict=True)):
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            ahead, behind = (
                loss((*inputs[:index], tensor + sign * step * direction, *inputs[index + 1 :])) for sign in (1, -1)
            )
            torch.testing.assert_close((ahead - behind) / (2 * step), (grad * direction).sum(), rtol=1e-6, atol=1e-6)


def test_lora_on_the_head_equals_the_merged_weight() -> None:
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    hidden_NH, weight_VH = head_tensors()
    generator = torch.Generator().manual_seed(9)
    a_RH = torch.randn(3, H, generator=generator, dtype=torch.float64, requires_grad=True)
    b_VR = torch.randn(V, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    frozen_VH = weight_VH.detach()
    merged = fused_loss(hidden_NH, frozen_VH + 2.0 * b_VR @ a_RH, targets, DEFAULT_MIX)
    lora = fused_loss(
        hidden_NH, frozen_VH, targets, DEFAULT_MIX, lora_hidden_NR=2.0 * hidden_NH @ a_RH.t(), lora_weight_VR=b_VR
    )
    torch.testing.assert_close(lora.loss_sum, merged.loss_sum)
    inputs = (hidden_NH, a_RH, b_VR)
    torch.testing.assert_close(torch.autograd.grad(lora.loss_sum, inputs), torch.autograd.grad(merged.loss_sum, inputs))


@pytest.mark.parametrize("chunk", [1, 3, N, 1000])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    dense_NV = teacher_logprobs()
    assert_same_as_dense((ForwardKL(), CrossEntropy()), dense_NV, sparse(dense_NV), chunk=chunk)


def test_focal_factor_weighs_by_what_the_student_misses() -> None:
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV).at_temperature(2.0, (dense_NV / 2).logsumexp(dim=1))
    hidden_NH, weight_VH = head_tensors()
    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1).detach()
    missed_N = 1.0 - log_q_NV.gather(1, targets.sampled_ids_N.unsqueeze(1)).squeeze(1).exp()
    terms = (ForwardKL(),)
    focal = fused_loss(hidden_NH, weight_VH, targets, LossMix(terms, focal_gamma=2.0))
    by_hand = fused_loss(hidden_NH, weight_VH, replace(targets, weights_N=missed_N**2), LossMix(terms))
    torch.testing.assert_close((focal.loss_sum, focal.weight_sum), (by_hand.loss_sum, by_hand.weight_sum))
    torch.testing.assert_close(*(torch.autograd.grad(sums.loss_sum, weight_VH)[0] for sums in (focal, by_hand)))


def test_a_tail_far_below_float32_resolution_keeps_its_gradient() -> None:
    # Teacher and student both leave e^-20 outside the support; 1 - sum would be 0 or negative in float32.
    logits_NV = torch.zeros(1, V)
    logits_NV[:, :2] = 24.0
    hidden_NH = torch.eye(1).requires_grad_()
    targets = SparseTargets(
        torch.tensor([[0, 1]]), torch.full((1, 2), math.log(0.5)), torch.tensor([-20.0]), torch.tensor([0])
    )
    weight_VH = logits_NV.t().clone().requires_grad_()
    fused_loss(hidden_NH, weight_VH, targets, LossMix((ReverseKL(),))).loss_sum.backward()
    log_q_tail = math.log(V - 2) - math.log(2) - 24.0
    expected_each = math.exp(log_q_tail) * (log_q_tail + 20.0 - 0.0) / (V - 2)
    assert weight_VH.grad is not None
    assert weight_VH.grad[2:].flatten().tolist() == pytest.approx([expected_each] * (V - 2), rel=1e-3)
