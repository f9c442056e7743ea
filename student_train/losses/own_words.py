"""Losses on what the student wrote itself, on wrong chains, and on targets that move with the student.

    policy_gradient         the student's chains, scored by the teacher: more of what the teacher finds likelier
    asymmetric_likelihood   likelihood of right chains up, of wrong ones down, the latter by less
    unlikelihood            likelihood of wrong chains down, bounded
    dpo                     right chains preferred to wrong ones of the same prompt
    taid                    a target between student and teacher that moves to the teacher
    start_kl                a rein: not far from the student that the stage started from

Log probabilities are of the tokens that came. Those of teacher, behaviour and start are constants: q alone learns.

    N loss tokens, B buckets of a distribution
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillroom.errors import ConfigError
from student_train.losses.divergences import MIN_SURPRISAL, Compared, Divergence, HeadLoss, Seen, kl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PolicyGradient(HeadLoss):
    """Reverse KL as a policy gradient on sampled tokens (on-policy distillation; offline: arXiv 2604.13010).

        advantage A = log p - log b,  ratio r = q / b,  loss -min(r A, clip(r, 1 - clip, 1 + clip) A)

    p is the teacher, b the behaviour: the student when it wrote the chain, so that the expectation of A is -KL(b | p).
    The ratio is clipped on both sides as in PPO (arXiv 1707.06347): A was measured at b, so once a token has moved by
    `clip` in the direction that A asks for, it has no gradient; moving back always has. Where the student has come to
    favour a token that the teacher finds unlikely, r has no bound: above `max_ratio` it grows linearly in log q
    instead, which bounds the gradient (truncated importance sampling). A itself is limited to +-max_advantage, or one
    token with p = 1e-30 would be the whole batch.

    Tokens without a behaviour (chains of the teacher in the same batch) have none of this loss.

    Attributes:
        clip: in (0, 1).
        max_ratio: above 1 + clip.
        max_advantage: nats, above 0.
    """

    clip: float = 0.2
    max_ratio: float = 3.0
    max_advantage: float = 10.0
    name = "policy_gradient"
    needs_behaviour = True
    imitates_token = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.clip < 1.0:
            raise ConfigError(f"{self.name}.clip={self.clip} must be strictly between 0 and 1")
        if not (math.isfinite(self.max_ratio) and self.max_ratio > 1.0 + self.clip):
            raise ConfigError(f"{self.name}.max_ratio={self.max_ratio} must be above 1 + clip = {1.0 + self.clip:g}")
        if not (math.isfinite(self.max_advantage) and self.max_advantage > 0.0):
            raise ConfigError(f"{self.name}.max_advantage={self.max_advantage} must be a finite number above 0")

    def nats(self, seen: Seen) -> Tensor:
        teacher_N, behaviour_N = seen.spoken.teacher_N, seen.spoken.behaviour_N
        assert seen.sampled_N is not None
        assert teacher_N is not None
        assert behaviour_N is not None
        # Before any arithmetic: nan that where() leaves out afterwards would still make the gradient nan.
        is_own_N = behaviour_N.isfinite()
        teacher_N, behaviour_N = (one.to(seen.sampled_N.dtype).where(is_own_N, 0.0) for one in (teacher_N, behaviour_N))
        advantage_N = (teacher_N - behaviour_N).clamp(-self.max_advantage, self.max_advantage)
        log_ratio_N = (seen.sampled_N - behaviour_N).where(is_own_N, 0.0)
        # Below the limit exp(x); above it its tangent, whose slope stays max_ratio.
        beyond_N = (log_ratio_N - math.log(self.max_ratio)).clamp(min=0.0)
        ratio_N = (log_ratio_N - beyond_N).exp() + self.max_ratio * beyond_N
        clipped_N = ratio_N.clamp(1.0 - self.clip, 1.0 + self.clip)
        # The minimum is the lower of two estimates: a step never gains by leaving the clipped range.
        return -(ratio_N * advantage_N).minimum(clipped_N * advantage_N).where(is_own_N, 0.0)


@dataclass(frozen=True)
class AsymmetricLikelihood(HeadLoss):
    """-log q of the tokens of right chains, +alpha log q of those of wrong ones (REDI, arXiv 2505.24850).

    Has no lower bound: with alpha near 1 the likelihood of right chains falls too. Lower alpha, or choose unlikelihood.

    Attributes:
        alpha: weight of a wrong token relative to a right one, in (0, 1].
    """

    alpha: float = 0.8
    name = "asymmetric_likelihood"
    needs_distribution = False
    needs_negatives = True
    applies_to = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"{self.name}.alpha={self.alpha} must be above 0 and at most 1")

    def nats(self, seen: Seen) -> Tensor:
        assert seen.sampled_N is not None
        if seen.is_negative_N is None:
            return -seen.sampled_N
        return (self.alpha * seen.sampled_N).where(seen.is_negative_N, -seen.sampled_N)


@dataclass(frozen=True)
class Unlikelihood(HeadLoss):
    """-log(1 - q) of the tokens of wrong chains (arXiv 1908.04319).

    At least 0, and tokens that are unlikely already have no gradient left.
    """

    name = "unlikelihood"
    needs_distribution = False
    needs_negatives = True
    applies_to = "wrong"

    def nats(self, seen: Seen) -> Tensor:
        assert seen.sampled_N is not None
        # Held where float32 would round 1 - q to 0; the gradient passes, since certain tokens must move most.
        held_N = seen.sampled_N - (seen.sampled_N + MIN_SURPRISAL).clamp(min=0.0).detach()
        return -(-held_N.expm1()).log()


@dataclass(frozen=True)
class DPO(HeadLoss):
    """-log sigmoid(beta m), m = log(q/q_start) of the right chain minus that of the wrong one (arXiv 2305.18290).

    Every token of a pair has the pair's loss, so that the mean over tokens is one over pairs, weighted by length.

    Attributes:
        beta: how soon a preference is enough, above 0.
    """

    beta: float = 0.1
    name = "dpo"
    needs_distribution = False
    needs_start = "tokens"
    needs_negatives = True
    needs_pairs = True
    applies_to = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.beta) and self.beta > 0.0):
            raise ConfigError(f"{self.name}.beta={self.beta} must be a finite number above 0")

    def nats(self, seen: Seen) -> Tensor:
        from torch.nn.functional import softplus

        assert seen.sampled_N is not None
        assert seen.pairs is not None
        pairs, margin_N = seen.pairs, self.beta * seen.pairs.margin_N
        # The margin is a sum over tokens of many chunks. Each token adds its own part of the gradient: the derivative
        # of the pair's loss by its log q, once for each token that has the loss.
        slope_N = -self.beta * pairs.sign_N * (-margin_N).sigmoid() * pairs.num_tokens_N
        value_N = softplus(-margin_N) + slope_N * (seen.sampled_N - seen.sampled_N.detach())
        return value_N.where(pairs.sign_N != 0.0, 0.0)


@dataclass(frozen=True)
class TAID(Divergence):
    """KL(t | q), the target t between student and teacher: q^(1 - a) p^a, normalised (TAID, arXiv 2501.16937).

    The target is a constant: no gradient passes through the student in it. Like reverse_kl, it is taken over the
    support, each distinct drawn id, and the rest as one outcome.

    Attributes:
        interpolation: a, from 0 (the student itself: nothing to learn) to 1 (the teacher: forward_kl).
    """

    interpolation: float = 1.0
    name = "taid"
    estimates_tail = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.interpolation <= 1.0:
            raise ConfigError(f"{self.name}.interpolation={self.interpolation} must be between 0 and 1")

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        # Geometric: a mean of log probabilities, normalised below.
        mixed_NB = (1.0 - self.interpolation) * student_NB.detach() + self.interpolation * teacher_NB
        return kl(mixed_NB - mixed_NB.logsumexp(dim=1, keepdim=True), student_NB)


@dataclass(frozen=True)
class StartKL(Divergence):
    """KL(q | q_start) over the support, each distinct drawn id, and the rest as one outcome: at most the dense one.

    Attributes:
        tail: `stored`, or `bucket`, which leaves drawn ids in the rest.
    """

    name = "start_kl"
    needs_start = "distribution"
    estimates_tail = False
    applies_to = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail not in ("stored", "bucket"):
            raise ConfigError(f"{self.name}.tail={self.tail} has no meaning here: choose stored or bucket")

    def _value(self, seen: Compared) -> Tensor:
        assert seen.start_NB is not None
        if self.tail == "bucket" or seen.draws is None:
            return kl(seen.student_NB, seen.start_NB)
        assert seen.draws.start_NF is not None
        return kl(seen.draws.student_NF, seen.draws.start_NF)

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        raise AssertionError("start_kl does not compare with the teacher")
