"""Several teachers on one token against dense mixtures: exact where they store, unbiased where they drew.

T tokens, V vocabulary, K support, M draws
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.schema.records import Draws, Signals
from student_train.data.mixture import mix
from student_train.data.pack import dense_draws
from student_train.losses.divergences import ForwardKL
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix
from student_train.losses.targets import SparseTargets, TailDraws

T, V, H = 5, 40, 6
SHARES = (0.3, 0.7)
Dense = npt.NDArray[np.float64]


def dense(seed: int) -> Dense:
    """Probabilities [T, V], sharper with each token."""
    logits_TV = np.random.default_rng(seed).normal(size=(T, V)) * np.arange(1, T + 1)[:, None]
    p_TV = np.exp(logits_TV)
    return np.asarray(p_TV / p_TV.sum(axis=1, keepdims=True))


def stored(p_TV: Dense, k: int, num_draws: int = 0, seed: int = 0) -> Signals:
    """The top `k` of each token, its tail and draws from it; the token that came is id 3."""
    ids_TK = np.argsort(-p_TV, axis=1)[:, :k]
    top_TK = np.take_along_axis(p_TV, ids_TK, axis=1)
    rest_TV = p_TV.copy()
    np.put_along_axis(rest_TV, ids_TK, 0.0, axis=1)
    tail_T = rest_TV.sum(axis=1)
    draws = None
    if num_draws:
        rng = np.random.default_rng(seed)
        drawn_TM = np.stack([rng.choice(V, num_draws, p=rest_V / rest_V.sum()) for rest_V in rest_TV])
        logprobs_TM = np.log(np.take_along_axis(p_TV, drawn_TM, axis=1))
        draws = Draws(
            np.full(T, num_draws, np.int32), drawn_TM.ravel().astype(np.int32), logprobs_TM.ravel().astype(np.float32)
        )
    with np.errstate(divide="ignore"):
        return Signals(
            topk_n_T=np.full(T, k, np.int32),
            topk_ids_N=ids_TK.ravel().astype(np.int32),
            topk_logprobs_N=np.log(top_TK).ravel().astype(np.float32),
            tail_logmass_T=np.log(tail_T).astype(np.float32),
            sampled_logprob_T=np.log(p_TV[:, 3]).astype(np.float32),
            sampled_rank_T=np.ones(T, np.int32),
            entropy_T=np.zeros(T, np.float32),
            draws=draws,
        )


def measure(signals: Signals) -> Dense:
    """Mass of every id [T, V], draws included; what stays in the tail of a token without draws is not placed."""
    token_N = np.repeat(np.arange(T), signals.topk_n_T)
    mass_TV = np.zeros((T, V))
    np.add.at(mass_TV, (token_N, signals.topk_ids_N), np.exp(signals.topk_logprobs_N, dtype=np.float64))
    if signals.draws is not None:
        token_D = np.repeat(np.arange(T), signals.draws.n_T)
        share_T = np.exp(signals.tail_logmass_T, dtype=np.float64) / np.maximum(signals.draws.n_T, 1)
        np.add.at(mass_TV, (token_D, signals.draws.ids_D), share_T[token_D])
    return mass_TV


def mixed(parts: list[Signals], seed: int = 0) -> Signals:
    return mix(parts, SHARES, np.random.default_rng(seed))


P, Q = dense(1), dense(2)
MIXTURE = SHARES[0] * P + SHARES[1] * Q


def test_whole_distributions_mix_exactly_and_reach_the_loss() -> None:
    signals = mixed([stored(P, V), stored(Q, V)])
    np.testing.assert_allclose(measure(signals), MIXTURE, atol=1e-5)
    np.testing.assert_allclose(np.exp(signals.sampled_logprob_T), MIXTURE[:, 3], rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    hidden_TH, weight_VH = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (T, V))
    ids_TK, logprobs_TK = signals.dense(V)
    targets = SparseTargets(
        torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK), torch.full((T,), -torch.inf), torch.full((T,), 3)
    )
    found = fused_loss(hidden_TH, weight_VH, targets, LossMix((ForwardKL(),))).loss_sum.item()
    log_q_TV = torch.log_softmax(hidden_TH @ weight_VH.t(), dim=1).numpy()
    assert found == pytest.approx(float((MIXTURE * (np.log(MIXTURE) - log_q_TV)).sum()), abs=1e-5)


def test_supports_without_draws_keep_the_rest_in_the_tail() -> None:
    first, second = stored(P, 4), stored(Q, 6)
    signals = mixed([first, second])
    known_TV = SHARES[0] * measure(first) + SHARES[1] * measure(second)
    np.testing.assert_allclose(measure(signals), known_TV, atol=1e-6)
    np.testing.assert_allclose(np.exp(signals.tail_logmass_T), 1.0 - known_TV.sum(axis=1), atol=1e-6)
    starts_T = np.cumsum(signals.topk_n_T) - signals.topk_n_T
    for start, n in zip(starts_T, signals.topk_n_T, strict=True):
        assert (np.diff(signals.topk_logprobs_N[start : start + n]) <= 0).all()


def test_a_teacher_mixed_with_itself_is_itself() -> None:
    one = stored(P, 5)
    signals = mixed([one, one])
    np.testing.assert_array_equal(signals.topk_ids_N, one.topk_ids_N)
    np.testing.assert_allclose(signals.topk_logprobs_N, one.topk_logprobs_N, atol=1e-5)
    np.testing.assert_allclose(signals.tail_logmass_T, one.tail_logmass_T, atol=1e-4)


def test_draws_are_unbiased() -> None:
    """Over redraws, mean mass of each id and mean of any function of ids are the dense mixture's, within five standard
    errors.
    """
    num_trials = 600
    masses = [
        measure(mixed([stored(P, 3, 4, seed), stored(Q, 4, 2, seed + num_trials)], seed)) for seed in range(num_trials)
    ]
    # A draw stands for 0.7 / 2 at most, so mass m has a variance of at most 0.35 m; rare ids may never have been drawn.
    spread_TV = np.sqrt(0.35 * MIXTURE / num_trials)
    assert (np.abs(np.mean(masses, axis=0) - MIXTURE) < 5 * spread_TV + 0.35 / num_trials).all()
    functions_VF = np.random.default_rng(3).normal(size=(V, 4))
    means_STF = np.asarray(masses) @ functions_VF
    error_TF = np.abs(means_STF.mean(axis=0) - MIXTURE @ functions_VF)
    assert (error_TF < 5 * means_STF.std(axis=0) / num_trials**0.5).all()
    np.testing.assert_allclose(np.sum(masses, axis=2), 1.0, atol=1e-5)


def test_a_tail_without_draws_is_not_placed_where_others_drew() -> None:
    """What the first teacher drew outside the union would otherwise stand for the second one's tail too."""
    num_trials = 200
    second = stored(Q, 4)
    found = [mixed([stored(P, 3, 4, seed), second], seed) for seed in range(num_trials)]
    masses_STV = np.array([measure(one) for one in found])
    tails_ST = np.exp([one.tail_logmass_T for one in found])
    for one in found:
        assert one.draws is not None
        assert not one.draws.n_T.any()
    np.testing.assert_allclose(masses_STV.sum(axis=2) + tails_ST, 1.0, atol=1e-5)
    # Ids of the second teacher's support: its own mass exactly, that of the first by its draws.
    token_N, id_N = np.repeat(np.arange(T), 4), second.topk_ids_N
    spread_N = masses_STV.std(axis=0)[token_N, id_N]
    error_N = np.abs(masses_STV.mean(axis=0) - MIXTURE)[token_N, id_N]
    assert (error_N < 5 * spread_N / num_trials**0.5 + 1e-3).all()
    # A teacher that has no draws because it has no tail leaves the others theirs.
    kept = mixed([stored(P, 3, 4), replace(second, tail_logmass_T=np.full(T, -np.inf, np.float32))])
    assert kept.draws is not None
    assert kept.draws.n_T.all()


def test_draws_know_the_probability_that_the_teachers_give_them() -> None:
    parts = [stored(P, 3, 4, 0), stored(Q, 3, 4, 1)]
    signals = mixed(parts)
    assert signals.draws is not None
    ids_TM, logprobs_TM, weights_TM = dense_draws(signals.draws, signals.tail_logmass_T)
    TailDraws(torch.from_numpy(ids_TM), torch.from_numpy(weights_TM), torch.from_numpy(logprobs_TM))
    drawn = [one.draws for one in parts if one.draws is not None]
    for token in range(T):
        for draw in range(int(signals.draws.n_T[token])):
            known = sum(
                share * p_TV[token, ids_TM[token, draw]] * (ids_TM[token, draw] in found.slice(token, token + 1).ids_D)
                for share, p_TV, found in zip(SHARES, (P, Q), drawn, strict=True)
            )
            assert logprobs_TM[token, draw] == pytest.approx(np.log(known), abs=1e-5)
