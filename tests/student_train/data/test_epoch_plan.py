"""The plan: every piece as often as it should be, packs that fit, an order that depends on seed and epoch alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import ConfigError
from stillroom.schema.records import Int32
from student_train.data.epoch_plan import EpochPlan, Pieces, PlanSpec, cut_chains, fill_packs, plan_epoch, repeat_counts

GOLDEN_ITEMS = [2, 3, 6, 11, 8, 1, 0, 10, 4, 9, 5, 7]
GOLDEN_OFFSETS = [0, 3, 4, 7, 9, 10, 11, 12]


def chains(num_chains: int, seed: int, max_tokens: int = 60, rows_per_group: int = 8) -> tuple[Int32, Int32, Int32]:
    rng = np.random.default_rng(seed)
    prompt_R = rng.integers(1, 10, num_chains).astype(np.int32)
    tokens_R = rng.integers(1, max_tokens, num_chains).astype(np.int32)
    return prompt_R, tokens_R, (np.arange(num_chains) // rows_per_group).astype(np.int32)


def plan_of(num_chains: int, spec: PlanSpec, epoch: int = 0, copies_R: Int32 | None = None) -> tuple[Pieces, EpochPlan]:
    prompt_R, tokens_R, group_R = chains(num_chains, 1)
    pieces = cut_chains(prompt_R, tokens_R, spec.sequence_tokens, spec.long_chains)
    return pieces, plan_epoch(pieces, group_R, copies_R, spec, epoch)


def totals(pieces: Pieces, plan: EpochPlan) -> Int32:
    return np.array([pieces.num_tokens_P[plan.pack(index)].sum() for index in range(plan.num_packs)], np.int32)


@settings(max_examples=60, deadline=None)
@given(
    num_chains=st.integers(1, 200),
    pack_tokens=st.integers(16, 300),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    lanes=st.integers(1, 5),
    window=st.integers(1, 9),
    policy=st.sampled_from(["truncate", "skip", "split"]),
)
def test_each_piece_once_in_packs_that_fit(
    num_chains: int, pack_tokens: int, seed: int, epoch: int, lanes: int, window: int, policy: str
) -> None:
    spec = PlanSpec(pack_tokens, seed=seed, long_chains=policy, lanes=lanes, window_groups=window)  # type: ignore[arg-type]
    pieces, plan = plan_of(num_chains, spec, epoch)
    assert sorted(plan.items_I.tolist()) == list(range(len(pieces.row_P)))
    sizes = totals(pieces, plan)
    assert (sizes <= pack_tokens).all()
    assert (sizes > 0).all()


def test_the_plan_is_pure_and_changes_with_seed_and_epoch() -> None:
    first = plan_of(100, PlanSpec(128))[1]
    again = plan_of(100, PlanSpec(128))[1]
    assert first.items_I.tolist() == again.items_I.tolist()
    assert first.offsets.tolist() == again.offsets.tolist()
    assert first.items_I.tolist() != plan_of(100, PlanSpec(128), epoch=1)[1].items_I.tolist()
    assert first.items_I.tolist() != plan_of(100, PlanSpec(128, seed=1))[1].items_I.tolist()


def test_the_plan_never_changes_between_versions() -> None:
    """A run resumed with a newer program must find its chains where they were: these numbers may not change."""
    prompt_R, tokens_R = np.full(12, 2, np.int32), np.arange(1, 13, dtype=np.int32)
    pieces = cut_chains(prompt_R, tokens_R, 20, "truncate")
    plan = plan_epoch(pieces, np.arange(12, dtype=np.int32) // 2, None, PlanSpec(20, lanes=2, window_groups=2), 3)
    assert plan.items_I.tolist() == GOLDEN_ITEMS
    assert plan.offsets.tolist() == GOLDEN_OFFSETS


def test_packs_are_well_filled() -> None:
    spec = PlanSpec(512)
    pieces, plan = plan_of(20_000, spec)
    assert totals(pieces, plan).mean() > 0.98 * spec.pack_tokens


def test_a_rank_of_a_world_that_divides_the_lanes_reads_only_its_share_of_groups() -> None:
    spec = PlanSpec(256, lanes=4, window_groups=4)
    pieces, plan = plan_of(8000, spec)
    group_R = chains(8000, 1)[2]
    lane_groups = [
        set(group_R[pieces.row_P[np.concatenate([plan.pack(i) for i in range(rank, plan.num_packs * 9 // 10, 4)])]])
        for rank in range(4)
    ]
    shared = sum(len(a & b) for n, a in enumerate(lane_groups) for b in lane_groups[:n])
    assert shared == 0


def test_reading_is_local_and_the_order_is_shuffled() -> None:
    spec = PlanSpec(256, lanes=1, window_groups=4)
    pieces, plan = plan_of(8000, spec)
    group_I = chains(8000, 1)[2][pieces.row_P[plan.items_I]]
    first_I: dict[int, int] = {}
    last_I: dict[int, int] = {}
    for place, group in enumerate(group_I.tolist()):
        first_I.setdefault(group, place)
        last_I[group] = place
    spans = np.array([last_I[group] - first_I[group] for group in first_I])
    # A window of four groups holds 32 chains; the pool adds eight packs' worth of about eight chains.
    assert spans.mean() < 3 * (32 + 64)
    # Neighbours on disk seldom stay neighbours.
    assert (np.abs(np.diff(pieces.row_P[plan.items_I])) == 1).mean() < 0.1


def test_fill_packs_starts_with_the_oldest_and_adds_the_longest_that_fits() -> None:
    taken, sizes = fill_packs(np.array([5, 4, 3, 6, 2], np.int32), 10)
    assert sizes.tolist() == [2, 2, 1]
    assert taken.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("weight", [0.25, 0.3, 1.0, 1.5, 3.0])
def test_cache_weights_repeat_and_subsample_evenly(weight: float) -> None:
    cache_R = np.array([0] * 30 + [1] * 101)
    total = np.zeros(131, np.int64)
    for epoch in range(20):
        copies_R = repeat_counts(cache_R, [2.0, weight], 7, epoch)
        assert copies_R is not None
        assert (copies_R[:30] == 2).all()
        assert set(copies_R[30:].tolist()) <= {int(np.floor(weight)), int(np.ceil(weight))}
        assert abs(copies_R[30:].sum() - weight * 101) <= 1
        total += copies_R
    assert (np.abs(total[30:] - 20 * weight) <= 1).all()


def test_weights_of_one_need_no_counts() -> None:
    assert repeat_counts(np.zeros(5, np.int32), [1.0, 1.0], 0, 0) is None


def test_a_chain_of_weight_three_is_read_three_times_an_epoch() -> None:
    copies_R = np.array([3, 0] * 50, np.int32)
    pieces, plan = plan_of(100, PlanSpec(128), copies_R=copies_R)
    assert np.bincount(pieces.row_P[plan.items_I], minlength=100).tolist() == copies_R.tolist()


def test_an_epoch_without_items_has_no_packs() -> None:
    assert plan_of(10, PlanSpec(128), copies_R=np.zeros(10, np.int32))[1].num_packs == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_tokens": 1}, "pack_tokens=1"),
        ({"max_tokens": 200}, "outside 2..pack_tokens=128"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"long_chains": "drop"}, "choose one of truncate, skip, split"),
        ({"lanes": 0}, "lanes=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanSpec(**{"pack_tokens": 128, **changes})  # type: ignore[arg-type]
