"""Several teachers' stored distributions of the same tokens as one: their weighted mean, in the form of any other.

In: signals of the same T tokens, one for each teacher, and their weights. Out: signals of sum_i w_i p_i. Cost: a sort
of all entries.

The support is the union of the supports. An id that a teacher stores adds w_i p_i(v), exactly. An id of the union that
a teacher does not store is in that teacher's tail: where it was drawn, each of n draws adds w_i tail_i / n, which is
unbiased; where there are no draws its mass stays in the tail. Support and tail together have mass 1. Draws outside the
union remain draws, unless a teacher without draws has left more than MAX_UNDRAWN_FRAC of the tail: nobody knows where
that mass is, so the tail is one bucket. They stand for unequal masses, so as many are drawn from them again, by
systematic resampling, each of which then stands for an equal share: the expected mass of every id is unchanged.

    T tokens, E entries of all teachers (flat), U entries of the union, D draws outside it, M most of a token
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Draws, Int32, Int64, Signals, ragged_to_dense

Float64 = npt.NDArray[np.float64]
MAX_UNDRAWN_FRAC = 1 / 20
"""Share of a tail that the draws of others may stand for: as much as stored codes round (teachers whose support reaches
the nucleus have no draws either, and leave a thousandth)."""
RESAMPLED_TOGETHER = 512
"""Tokens: the comparison below takes tokens x draws x draws."""


def mix(teachers: Sequence[Signals], weights: Sequence[float], generator: np.random.Generator) -> Signals:
    """The mixture of `teachers` with `weights`, which are above 0 and need not add up to 1.

    Ranks are those of the first teacher; the entropy counts the tail as one outcome. Log-partitions do not mix.
    """
    shares = np.array(weights, np.float64) / np.sum(weights)
    num_tokens = len(teachers[0].topk_n_T)
    assert all(len(one.topk_n_T) == num_tokens for one in teachers)
    token_E = np.concatenate([np.repeat(np.arange(num_tokens), one.topk_n_T) for one in teachers])
    id_E = np.concatenate([one.topk_ids_N for one in teachers]).astype(np.int64)
    mass_E = np.concatenate(
        [share * np.exp(one.topk_logprobs_N, dtype=np.float64) for share, one in zip(shares, teachers, strict=True)]
    )
    # Token and id as one number that sorts by both: ids are below 2^31.
    key_U, entry_E = np.unique(token_E << 32 | id_E, return_inverse=True)
    mass_U = np.bincount(entry_E, mass_E, len(key_U)).astype(np.float64)
    tail_T = _total(
        [share * np.exp(one.tail_logmass_T, dtype=np.float64) for share, one in zip(shares, teachers, strict=True)]
    )
    draws = None
    if any(one.draws is not None for one in teachers):
        token_D, id_D, mass_D, logprob_D = _all_draws(teachers, shares)
        key_D = token_D << 32 | id_D
        place_D = np.minimum(np.searchsorted(key_U, key_D), len(key_U) - 1)
        is_stored_D = key_U[place_D] == key_D
        mass_U += np.bincount(place_D[is_stored_D], mass_D[is_stored_D], len(key_U))
        moved_T = np.bincount(token_D[is_stored_D], mass_D[is_stored_D], num_tokens)
        # Rounding may have left the draws a little more than the tail.
        tail_T = np.maximum(tail_T - moved_T, 0.0)
        is_placed_T = _undrawn(teachers, shares) <= MAX_UNDRAWN_FRAC * tail_T
        outside = ~is_stored_D & is_placed_T[token_D]
        draws = _resampled(num_tokens, token_D[outside], id_D[outside], mass_D[outside], logprob_D[outside], generator)
    return _signals(teachers, shares, key_U, mass_U, tail_T, draws)


def _all_draws(teachers: Sequence[Signals], shares: Float64) -> tuple[Int64, Int64, Float64, Float64]:
    """Token, id, mass that it stands for and log probability in the mixture, of each draw of each teacher."""
    num_tokens = len(teachers[0].topk_n_T)
    tokens, ids, masses, probs = [], [], [], []
    # A token without draws has its mass repeated no times; the 1 only avoids a division by 0.
    for share, one in zip(shares, teachers, strict=True):
        found = one.draws if one.draws is not None else Draws.none(num_tokens)
        tokens.append(np.repeat(np.arange(num_tokens), found.n_T))
        ids.append(found.ids_D.astype(np.int64))
        mass_T = share * np.exp(one.tail_logmass_T, dtype=np.float64) / np.maximum(found.n_T, 1)
        masses.append(np.repeat(mass_T, found.n_T))
        probs.append(share * np.exp(found.logprobs_D, dtype=np.float64))
    token_D, id_D, prob_D = np.concatenate(tokens), np.concatenate(ids), np.concatenate(probs)
    # What a teacher gives a drawn id counts once, however often it drew it; what others give it is known if they drew
    # it too. A teacher that stores it would have put it into the union.
    teacher_D = np.repeat(np.arange(len(teachers)), [len(one) for one in tokens])
    key_D = token_D << 32 | id_D
    _, first = np.unique(np.stack([key_D, teacher_D]), axis=1, return_index=True)
    keys, number_D = np.unique(key_D, return_inverse=True)
    known = np.bincount(number_D[first], prob_D[first], len(keys))
    with np.errstate(divide="ignore"):
        return token_D, id_D, np.concatenate(masses), np.log(known)[number_D]


def _undrawn(teachers: Sequence[Signals], shares: Float64) -> Float64:
    """[T] mass of the tails that no draw stands for."""
    return _total(
        [
            share * np.exp(one.tail_logmass_T, dtype=np.float64) * (True if one.draws is None else one.draws.n_T == 0)
            for share, one in zip(shares, teachers, strict=True)
        ]
    )


def _resampled(
    num_tokens: int, token_D: Int64, id_D: Int64, mass_D: Float64, logprob_D: Float64, generator: np.random.Generator
) -> Draws:
    """As many draws of each token, of equal masses."""
    order = np.argsort(token_D, kind="stable")
    n_T = np.bincount(token_D, minlength=num_tokens).astype(np.int32)
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    offsets_T = generator.random(num_tokens)
    width = int(n_T.max(initial=0))
    if not width:
        return Draws.none(num_tokens)
    _, mass_TM = ragged_to_dense(n_T, id_D[order].astype(np.int32), mass_D[order].astype(np.float32), width)
    # Padding is -inf, as for log probabilities; a mass of nothing is 0.
    mass_TM = np.where(np.isfinite(mass_TM), mass_TM, 0.0).astype(np.float64)
    chosen = []
    for start in range(0, num_tokens, RESAMPLED_TOGETHER):
        part = slice(start, start + RESAMPLED_TOGETHER)
        reached_TM = mass_TM[part].cumsum(axis=1)
        n_T1 = n_T[part, None]
        # Points at equal distances over the masses laid end to end; each chooses the draw that it falls on.
        point_TM = (offsets_T[part, None] + np.arange(width)) / np.maximum(n_T1, 1) * reached_TM[:, -1:]
        index_TM = (point_TM[:, :, None] >= reached_TM[:, None, :]).sum(axis=2)
        index_TM = np.minimum(index_TM, np.maximum(n_T1 - 1, 0))
        chosen.append((starts_T[part, None] + index_TM)[np.arange(width) < n_T1])
    taken = order[np.concatenate(chosen)]
    return Draws(n_T, id_D[taken].astype(np.int32), logprob_D[taken].astype(np.float32))


def _signals(
    teachers: Sequence[Signals],
    shares: Float64,
    key_U: Int64,
    mass_U: Float64,
    tail_T: Float64,
    draws: Draws | None,
) -> Signals:
    token_U = key_U >> 32
    n_T: Int32 = np.bincount(token_U, minlength=len(tail_T)).astype(np.int32)
    order = np.lexsort((-mass_U, token_U))
    # Two teachers that each round up would pass 1 together.
    excess_T = np.maximum(np.bincount(token_U, mass_U, len(tail_T)) + tail_T, 1e-30)
    mass_U, tail_T = mass_U / excess_T[token_U], tail_T / excess_T
    with np.errstate(divide="ignore"):
        logprob_U, tail_logmass_T = np.log(mass_U), np.log(tail_T)
    entropy_T = -np.bincount(token_U, mass_U * np.where(mass_U > 0, logprob_U, 0.0), len(tail_T))
    entropy_T -= tail_T * np.where(tail_T > 0, tail_logmass_T, 0.0)
    said = [
        share * np.exp(one.sampled_logprob_T, dtype=np.float64) for share, one in zip(shares, teachers, strict=True)
    ]
    return Signals(
        topk_n_T=n_T,
        topk_ids_N=(key_U & 0xFFFFFFFF)[order].astype(np.int32),
        topk_logprobs_N=logprob_U[order].astype(np.float32),
        tail_logmass_T=tail_logmass_T.astype(np.float32),
        # About float32's smallest number above 0, so that the log is finite.
        sampled_logprob_T=np.log(np.maximum(_total(said), 1e-45)).astype(np.float32),
        sampled_rank_T=teachers[0].sampled_rank_T,
        entropy_T=entropy_T.astype(np.float32),
        draws=draws,
    )


def _total(parts: Sequence[Float64]) -> Float64:
    return np.asarray(np.stack(parts).sum(axis=0), np.float64)
