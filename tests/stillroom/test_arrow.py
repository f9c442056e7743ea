"""One cache, one number: the views, decoded samples and `stillroom.arrow` give the same columns and probabilities, and
FORMAT.md's own words do too.
"""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import stillroom
from stillroom import arrow
from stillroom.schema.tables import CODECS
from tests.helpers.caches import make_cache

KEYS = {"topk": ["sample_id", "position", "drawn", "rank", "token_id"], "tokens": ["sample_id", "position"]}


def stored_rows(root: Path) -> pa.Table:
    files = [pq.read_table(path) for path in sorted(root.glob("chains/*/*.parquet"))]
    return pa.concat_tables(files, promote_options="default")


def assert_same(found: pa.Table, view: pa.Table, keys: list[str]) -> None:
    order = [(name, "ascending") for name in keys]
    found, view = found.sort_by(order), view.sort_by(order)
    assert found.schema.equals(view.schema)
    for field in view.schema:
        mine, theirs = found.column(field.name), view.column(field.name)
        if pa.types.is_floating(field.type):
            np.testing.assert_allclose(mine.to_numpy(), theirs.to_numpy(), rtol=1e-6, atol=1e-7, err_msg=field.name)
        else:
            assert mine.to_pylist() == theirs.to_pylist(), field.name


@pytest.mark.parametrize("codec", CODECS)
def test_every_way_of_reading_gives_the_same_probabilities(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, num_chains=10, codec=codec, max_support=3, draws=2)
    stored = stored_rows(tmp_path)
    with stillroom.open_cache(tmp_path) as opened:
        views = {name: opened.sql(f"FROM {name}").arrow() for name in KEYS}
        samples = sorted(opened.samples(), key=lambda sample: str(sample.chain["sample_id"]))
    assert len(samples) == len(cache.chains)
    pieces = pickle.loads(pickle.dumps(arrow.read_pieces(str(tmp_path))))
    monkeypatch.setattr(arrow, "BATCH_ENTRIES", 200)
    for name, whole, stream in (
        ("topk", arrow.topk, arrow.topk_batches),
        ("tokens", arrow.tokens, arrow.tokens_batches),
    ):
        assert_same(whole(stored, pieces), views[name], KEYS[name])
        batches = list(stream(stored.to_batches(max_chunksize=7), pieces))
        # Two batches of rows became more, each of about 200 candidates.
        assert len(batches) > 4
        assert_same(pa.Table.from_batches(batches), views[name], KEYS[name])
        assert whole(stored).drop_columns(["piece"]).equals(whole(stored, pieces).drop_columns(["piece"]))
    view = views["topk"].sort_by([(name, "ascending") for name in KEYS["topk"]])
    support = view.filter(pc.invert(view.column("drawn")))
    decoded = np.concatenate([sample.signals.topk_logprobs_N for sample in samples])
    np.testing.assert_allclose(support.column("prob").to_numpy(), np.exp(decoded), rtol=5e-6)
    tokens = views["tokens"].sort_by([(name, "ascending") for name in KEYS["tokens"]])
    top1 = np.concatenate([np.exp(sample.dense(1)[1][:, 0]) for sample in samples])
    tails = np.concatenate([np.exp(sample.signals.tail_logmass_T) for sample in samples])
    np.testing.assert_allclose(tokens.column("top1_prob").to_numpy(), top1, rtol=5e-6)
    np.testing.assert_allclose(tokens.column("tail_mass").to_numpy(), tails, rtol=5e-6)
    assert any(view.column("drawn").to_pylist())


def row(codes: list[int], tail: int, support: int, draws: int) -> dict[str, object]:
    return {
        "sample_id": "a",
        "topk_n": [support],
        "draw_n": [draws],
        "topk_ids": list(range(len(codes))),
        "topk_codes": codes,
        "tail_codes": [tail],
    }


def test_the_example_of_the_format() -> None:
    """Probabilities 0.6, 0.3 and tail 0.1 (FORMAT.md), and two draws from that tail, which change none of them."""
    found = stillroom.topk(pa.Table.from_pylist([row([32, 49], 68, 2, 0), row([32, 49, 90, 90], 68, 2, 2)]))
    np.testing.assert_allclose(found.column("prob").to_numpy()[:4], [0.59599, 0.30265, 0.59599, 0.30265], atol=1e-5)
    np.testing.assert_allclose(found.column("weight").to_numpy()[4:], 0.10135 / 2, atol=1e-5)
    assert found.column("rank").to_pylist() == [1, 2, 1, 2, None, None]


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.int32())])
def test_lists_may_be_wider_and_missing_ones_null_or_empty(tmp_path: Path, kind: pa.DataType) -> None:
    for number, codec in enumerate(CODECS):
        make_cache(tmp_path, num_chains=4, codec=codec, seed=number)
    stored = stored_rows(tmp_path).drop_columns(["draw_n"])
    wanted = stillroom.topk(stored).to_pylist()
    for name in ("topk_n", "topk_ids", "topk_codes", "tail_codes"):
        wider = stored.column(name).cast(kind)
        stored = stored.set_column(stored.schema.get_field_index(name), name, wider)
    filled = pc.if_else(stored.column("topk_codes").is_null(), pa.scalar([], kind), stored.column("topk_codes"))
    stored = stored.set_column(stored.schema.get_field_index("topk_codes"), "topk_codes", filled)
    assert stillroom.topk(stored).to_pylist() == wanted
    views = stored.set_column(0, "sample_id", stored.column("sample_id").cast(pa.string_view()))
    assert stored.column_names[0] == "sample_id"
    assert stillroom.topk(views).to_pylist() == wanted
    # In the order of the chains, whose codecs alternate here.
    mixed = stored.take(pa.array([0, 4, 1, 5, 2, 6]))
    lists = arrow.topk_lists(mixed)
    assert lists.value_lengths().to_pylist() == mixed.column("topk_ids").combine_chunks().value_lengths().to_pylist()
    for row, candidates in zip(mixed.to_pylist(), lists.to_pylist(), strict=True):
        assert candidates == [one for one in wanted if one["sample_id"] == row["sample_id"]]
    for decode in (arrow.topk, arrow.tokens):
        assert decode(stored.slice(0, 0)).num_rows == 0


def test_missing_columns_and_contradictions_are_named() -> None:
    whole = pa.Table.from_pylist([row([32, 49, 90], 68, 2, 1)])
    with pytest.raises(stillroom.DataError, match="has no topk_n: select sample_id, run_id, topk_n"):
        stillroom.topk(whole.drop_columns(["topk_n"]))
    with pytest.raises(stillroom.DataError, match="topk_codes and tail_codes, or topk_logprobs"):
        stillroom.topk(whole.drop_columns(["tail_codes"]))
    with pytest.raises(stillroom.CorruptError, match="topk_n and draw_n do not add up"):
        stillroom.topk(whole.drop_columns(["draw_n"]))
    with pytest.raises(stillroom.DataError, match="has no source, token_ids"):
        arrow.tokens(whole)
    with pytest.raises(stillroom.DataError, match="has no run_id"):
        arrow.topk(whole, arrow.Pieces(pa.nulls(1, pa.string()), {}))
