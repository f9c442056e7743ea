"""A cache from Python: tables, relations, decoded samples found by how their id begins."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.reader import Cache, open_cache, readable
from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.schema.tables import CODECS
from tests.helpers.caches import SyntheticCache, make_cache


@pytest.fixture(scope="module", params=CODECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("cache"), codec=request.param, num_chains=30)


@pytest.fixture(scope="module")
def cache(made: SyntheticCache) -> Iterator[Cache]:
    with open_cache(made.root) as opened:
        yield opened


def test_every_sample_decodes_to_what_was_written(made: SyntheticCache, cache: Cache) -> None:
    tolerance = 1e-6 if made.manifests[0].capture["codec"] == "topk-f32" else 0.15
    for chain in made.chains:
        sample = cache.sample(chain.sample_id)
        assert sample.chain["sample_id"] == chain.sample_id
        assert sample.messages == [{"role": "user", "content": chain.prompt}]
        assert sample.token_ids_T.tolist() == chain.token_ids.tolist()
        assert sample.pieces_T == [f"w{token}" for token in chain.token_ids]
        ids_TK, logprobs_TK = sample.dense()
        expected_ids_TK, expected_TK = chain.signals.dense(sample.header.max_support)
        assert ids_TK.tolist() == expected_ids_TK.tolist()
        np.testing.assert_array_equal(np.isneginf(logprobs_TK), np.isneginf(expected_TK))
        np.testing.assert_allclose(np.exp(logprobs_TK), np.exp(expected_TK), rtol=tolerance, atol=1e-3)
        assert sample.dense(3)[1].shape == (len(chain.token_ids), 3)


def test_samples_hold_the_rows_of_the_view_chains(made: SyntheticCache, cache: Cache) -> None:
    rows = cache.sql("SELECT * FROM chains").arrow().to_pylist()
    found = list(cache.samples())
    by_id = {row["sample_id"]: row for row in rows}
    assert {sample.chain["sample_id"]: sample.chain for sample in found} == by_id
    one = cache.sample(made.chains[3].sample_id)
    same = next(sample for sample in found if sample.chain["sample_id"] == made.chains[3].sample_id)
    assert one.token_ids_T.tolist() == same.token_ids_T.tolist()
    np.testing.assert_array_equal(one.signals.topk_logprobs_N, same.signals.topk_logprobs_N)


def test_a_condition_chooses_samples(made: SyntheticCache, cache: Cache) -> None:
    where = "num_tokens > 5 AND correct -- the judged ones"
    wanted = cache.sql(f"SELECT sample_id FROM chains WHERE {where}\nORDER BY 1").fetchall()
    assert 0 < len(wanted) < len(made.chains)
    assert sorted((sample.chain["sample_id"],) for sample in cache.samples(where)) == wanted
    assert list(cache.samples("false")) == []
    for wrong, said in (
        ("corect", "there is no column corect"),
        ("split = train", r"\(text goes in single quotes: 'train'\)$"),
        ("", "where is empty"),
        ("1; SELECT 2", "where"),
    ):
        with pytest.raises(ConfigError, match=said):
            next(cache.samples(wrong))


def test_row_groups_decode_in_bulk(made: SyntheticCache, cache: Cache) -> None:
    lengths = {chain.sample_id: len(chain.token_ids) for chain in made.chains}
    groups = list(cache.row_groups(["sample_id", "num_tokens"], where="num_tokens > 3"))
    assert any(group.table.num_rows > 1 for group in groups)
    found: dict[str, int] = {}
    for group in groups:
        assert group.table.column_names == ["sample_id", "num_tokens"]
        assert np.diff(group.offsets_R).tolist() == group.table["num_tokens"].to_pylist()
        for row, sample_id in enumerate(group.table["sample_id"].to_pylist()):
            found[sample_id] = len(group.signals_of(row).topk_n_T)
    assert found == {sample_id: length for sample_id, length in lengths.items() if length > 3}
    with pytest.raises(ConfigError, match="no column 'sample': did you mean 'sample_id'"):
        next(cache.row_groups(["sample"]))


def test_a_closed_cache_says_so(made: SyntheticCache) -> None:
    with open_cache(made.root) as cache:
        assert repr(cache) == f"Cache({str(made.root)!r}, chains_version={cache.catalog.chains.version})"
        assert repr(cache.sample(made.chains[0].sample_id)).startswith(f"Sample({made.chains[0].sample_id}, ")
    with pytest.raises(ConfigError, match="the cache is closed"):
        cache.sql("SELECT 1")


def test_results_come_as_arrow_pandas_polars_and_tuples(cache: Cache) -> None:
    result = cache.sql("SELECT source, count(*) AS n FROM chains GROUP BY source ORDER BY source;")
    rows = result.fetchall()
    assert [tuple(row.values()) for row in result.arrow().to_pylist()] == rows
    assert list(result.df().itertuples(index=False, name=None)) == rows
    assert result.pl().rows() == rows
    assert "source" in repr(result)
    with pytest.raises(ConfigError, match="read-only"):
        cache.sql("CREATE TABLE x (i INTEGER)")
    with pytest.raises(ConfigError, match="corect"):
        cache.sql("SELECT corect FROM chains")
    with pytest.raises(ConfigError, match=r"\(text goes in single quotes: 'sums'\)$"):
        cache.sql('SELECT 1 FROM chains WHERE source = "sums"')


@pytest.mark.parametrize(("package", "method"), [("pandas", "df"), ("polars", "pl")])
def test_a_missing_package_is_named_with_its_command(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, package: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = cache.sql("SELECT 1 AS one")
    with pytest.raises(StillroomError, match=rf"^{package} is not installed: pip install 'stillroom\[notebook\]'$"):
        {"df": result.df, "pl": result.pl}[method]()


def test_samples_are_found_by_how_they_begin(made: SyntheticCache, cache: Cache) -> None:
    wanted = made.chains[7].sample_id
    assert cache.sample(wanted[:12]).chain["sample_id"] == wanted
    for prefix in ("", "%", "a' OR '1'='1", "../x", "x" * 65):
        with pytest.raises(DataError, match="is not a sample id"):
            cache.sample(prefix)
    with pytest.raises(DataError, match="no sample of"):
        cache.sample("zzzz")
    firsts = [chain.sample_id[0] for chain in made.chains]
    common = max(firsts, key=firsts.count)
    with pytest.raises(
        DataError, match=f"^{firsts.count(common)} samples of .* begin with {common!r}, .*: add more characters"
    ):
        cache.sample(common)


def test_a_folder_of_a_cache_names_the_cache(made: SyntheticCache) -> None:
    with pytest.raises(DataError, match=rf"did you mean {made.root}\?"):
        open_cache(made.root / "chains")


def test_ids_stand_in_where_there_is_no_vocabulary(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=4)
    for path in (made.root / "vocab").iterdir():
        path.unlink()
    with open_cache(made.root) as cache:
        sample = cache.sample(made.chains[0].sample_id)
    assert sample.pieces_T == [f"<{token}>" for token in made.chains[0].token_ids]


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        (["a", "<0xC3>", "<0xA9>", "b"], ["a", "", "é", "b"]),
        ([" <0xE2><0x82>", "<0xAC>1"], [" ", "€1"]),
        (["<0xFF>", "x"], ["\ufffd", "x"]),
        (["x", "<0xC3>"], ["x", "\ufffd"]),
        ([], []),
    ],
)
def test_characters_of_several_tokens_are_put_together(pieces: list[str], texts: list[str]) -> None:
    assert readable(pieces) == texts
