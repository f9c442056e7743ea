"""Drawn tails and log-partitions from the shard to the loss: each loss token meets its own, also when shuffled and
packed, and the losses that read them equal dense ones.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.errors import ConfigError
from stillroom.schema.records import Signals
from student_train.config.stage import StageConfig
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.pack import Pack, TargetView, to_torch
from student_train.data.selection import Selection
from student_train.data.stream import PackStream
from student_train.losses.divergences import ForwardKL
from student_train.losses.fused_head import fused_loss
from student_train.losses.mix import LossMix
from student_train.losses.targets import SparseTargets, TailDraws
from student_train.planning.checks import check_temperature
from student_train.schedule import mix_at, target_view, temperature_at, temperature_steps
from tests.helpers.caches import SyntheticCache, make_cache

TEMPERATURES = (0.5, 2.0)


def selection_of(folder: Path, caches: list[SyntheticCache]) -> Selection:
    return freeze(folder / "selection.parquet", SelectionRequest([CacheSource(cache.root) for cache in caches]))


@pytest.fixture
def cache(tmp_path: Path) -> SyntheticCache:
    return make_cache(tmp_path / "cache", num_chains=30, max_support=3, draws=2, temperatures=TEMPERATURES)


def token_signals(cache: SyntheticCache, selection: Selection, row: int, token: int) -> Signals:
    (chain,) = [one for one in cache.chains if int(one.sample_id[:16], 16) == int(selection.key_R[row])]
    return chain.signals.slice(token, token + 1)


@pytest.mark.parametrize("long_chains", ["truncate", "split"])
def test_every_loss_token_gets_its_own_draws_and_partitions(
    tmp_path: Path, cache: SyntheticCache, long_chains: str
) -> None:
    selection = selection_of(tmp_path, [cache])
    spec = PlanSpec(pack_tokens=64, seed=3, max_tokens=40, long_chains=long_chains)  # type: ignore[arg-type]
    seen = 0
    with PackStream(selection, spec, packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            assert pack.draw_ids_NM is not None
            assert pack.draw_weights_NM is not None
            assert pack.log_partitions_NS is not None
            for place, (row, token) in enumerate(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True)):
                wanted = token_signals(cache, selection, row, token)
                assert wanted.draws is not None
                assert wanted.log_partitions_TS is not None
                n = int(wanted.draws.n_T[0])
                assert pack.draw_ids_NM[place, :n].tolist() == wanted.draws.ids_D.tolist()
                weight = np.exp(wanted.tail_logmass_T[0]) / n if n else 0.0
                np.testing.assert_allclose(pack.draw_weights_NM[place], [weight] * n + [0] * (2 - n), rtol=1e-6)
                np.testing.assert_array_equal(pack.log_partitions_NS[place], wanted.log_partitions_TS[0])
                seen += 1
    assert seen > 300


def test_a_cache_without_draws_beside_one_with_them_leaves_the_tail_in_a_bucket(
    tmp_path: Path, cache: SyntheticCache
) -> None:
    other = make_cache(tmp_path / "other", num_chains=8, max_support=3, seed=1, temperatures=(2.0,))
    stage = StageConfig.model_validate({"learning_rate": 1e-3, "losses": {"forward_kl": 1.0}, "temperature": 0.5})
    mix = mix_at(stage, 0, 10)
    alone = selection_of(tmp_path, [cache])
    assert target_view(stage, alone.header.temperatures, mix, 0, 10, has_draws=alone.header.draws > 0).with_draws
    check_temperature(mix, alone, stage)
    (tmp_path / "both").mkdir()
    both = selection_of(tmp_path / "both", [cache, other])
    assert (both.header.draws, both.header.temperatures) == (0, [2.0])
    with pytest.raises(ConfigError, match=r"temperature 0.5 .* hold 2: .*capture.temperatures: \[0.5\]"):
        check_temperature(mix, both, stage)
    # Partitions of a temperature that both hold are read from the right column of each.
    with PackStream(both, PlanSpec(pack_tokens=64), packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            assert pack.draw_ids_NM is None
            assert pack.log_partitions_NS is not None
            np.testing.assert_allclose(pack.log_partitions_NS[:, 0], pack.token_N / 64 + 2.0, rtol=1e-6)


def test_a_schedule_steps_through_stored_temperatures() -> None:
    stage = StageConfig.model_validate(
        {"learning_rate": 1e-3, "temperature": {"kind": "exponential", "start": 5.0, "end": 1.0}}
    )
    stored = [2.0, 4.0]
    values = [temperature_at(stage, stored, step, 9) for step in range(9)]
    # 5, 4.09, 3.34, 2.73, 2.24, 1.83, 1.50, 1.22, 1: the nearest by ratio among 1, 2 and 4.
    assert values == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert temperature_steps(stage, stored, 9) == [(0, 4.0), (3, 2.0), (7, 1.0)]
    mix = mix_at(stage, 0, 9)
    views = [target_view(stage, stored, mix, step, 9, has_draws=False) for step in (0, 3, 8)]
    assert [view.partition for view in views] == [1, 0, None]


def dense_targets(num_tokens: int, vocab_size: int, k: int, tau: float) -> tuple[SparseTargets, torch.Tensor]:
    """Targets that hold k exact entries and the log-partition of a random teacher, and the teacher's log p [N, V]."""
    logp_NV = torch.randn(num_tokens, vocab_size, dtype=torch.float64).mul(2.0).log_softmax(1)
    top = logp_NV.topk(k, dim=1)
    tail_N = torch.log1p(-top.values.exp().sum(1))
    targets = SparseTargets(top.indices, top.values, tail_N, top.indices[:, 0])
    return targets.at_temperature(tau, (logp_NV / tau).logsumexp(1)), logp_NV


def test_sampled_tails_average_to_the_dense_loss_and_gradient_at_any_temperature() -> None:
    torch.manual_seed(0)
    for tau in (1.0, 2.0):
        targets, logp_NV = dense_targets(3, 12, 3, tau)
        rest_NV = logp_NV.exp().scatter(1, targets.ids_NK, 0.0)
        # Every id of the tail drawn once, weighted by its own probability: the expectation itself.
        off = [torch.nonzero(row)[:, 0] for row in rest_NV]
        ids_NM = torch.stack(off)
        draws = TailDraws(ids_NM, rest_NV.gather(1, ids_NM), logp_NV.gather(1, ids_NM))
        hybrid = SparseTargets(
            targets.ids_NK,
            targets.logprobs_NK,
            targets.tail_logmass_N,
            targets.sampled_ids_N,
            draws=draws,
            temperature=tau,
            log_partition_N=targets.log_partition_N,
        )
        hidden_NH = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
        mix = LossMix((ForwardKL(),))
        sums = fused_loss(hidden_NH, torch.eye(12, dtype=torch.float64), hybrid, mix)
        (gradient_NH,) = torch.autograd.grad(sums.loss_sum, hidden_NH)
        teacher_NV, student_NV = (logp_NV / tau).log_softmax(1), (hidden_NH / tau).log_softmax(1)
        dense = tau**2 * (teacher_NV.exp() * (teacher_NV - student_NV)).sum()
        (wanted_NH,) = torch.autograd.grad(dense, hidden_NH)
        torch.testing.assert_close(sums.loss_sum, dense.detach())
        torch.testing.assert_close(gradient_NH, wanted_NH)


def test_a_token_without_draws_has_the_tail_bucket() -> None:
    torch.manual_seed(1)
    targets, _ = dense_targets(4, 12, 3, 1.0)
    none = TailDraws(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1), torch.full((4, 1), -torch.inf))
    hybrid = SparseTargets(
        targets.ids_NK, targets.logprobs_NK, targets.tail_logmass_N, targets.sampled_ids_N, draws=none
    )
    hidden_NH = torch.randn(4, 12, dtype=torch.float64)
    weight = torch.eye(12, dtype=torch.float64)
    sampled = fused_loss(hidden_NH, weight, hybrid, LossMix((ForwardKL(),)))
    bucket = fused_loss(hidden_NH, weight, targets, LossMix((ForwardKL(tail="bucket"),)))
    torch.testing.assert_close(sampled.loss_sum, bucket.loss_sum)


def test_views_carry_what_a_mix_needs(tmp_path: Path, cache: SyntheticCache) -> None:
    selection = selection_of(tmp_path, [cache])
    with PackStream(selection, PlanSpec(pack_tokens=64), packs_per_step=1, num_epochs=1) as stream:
        packs: list[Pack] = list(itertools.islice(stream, 2))
    plain = to_torch(packs[0], "cpu").targets
    assert (plain.draws, plain.temperature) == (None, 1.0)
    seen = to_torch(packs[0], "cpu", TargetView(with_draws=True, temperature=2.0, partition=1)).targets
    assert seen.draws is not None
    assert seen.log_partition_N is not None
    assert packs[0].log_partitions_NS is not None
    np.testing.assert_array_equal(seen.log_partition_N.numpy(), packs[0].log_partitions_NS[:, 1])
