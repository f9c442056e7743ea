"""Codes of states and attention, and the reader of feature sets."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.feature_codec import VectorCodec, attention_token_bytes, decode_attention, encode_attention
from stillroom.cache.features import FeatureParts, FeatureSet, Head
from stillroom.cache.shards import read_row_group
from stillroom.errors import CorruptError, DataError
from stillroom.schema.records import Float32
from teacher_cache.states.engine import Wanted
from teacher_cache.states.fitting import error_frac, fit_codec, head_metric
from tests.helpers.caches import make_cache
from tests.helpers.feature_sets import add_features, expected


def states(num: int = 400, width: int = 24, rank: int = 24) -> Float32:
    """States of low rank with an outlier channel."""
    rng = np.random.default_rng(0)
    made = rng.standard_normal((num, rank)) @ rng.standard_normal((rank, width)) + 3
    made[:, 5] *= 100
    return made.astype(np.float32)


@pytest.mark.parametrize(("bits", "most"), [(8, 1e-4), (4, 4e-2)])
def test_codes_keep_states_whatever_their_outliers(bits: int, most: float) -> None:
    x = states()
    codec, lost_frac = fit_codec(x, bits, None)
    data = codec.encode(x)
    assert lost_frac == 0
    assert len(data) == len(x) * codec.token_bytes == len(x) * (2 + 24 * bits // 8)
    error_D = np.square(codec.decode(data, len(x)) - x).mean(axis=0) / np.square(x).mean(axis=0)
    # Channel by channel: the outlier must not cost the others their precision.
    assert error_D.max() < most


def test_a_basis_of_the_true_rank_loses_nothing_but_rounding() -> None:
    x = states(rank=6)
    codec, lost_frac = fit_codec(x, 8, 6)
    assert lost_frac < 1e-9
    decoded = codec.decode(codec.encode(x), len(x))
    assert np.square(decoded - x).sum() / np.square(x - x.mean(axis=0)).sum() < 1e-3
    assert codec.token_bytes == 8


def test_a_metric_keeps_the_directions_that_it_weighs() -> None:
    x, rng = states(), np.random.default_rng(1)
    directions_KD = rng.standard_normal((3, 24))
    metric = directions_KD.T @ directions_KD
    errors = []
    for one in (None, metric):
        codec, _ = fit_codec(x, 8, 4, one)
        errors.append(np.square((codec.decode(codec.encode(x), len(x)) - x) @ directions_KD.T).mean())
    assert errors[1] < 0.1 * errors[0]


def test_a_channel_that_wakes_after_calibration_costs_the_others_little() -> None:
    x = states()
    seen = x.copy()
    seen[:, 3] = 0
    codec, _ = fit_codec(seen, 8, None)
    decoded = codec.decode(codec.encode(x), len(x))
    assert (np.square(decoded - x).mean(axis=0) < 1e-2 * np.square(x).mean(axis=0)).all()


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("rank", [None, 4])
def test_states_that_are_all_alike_have_finite_losses(value: float, rank: int | None) -> None:
    x = np.full((50, 24), value, np.float32)
    codec, lost_frac = fit_codec(x, 8, rank)
    assert (lost_frac, error_frac(codec, x)) in [(0, 0), (0, 1)]
    np.testing.assert_allclose(codec.decode(codec.encode(x), 50), x, rtol=0.01)


def test_states_far_beyond_calibration_saturate() -> None:
    codec = VectorCodec(8, np.ones(4, np.float32))
    x = np.array([[1e9, 1, -1e9, 0], [1, 2, 3, 4]], np.float32)
    limit = 127 * np.finfo(np.float16).max.astype(np.float32)
    decoded = codec.decode(codec.encode(x), 2)
    np.testing.assert_allclose(decoded, [[limit, 0, -limit, 0], x[1]], atol=0.02)


def test_the_metric_is_the_second_derivative_of_the_divergence() -> None:
    """With bias, scale and cap; and no metric at all, where the teacher is certain, still makes a basis."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 6)).astype(np.float32), rng.standard_normal((9, 6)).astype(np.float32)
    head = Head(weight, rng.standard_normal(9).astype(np.float32), 1.5, 2.0)
    metric = head_metric(x, head)
    step = 1e-2 * rng.standard_normal(6).astype(np.float32)
    log_p, log_q = (z - np.log(np.exp(z).sum()) for z in (head.logits(one)[0].astype(float) for one in (x, x + step)))
    assert step @ metric @ step / 2 == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=0.05)
    certain = head_metric(np.ones((40, 6), np.float32), Head(1e4 * weight, None, 1.0, None))
    codec, _ = fit_codec(states(width=6), 8, 3, certain)
    assert np.isfinite(codec.decode(codec.encode(states(width=6)), 400)).all()


def test_codes_of_another_length_are_refused() -> None:
    codec = VectorCodec(8, np.ones(4, np.float32))
    with pytest.raises(CorruptError, match="11 bytes, 12 expected for 2 positions"):
        codec.decode(b"x" * 11, 2)


@pytest.mark.parametrize("num_context", [40, 70_000])
def test_attention_sums_to_one_and_keeps_its_keys(num_context: int) -> None:
    rng = np.random.default_rng(0)
    weights = -np.sort(-rng.dirichlet(np.full(8, 0.3), (5, 2)), axis=-1)[..., :3].astype(np.float32)
    keys = rng.integers(0, num_context, (5, 2, 3)).astype(np.int32)
    data = encode_attention(keys, weights, num_context)
    assert len(data) == 5 * attention_token_bytes(2, 3, num_context)
    heads = decode_attention(data, 5, 2, 3, num_context)
    for h, head in enumerate(heads):
        assert (head.keys_PM == keys[:, h]).all()
        np.testing.assert_allclose(head.weights_PM, weights[:, h], atol=6e-3)
        np.testing.assert_allclose(head.weights_PM.sum(axis=1) + head.rest_P, 1, rtol=1e-6)


def test_the_reader_finds_every_chain_by_key(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=30)
    result = add_features(cache.root)
    assert (result.num_chains, result.stopped) == (30, None)
    opened = FeatureSet.open(cache.root)
    assert (opened.layers, opened.heads[0][0], len(opened.heads), opened.num_keys) == ((1, 2), 2, 2, 3)
    rows = opened.read([chain.sample_id for chain in cache.chains])
    made = expected(cache.root, Wanted(True, (1, 2), (2,), 3))
    assert rows.keys() == made.keys() == set(opened.sample_ids())
    for sample_id, (chain, true) in made.items():
        row = rows[sample_id]
        assert row.chain_id == chain.chain_id
        assert row.hidden_PD is not None
        assert true.hidden_PD is not None
        assert (row.positions_P == np.arange(len(chain.token_ids))).all()
        np.testing.assert_allclose(row.hidden_PD[:, 1:], true.hidden_PD[:, 1:], atol=0.06)
        # Half the rank of noise keeps about half of it: enough to tell one token from another.
        noise = row.layers[2][:, 1:], true.layers[2][:, 1:]
        assert np.square(noise[0] - noise[1]).mean() < 0.75 * np.square(noise[1]).mean()
        for layer, head in opened.heads:
            assert (row.attention[layer, head].keys_PM == true.attention[layer].keys_PHM[:, head]).all()
    basis = opened.basis(2)
    assert basis is not None
    assert opened.basis("hidden") is None
    sample_id = cache.chains[7].sample_id
    coefficients = opened.read([sample_id], expand=False)[sample_id].layers[2]
    np.testing.assert_allclose(coefficients @ basis.vectors_RD + basis.mean_D, rows[sample_id].layers[2], atol=1e-4)


def test_threads_read_the_columns_that_they_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c", num_chains=30)
    add_features(cache.root)
    ids = [chain.sample_id for chain in cache.chains]
    whole = FeatureSet.open(cache.root).read(ids, expand=False)
    opened, asked = FeatureSet.open(cache.root), set[str]()

    def noted(file: Any, index: int, columns: Sequence[str], where: str) -> Any:
        asked.update(columns)
        return read_row_group(file, index, columns, where)

    monkeypatch.setattr("stillroom.cache.features.read_row_group", noted)
    parts = FeatureParts(hidden=False, layers=(2,), attention=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: opened.read_stored([one], parts)[one], ids * 3))
    assert "hidden" not in asked
    for row in found:
        true, part = whole[row.sample_id], row.decode(1, 3, expand=False)
        assert part.layers.keys() == {2}
        assert part.hidden_PD is None
        np.testing.assert_array_equal(part.layers[2], true.layers[2][1:3])
        np.testing.assert_array_equal(part.positions_P, true.positions_P[1:3])
        for head, one in part.attention.items():
            np.testing.assert_array_equal(one.weights_PM, true.attention[head].weights_PM[1:3])


def test_a_set_that_cannot_be_read_in_full_is_never_half_read(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=30)
    add_features(cache.root)
    opened = FeatureSet.open(cache.root)
    path = sorted((cache.root / "features").rglob("w*.parquet"))[-1]
    path.rename(path.with_suffix(".gone"))
    for _ in range(2):
        with pytest.raises(CorruptError, match="is registered but missing"):
            len(opened)


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", num_chains=4)
    with pytest.raises(DataError, match="has no features: `teacher-cache features CONFIG` adds them"):
        FeatureSet.open(cache.root)
    add_features(cache.root)
    with pytest.raises(DataError, match="has no feature set 'other': choose one of all_"):
        FeatureSet.open(cache.root, "other")
