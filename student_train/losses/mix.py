"""A weighted sum of losses, and what it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillroom.errors import ConfigError
from student_train.losses.divergences import CrossEntropy, Divergence, FeatureLoss, ForwardKL, HeadLoss, Loss


@dataclass(frozen=True)
class LossMix:
    """A weighted sum of losses: those on the head share one pass over it.

    Attributes:
        terms: losses on the head; each name once.
        focal_gamma: hard tokens count more: each token's weight in `terms` is multiplied by (1 - q(sampled
            token))^gamma, taken at temperature 1 without gradient (focal loss, Lin et al. 2017, arXiv 1708.02002). None
            is off.
        features: losses below the head.
        corrects_negatives: losses that do not imitate the token that came apply to wrong chains as well.

    Raises:
        ConfigError: no losses, a name twice, all weights 0, or a gamma that is not above 0.
    """

    terms: tuple[HeadLoss, ...]
    focal_gamma: float | None = None
    features: tuple[FeatureLoss, ...] = ()
    corrects_negatives: bool = False

    def __post_init__(self) -> None:
        if not any(term.weight > 0.0 for term in self.all):
            raise ConfigError("losses: no loss has a weight above 0, so nothing would be learned: give one a weight")
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"losses: a name is repeated in {self.names}: list each loss once")
        if self.focal_gamma is not None and not (math.isfinite(self.focal_gamma) and self.focal_gamma > 0.0):
            raise ConfigError(f"focal_gamma={self.focal_gamma} must be above 0; leave it out to weight tokens equally")
        if self.focal_gamma is not None and not self.terms:
            raise ConfigError(f"focal_gamma has no effect on {' and '.join(self.names)}: remove it")

    @property
    def all(self) -> tuple[Loss, ...]:
        """The losses in the order of their sums: those on the head first."""
        return *self.terms, *self.features

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.all)

    @property
    def reads_chunks(self) -> bool:
        """Whether chunks of text are read."""
        return any(term.needs_chunks for term in self.terms)

    @property
    def reads_behaviour(self) -> bool:
        """Whether the behaviour's log probabilities are read."""
        return any(term.needs_behaviour for term in self.terms)

    @property
    def reads_pairs(self) -> bool:
        """Whether right and wrong chains are compared."""
        return any(term.needs_pairs for term in self.terms)

    @property
    def reads_start(self) -> Literal["nothing", "tokens", "distribution"]:
        """What is read of the student that the stage starts from."""
        needs = {term.needs_start for term in self.terms}
        return "distribution" if "distribution" in needs else "tokens" if "tokens" in needs else "nothing"

    @property
    def reads_draws(self) -> bool:
        """Whether draws from the tail are read where the cache holds them."""
        return any(
            isinstance(term, Divergence) and (term.tail == "stored" or term.needs_start == "distribution")
            for term in self.terms
        )

    @property
    def reads_hidden(self) -> bool:
        """Whether the teacher's last hidden states are read."""
        return any(term.needs_hidden for term in self.terms)

    @property
    def is_exact(self) -> bool:
        """Whether every divergence knows the teacher's whole distribution, so that any temperature is exact."""
        return all(term.needs_hidden for term in self.terms if isinstance(term, Divergence))

    @property
    def reads_features(self) -> bool:
        """Whether anything is read of the table of features."""
        return self.reads_hidden or bool(self.features)


DEFAULT_MIX = LossMix((ForwardKL(0.9), CrossEntropy(0.1)))
