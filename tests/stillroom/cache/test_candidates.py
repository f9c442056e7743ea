"""One cache, one number: the views, decoded samples and `stillroom.topk` give the same probabilities, and FORMAT.md's
own words do too.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import stillroom
from stillroom.schema.tables import CODECS
from tests.helpers.caches import make_cache

KEYS = ["sample_id", "position", "drawn", "rank", "token_id"]


@pytest.mark.parametrize("codec", CODECS)
def test_every_way_of_reading_gives_the_same_probabilities(tmp_path: Path, codec: str) -> None:
    cache = make_cache(tmp_path, num_chains=10, codec=codec, max_support=3, draws=2)
    order = [(name, "ascending") for name in KEYS]
    stored = pa.concat_tables([pq.read_table(path) for path in sorted(tmp_path.glob("chains/*/*.parquet"))])
    outside = stillroom.topk(stored).sort_by(order)
    with stillroom.open_cache(tmp_path) as opened:
        view = opened.sql(f"SELECT {', '.join(KEYS)}, prob, weight FROM topk").arrow().sort_by(order)
        tokens = opened.sql("SELECT top1_prob, tail_mass FROM tokens ORDER BY sample_id, position").arrow()
        samples = sorted(opened.samples(), key=lambda sample: str(sample.chain["sample_id"]))
    assert len(samples) == len(cache.chains)
    for name in KEYS:
        assert outside.column(name).to_pylist() == view.column(name).to_pylist()
    for name in ("prob", "weight"):
        np.testing.assert_allclose(outside.column(name).to_numpy(), view.column(name).to_numpy(), rtol=5e-6)
    support = view.filter(pc.invert(view.column("drawn")))
    decoded = np.concatenate([sample.signals.topk_logprobs_N for sample in samples])
    np.testing.assert_allclose(support.column("prob").to_numpy(), np.exp(decoded), rtol=5e-6)
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
    stored = pa.concat_tables(
        [pq.read_table(path) for path in tmp_path.glob("chains/*/*.parquet")], promote_options="default"
    ).drop_columns(["draw_n"])
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
    assert stillroom.topk(stored.slice(0, 0)).num_rows == 0


def test_missing_columns_and_contradictions_are_named() -> None:
    whole = pa.Table.from_pylist([row([32, 49, 90], 68, 2, 1)])
    with pytest.raises(stillroom.DataError, match="has no topk_n: select sample_id, topk_n"):
        stillroom.topk(whole.drop_columns(["topk_n"]))
    with pytest.raises(stillroom.DataError, match="topk_codes and tail_codes, or topk_logprobs"):
        stillroom.topk(whole.drop_columns(["tail_codes"]))
    with pytest.raises(stillroom.CorruptError, match="topk_n and draw_n do not add up"):
        stillroom.topk(whole.drop_columns(["draw_n"]))
