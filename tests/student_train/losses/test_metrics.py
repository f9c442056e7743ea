"""Per-token metrics against dense float64 formulas. N tokens, H hidden, V vocabulary, K support"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_train.data.pack import empty_pack
from student_train.evaluation import _compared
from student_train.losses.head_chunks import HeadInputs
from student_train.losses.metrics import TokenMetrics, metrics_tensor
from student_train.losses.targets import SparseTargets

N, H, V, K = 11, 6, 29, 4


def inputs() -> tuple[Tensor, Tensor, Tensor, SparseTargets]:
    """float64 hidden, weight, dense teacher log probabilities and their top K; some tokens agree, some do not."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    noise_NV = torch.randn(N, V, generator=generator, dtype=torch.float64)
    dense_NV = torch.log_softmax((hidden_NH @ weight_VH.t()).detach() + 2.0 * noise_NV, dim=1)
    logprobs_NK, ids_NK = dense_NV.topk(K, dim=1)
    tail_N = torch.log1p(-logprobs_NK.exp().sum(dim=1))
    sampled_N = torch.multinomial(dense_NV.exp(), 1, generator=generator).flatten()
    return hidden_NH, weight_VH, dense_NV, SparseTargets(ids_NK, logprobs_NK, tail_N, sampled_N)


def sparse_metrics(
    hidden_NH: Tensor, weight_VH: Tensor, targets: SparseTargets, chunk: int | None = None
) -> TokenMetrics:
    return TokenMetrics(*metrics_tensor(HeadInputs(hidden_NH, weight_VH, chunk_tokens=chunk), targets))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_metrics_agree_with_dense(chunk: int) -> None:
    hidden_NH, weight_VH, dense_NV, targets = inputs()
    # A temperature in the targets does not change what is measured.
    heated = targets.at_temperature(2.0, (dense_NV / 2.0).logsumexp(dim=1))
    metrics = sparse_metrics(hidden_NH, weight_VH, heated, chunk)

    log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.t(), dim=1).detach()
    top_N = log_q_NV.argmax(dim=1)
    p_NB, q_NB = (merged(log_NV.exp(), targets.ids_NK) for log_NV in (dense_NV, log_q_NV))
    middle_NB = (p_NB + q_NB) / 2
    expected = TokenMetrics(
        cross_entropy_N=-log_q_NV.gather(1, targets.sampled_ids_N.unsqueeze(1)).squeeze(1),
        forward_kl_N=kl(p_NB, q_NB),
        reverse_kl_N=kl(q_NB, p_NB),
        jsd_N=(kl(p_NB, middle_NB) + kl(q_NB, middle_NB)) / 2,
        agreement_N=(top_N == dense_NV.argmax(dim=1)).double(),
        confidence_N=log_q_NV.exp().amax(dim=1),
        correct_N=(top_N == targets.sampled_ids_N).double(),
        entropy_N=-(log_q_NV.exp() * log_q_NV).sum(dim=1),
    )
    assert 0 < expected.agreement_N.sum().item() < N
    assert 0 < expected.correct_N.sum().item() < N
    for name, value_N in expected._asdict().items():
        actual_N = metrics._asdict()[name]
        assert actual_N.dtype == torch.float32
        assert not actual_N.requires_grad
        assert actual_N.tolist() == pytest.approx(value_N.tolist(), rel=1e-6, abs=1e-6), name
    assert bool((metrics.jsd_N <= math.log(2)).all())
    assert bool((metrics.forward_kl_N <= (dense_NV.exp() * (dense_NV - log_q_NV)).sum(dim=1) + 1e-6).all())


def test_tokens_without_a_distribution_are_nan_where_one_is_needed() -> None:
    hidden_NH, weight_VH, _, targets = inputs()
    alone = sparse_metrics(hidden_NH, weight_VH, SparseTargets.text_alone(targets.sampled_ids_N))
    logprobs_NK = targets.logprobs_NK.clone()
    logprobs_NK[3] = -torch.inf
    partly = SparseTargets(targets.ids_NK, logprobs_NK, targets.tail_logmass_N, targets.sampled_ids_N)
    mixed = sparse_metrics(hidden_NH, weight_VH, partly)
    known = sparse_metrics(hidden_NH, weight_VH, targets)
    for name in ("cross_entropy_N", "confidence_N", "correct_N", "entropy_N"):
        torch.testing.assert_close(alone._asdict()[name], known._asdict()[name])
        torch.testing.assert_close(mixed._asdict()[name], known._asdict()[name])
    for name in ("forward_kl_N", "reverse_kl_N", "jsd_N", "agreement_N"):
        assert bool(alone._asdict()[name].isnan().all())
        assert mixed._asdict()[name].isnan().nonzero().flatten().tolist() == [3]


def test_an_evaluation_leaves_tokens_without_a_distribution_out() -> None:
    """Of a cut vocabulary, all of whose stored ids were removed; of a projection, inside of a teacher's token."""
    pack = replace(
        empty_pack(with_signals=True), logprobs_NK=np.array([[-1, -np.inf], [-np.inf] * 2, [-1, -2]], np.float32)
    )
    found_N = _compared(pack)
    assert found_N is not None
    assert found_N.tolist() == [True, False, True]
    found_N = _compared(replace(pack, is_common_N=np.array([False, True, True])))
    assert found_N is not None
    assert found_N.tolist() == [False, False, True]
    assert _compared(empty_pack(with_signals=False)) is None


def merged(probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """[N, K+1]: the probabilities of the ids and the sum of all others."""
    others_NV = probs_NV.scatter(1, ids_NK, 0.0)
    return torch.cat([probs_NV.gather(1, ids_NK), others_NV.sum(dim=1, keepdim=True)], dim=1)


def kl(left_NB: Tensor, right_NB: Tensor) -> Tensor:
    return (left_NB * (left_NB / right_NB).log()).sum(dim=1)
