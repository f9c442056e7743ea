"""What a stage knows of its tokens besides the stream: attached to each pack by key, the chain's row and the token.

In: a pack. Out: the same pack with the behaviour's log probabilities, which tokens are of wrong chains or terms, and
the log probabilities of the student that the stage starts from. Nothing here depends on how chains were packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from student_train.data.pack import Pack, StartNumbers
from student_train.data.terms import MarkedTerms
from student_train.data.token_numbers import TokenNumbers


class Start(Protocol):
    """Log probabilities of the student that a stage starts from."""

    def of(self, pack: Pack) -> StartNumbers:
        """Those of the pack's loss tokens."""


@dataclass(frozen=True)
class Attached:
    """None where the stage has none; is_negative_R bool, one for each chain of the selection."""

    behaviour: TokenNumbers | None = None
    is_negative_R: npt.NDArray[np.bool_] | None = None
    start: Start | None = None
    terms: MarkedTerms | None = None

    def to(self, pack: Pack) -> Pack:
        """The pack with everything known of its tokens."""
        if self.behaviour is not None:
            pack = replace(pack, behaviour_logprobs_N=self.behaviour.of(pack.row_N, pack.token_N))
        if pack.pair_signs_N is not None:
            pack = replace(pack, is_negative_N=pack.pair_signs_N < 0)
        elif self.is_negative_R is not None:
            pack = replace(pack, is_negative_N=self.is_negative_R[pack.row_N])
        if self.terms is not None:
            pack = replace(pack, weights_N=pack.weights_N * self.terms.factors_of(pack))
        return pack if self.start is None else replace(pack, start=self.start.of(pack))


NOTHING_ATTACHED = Attached()
