"""Bounds and identities of the bucket divergences, and what the loss configuration refuses.

N tokens, B buckets (support, then the tail), K = B - 1
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.errors import ConfigError
from student_train.losses.divergences import (
    LOSS_NAMES,
    LossMix,
    LossTerm,
    forward_kl_renormalised,
    forward_kl_tail_bucket,
    forward_kl_truncated,
    jsd_tail_bucket,
    skewed_kl_tail_bucket,
    total_variation_tail_bucket,
    weighted_sum,
)
from student_train.losses.targets import NO_MASS


def two_distributions(seed: int, spread: float, num_buckets: int) -> tuple[Tensor, Tensor]:
    """float64 log probabilities [4, B] of a teacher and a student, further apart the larger the spread."""
    generator = torch.Generator().manual_seed(seed)
    logits_2NB = spread * torch.randn(2, 4, num_buckets, generator=generator, dtype=torch.float64)
    teacher_NB, student_NB = torch.log_softmax(logits_2NB, dim=2)
    return teacher_NB, student_NB


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 40.0), num_buckets=st.integers(2, 9))
def test_bounds(seed: int, spread: float, num_buckets: int) -> None:
    teacher_NB, student_NB = two_distributions(seed, spread, num_buckets)
    slack = 1e-9
    assert bool((forward_kl_tail_bucket(teacher_NB, student_NB) >= -slack).all())
    for beta in (0.1, 0.5, 0.9):
        jsd_N = jsd_tail_bucket(teacher_NB, student_NB, beta)
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert bool(((jsd_N >= -slack) & (jsd_N <= most + slack)).all())
        torch.testing.assert_close(jsd_N, jsd_tail_bucket(student_NB, teacher_NB, 1 - beta))
    for alpha in (0.1, 0.5):
        skewed_N = skewed_kl_tail_bucket(teacher_NB, student_NB, alpha)
        assert bool(((skewed_N >= -slack) & (skewed_N <= -math.log(alpha) + slack)).all())
    variation_N = total_variation_tail_bucket(teacher_NB, student_NB)
    assert bool(((variation_N >= 0) & (variation_N <= 1 + slack)).all())
    # Pinsker's inequality.
    assert bool((variation_N**2 <= forward_kl_tail_bucket(teacher_NB, student_NB) / 2 + slack).all())


def test_jsd_of_distributions_that_share_nothing_is_log_2() -> None:
    teacher_NB = torch.tensor([[0.0, NO_MASS, NO_MASS]])
    student_NB = torch.tensor([[NO_MASS, 0.0, NO_MASS]])
    assert jsd_tail_bucket(teacher_NB, student_NB).item() == pytest.approx(math.log(2))
    assert total_variation_tail_bucket(teacher_NB, student_NB).item() == 1.0


@pytest.mark.parametrize("beta", [1e-4, 1.0 - 1e-4])
def test_jsd_tends_to_kl_at_its_ends(beta: float) -> None:
    teacher_NB, student_NB = two_distributions(0, 1.0, 6)
    kl_N = (
        forward_kl_tail_bucket(teacher_NB, student_NB) if beta < 0.5 else forward_kl_tail_bucket(student_NB, teacher_NB)
    )
    torch.testing.assert_close(
        jsd_tail_bucket(teacher_NB, student_NB, beta) / min(beta, 1 - beta), kl_N, rtol=2e-2, atol=0
    )


def test_equal_distributions_are_at_distance_zero_with_no_gradient() -> None:
    teacher_NB, _ = two_distributions(0, 2.0, 6)
    logits_NB = teacher_NB.clone().requires_grad_()
    student_NB = torch.log_softmax(logits_NB, dim=1)
    total_N = forward_kl_tail_bucket(teacher_NB, student_NB) + forward_kl_tail_bucket(student_NB, teacher_NB)
    total_N = total_N + jsd_tail_bucket(teacher_NB, student_NB) + skewed_kl_tail_bucket(teacher_NB, student_NB)
    torch.testing.assert_close(total_N, torch.zeros_like(total_N), rtol=0, atol=1e-12)
    (grad_NB,) = torch.autograd.grad(total_N.sum(), logits_NB)
    torch.testing.assert_close(grad_NB, torch.zeros_like(grad_NB), rtol=0, atol=1e-12)


def test_only_the_tail_bucket_is_minimal_at_the_teacher() -> None:
    # Support mass 0.6: the truncated and the renormalised loss still push the student's 0.6 towards 1.
    teacher_NB = torch.tensor([[0.4, 0.2, 0.4]], dtype=torch.float64).log()
    for loss, expected in (
        (forward_kl_tail_bucket, 0.0),
        (forward_kl_truncated, 0.6 * 0.4),
        (forward_kl_renormalised, 0.4),
    ):
        logits_NB = teacher_NB.clone().requires_grad_()
        (grad_NB,) = torch.autograd.grad(loss(teacher_NB, torch.log_softmax(logits_NB, dim=1)).sum(), logits_NB)
        assert grad_NB[0, -1].item() == pytest.approx(expected, abs=1e-12)


def test_a_row_without_support_teaches_nothing_when_renormalised() -> None:
    teacher_NB = torch.tensor([[NO_MASS, NO_MASS, 0.0]])
    student_NB = torch.tensor([[NO_MASS, NO_MASS, -0.5]])
    assert forward_kl_renormalised(teacher_NB, student_NB).item() == 0.0
    assert forward_kl_tail_bucket(teacher_NB, student_NB).item() == 0.5


def test_terms_say_what_they_need() -> None:
    needs = {
        name: (term.needs_distribution, term.needs_tail, term.needs_draws, term.uses_draws)
        for name in LOSS_NAMES
        for term in [LossTerm(name)]
    }
    assert needs["forward_kl_tail_bucket"] == (True, True, False, False)
    assert needs["forward_kl_truncated"] == (True, False, False, False)
    assert needs["forward_kl_stored_tail"] == (True, True, False, True)
    assert needs["forward_kl_sampled_tail"] == (True, False, True, True)
    assert needs["jsd_stored_tail"] == (True, True, False, True)
    assert needs["cross_entropy"] == (False, False, False, False)
    assert needs["cross_entropy_argmax"] == (True, False, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "forward_kl"}, "loss 'forward_kl' is unknown: did you mean 'forward_kl_truncated'?"),
        ({"name": "cross_entropy", "weight": -0.1}, "weight=-0.1 must be a finite number of at least 0"),
        ({"name": "cross_entropy", "weight": math.nan}, "weight=nan must be a finite"),
        ({"name": "cross_entropy", "beta": 0.5}, "beta=0.5 has no effect: cross_entropy takes no beta"),
        ({"name": "jsd_stored_tail", "alpha": 0.5}, "alpha=0.5 has no effect: jsd_stored_tail takes no alpha"),
        ({"name": "jsd_stored_tail", "beta": 1.0}, "beta=1.0 must lie strictly between 0 and 1"),
        ({"name": "skewed_reverse_kl_stored_tail", "alpha": 0.0}, "alpha=0.0 must lie strictly"),
    ],
)
def test_terms_refuse(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossTerm(**arguments)  # type: ignore[arg-type]


def test_mixes_refuse() -> None:
    entropy = LossTerm("cross_entropy")
    with pytest.raises(ConfigError, match="no term has a weight above 0"):
        LossMix((LossTerm("cross_entropy", 0.0),))
    with pytest.raises(ConfigError, match="no term has a weight above 0"):
        LossMix(())
    with pytest.raises(ConfigError, match="a name stands twice"):
        LossMix((entropy, entropy))
    with pytest.raises(ConfigError, match=r"focal_gamma=0\.0 must be above 0"):
        LossMix((entropy,), focal_gamma=0.0)


def test_weighted_sum() -> None:
    mix = LossMix((LossTerm("forward_kl_tail_bucket", 0.9), LossTerm("cross_entropy", 0.1)))
    values_NJ = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(weighted_sum(mix, values_NJ), torch.tensor([1.1, 3.1]))
