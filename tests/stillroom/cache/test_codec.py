"""Codecs: what they promise, to the last id, and what they refuse."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.codec import decode, encode
from stillroom.errors import ConfigError, CorruptError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Capture, Message, Prompt, Signals
from stillroom.schema.tables import CODECS, list_of
from teacher_cache.engine.api import Finished, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.writer.rows import scalars_of, support_of


def capture_of(rng: np.random.Generator, num_tokens: int, k: int, vocab_size: int, scale: float = 4.0) -> Capture:
    """Rank-ordered top-k of random full distributions, float64 inside."""
    logits_TV = rng.normal(0, scale, (num_tokens, vocab_size))
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    ids_TK = np.argsort(-logprobs_TV, axis=1)[:, :k].astype(np.int32)
    topk_TK = np.take_along_axis(logprobs_TV, ids_TK, axis=1).astype(np.float32)
    rank_T = rng.integers(0, k, num_tokens)
    rows = np.arange(num_tokens)
    return Capture(ids_TK[rows, rank_T], topk_TK[rows, rank_T], (rank_T + 1).astype(np.int32), ids_TK, topk_TK)


def header(codec: str, **changes: Any) -> ShardHeader:
    fields: dict[str, Any] = {
        "codec": codec,
        "max_support": 64,
        "nucleus": 0.999,
        "entropy": "support",
        "vocab_size": 1 << 20,
        "run_id": "r",
        "worker": "w0",
        "teacher_fingerprint": "t",
        "tokenizer_fingerprint": "k",
        "template_fingerprint": "c",
    }
    return ShardHeader(**{**fields, **changes})


def table_of(codec: str, rows: list[Signals]) -> pa.Table:
    tokens = pa.array([np.zeros(len(row.topk_n_T), np.int32) for row in rows], list_of(pa.int32()))
    return pa.table({"token_ids": tokens, **encode(codec, rows)})


def kl_T(signals: Signals, decoded: Signals) -> Any:
    starts_T = np.cumsum(signals.topk_n_T) - signals.topk_n_T
    p_N = np.exp(signals.topk_logprobs_N.astype(np.float64))
    support_T = np.add.reduceat(p_N * (signals.topk_logprobs_N - decoded.topk_logprobs_N), starts_T)
    tail_T = np.exp(signals.tail_logmass_T.astype(np.float64))
    some_T = tail_T > 0
    return support_T + np.where(
        some_T, tail_T * (np.where(some_T, signals.tail_logmass_T - decoded.tail_logmass_T, 0)), 0
    )


def test_support_is_the_smallest_prefix_with_the_mass() -> None:
    rng = np.random.default_rng(0)
    capture = capture_of(rng, 300, 64, 500)
    signals = support_of(capture, 64, 0.9)
    cumulative = np.cumsum(np.exp(capture.topk_logprobs_TK.astype(np.float64)), axis=1)
    for t, n in enumerate(signals.topk_n_T):
        assert cumulative[t, n - 1] >= 0.9 or n == 64
        assert n == 1 or cumulative[t, n - 2] < 0.9
        np.testing.assert_allclose(np.exp(signals.tail_logmass_T[t]), 1 - cumulative[t, n - 1], rtol=1e-4, atol=1e-6)
    assert set(support_of(capture, 8, None).topk_n_T) == {8}


def test_a_tail_below_float_precision_keeps_the_captured_mass_that_was_cut() -> None:
    logprobs = np.array([[0.0, np.log(0.9e-9)]], np.float32)
    capture = Capture(
        np.array([5], np.int32),
        logprobs[:, 0],
        np.array([1], np.int32),
        np.array([[5, 6]], np.int32),
        logprobs,
    )
    assert support_of(capture, 2, 0.999).tail_logmass_T[0] == pytest.approx(np.log(0.9e-9), abs=1e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_keeps_ids_counts_and_rows(codec: str) -> None:
    rng = np.random.default_rng(1)
    rows = [support_of(capture_of(rng, n, 64, 300), 64, 0.999) for n in (1, 7, 40)]
    decoded, offsets = decode(table_of(codec, rows), header(codec), "shard")
    assert offsets.tolist() == [0, 1, 8, 48]
    for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
        part = decoded.slice(int(start), int(stop))
        np.testing.assert_array_equal(part.topk_n_T, row.topk_n_T)
        np.testing.assert_array_equal(part.topk_ids_N, row.topk_ids_N)
        np.testing.assert_array_equal(part.sampled_rank_T, row.sampled_rank_T)
        np.testing.assert_allclose(part.sampled_logprob_T, row.sampled_logprob_T, rtol=2**-10)


def test_f32_is_exact() -> None:
    signals = support_of(capture_of(np.random.default_rng(2), 50, 64, 300), 64, 0.999)
    decoded, _ = decode(table_of("topk-f32", [signals]), header("topk-f32"), "shard")
    for field in dataclasses.fields(Signals):
        np.testing.assert_array_equal(getattr(decoded, field.name), getattr(signals, field.name))


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0, 20.0])
def test_u8_keeps_the_promised_fidelity_and_sums_to_one(scale: float) -> None:
    signals = support_of(capture_of(np.random.default_rng(3), 2000, 64, 400, scale), 64, 0.999)
    decoded, _ = decode(table_of("topk-u8", [signals]), header("topk-u8"), "shard")
    starts_T = np.cumsum(decoded.topk_n_T) - decoded.topk_n_T
    mass_T = np.add.reduceat(np.exp(decoded.topk_logprobs_N.astype(np.float64)), starts_T)
    np.testing.assert_allclose(mass_T + np.exp(decoded.tail_logmass_T.astype(np.float64)), 1.0, atol=2e-6)
    divergence_T = kl_T(signals, decoded)
    assert divergence_T.mean() < 3e-4
    assert divergence_T.max() < 1e-3
    assert divergence_T.min() > -1e-6


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("last_id", [131_071, 131_072, 200_000, (1 << 20) - 1])
def test_ids_survive_to_the_last_of_the_vocabulary(codec: str, last_id: int) -> None:
    logprobs = np.log(np.array([[0.7, 0.2]], np.float32))
    capture = Capture(
        np.array([last_id], np.int32),
        logprobs[:, 0],
        np.array([1], np.int32),
        np.array([[last_id, 0]], np.int32),
        logprobs,
    )
    decoded, _ = decode(table_of(codec, [support_of(capture, 2, None)]), header(codec), "shard")
    assert decoded.topk_ids_N.tolist() == [last_id, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.sampled_from(CODECS))
def test_any_rows_round_trip(lengths: list[int], seed: int, codec: str) -> None:
    rng = np.random.default_rng(seed)
    rows = [support_of(capture_of(rng, n, 16, 40, float(rng.uniform(0.1, 30))), 16, 0.99) for n in lengths]
    decoded, offsets = decode(table_of(codec, rows), header(codec), "shard")
    assert np.diff(offsets).tolist() == lengths
    written = np.concatenate([row.topk_ids_N for row in rows])
    np.testing.assert_array_equal(decoded.topk_ids_N, written)
    assert np.isfinite(decoded.topk_logprobs_N).all()


@pytest.mark.parametrize(
    ("column", "index", "value", "problem"),
    [
        ("topk_n", 0, 0, "column topk_n"),
        ("topk_n", 0, 65, "column topk_n"),
        ("topk_n", 1, 3, "add up to"),
        ("topk_codes", 2, 256, "0..255"),
        ("topk_codes", 2, -1, "0..255"),
        ("tail_codes", 0, 300, "0..255"),
        ("topk_ids", 0, -5, "vocabulary"),
        ("topk_ids", 0, 1 << 20, "vocabulary"),
    ],
)
def test_lying_values_are_named_by_shard_row_and_column(column: str, index: int, value: int, problem: str) -> None:
    rows = [support_of(capture_of(np.random.default_rng(4), n, 8, 40), 8, None) for n in (3, 4)]
    table = table_of("topk-u8", rows)
    lists = table.column(column).to_pylist()
    lists[1][index] = value
    position = table.column_names.index(column)
    broken = table.set_column(position, column, pa.array(lists, table.column(column).type))
    with pytest.raises(CorruptError, match=rf"the-shard: row 1, column.*{problem}|the-shard: row 1, .*{problem}"):
        decode(broken, header("topk-u8"), "the-shard")


def test_lists_of_wrong_length_and_nulls_are_refused() -> None:
    table = table_of("topk-u8", [support_of(capture_of(np.random.default_rng(5), 3, 8, 40), 8, None)])
    for column in ("entropy", "sampled_rank", "tail_codes"):
        position = table.column_names.index(column)
        short = pa.array([[0, 0]], table.column(column).type)
        with pytest.raises(CorruptError, match=f"row 0, column {column}"):
            decode(table.set_column(position, column, short), header("topk-u8"), "s")
        null = pa.array([[0, None, 0]], list_of(table.column(column).type.value_type))
        with pytest.raises(CorruptError, match=f"column {column} holds nulls"):
            decode(table.set_column(position, column, null), header("topk-u8"), "s")
        with pytest.raises(CorruptError, match=f"column {column} is missing"):
            decode(table.drop_columns([column]), header("topk-u8"), "s")


def test_empty_tables_decode_to_nothing() -> None:
    for codec in CODECS:
        signals, offsets = decode(table_of(codec, []), header(codec), "s")
        assert offsets.tolist() == [0]
        assert len(signals.topk_ids_N) == 0


def test_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="topk-u9"):
        encode("topk-u9", [])


def test_scalars_are_means_of_the_uncoded_signals() -> None:
    capture = capture_of(np.random.default_rng(6), 20, 16, 40)
    scalars = scalars_of(support_of(capture, 16, None))
    probs = np.exp(capture.topk_logprobs_TK.astype(np.float64))
    assert scalars["mean_top1_prob"] == pytest.approx(probs[:, 0].mean(), rel=1e-6)
    assert scalars["mean_tail_mass"] == pytest.approx((1 - probs.sum(axis=1)).mean(), rel=1e-4)
    assert scalars["mean_support"] == 16


def test_dense_view_pads_with_no_mass() -> None:
    signals = support_of(capture_of(np.random.default_rng(7), 9, 16, 40), 16, 0.6)
    ids_TK, logprobs_TK = signals.dense(16)
    for t, n in enumerate(signals.topk_n_T):
        part = signals.slice(t, t + 1)
        np.testing.assert_array_equal(ids_TK[t, :n], part.topk_ids_N)
        np.testing.assert_array_equal(logprobs_TK[t, :n], part.topk_logprobs_N)
        assert np.isneginf(logprobs_TK[t, n:]).all()


def captured_with_draws(
    num_tokens: int, vocab_size: int, k: int, draws: int, temperatures: tuple[float, ...]
) -> Capture:
    engine = FakeEngine(vocab_size, k, draws=draws, temperatures=temperatures, mean_tokens=num_tokens)
    prompt = Prompt("p", (Message("user", "?"),), "s", "train")
    engine.submit(Request(prompt, [1], 0, 7, {}, 4000, "0" * 32))
    (outcome,) = engine.step()
    assert isinstance(outcome, Finished)
    return outcome.capture


@pytest.mark.parametrize("codec", CODECS)
def test_draws_and_log_partitions_round_trip_beside_the_support(codec: str) -> None:
    capture = captured_with_draws(300, 2000, 4, 3, (0.5, 2.0))
    written = support_of(capture, 4, 0.9)
    assert written.draws is not None
    bare = dataclasses.replace(capture, draw_ids_TM=None, draw_logprobs_TM=None, log_partitions_TS=None)
    plain = support_of(bare, 4, 0.9)
    own = header(codec).model_copy(update={"draws": 3, "temperatures": [0.5, 2.0]})
    rows = [written.slice(0, 7), written.slice(7, 7), written.slice(7, len(written.topk_n_T))]
    read, offsets = decode(table_of(codec, rows), own, "shard")
    assert offsets[-1] == len(written.topk_n_T)
    assert read.draws is not None
    assert read.log_partitions_TS is not None
    assert written.log_partitions_TS is not None
    np.testing.assert_array_equal(read.draws.n_T, written.draws.n_T)
    np.testing.assert_array_equal(read.draws.ids_D, written.draws.ids_D)
    atol = 0.1 if codec == "topk-u8" else 0
    np.testing.assert_allclose(read.draws.logprobs_D, written.draws.logprobs_D, atol=atol)
    np.testing.assert_allclose(read.log_partitions_TS, written.log_partitions_TS, rtol=1e-4)
    # The support decodes as if there were no draws: their mass is the tail's and counts once.
    alone, _ = decode(table_of(codec, [plain]), header(codec), "shard")
    np.testing.assert_array_equal(read.topk_ids_N, alone.topk_ids_N)
    np.testing.assert_array_equal(read.topk_logprobs_N, alone.topk_logprobs_N)
    np.testing.assert_array_equal(read.tail_logmass_T, alone.tail_logmass_T)


def test_draws_are_kept_where_the_support_was_cut_short_of_the_nucleus() -> None:
    capture = captured_with_draws(400, 2000, 4, 3, ())
    mass_T = np.exp(capture.topk_logprobs_TK.astype(np.float64)).sum(axis=1)
    signals = support_of(capture, 4, 0.9)
    assert signals.draws is not None
    np.testing.assert_array_equal(signals.draws.n_T > 0, mass_T < 0.9)
    assert 0 < (signals.draws.n_T > 0).mean() < 1
    everywhere = support_of(capture, 4, None)
    assert everywhere.draws is not None
    assert (everywhere.draws.n_T == 3).all()


@pytest.mark.parametrize(("column", "value"), [("draw_n", 4), ("draw_n", -1), ("draw_n", 1)])
def test_lying_draw_counts_are_named(column: str, value: int) -> None:
    capture = captured_with_draws(40, 2000, 4, 3, ())
    table = table_of("topk-u8", [support_of(capture, 4, None)])
    lists = table.column(column).to_pylist()
    lists[0][0] = value
    broken = table.set_column(table.column_names.index(column), column, pa.array(lists, table.column(column).type))
    with pytest.raises(CorruptError, match=r"row 0, column (draw_n|topk_ids)"):
        decode(broken, header("topk-u8").model_copy(update={"draws": 3}), "s")


def test_log_partitions_of_another_count_are_named() -> None:
    capture = captured_with_draws(40, 2000, 4, 0, (2.0,))
    table = table_of("topk-u8", [support_of(capture, 4, None)])
    with pytest.raises(CorruptError, match="row 0, column log_partitions does not have 2 entries"):
        decode(table, header("topk-u8").model_copy(update={"temperatures": [2.0, 3.0]}), "s")
