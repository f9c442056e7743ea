"""Bounds and identities of the bucket divergences, and what the loss configuration refuses.

N tokens, B buckets (support, then the tail), K = B - 1
"""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.errors import ConfigError
from student_train.losses.chunk import weighted_sum
from student_train.losses.divergences import (
    JSD,
    NO_MASS,
    Chunked,
    ChunkLikelihood,
    Compared,
    CrossEntropy,
    CrossEntropyArgmax,
    Divergence,
    ForwardKL,
    ReverseKL,
    Seen,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
    kl,
)
from student_train.losses.mix import LossMix
from student_train.losses.names import LOSSES, make_loss


def two_distributions(seed: int, spread: float, num_buckets: int) -> tuple[Tensor, Tensor]:
    """float64 log probabilities [4, B] of a teacher and a student, further apart the larger the spread."""
    generator = torch.Generator().manual_seed(seed)
    logits_2NB = spread * torch.randn(2, 4, num_buckets, generator=generator, dtype=torch.float64)
    teacher_NB, student_NB = torch.log_softmax(logits_2NB, dim=2)
    return teacher_NB, student_NB


# Training tests in the same process flush subnormal numbers, and hypothesis refuses to make any then.
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 40.0, allow_subnormal=False), num_buckets=st.integers(2, 9))
def test_bounds(seed: int, spread: float, num_buckets: int) -> None:
    teacher_NB, student_NB = two_distributions(seed, spread, num_buckets)
    slack = 1e-9
    assert bool((kl(teacher_NB, student_NB) >= -slack).all())
    for beta in (0.1, 0.5, 0.9):
        jsd_N = JSD(beta=beta).between(teacher_NB, student_NB)
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert bool(((jsd_N >= -slack) & (jsd_N <= most + slack)).all())
        torch.testing.assert_close(jsd_N, JSD(beta=1 - beta).between(student_NB, teacher_NB))
    for alpha in (0.1, 0.5):
        skewed_N = SkewedForwardKL(alpha=alpha).between(teacher_NB, student_NB)
        assert bool(((skewed_N >= -slack) & (skewed_N <= -math.log(alpha) + slack)).all())
    variation_N = TotalVariation().between(teacher_NB, student_NB)
    assert bool(((variation_N >= 0) & (variation_N <= 1 + slack)).all())
    # Pinsker's inequality.
    assert bool((variation_N**2 <= kl(teacher_NB, student_NB) / 2 + slack).all())


def test_jsd_of_distributions_that_share_nothing_is_log_2() -> None:
    teacher_NB = torch.tensor([[0.0, NO_MASS, NO_MASS]])
    student_NB = torch.tensor([[NO_MASS, 0.0, NO_MASS]])
    assert JSD().between(teacher_NB, student_NB).item() == pytest.approx(math.log(2))
    assert TotalVariation().between(teacher_NB, student_NB).item() == 1.0


@pytest.mark.parametrize("beta", [1e-4, 1.0 - 1e-4])
def test_jsd_tends_to_kl_at_its_ends(beta: float) -> None:
    teacher_NB, student_NB = two_distributions(0, 1.0, 6)
    kl_N = kl(teacher_NB, student_NB) if beta < 0.5 else kl(student_NB, teacher_NB)
    torch.testing.assert_close(
        JSD(beta=beta).between(teacher_NB, student_NB) / min(beta, 1 - beta), kl_N, rtol=2e-2, atol=0
    )


def test_equal_distributions_are_at_distance_zero_with_no_gradient() -> None:
    teacher_NB, _ = two_distributions(0, 2.0, 6)
    logits_NB = teacher_NB.clone().requires_grad_()
    student_NB = torch.log_softmax(logits_NB, dim=1)
    total_N = kl(teacher_NB, student_NB) + kl(student_NB, teacher_NB)
    total_N = total_N + JSD().between(teacher_NB, student_NB) + SkewedForwardKL().between(teacher_NB, student_NB)
    torch.testing.assert_close(total_N, torch.zeros_like(total_N), rtol=0, atol=1e-12)
    (grad_NB,) = torch.autograd.grad(total_N.sum(), logits_NB)
    torch.testing.assert_close(grad_NB, torch.zeros_like(grad_NB), rtol=0, atol=1e-12)


def test_only_the_tail_bucket_is_minimal_at_the_teacher() -> None:
    # Support mass 0.6: a dropped and a renormalised tail still push the student's 0.6 towards 1.
    teacher_NB = torch.tensor([[0.4, 0.2, 0.4]], dtype=torch.float64).log()
    for loss, expected in (
        (ForwardKL(tail="bucket"), 0.0),
        (ForwardKL(tail="drop"), 0.6 * 0.4),
        (ForwardKL(tail="renormalise"), 0.4),
    ):
        logits_NB = teacher_NB.clone().requires_grad_()
        value_N = nats(loss, teacher_NB, torch.log_softmax(logits_NB, dim=1))
        (grad_NB,) = torch.autograd.grad(value_N.sum(), logits_NB)
        assert grad_NB[0, -1].item() == pytest.approx(expected, abs=1e-12)


def test_a_row_without_support_teaches_nothing_when_renormalised() -> None:
    teacher_NB = torch.tensor([[NO_MASS, NO_MASS, 0.0]])
    student_NB = torch.tensor([[NO_MASS, NO_MASS, -0.5]])
    assert nats(ForwardKL(tail="renormalise"), teacher_NB, student_NB).item() == 0.0
    assert nats(ForwardKL(tail="bucket"), teacher_NB, student_NB).item() == 0.5


def nats(loss: Divergence, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    return loss.nats(Seen(Compared(1.0, teacher_NB, student_NB, None), None, None))


def test_the_reverse_divergences_exchange_the_sides() -> None:
    teacher_NB, student_NB = two_distributions(0, 2.0, 6)
    torch.testing.assert_close(ReverseKL().between(teacher_NB, student_NB), kl(student_NB, teacher_NB))
    forward = SkewedForwardKL(alpha=0.3).between(student_NB, teacher_NB)
    torch.testing.assert_close(SkewedReverseKL(alpha=0.3).between(teacher_NB, student_NB), forward)


def test_a_student_certain_of_its_chunk_still_learns() -> None:
    # log q of a token is 0 in float32 from about 1 - 6e-8 on; 1 - q has no log there.
    sampled_N = torch.zeros(2, requires_grad=True)
    chunks = Chunked(torch.tensor([0, 0]), torch.tensor([-0.5, -0.5]))
    value_N = ChunkLikelihood(temperature=1.0).nats(Seen(None, sampled_N, None, chunks))
    value_N.sum().backward()
    assert sampled_N.grad is not None
    assert torch.isfinite(value_N).all()
    assert (sampled_N.grad > 1.0).all()


def test_chunk_likelihood_is_least_where_both_agree_and_spreads_over_its_tokens() -> None:
    teacher_N = torch.tensor([-1.2, -1.2, 0.0, -0.4], dtype=torch.float64)
    chunks = Chunked(torch.tensor([5, 5, -1, 7]), teacher_N)
    for temperature in (0.5, 1.0, 100.0):
        loss = ChunkLikelihood(temperature=temperature)
        agreeing_N = torch.tensor([-0.9, -0.3, -3.0, -0.4], dtype=torch.float64, requires_grad=True)
        value_N = loss.nats(Seen(None, agreeing_N, None, chunks))
        torch.testing.assert_close(value_N, torch.zeros_like(value_N), atol=1e-9, rtol=0)
        (grad_N,) = torch.autograd.grad(value_N.sum(), agreeing_N)
        torch.testing.assert_close(grad_N, torch.zeros_like(grad_N), atol=1e-9, rtol=0)
        other_N = loss.nats(Seen(None, agreeing_N.detach() - 1.0, None, chunks))
        assert other_N[0] == other_N[1] > 0.0
        assert other_N[2] == 0.0


def test_losses_say_what_they_need() -> None:
    assert {name: kind.name for name, kind in LOSSES.items()} == {name: name for name in LOSSES}
    assert [name for name, kind in LOSSES.items() if not kind().needs_distribution] == [
        "cross_entropy",
        "chunk_likelihood",
        "asymmetric_likelihood",
        "unlikelihood",
        "dpo",
        "hidden_mse",
        "hidden_cosine",
        "hidden_relations",
        "attention_kl",
    ]
    exact = ForwardKL(tail="exact")
    assert (exact.needs_hidden, exact.needs_distribution) == (True, False)
    assert [name for name, kind in LOSSES.items() if kind.needs_chunks] == ["chunk_likelihood"]
    assert LossMix((CrossEntropy(), JSD())).reads_draws
    assert not LossMix((CrossEntropyArgmax(), JSD(tail="bucket"))).reads_draws


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "forward"}, "loss 'forward' is unknown: did you mean 'forward_kl'?"),
        ({"name": "cross_entropy", "weight": -0.1}, "weight=-0.1 must be a finite number of at least 0"),
        ({"name": "cross_entropy", "weight": math.nan}, "weight=nan must be a finite"),
        ({"name": "cross_entropy", "beta": 0.5}, "beta=0.5 has no effect: cross_entropy takes no beta"),
        ({"name": "cross_entropy", "tail": "bucket"}, "tail=bucket has no effect: cross_entropy takes no tail"),
        ({"name": "jsd", "alpha": 0.5}, "alpha=0.5 has no effect: jsd takes no alpha"),
        ({"name": "jsd", "beta": 1.0}, "jsd.beta=1.0 must be strictly between 0 and 1"),
        ({"name": "chunk_likelihood", "temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"name": "skewed_reverse_kl", "alpha": 0.0}, "skewed_reverse_kl.alpha=0.0 must be strictly"),
        ({"name": "policy_gradient", "clip": 1.0}, "policy_gradient.clip=1.0 must be strictly between 0 and 1"),
        ({"name": "policy_gradient", "max_ratio": 1.1}, "policy_gradient.max_ratio=1.1 must be above 1 + clip = 1.2"),
        ({"name": "policy_gradient", "max_advantage": 0.0}, "max_advantage=0.0 must be a finite number above 0"),
        ({"name": "asymmetric_likelihood", "alpha": 1.5}, "alpha=1.5 must be above 0 and at most 1"),
        ({"name": "dpo", "beta": 0.0}, "dpo.beta=0.0 must be a finite number above 0"),
        ({"name": "taid", "interpolation": 1.5}, "taid.interpolation=1.5 must be between 0 and 1"),
        ({"name": "start_kl", "tail": "drop"}, "start_kl.tail=drop has no meaning here: choose stored or bucket"),
    ],
)
def test_losses_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_loss(**arguments)


def test_mixes_refuse() -> None:
    for terms in ((CrossEntropy(0.0),), ()):
        with pytest.raises(ConfigError, match="no loss has a weight above 0"):
            LossMix(terms)
    with pytest.raises(ConfigError, match="a name is repeated"):
        LossMix((ForwardKL(), ForwardKL(tail="bucket")))
    with pytest.raises(ConfigError, match=r"focal_gamma=0\.0 must be above 0"):
        LossMix((CrossEntropy(),), focal_gamma=0.0)


def test_weighted_sum() -> None:
    mix = LossMix((ForwardKL(0.9), CrossEntropy(0.1)))
    values_NJ = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(weighted_sum(mix, values_NJ), torch.tensor([1.1, 3.1]))
