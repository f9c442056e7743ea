"""The check of an export: held-out chains through the format in its own runtime, and through the float student.

In: chains as token ids with the positions that predict the completion, two runtimes. Out: over all those positions,
top-1 agreement, KL(float | format) and the Jensen-Shannon divergence, in nats. Rows are matched by chain and position.
Where a runtime gives only its most likely tokens, the others are one bucket, and both divergences are lower bounds.

    N positions of a chain, V vocabulary, K most likely tokens
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stillroom.errors import DataError, StillroomError
from stillroom.log import Progress
from student_train.data.epoch_plan import PlanSpec
from student_train.data.pack import Pack
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.export.worker import RuntimeWorker, Scores

MAX_CHAIN_TOKENS = 1024
"""Longer chains are cut: logits of a whole one would take gigabytes."""
BLOCK_POSITIONS = 64
"""Compared at a time: a chain of 1,024 tokens of 150,000 ids is 1.2 GB in float64, and several such are needed."""
LOG_2 = float(np.log(2.0))


@dataclass(frozen=True)
class Chain:
    """Prompt and completion; the logits at positions[n] predict completion token n."""

    ids: list[int]
    positions: list[int]

    def shortened(self, max_tokens: int) -> "Chain":
        """Its first tokens, with the positions that predict another of them."""
        return Chain(self.ids[:max_tokens], [one for one in self.positions if one < max_tokens - 1])


class Agreement(BaseModel):
    """How close a format is to the float student: means over `num_tokens` positions, in nats."""

    model_config = ConfigDict(frozen=True)

    num_chains: int
    num_tokens: int
    top1_agreement: float
    """Share of positions with the same most likely token."""
    kl: float
    """KL(float | format)."""
    js: float
    """Jensen-Shannon divergence, at most log 2."""
    retention: float
    """1 - js / log 2."""


def read_chains(selection: Selection, max_chains: int) -> list[Chain]:
    """The first chains of a selection in a fixed order, in the student's tokens, cut at MAX_CHAIN_TOKENS.

    Raises DataError if none predicts a token, CorruptError.
    """
    spec = PlanSpec(pack_tokens=MAX_CHAIN_TOKENS, long_chains="truncate")
    with PackStream(selection, spec, packs_per_step=1, num_epochs=1, with_signals=False) as stream:
        found = list(itertools.islice(itertools.chain.from_iterable(map(_chains_of, stream)), max_chains))
    if not found:
        raise DataError(f"no chain with {selection.header.where!r} predicts a token: nothing to compare the export on")
    return found


def _chains_of(pack: Pack) -> Iterator[Chain]:
    starts_D = np.flatnonzero(np.diff(pack.document_ids_L, prepend=-1)).tolist()
    for start, stop in zip(starts_D, [*starts_D[1:], pack.num_tokens], strict=True):
        is_inside_N = (pack.predict_positions_N >= start) & (pack.predict_positions_N < stop)
        positions = (pack.predict_positions_N[is_inside_N] - start).tolist()
        if positions:
            yield Chain(pack.input_ids_L[start:stop].tolist(), positions)


def compare(reference: RuntimeWorker, candidate: RuntimeWorker, chains: Sequence[Chain]) -> Agreement:
    """Both runtimes on the same token ids. Raises StillroomError where one fails."""
    sums, num_tokens = torch.zeros(3, dtype=torch.float64), 0
    with Progress("compare", len(chains), "chains") as progress:
        for number, chain in enumerate(chains):
            expected = reference.scores(chain.ids, chain.positions)
            found = candidate.scores(chain.ids, chain.positions)
            for first in range(0, len(chain.positions), BLOCK_POSITIONS):
                block = [one.rows(first, first + BLOCK_POSITIONS) for one in (expected, found)]
                sums += torch.stack(divergences(*block)).sum(dim=1)
            num_tokens += len(chain.positions)
            progress.update(number + 1, num_tokens)
    agreement, kl, js = (sums / num_tokens).tolist()
    if not np.isfinite([kl, js]).all():
        raise StillroomError(f"{candidate.folder} gives logits that are not finite in {candidate.runtime}")
    return Agreement(
        num_chains=len(chains),
        num_tokens=num_tokens,
        top1_agreement=agreement,
        # Rounding can leave a divergence of equal distributions just below 0.
        kl=max(kl, 0.0),
        js=max(js, 0.0),
        retention=1.0 - max(js, 0.0) / LOG_2,
    )


def divergences(expected: Scores, found: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement (0 or 1), KL(expected | found) and Jensen-Shannon of each position, float64 [N].

    Raises StillroomError if the vocabularies differ in size by more than padding.
    """
    assert expected.logits_NV is not None
    expected_NV = torch.from_numpy(expected.logits_NV).double()
    if found.logits_NV is None:
        assert found.ids_NK is not None
        assert found.logprobs_NK is not None
        ids_NK = torch.from_numpy(found.ids_NK).long()
        q_NK = torch.from_numpy(found.logprobs_NK).double()
        p_NK = expected_NV.log_softmax(dim=1).gather(1, ids_NK)
        agreement_N = (expected_NV.argmax(dim=1) == ids_NK[:, 0]).double()
        p_NC, q_NC = _with_rest(p_NK), _with_rest(q_NK)
    else:
        found_NV = torch.from_numpy(found.logits_NV).double()
        if found_NV.shape[1] < expected_NV.shape[1]:
            raise StillroomError(f"the format predicts {found_NV.shape[1]} ids, the student {expected_NV.shape[1]}")
        # Some runtimes pad the vocabulary.
        found_NV = found_NV[:, : expected_NV.shape[1]]
        agreement_N = (expected_NV.argmax(dim=1) == found_NV.argmax(dim=1)).double()
        p_NC, q_NC = expected_NV.log_softmax(dim=1), found_NV.log_softmax(dim=1)
    m_NC = torch.logaddexp(p_NC, q_NC) - LOG_2
    js_N = (_kl(p_NC, m_NC) + _kl(q_NC, m_NC)) / 2
    return agreement_N, _kl(p_NC, q_NC), js_N


def _kl(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    # 0 log 0 is 0, also where both are -inf.
    return torch.where(p_NC.isneginf(), 0.0, p_NC.exp() * (p_NC - q_NC)).sum(dim=1)


def _with_rest(logprobs_NK: Tensor) -> Tensor:
    """[N, K + 1]: with the log probability of everything else, which rounding may leave slightly below nothing."""
    rest_N = (1.0 - logprobs_NK.exp().sum(dim=1)).clamp_min(1e-12).log()
    return torch.cat([logprobs_NK, rest_N.unsqueeze(1)], dim=1)
