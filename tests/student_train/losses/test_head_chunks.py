"""What the fused pass over the head computes and allocates, and in which precision.

N loss tokens, H hidden, V vocabulary, K support
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from student_train.losses.divergences import CrossEntropy
from student_train.losses.fused_head import fused_loss
from student_train.losses.head_chunks import HeadChunks, HeadInputs
from student_train.losses.metrics import TokenMetrics, metrics_tensor
from student_train.losses.mix import DEFAULT_MIX, LossMix
from student_train.losses.targets import SparseTargets, TextChunks
from tests.helpers.dense_losses import H, K, N, head_tensors, sparse, teacher_logprobs


def test_tied_embeddings_add_both_gradients() -> None:
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV)
    _, weight_VH = head_tensors()
    input_ids_N = torch.arange(N) % 5
    fused = fused_loss(torch.tanh(weight_VH[input_ids_N]), weight_VH, targets, LossMix((CrossEntropy(),)))
    logits_NV = torch.tanh(weight_VH[input_ids_N]) @ weight_VH.t()
    dense = torch.nn.functional.cross_entropy(logits_NV, targets.sampled_ids_N, reduction="sum")
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight_VH)[0] for loss in (fused.loss_sum, dense)))


class Allocations(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and which operations ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def count(name: str, recorded: Allocations) -> int:
    return sum(f"aten.{name}." in operation for operation in recorded.names)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_larger_than_a_chunk_or_the_weight_is_allocated(temperature: float) -> None:
    num_tokens, num_vocab, chunk = 96, 512, 8
    hidden_NH = torch.randn(num_tokens, H, requires_grad=True)
    weight_VH = torch.randn(num_vocab, H, requires_grad=True)
    ids_NK = torch.stack([torch.randperm(num_vocab)[:K] for _ in range(num_tokens)])
    logprobs_NK = torch.full((num_tokens, K), math.log(0.9 / K))
    targets = SparseTargets(ids_NK, logprobs_NK, torch.full((num_tokens,), math.log(0.1)), ids_NK[:, 0])
    targets = targets.at_temperature(temperature, torch.full((num_tokens,), 0.7))
    with Allocations() as recorded:
        fused_loss(hidden_NH, weight_VH, targets, DEFAULT_MIX, chunk_tokens=chunk).loss_sum.backward()
    assert recorded.largest == max(chunk * num_vocab, num_vocab * H)
    assert num_tokens * num_vocab > 10 * recorded.largest


@pytest.mark.parametrize(("trains_hidden", "trains_weight"), [(True, False), (False, True), (True, True)])
def test_only_the_gradients_asked_for_are_computed(trains_hidden: bool, trains_weight: bool) -> None:
    dense_NV = teacher_logprobs()
    hidden_NH, weight_VH = head_tensors()
    hidden_NH.requires_grad_(trains_hidden)
    weight_VH.requires_grad_(trains_weight)
    with Allocations() as recorded:
        sums = fused_loss(hidden_NH, weight_VH, sparse(dense_NV), DEFAULT_MIX, chunk_tokens=N)
        sums.loss_sum.backward()
    assert count("mm", recorded) == 1 + trains_hidden + trains_weight
    assert (hidden_NH.grad is not None, weight_VH.grad is not None) == (trains_hidden, trains_weight)


def test_no_gradient_work_under_no_grad() -> None:
    dense_NV = teacher_logprobs()
    hidden_NH, weight_VH = head_tensors()
    with torch.no_grad(), Allocations() as recorded:
        sums = fused_loss(hidden_NH, weight_VH, sparse(dense_NV), DEFAULT_MIX, chunk_tokens=N)
    assert count("mm", recorded) == 1
    assert count("addmm_", recorded) == 0
    assert not sums.loss_sum.requires_grad
    torch.testing.assert_close(
        sums.loss_sum, fused_loss(hidden_NH, weight_VH, sparse(dense_NV), DEFAULT_MIX).loss_sum.detach()
    )


def test_the_weight_gradient_is_handed_over_without_a_copy() -> None:
    hidden_NH, weight_VH = head_tensors()
    loss = fused_loss(hidden_NH, weight_VH, sparse(teacher_logprobs()), DEFAULT_MIX).loss_sum
    assert loss.grad_fn is not None
    kept = loss.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[attr-defined]
    loss.backward()
    assert weight_VH.grad is not None
    assert weight_VH.grad.data_ptr() == kept


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden_NH, weight_VH = head_tensors()
    loss = fused_loss(hidden_NH, weight_VH, sparse(teacher_logprobs()), DEFAULT_MIX).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_checkpointing_around_the_loss() -> None:
    hidden_NH, weight_VH = head_tensors()
    targets = sparse(teacher_logprobs())

    def loss(hidden_NH: Tensor) -> Tensor:
        return fused_loss(torch.tanh(hidden_NH), weight_VH, targets, DEFAULT_MIX, chunk_tokens=N).loss_sum

    plain = torch.autograd.grad(loss(hidden_NH), (hidden_NH, weight_VH))
    with Allocations() as recorded:
        checkpointed = checkpoint(loss, hidden_NH, use_reentrant=False)
        grads = torch.autograd.grad(checkpointed, (hidden_NH, weight_VH))
    torch.testing.assert_close(grads, plain)
    assert count("tanh", recorded) == 2  # once forward, once for the backward: the few inner numbers start no third


def test_a_scaled_loss_scales_its_gradients() -> None:
    hidden_NH, weight_VH = head_tensors()
    targets = sparse(teacher_logprobs())
    one, scaled = (
        torch.autograd.grad(
            factor * fused_loss(hidden_NH, weight_VH, targets, DEFAULT_MIX).loss_sum, (hidden_NH, weight_VH)
        )
        for factor in (1.0, 0.125)
    )
    torch.testing.assert_close(scaled, tuple(0.125 * grad for grad in one))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precisions(dtype: torch.dtype, tolerance: float) -> None:
    """Against float64 on the same rounded inputs; reductions and the accumulated weight gradient are float32."""
    dense_NV = teacher_logprobs()
    targets = sparse(dense_NV, padding=1)
    hidden_NH, weight_VH = (tensor.detach().to(dtype).requires_grad_() for tensor in head_tensors())
    exact_NH, exact_VH = (tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH))
    loss = fused_loss(hidden_NH, weight_VH, targets, DEFAULT_MIX, chunk_tokens=4).loss_sum
    exact_loss = fused_loss(exact_NH, exact_VH, targets, DEFAULT_MIX).loss_sum
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerance)
    grads = torch.autograd.grad(loss, (hidden_NH, weight_VH))
    for low, high in zip(grads, torch.autograd.grad(exact_loss, (exact_NH, exact_VH)), strict=True):
        assert low.dtype == dtype
        assert (low.double() - high).norm() <= tolerance * high.norm()


def test_half_precision_weight_gradients_accumulate_in_float32() -> None:
    # 400 equal contributions of 1/256 to each entry: in bfloat16 a running sum would stop near 1.
    num_tokens = 400
    hidden_NH = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = SparseTargets.text_alone(torch.zeros(num_tokens, dtype=torch.long), torch.full((num_tokens,), 2.0**-7))
    fused_loss(hidden_NH, weight_VH, targets, LossMix((CrossEntropy(),)), chunk_tokens=1).loss_sum.backward()
    assert weight_VH.grad is not None
    assert weight_VH.grad.flatten().tolist() == pytest.approx([-400 / 256, 400 / 256], rel=1e-2)


def test_enclosing_autocast_changes_nothing() -> None:
    targets = sparse(teacher_logprobs())
    hidden_NH, weight_VH = (tensor.detach().float().requires_grad_() for tensor in head_tensors())
    lora_NR, lora_VR = (tensor.detach()[:, :2].clone().requires_grad_() for tensor in (hidden_NH, weight_VH))

    def results() -> tuple[Tensor, ...]:
        loss = fused_loss(
            hidden_NH, weight_VH, targets, DEFAULT_MIX, lora_hidden_NR=lora_NR, lora_weight_VR=lora_VR
        ).loss_sum
        head = HeadInputs(hidden_NH, weight_VH, None, lora_NR, lora_VR)
        metrics = TokenMetrics(*metrics_tensor(head, targets))
        return loss, metrics.entropy_N, *torch.autograd.grad(loss, (hidden_NH, weight_VH, lora_NR, lora_VR))

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [(4, [(0, 3), (3, 5), (5, 10)]), (100, [(0, 10)]), (1, [(0, 3), (3, 5), (5, 10)]), (8, [(0, 5), (5, 10)])],
)
def test_chunks_of_the_head_end_where_no_chunk_of_text_is_cut(chunk: int, expected: list[tuple[int, int]]) -> None:
    head = HeadInputs(torch.zeros(10, 2), torch.zeros(3, 2), chunk_tokens=chunk)
    ids_N = torch.tensor([1, 1, 1, 4, 4, 5, 5, 5, 5, 5])
    assert list(HeadChunks(head, cuts=TextChunks.of(ids_N, torch.zeros(10)).cuts).spans()) == expected


def test_no_tokens_give_zero_losses_and_zero_gradients() -> None:
    # A rank without loss tokens must still take part in the collectives of its backward pass.
    _, weight_VH = head_tensors()
    hidden_0H = torch.empty(0, H, dtype=torch.float64, requires_grad=True)
    empty_0K = torch.empty(0, K)
    targets = SparseTargets(empty_0K.long(), empty_0K, torch.empty(0), torch.empty(0, dtype=torch.long))
    sums = fused_loss(hidden_0H, weight_VH, targets, DEFAULT_MIX)
    sums.loss_sum.backward()
    assert sums.loss_sum.item() == 0.0
    assert weight_VH.grad is not None
    assert not bool(weight_VH.grad.any())
