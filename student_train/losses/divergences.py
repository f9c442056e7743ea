"""The losses, one frozen class each: what a loss needs, its value where the teacher is known, and its tail.

In: log probabilities of teacher and student in B = K + 1 buckets a token: the K stored ids and, last, everything else.
Out: nats per token. Cost: O(N K); `fused_head.py` does the O(N V) part once for any mix. A new loss is a class here, in
`own_words.py` or (below the head) in `below.py`, and its line in `names.py`.

With p on the support S, r = 1 - sum_S p the teacher's tail, q the student and q_r = 1 - sum_S q its tail, `tail` says
what becomes of r, here for the forward KL:

    stored       sum_S p log(p/q) + sum_draws w log(p/q)
                 each draw stands for w of the tail: an unbiased estimate of the dense KL (Sparse Logit Sampling, arXiv
                 2503.16870). Tokens without draws, and caches without any, have one bucket.
    bucket       sum_S p log(p/q) + r log(r/q_r)
                 at most the dense KL: merging ids never raises an f-divergence (log-sum inequality)
    drop         sum_S p log(p/q)
                 can be negative, and is minimal at q = p / sum_S p, like the next
    renormalise  sum_S p' log(p'/q), p' = p / sum_S p
                 claims that the tail has no mass, which makes students over-confident (2503.16870)
    exact        sum_V p log(p/q)
                 over the whole vocabulary, from the teacher's last hidden state and its head; only on tokens that have
                 one (`whole_teacher.py`)

An f-divergence is a sum of c(p, q) over ids, c homogeneous. With a = c(1, 0) and b = c(0, 1)

    sum over the tail of c(p, q) = a r + b q_r + sum over the tail of p h(q/p),    h(t) = c(1, t) - a - b t

where r and q_r are known exactly, and h, which the draws average, grows at most like log t: a student that is wrong
about a rare token cannot make the estimate wild. `tail_costs` is (a, b) and `drawn_nats` is h.

Distributions are compared at the targets' temperature and multiplied by its square, value and gradient alike (Hinton et
al., 1503.02531); cross-entropies stay at temperature 1.

Between vocabularies ids do not compare but text does: `ChunkLikelihood` reads the student's log probability of its own
tokens and the teacher's of the same text.

    N loss tokens, K support, B = K + 1 buckets, M draws, F = K + M + 1 buckets with drawn ids apart
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from stillroom.errors import ConfigError

if TYPE_CHECKING:
    # Not at run time: `student-train plan` names losses and is done before torch would have loaded.
    from torch import Tensor

Tail = Literal["stored", "bucket", "drop", "renormalise", "exact"]

NO_MASS = -1.0e4
"""Log probability of nothing. Finite on purpose: exp() of it is exactly 0 in float32 and float64, and 0 * (NO_MASS -
NO_MASS) is 0 where 0 * (inf - inf) would be nan, so no divergence needs a mask."""

# Nats. exp(30) is finite in float32, and beyond it t log(1 + x/t) no longer differs from x (see JSD.drawn_nats).
MAX_LOG_RATIO = 30.0

MIN_SURPRISAL = 1.0e-6
"""Nats that a chunk of text costs at least: float32 rounds a log probability nearer to 0 to 0, and 1 - 1 has no log."""


@dataclass(frozen=True)
class Drawn:
    """Ids drawn from the teacher's tail, as log probabilities.

    Attributes:
        weights_NM: mass that each draw stands for; 0 is padding.
        teacher_NM, student_NM: of the drawn ids.
        teacher_NF, student_NF: of the support, each distinct drawn id, and the rest of the tail.
        start_NF: the same of the student that the stage starts from; None where no loss compares with it.
    """

    weights_NM: Tensor
    teacher_NM: Tensor
    student_NM: Tensor
    teacher_NF: Tensor
    student_NF: Tensor
    start_NF: Tensor | None = None


@dataclass(frozen=True)
class Compared:
    """Teacher and student at one temperature, as log probabilities in buckets; NO_MASS where a bucket holds nothing."""

    temperature: float
    teacher_NB: Tensor
    student_NB: Tensor
    draws: Drawn | None
    start_NB: Tensor | None = None


@dataclass(frozen=True)
class Chunked:
    """Which chunk of text each token belongs to.

    Attributes:
        ids_N: equal within a chunk, whose tokens stand together; -1 is outside of chunks.
        teacher_N: the teacher's log probability of the token's whole chunk.
    """

    ids_N: Tensor
    teacher_N: Tensor


@dataclass(frozen=True)
class Spoken:
    """What others gave the tokens that came, as log probabilities at temperature 1; nan where they did not.

    Attributes:
        teacher_N: the teacher.
        behaviour_N: the student that wrote the chain, when it wrote it.
        start_N: the student that the stage starts from.
    """

    teacher_N: Tensor | None = None
    behaviour_N: Tensor | None = None
    start_N: Tensor | None = None


NOTHING_SPOKEN = Spoken()


@dataclass(frozen=True)
class Paired:
    """The pair of a right and a wrong chain that each token belongs to, measured over both chains as a whole.

    Attributes:
        sign_N: 1 in the right chain, -1 in the wrong one, 0 in no pair.
        margin_N: how much more the student has come to prefer the right chain since its start, log (q/q_start) of the
            right chain minus that of the wrong one; no gradient.
        num_tokens_N: tokens of the pair.
    """

    sign_N: Tensor
    margin_N: Tensor
    num_tokens_N: Tensor


@dataclass(frozen=True)
class Seen:
    """What losses read of N tokens.

    Attributes:
        compared: both sides at the targets' temperature; None where no loss of the mix is a Divergence.
        sampled_N: log q at temperature 1 of the token that the teacher sampled; None where all losses are Divergences.
        argmax_N: the same of the teacher's most likely token; also None for text alone.
        chunks: None where the targets hold none.
        spoken: what others gave the token that came.
        is_negative_N: tokens of chains to move away from; None where there are none.
        pairs: None where the targets hold none.
    """

    compared: Compared | None
    sampled_N: Tensor | None
    argmax_N: Tensor | None
    chunks: Chunked | None = None
    spoken: Spoken = NOTHING_SPOKEN
    is_negative_N: Tensor | None = None
    pairs: Paired | None = None


@dataclass(frozen=True)
class Loss(ABC):
    """A loss and its weight in a mix.

    Attributes:
        weight: multiplies the loss, value and gradient; finite, at least 0.

    Raises:
        ConfigError: a value is out of range.
    """

    weight: float = 1.0

    name: ClassVar[str]
    needs_chunks: ClassVar[bool] = False
    """Whether targets must hold the teacher's log probabilities of chunks of text."""
    needs_behaviour: ClassVar[bool] = False
    """Whether targets must hold what the student that wrote the chain gave its tokens."""
    needs_start: ClassVar[Literal["nothing", "tokens", "distribution"]] = "nothing"
    """What targets must hold of the student that the stage starts from."""
    needs_negatives: ClassVar[bool] = False
    """Whether the loss says nothing without wrong chains."""
    needs_pairs: ClassVar[bool] = False
    """Whether it compares right and wrong chains of one prompt."""
    applies_to: ClassVar[Literal["right", "wrong", "all"]] = "right"
    """Tokens that the loss is for: those of chains to learn from, of chains to move away from, or both."""
    imitates_token: ClassVar[bool] = True
    """Whether it makes the token that came likelier, rather than what the teacher said in its place."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            raise ConfigError(f"{self.name}.weight={self.weight} must be a finite number of at least 0")

    @property
    def needs_distribution(self) -> bool:
        """Whether the cache must hold the teacher's stored distribution."""
        return True

    @property
    def needs_hidden(self) -> bool:
        """Whether the cache must hold the teacher's last hidden states."""
        return False


@dataclass(frozen=True)
class HeadLoss(Loss):
    """A loss on the student's distribution of the next token."""

    @abstractmethod
    def nats(self, seen: Seen) -> Tensor:
        """[N] nats, without the weight."""


@dataclass(frozen=True)
class CrossEntropy(HeadLoss):
    """-log q of the token that the teacher sampled."""

    name = "cross_entropy"

    @property
    def needs_distribution(self) -> bool:
        return False

    def nats(self, seen: Seen) -> Tensor:
        assert seen.sampled_N is not None
        return -seen.sampled_N


@dataclass(frozen=True)
class CrossEntropyArgmax(HeadLoss):
    """-log q of the teacher's most likely token."""

    name = "cross_entropy_argmax"

    def nats(self, seen: Seen) -> Tensor:
        assert seen.argmax_N is not None
        return -seen.argmax_N


@dataclass(frozen=True)
class ChunkLikelihood(HeadLoss):
    """Approximate likelihood matching (arXiv 2503.20083) of chunks, the text between boundaries of both vocabularies.

    With p and q what teacher and student give a chunk, the products over their own tokens, the outcomes are "this
    chunk" and "any other text", at a = p^(1/tau) and b = q^(1/tau):

        tau (a log(a/b) + (1 - a) log((1 - a)/(1 - b)))

    tau = 1 is the binary KL, which hardly sees unlikely chunks. With tau to infinity it becomes y - x + x log(x/y) of
    the surprisals x = -log p and y = -log q. The factor tau keeps the size of the gradient.

    Each token of a chunk holds an equal share, so that the mean of their weights weighs it.

    Attributes:
        temperature: tau, above 0; of this loss alone, and known at every value.
    """

    temperature: float = 100.0
    name = "chunk_likelihood"
    needs_chunks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ConfigError(f"{self.name}.temperature={self.temperature} must be a finite number above 0")

    @property
    def needs_distribution(self) -> bool:
        return False

    def nats(self, seen: Seen) -> Tensor:
        assert seen.sampled_N is not None
        assert seen.chunks is not None
        ids_N, sampled_N = seen.chunks.ids_N, seen.sampled_N
        # roll compares the first token with the last; its number below is 0 whatever comes out.
        is_first_N = ids_N != ids_N.roll(1)
        # Chunks numbered as they come: ids 7, 7, -1, 9 are 0, 0, 1, 2. Not more than N, a size that no GPU waits for.
        number_N = is_first_N.cumsum(0) - is_first_N[:1].long()
        zeros_N = sampled_N.new_zeros(sampled_N.shape)
        student_N = zeros_N.index_add(0, number_N, sampled_N)[number_N]
        length_N = zeros_N.index_add(0, number_N, zeros_N + 1.0)[number_N]
        value_N = self._between(seen.chunks.teacher_N.to(sampled_N.dtype), student_N)
        return (value_N / length_N).where(ids_N >= 0, 0.0)

    def _between(self, teacher_N: Tensor, student_N: Tensor) -> Tensor:
        log_a_N = teacher_N.clamp(max=-MIN_SURPRISAL) / self.temperature
        # The gradient passes where the value is held: a student that is wrongly certain must still learn.
        held_N = student_N - (student_N + MIN_SURPRISAL).clamp(min=0.0).detach()
        log_b_N = held_N / self.temperature
        log_rest_a_N, log_rest_b_N = (-log_a_N.expm1()).log(), (-log_b_N.expm1()).log()
        rest_N = -log_a_N.expm1() * (log_rest_a_N - log_rest_b_N)
        return self.temperature * (log_a_N.exp() * (log_a_N - log_b_N) + rest_N)


@dataclass(frozen=True)
class Divergence(HeadLoss):
    """A loss that compares distributions.

    Attributes:
        tail: what becomes of the mass outside the support, see the top of the file.
    """

    tail: Tail = "stored"

    imitates_token = False
    estimates_tail: ClassVar[bool] = True
    """Whether draws estimate the tail's part; otherwise each distinct drawn id is an entry of its own."""

    @property
    def needs_distribution(self) -> bool:
        return not self.needs_hidden

    @property
    def needs_hidden(self) -> bool:
        return self.tail == "exact"

    def nats(self, seen: Seen) -> Tensor:
        """[N] nats times temperature^2, without the weight."""
        assert seen.compared is not None
        assert not self.needs_hidden
        # Gradients of soft targets shrink by 1/tau^2 (Hinton et al., arXiv 1503.02531): value and gradient are scaled.
        return self._value(seen.compared) * seen.compared.temperature**2

    def _value(self, seen: Compared) -> Tensor:
        teacher_NK, student_NK = seen.teacher_NB[:, :-1], seen.student_NB[:, :-1]
        if self.tail == "drop":
            return self.between(teacher_NK, student_NK)
        if self.tail == "renormalise":
            mass_N1 = teacher_NK.logsumexp(dim=1, keepdim=True)
            # A token without support has no mass to rescale, and teaches nothing.
            # Its log-sum-exp is NO_MASS + log K, so the threshold lies well above NO_MASS.
            return self.between((teacher_NK - mass_N1).where(mass_N1 > NO_MASS / 2, NO_MASS), student_NK)
        if self.tail == "bucket" or seen.draws is None:
            return self.between(seen.teacher_NB, seen.student_NB)
        if self.estimates_tail:
            return self._estimate(seen, seen.draws)
        return self.between(seen.draws.teacher_NF, seen.draws.student_NF)

    @abstractmethod
    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        """[N] nats, summed over any buckets."""

    def _estimate(self, seen: Compared, draws: Drawn) -> Tensor:
        """[N] nats: exact on the support, the tail's part estimated from the draws without bias."""
        is_draw_NM = draws.weights_NM > 0.0
        # Padding has weight 0, but 0 * inf would be nan.
        log_ratio_NM = (draws.student_NM - draws.teacher_NM).where(is_draw_NM, 0.0)
        per_teacher, per_student = self.tail_costs
        known_N = per_teacher * seen.teacher_NB[:, -1].exp() + per_student * seen.student_NB[:, -1].exp()
        drawn_N = known_N + (draws.weights_NM * self.drawn_nats(log_ratio_NM)).sum(dim=1)
        # A token whose support reaches the nucleus has no draws.
        bucket_N = self.between(seen.teacher_NB[:, -1:], seen.student_NB[:, -1:])
        on_support_N = self.between(seen.teacher_NB[:, :-1], seen.student_NB[:, :-1])
        return on_support_N + drawn_N.where(is_draw_NM.any(dim=1), bucket_N)

    @property
    def tail_costs(self) -> tuple[float, float]:
        """(a, b): what a tail costs where the student has nothing, and where the teacher has nothing."""
        return 0.0, 0.0

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        """h(t) = c(1, t) - a - b t of log t = log(q/p), in a form that loses nothing where t is large or small."""
        raise NotImplementedError(self.name)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher | student): the student covers all that the teacher says."""

    name = "forward_kl"

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        return kl(teacher_NB, student_NB)

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        return -log_ratio_NM


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student | teacher): the student seeks one mode (MiniLLM, arXiv 2306.08543).

    A lower bound of the dense one even with draws: b is infinite, since no draw from the teacher says what a student
    claims where the teacher says nothing. But a drawn id comes with the teacher's own probability, so each distinct
    one leaves the bucket and is an entry of its own.
    """

    name = "reverse_kl"
    estimates_tail = False

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        return kl(student_NB, teacher_NB)


@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    At most log 2 at beta = 0.5.

    Attributes:
        beta: the teacher's share of the mixture, in (0, 1).
    """

    beta: float = 0.5
    name = "jsd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("jsd.beta", self.beta)

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        mixture_NB = _mixture(teacher_NB, student_NB, self.beta)
        return self.beta * kl(teacher_NB, mixture_NB) + (1.0 - self.beta) * kl(student_NB, mixture_NB)

    @property
    def tail_costs(self) -> tuple[float, float]:
        return -self.beta * math.log(self.beta), -(1.0 - self.beta) * math.log1p(-self.beta)

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        # -beta log(beta + (1 - beta) t) + beta log beta = -beta log(1 + (1 - beta)/beta t)
        of_teacher_NM = self.beta * _softplus(log_ratio_NM + _odds(self.beta))
        # t log(1 + x/t) is x from MAX_LOG_RATIO on, and t itself could overflow.
        limited_NM = log_ratio_NM.clamp(max=MAX_LOG_RATIO)
        return -of_teacher_NM - (1.0 - self.beta) * limited_NM.exp() * _softplus(-limited_NM - _odds(self.beta))


@dataclass(frozen=True)
class SkewedForwardKL(Divergence):
    """KL(p | alpha p + (1 - alpha) q), at most -log alpha (DistiLLM, arXiv 2402.03898).

    Attributes:
        alpha: the teacher's share of the mixture, in (0, 1).
    """

    alpha: float = 0.1
    name = "skewed_forward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(f"{self.name}.alpha", self.alpha)

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        return kl(teacher_NB, _mixture(teacher_NB, student_NB, self.alpha))

    @property
    def tail_costs(self) -> tuple[float, float]:
        return -math.log(self.alpha), 0.0

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        # -log(alpha + (1 - alpha) t) + log alpha = -log(1 + (1 - alpha)/alpha t)
        return -_softplus(log_ratio_NM + _odds(self.alpha))


@dataclass(frozen=True)
class SkewedReverseKL(SkewedForwardKL):
    """KL(q | alpha q + (1 - alpha) p), at most -log alpha (DistiLLM, arXiv 2402.03898).

    Attributes:
        alpha: the student's share of the mixture, in (0, 1).
    """

    name = "skewed_reverse_kl"

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        return kl(student_NB, _mixture(student_NB, teacher_NB, self.alpha))

    @property
    def tail_costs(self) -> tuple[float, float]:
        return 0.0, -math.log(self.alpha)

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        limited_NM = log_ratio_NM.clamp(max=MAX_LOG_RATIO)
        # t log(t/(alpha t + 1 - alpha)) + t log alpha = -t log(1 + (1 - alpha)/(alpha t))
        return -limited_NM.exp() * _softplus(_odds(self.alpha) - limited_NM)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum |p - q| / 2, at most 1."""

    name = "total_variation"

    def between(self, teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
        return 0.5 * (teacher_NB.exp() - student_NB.exp()).abs().sum(dim=1)

    @property
    def tail_costs(self) -> tuple[float, float]:
        return 0.5, 0.5

    def drawn_nats(self, log_ratio_NM: Tensor) -> Tensor:
        # |1 - t|/2 - 1/2 - t/2 = -min(1, t)
        return -log_ratio_NM.clamp(max=0.0).exp()


@dataclass(frozen=True)
class FeatureLoss(Loss):
    """A loss below the head, on the tokens whose features the cache holds; each layer of the teacher has one of the
    student's beside it.

    Attributes:
        layers: (teacher layer, student layer) pairs; None pairs every stored layer, evenly spaced (`pairs_of`).
    """

    layers: tuple[tuple[int, int], ...] | None = None

    @property
    def needs_distribution(self) -> bool:
        return False


def kl(left_NB: Tensor, right_NB: Tensor) -> Tensor:
    """KL(left | right), [N] nats."""
    return (left_NB.exp() * (left_NB - right_NB)).sum(dim=1)


def _mixture(left_NB: Tensor, right_NB: Tensor, left_share: float) -> Tensor:
    return (left_NB + math.log(left_share)).logaddexp(right_NB + math.log1p(-left_share))


def _odds(share: float) -> float:
    """log((1 - share) / share)"""
    return math.log1p(-share) - math.log(share)


def _softplus(x_NM: Tensor) -> Tensor:
    # Imported late for the same reason as Tensor above.
    from torch.nn.functional import softplus

    return softplus(x_NM)


def _require_share(key: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{key}={value} must be strictly between 0 and 1")
