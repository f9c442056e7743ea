"""What the teacher said about N loss tokens, as tensors: the stored support, the mass outside it, the token it sampled.

In: decoded cache rows, shifted to the positions that predict them. Out: log probabilities in buckets at one
temperature. Cost: O(N K), nothing of vocabulary size.

    N loss tokens, K padded support, B = K + 1 buckets (support, then the tail), M draws from the tail

A teacher at temperature tau is p_v^(1/tau) / Z with Z = sum_v p_v^(1/tau) over the *whole* vocabulary. Only the teacher
knows Z, so it comes from the cache (`capture.temperatures`); renormalising the stored top k instead errs by 0.6 in
total variation at k=64, tau=2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.schema.records import Int64
from student_train.losses.divergences import NO_MASS, NOTHING_SPOKEN, Paired, Spoken
from student_train.losses.whole_teacher import WholeTeacher

MIN_TAIL_LOGMASS = -32.0
"""A tail stored as zero counts as e^-32, the smallest probability that the cache's 8-bit codes hold. Forward KL, JSD
and total variation move by less than 1e-12; the reverse KL stays finite."""

MIN_LEFT_FRAC = 2.0**-5
"""Share of a tail that always stays outside the drawn ids: a rounding error must not be infinitely surprising."""


@dataclass(frozen=True)
class TailDraws:
    """Tokens drawn from the teacher's tail, each standing for a share of its mass (Sparse Logit Sampling, 2503.16870).

    With n draws from the tail (probability proportional to p outside the exact support) each weighs tail mass / n, so
    that sum_S p f + sum_draws w f is an unbiased estimate of sum_v p_v f_v. Ids may repeat.

    Attributes:
        ids_NM: int32 or int64; padding holds any valid id with weight 0.
        weights_NM: float32, probability mass (at temperature 1) that the draw stands for.
        logprobs_NM: float32, natural log of the teacher's probability of the drawn token at temperature 1; padding is
            -inf.
    """

    ids_NM: Tensor
    weights_NM: Tensor
    logprobs_NM: Tensor

    def __post_init__(self) -> None:
        assert self.ids_NM.dim() == 2
        assert self.ids_NM.shape == self.weights_NM.shape == self.logprobs_NM.shape


@dataclass(frozen=True)
class TextChunks:
    """What the teacher gives the text between boundaries that its vocabulary and the student's have in common.

    Attributes:
        ids_N: int32 or int64, equal within a chunk, whose tokens stand together; -1 is outside of chunks.
        logprobs_N: float32, natural log of the teacher's probability of the token's whole chunk.
        cuts: ascending places, 0 and N among them, that separate no tokens of a chunk; numpy, so that no copy waits for
            a GPU. Parts of targets have none.
    """

    ids_N: Tensor
    logprobs_N: Tensor
    cuts: Int64 | None

    @staticmethod
    def of(ids_N: Tensor, logprobs_N: Tensor) -> TextChunks:
        """With the places to cut read off `ids_N`, which is on the CPU."""
        ids = ids_N.numpy()
        # Tokens that belong to no chunk (-1) may be cut from each other.
        inside = np.flatnonzero((ids[1:] != ids[:-1]) | (ids[1:] < 0)) + 1
        return TextChunks(ids_N, logprobs_N, np.concatenate([[0], inside, [len(ids)]]).astype(np.int64))


@dataclass(frozen=True)
class StartBuckets:
    """Log probabilities at temperature 1 of the student that the stage starts from, at the ids of the targets.

    Attributes:
        support_NK, draws_NM: of the stored and of the drawn ids; padding holds any number.
        rest_N: of all ids that are neither; -inf where there are none.
    """

    support_NK: Tensor
    draws_NM: Tensor | None
    rest_N: Tensor


@dataclass(frozen=True)
class ChainPairs:
    """Pairs of a right and a wrong chain. Both chains of a pair are whole among the N tokens.

    Attributes:
        ids_N: int64, number of the pair below N; tokens of no pair have any.
        sign_N: float32, 1 in the right chain, -1 in the wrong one, 0 in no pair.
    """

    ids_N: Tensor
    sign_N: Tensor

    def measured(self, sampled_N: Tensor, start_N: Tensor) -> Paired:
        """With each pair's margin; `sampled_N` and `start_N` are what student and start give the tokens that came."""
        sign_N = self.sign_N.to(sampled_N.dtype)
        zeros_N = torch.zeros_like(sampled_N)
        # Outside of pairs the start may be nan, which a sign of 0 would not remove.
        moved_N = (sign_N * (sampled_N - start_N.to(sampled_N.dtype))).where(sign_N != 0.0, 0.0)
        # Sum over both chains of a pair, given back to each of its tokens.
        margin_N = zeros_N.index_add(0, self.ids_N, moved_N)[self.ids_N]
        return Paired(sign_N, margin_N, zeros_N.index_add(0, self.ids_N, sign_N.abs())[self.ids_N])


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distributions of N loss tokens. Shapes are checked; values are trusted (the stream checks them).

    Attributes:
        ids_NK: int32 or int64 token ids in rank order. Padding slots repeat any valid id. K = 0: text alone.
        logprobs_NK: float32 natural logs of the teacher's probabilities at temperature 1; padding is -inf.
        tail_logmass_N: float32 natural log of the teacher's mass outside the stored support; may be -inf.
        sampled_ids_N: int64, the token that the teacher sampled, hence the next token of the text.
        weights_N: float32 weight of each token in every loss; None is 1.
        draws: sampled part of hybrid targets; `tail_logmass_N` is then the mass that the draws share.
        temperature: at which the distribution losses compare teacher and student (cross-entropies stay at 1).
        log_partition_N: float32, log sum_v p_v^(1/temperature), required when `temperature` is not 1.
        chunks: for losses on chunks of text.
        spoken: float32, what teacher, behaviour and start gave the sampled token.
        is_negative_N: bool, tokens of chains to move away from; None is none.
        start: for losses that compare with the student's start; at the ids of support and draws.
        pairs: for losses that compare chains; measured, for a part of targets.
        whole: whole distributions of some tokens, for losses with `tail: exact`.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logmass_N: Tensor
    sampled_ids_N: Tensor
    weights_N: Tensor | None = None
    draws: TailDraws | None = None
    temperature: float = 1.0
    log_partition_N: Tensor | None = None
    chunks: TextChunks | None = None
    spoken: Spoken = NOTHING_SPOKEN
    is_negative_N: Tensor | None = None
    start: StartBuckets | None = None
    pairs: ChainPairs | Paired | None = None
    whole: WholeTeacher | None = None

    def __post_init__(self) -> None:
        assert self.ids_NK.dim() == 2
        assert self.ids_NK.shape == self.logprobs_NK.shape
        spoken = (self.spoken.teacher_N, self.spoken.behaviour_N, self.spoken.start_N, self.is_negative_N)
        per_token = (self.tail_logmass_N, self.sampled_ids_N, self.weights_N, self.log_partition_N, *spoken)
        assert all(tensor is None or tensor.shape == (self.num_tokens,) for tensor in per_token)
        assert self.draws is None or self.draws.ids_NM.shape[0] == self.num_tokens
        assert self.chunks is None or self.chunks.ids_N.shape == self.chunks.logprobs_N.shape == (self.num_tokens,)
        assert self.temperature > 0.0
        assert self.temperature == 1.0 or self.log_partition_N is not None

    @property
    def num_tokens(self) -> int:
        return self.ids_NK.shape[0]

    @property
    def num_support(self) -> int:
        """K, the padded width of the support; 0 for text alone."""
        return self.ids_NK.shape[1]

    @property
    def cuts(self) -> Int64 | None:
        """Where these targets may be cut; None is everywhere."""
        return None if self.chunks is None else self.chunks.cuts

    @staticmethod
    def text_alone(ids_N: Tensor, weights_N: Tensor | None = None) -> SparseTargets:
        """Targets that hold nothing but the next token, int64 `ids_N`, for cross-entropy."""
        # Width 0 instead of None: all shapes below stay two-dimensional.
        empty_N0 = torch.empty(ids_N.shape[0], 0, device=ids_N.device)
        tail_N = torch.zeros(ids_N.shape[0], device=ids_N.device)
        return SparseTargets(empty_N0.long(), empty_N0, tail_N, ids_N, weights_N)

    def at_temperature(self, temperature: float, log_partition_N: Tensor | None) -> SparseTargets:
        """The same targets seen at another temperature, with the log-partition that the cache holds for it."""
        return replace(self, temperature=temperature, log_partition_N=log_partition_N)

    def with_chunks(self, chunks: TextChunks) -> SparseTargets:
        """The same targets with chunks of text, whose tensors move to the device of the others."""
        device = self.ids_NK.device
        moved = replace(chunks, ids_N=chunks.ids_N.to(device), logprobs_N=chunks.logprobs_N.to(device))
        return replace(self, chunks=moved)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        moved: SparseTargets = _map(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def narrow(self, start: int, stop: int) -> SparseTargets:
        """Tokens start..stop as views."""
        part: SparseTargets = _map(replace(self, whole=None), lambda tensor: tensor[start:stop])
        if self.whole is not None:
            part = replace(part, whole=self.whole.narrow(start, stop))
        # Cuts count from the first token of the whole, so parts have none.
        return part if part.chunks is None else replace(part, chunks=replace(part.chunks, cuts=None))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with `change` applied to every tensor in it; all have one entry a token."""
    if isinstance(value, Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{field.name: _map(getattr(value, field.name), change) for field in fields(value)})


def in_support(targets: SparseTargets) -> Tensor:
    """bool [N, K]: which slots are stored entries rather than padding."""
    return targets.logprobs_NK != -torch.inf


def teacher_buckets(targets: SparseTargets, dtype: torch.dtype) -> Tensor:
    """Log probabilities [N, K+1] of the support and, last, the tail, at the targets' temperature; padding is NO_MASS.

    At temperature 1 the tail is the stored one. At others it is what the support leaves of the exact partition; it is
    taken in float64, where 1 - sum still means something.
    """
    if targets.temperature == 1.0:
        support_NK, tail_N = targets.logprobs_NK, targets.tail_logmass_N
    else:
        support_NK = at_temperature(targets.logprobs_NK, targets)
        # Rounding may put the support's mass above 1; no tail at all is -inf here and MIN_TAIL_LOGMASS below.
        tail_N = torch.log1p(-support_NK.exp().sum(dim=1).clamp(max=1.0))
    tail_N1 = tail_N.clamp(min=MIN_TAIL_LOGMASS).unsqueeze(1)
    return torch.cat([support_NK.clamp(min=NO_MASS), tail_N1.to(support_NK.dtype)], dim=1).to(dtype)


def draws_at_temperature(targets: SparseTargets, draws: TailDraws, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights_NM, logprobs_NM) of the draws at the targets' temperature; padding has weight 0 and NO_MASS.

    They were drawn at temperature 1, so at another one each weighs w * p_tau(v) / p_1(v) (importance sampling).
    """
    logprobs_NM = draws.logprobs_NM.clamp(min=NO_MASS)
    if targets.temperature == 1.0:
        return draws.weights_NM.to(dtype), logprobs_NM.to(dtype)
    at_tau_NM = at_temperature(logprobs_NM, targets)
    # Padding has no weight, and exp(NO_MASS) is 0.
    ratio_NM = torch.where(draws.weights_NM > 0, at_tau_NM - logprobs_NM, NO_MASS).exp()
    weights_NM = draws.weights_NM * ratio_NM
    return weights_NM.to(dtype), at_tau_NM.to(dtype)


def distinct_draws(targets: SparseTargets, draws: TailDraws) -> Tensor:
    """bool [N, M]: the first draw of each id, which is a further entry of the support; padding and repeats are not."""
    # Padding repeats a valid id, so equality alone would take it for a stored one.
    stored_NKM = (targets.ids_NK.unsqueeze(2) == draws.ids_NM.unsqueeze(1)) & in_support(targets).unsqueeze(2)
    is_real_NM = (draws.weights_NM > 0.0) & ~stored_NKM.any(dim=1)
    # Padding and stored ids become -1, which no real id equals and `is_first_NM` leaves out.
    ids_NM, order_NM = torch.where(is_real_NM, draws.ids_NM.long(), -1).sort(dim=1, stable=True)
    is_first_NM = ids_NM >= 0
    is_first_NM[:, 1:] &= ids_NM[:, 1:] != ids_NM[:, :-1]
    return torch.zeros_like(is_first_NM).scatter(1, order_NM, is_first_NM)


def split_tail(teacher_NB: Tensor, drawn_logprobs_NM: Tensor) -> Tensor:
    """Log probabilities [N, K+M+1] of support, drawn ids and, last, what is left of the tail in `teacher_NB` [N, K+1].

    `drawn_logprobs_NM` is NO_MASS where `distinct_draws` is False. Stored codes round each entry by up to a twentieth,
    so that drawn ids may seem to hold more than the tail: then a MIN_LEFT_FRAC of it is left.
    """
    # float64: what is left is a small difference of nearly equal masses.
    tail_N1 = teacher_NB[:, -1:].double().exp()
    left_N1 = tail_N1 - drawn_logprobs_NM.double().exp().sum(dim=1, keepdim=True)
    left_N1 = torch.maximum(left_N1, MIN_LEFT_FRAC * tail_N1).log().clamp(min=NO_MASS)
    return torch.cat([teacher_NB[:, :-1], drawn_logprobs_NM, left_N1.to(teacher_NB.dtype)], dim=1)


def at_temperature(logprobs_NX: Tensor, targets: SparseTargets) -> Tensor:
    """float64 log p_tau = log p / tau - log Z of log probabilities at temperature 1."""
    assert targets.log_partition_N is not None
    return logprobs_NX.double() / targets.temperature - targets.log_partition_N.double().unsqueeze(1)
