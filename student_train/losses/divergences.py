"""Every divergence between a teacher known on a support and a student known everywhere, named by the missing mass.

In: log probabilities of teacher and student in B = K+1 buckets a token: the K stored ids and, last, everything else.
Out: nats a token. Cost: O(N K); `fused.py` does the O(N V) part once for any mix of these.

With p on the support S, r = 1 - sum_S p the teacher's tail, q the student and q_r = 1 - sum_S q its tail:

    forward_kl_tail_bucket          sum_S p log(p/q) + r log(r/q_r)
        a lower bound of the dense KL, exact on S, and equal to it where K = V
    forward_kl_truncated            sum_S p log(p/q)
        drops the tail's term; can be negative, and is minimal at q = p / sum_S p, like the next
    forward_kl_renormalised         sum_S p' log(p'/q), p' = p / sum_S p
        says that the tail has no mass: an over-confident student (Sparse Logit Sampling, arXiv 2503.16870)
    forward_kl_sampled_tail         sum_S p log(p/q) + sum_draws w log(p/q)
        an unbiased estimate of the dense KL from draws that stand for w of the tail each (arXiv 2503.16870); a token
        without draws, whose tail the cache leaves as a mass, has the tail bucket's term
    forward_kl_stored_tail          the tail as the cache holds it: drawn where it holds draws, else in one bucket
        the default: what the two above are, for any cache
    reverse_kl_tail_bucket          sum_S q log(q/p) + q_r log(q_r/r)
        a lower bound; a cache gives no upper one (MiniLLM, arXiv 2306.08543)
    jsd_stored_tail                 beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q
        generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649); at most log 2 at beta = 0.5
    skewed_forward_kl_stored_tail   KL(p | alpha p + (1 - alpha) q), at most -log alpha (DistiLLM, arXiv 2402.03898)
    skewed_reverse_kl_stored_tail   KL(q | alpha q + (1 - alpha) p), at most -log alpha (the same)
    total_variation_stored_tail     sum |p - q| / 2, at most 1
    cross_entropy                   -log q of the token that the teacher sampled
    cross_entropy_argmax            -log q of the teacher's rank-0 token

Merging ids into one bucket never raises an f-divergence, so each value with its tail in a bucket is at most the dense
one (for forward KL this is the log-sum inequality). Where the cache holds draws, every `stored_tail` is estimated from
them without bias. An f-divergence is a sum of c(p, q) over ids, c homogeneous; with a = c(1, 0) and b = c(0, 1)

    sum over the tail of c(p, q) = a r + b q_r + sum over the tail of p h(q/p),    h(t) = c(1, t) - a - b t

where r and q_r are known exactly, and of h, which the draws average over, grows at most like log t: a student that is
wrong about a rare token cannot make the estimate wild. For the reverse KL b is infinite, so its tail stays in a bucket;
but a drawn token comes with the teacher's own probability, hence each distinct drawn id is an entry of S there.

Distributions are compared at the targets' temperature and multiplied by its square, value and gradient alike (Hinton et
al., 1503.02531); cross-entropies stay at temperature 1.

    N loss tokens, K support, B = K + 1 buckets, M draws, J terms of a mix
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stillroom.config import nearest_name
from stillroom.errors import ConfigError
from student_train.losses.targets import NO_MASS

LossName = Literal[
    "forward_kl_tail_bucket",
    "forward_kl_truncated",
    "forward_kl_renormalised",
    "forward_kl_sampled_tail",
    "forward_kl_stored_tail",
    "reverse_kl_tail_bucket",
    "jsd_stored_tail",
    "skewed_forward_kl_stored_tail",
    "skewed_reverse_kl_stored_tail",
    "total_variation_stored_tail",
    "cross_entropy",
    "cross_entropy_argmax",
]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)

DEFAULT_JSD_BETA = 0.5
DEFAULT_SKEW_ALPHA = 0.1
MAX_LOG_RATIO = 30.0


@dataclass(frozen=True)
class LossTerm:
    """One named loss and its share in a mix.

    Attributes:
        name: one of LOSS_NAMES.
        weight: multiplies the loss, value and gradient; finite, at least 0.
        beta: `jsd_stored_tail` alone: the teacher's share of the mixture, in (0, 1); None is 0.5.
        alpha: skewed KLs alone: share of the divergence's own side in the mixture, in (0, 1); None is 0.1.

    Raises:
        ConfigError: unknown name, value out of range, or a parameter that this loss does not have.
    """

    name: LossName
    weight: float = 1.0
    beta: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSS_NAMES:
            raise ConfigError(f"loss {self.name!r} is unknown{nearest_name(self.name, LOSS_NAMES, 'choose one of')}")
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            raise ConfigError(f"{self.name}.weight={self.weight} must be a finite number of at least 0")
        self._check_share("beta", self.beta, self.name == "jsd_stored_tail")
        self._check_share("alpha", self.alpha, self.name.startswith("skewed_"))

    def _check_share(self, parameter: str, value: float | None, is_used: bool) -> None:
        if value is not None and not is_used:
            raise ConfigError(
                f"{self.name}.{parameter}={value} has no effect: {self.name} takes no {parameter}, drop it"
            )
        if value is not None and not 0.0 < value < 1.0:
            raise ConfigError(f"{self.name}.{parameter}={value} must lie strictly between 0 and 1")

    @property
    def share(self) -> float:
        """`beta` or `alpha`, or its default."""
        if self.name == "jsd_stored_tail":
            return DEFAULT_JSD_BETA if self.beta is None else self.beta
        return DEFAULT_SKEW_ALPHA if self.alpha is None else self.alpha

    @property
    def is_cross_entropy(self) -> bool:
        return self.name.startswith("cross_entropy")

    @property
    def needs_distribution(self) -> bool:
        """Whether the cache must hold the teacher's distribution (`cross_entropy_argmax` needs its rank-0 id)."""
        return not self.is_cross_entropy or self.name == "cross_entropy_argmax"

    @property
    def needs_tail(self) -> bool:
        """Whether the cache must hold the mass outside the support."""
        return self.name.endswith(("_tail_bucket", "_stored_tail"))

    @property
    def needs_draws(self) -> bool:
        """Whether the cache must hold draws from the tail."""
        return self.name == "forward_kl_sampled_tail"

    @property
    def estimates_tail(self) -> bool:
        """Whether the tail's term is an average over draws, where there are any."""
        return self.name.endswith(("_sampled_tail", "_stored_tail"))

    @property
    def splits_tail(self) -> bool:
        """Whether drawn ids, where there are any, are entries of their own beside the support's."""
        return self.name == "reverse_kl_tail_bucket"

    @property
    def uses_draws(self) -> bool:
        """Whether draws from the tail are read where the cache holds them."""
        return self.estimates_tail or self.splits_tail


@dataclass(frozen=True)
class LossMix:
    """A weighted sum of losses that share one pass over the head.

    Attributes:
        terms: at least one; each name once.
        focal_gamma: hard tokens count more: each token's weight is multiplied by (1 - q(sampled token))^gamma, taken at
            temperature 1 without gradient (focal loss, Lin et al. 2017, arXiv 1708.02002). None is off.

    Raises:
        ConfigError: no terms, a name twice, all weights 0, or a gamma that is not above 0.
    """

    terms: tuple[LossTerm, ...]
    focal_gamma: float | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not any(term.weight > 0.0 for term in self.terms):
            raise ConfigError("losses: no term has a weight above 0, so nothing would be learnt: give one a weight")
        if len(set(names)) < len(names):
            raise ConfigError(
                f"losses: a name stands twice in {names}: give each loss once, with the sum of its weights"
            )
        if self.focal_gamma is not None and not (math.isfinite(self.focal_gamma) and self.focal_gamma > 0.0):
            raise ConfigError(f"focal_gamma={self.focal_gamma} must be above 0; leave it out to weigh tokens alike")

    @property
    def names(self) -> tuple[LossName, ...]:
        return tuple(term.name for term in self.terms)


DEFAULT_MIX = LossMix((LossTerm("forward_kl_stored_tail", 0.9), LossTerm("cross_entropy", 0.1)))


def weighted_sum(mix: LossMix, values_XJ: Tensor) -> Tensor:
    """sum_J of the terms' weights times `values_XJ` [..., J]. Python numbers, so that no copy waits for a GPU."""
    parts = [term.weight * value_X for term, value_X in zip(mix.terms, values_XJ.unbind(dim=-1), strict=True)]
    return torch.stack(parts).sum(dim=0)


def bucket_loss(term: LossTerm, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """Nats a token [N] of any divergence that is a function of the buckets.

    Both sides are natural log probabilities in buckets, NO_MASS where neither has any.
    """
    match term.name:
        case "forward_kl_tail_bucket" | "forward_kl_stored_tail" | "forward_kl_sampled_tail":
            return forward_kl_tail_bucket(teacher_NB, student_NB)
        case "forward_kl_truncated":
            return forward_kl_truncated(teacher_NB, student_NB)
        case "forward_kl_renormalised":
            return forward_kl_renormalised(teacher_NB, student_NB)
        case "reverse_kl_tail_bucket":
            return forward_kl_tail_bucket(student_NB, teacher_NB)
        case "jsd_stored_tail":
            return jsd_tail_bucket(teacher_NB, student_NB, term.share)
        case "skewed_forward_kl_stored_tail":
            return skewed_kl_tail_bucket(teacher_NB, student_NB, term.share)
        case "skewed_reverse_kl_stored_tail":
            return skewed_kl_tail_bucket(student_NB, teacher_NB, term.share)
        case "total_variation_stored_tail":
            return total_variation_tail_bucket(teacher_NB, student_NB)
        case _:
            raise AssertionError(f"{term.name} is no function of the buckets")


def forward_kl_tail_bucket(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """KL(teacher | student) over support and tail, [N] nats; with the sides exchanged it is the reverse KL."""
    return (teacher_NB.exp() * (teacher_NB - student_NB)).sum(dim=1)


def forward_kl_truncated(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """The support's terms of KL(teacher | student), [N] nats, as if the tail's were none; for comparison."""
    return forward_kl_tail_bucket(teacher_NB[:, :-1], student_NB[:, :-1])


def forward_kl_renormalised(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """KL(teacher rescaled to mass 1 on its support | student), [N] nats; for comparison. A row without support is 0."""
    teacher_NK = teacher_NB[:, :-1]
    mass_N1 = teacher_NK.logsumexp(dim=1, keepdim=True)
    renormalised_NK = torch.where(mass_N1 > NO_MASS / 2, teacher_NK - mass_N1, NO_MASS)
    return forward_kl_tail_bucket(renormalised_NK, student_NB[:, :-1])


def sampled_tail_loss(
    term: LossTerm,
    teacher_NB: Tensor,
    student_NB: Tensor,
    weights_NM: Tensor,
    teacher_NM: Tensor,
    student_NM: Tensor,
) -> Tensor:
    """A divergence exact on the support, the tail's part estimated from draws without bias, [N] nats (2503.16870).

    `weights_NM` is the mass that each draw stands for, `teacher_NM` and `student_NM` its log probabilities. A token
    whose weights are all 0 has no draws, and the tail bucket's term.
    """
    is_draw_NM = weights_NM > 0.0
    log_ratio_NM = torch.where(is_draw_NM, student_NM - teacher_NM, 0.0)
    per_teacher, per_student = _tail_slopes(term)
    known_N = per_teacher * teacher_NB[:, -1].exp() + per_student * student_NB[:, -1].exp()
    drawn_N = known_N + (weights_NM * _bent(term, log_ratio_NM)).sum(dim=1)
    bucket_N = bucket_loss(term, teacher_NB[:, -1:], student_NB[:, -1:])
    on_support_N = bucket_loss(term, teacher_NB[:, :-1], student_NB[:, :-1])
    return on_support_N + torch.where(is_draw_NM.any(dim=1), drawn_N, bucket_N)


def _tail_slopes(term: LossTerm) -> tuple[float, float]:
    """(a, b): what a tail costs where the student has nothing, and where the teacher has; 0 where that is infinite."""
    share = term.share
    match term.name:
        case "jsd_stored_tail":
            return -share * math.log(share), -(1.0 - share) * math.log1p(-share)
        case "skewed_forward_kl_stored_tail":
            return -math.log(share), 0.0
        case "skewed_reverse_kl_stored_tail":
            return 0.0, -math.log(share)
        case "total_variation_stored_tail":
            return 0.5, 0.5
        case _:
            return 0.0, 0.0


def _bent(term: LossTerm, log_ratio_NM: Tensor) -> Tensor:
    """h(t) = c(1, t) - a - b t of log t = log(q/p), in forms that lose nothing where t is large or small.

    Example: of the skewed forward KL -log(alpha + (1 - alpha) t) + log alpha = -log(1 + (1 - alpha)/alpha t).
    """
    softplus, logit = torch.nn.functional.softplus, math.log1p(-term.share) - math.log(term.share)
    # t log(1 + x/t) is x from here on, and t itself could overflow.
    limited_NM = log_ratio_NM.clamp(max=MAX_LOG_RATIO)
    match term.name:
        case "jsd_stored_tail":
            of_teacher_NM = term.share * softplus(log_ratio_NM + logit)
            return -of_teacher_NM - (1.0 - term.share) * limited_NM.exp() * softplus(-limited_NM - logit)
        case "skewed_forward_kl_stored_tail":
            return -softplus(log_ratio_NM + logit)
        case "skewed_reverse_kl_stored_tail":
            return -limited_NM.exp() * softplus(logit - limited_NM)
        case "total_variation_stored_tail":
            return -log_ratio_NM.clamp(max=0.0).exp()
        case _:
            return -log_ratio_NM


def jsd_tail_bucket(teacher_NB: Tensor, student_NB: Tensor, beta: float = DEFAULT_JSD_BETA) -> Tensor:
    """beta KL(teacher | m) + (1-beta) KL(student | m), m = beta teacher + (1-beta) student, [N] nats (2306.13649)."""
    mixture_NB = torch.logaddexp(teacher_NB + math.log(beta), student_NB + math.log1p(-beta))
    from_teacher_N = forward_kl_tail_bucket(teacher_NB, mixture_NB)
    return beta * from_teacher_N + (1.0 - beta) * forward_kl_tail_bucket(student_NB, mixture_NB)


def skewed_kl_tail_bucket(left_NB: Tensor, right_NB: Tensor, alpha: float = DEFAULT_SKEW_ALPHA) -> Tensor:
    """KL(left | alpha left + (1-alpha) right), [N] nats, at most -log alpha (arXiv 2402.03898)."""
    mixture_NB = torch.logaddexp(left_NB + math.log(alpha), right_NB + math.log1p(-alpha))
    return forward_kl_tail_bucket(left_NB, mixture_NB)


def total_variation_tail_bucket(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """Half the L1 distance over support and tail, [N], in [0, 1]."""
    return 0.5 * (teacher_NB.exp() - student_NB.exp()).abs().sum(dim=1)
