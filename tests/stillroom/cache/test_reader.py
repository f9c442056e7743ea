"""A cache from Python: tables, relations, decoded samples found by how their id begins."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.reader import Cache, open_cache, readable
from stillroom.errors import ConfigError, DataError
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


def test_relations_and_tables_agree(cache: Cache) -> None:
    query = "SELECT source, count(*) AS n FROM chains GROUP BY source ORDER BY source;"
    assert cache.sql(query).fetchall() == [tuple(row.values()) for row in cache.arrow(query).to_pylist()]
    assert cache.sql("SELECT * FROM chains").filter("num_tokens > 1").limit(3).fetchall()
    for call in (cache.sql, cache.arrow):
        with pytest.raises(ConfigError):
            call("CREATE TABLE x (i INTEGER)")


def test_samples_are_found_by_how_they_begin(made: SyntheticCache, cache: Cache) -> None:
    wanted = made.chains[7].sample_id
    assert cache.sample(wanted[:12]).chain["sample_id"] == wanted
    for prefix in ("", "%", "a' OR '1'='1", "../x", "x" * 65):
        with pytest.raises(DataError, match="no sample id"):
            cache.sample(prefix)
    with pytest.raises(DataError, match="no sample of"):
        cache.sample("zzzz")
    firsts = [chain.sample_id[0] for chain in made.chains]
    common = max(firsts, key=firsts.count)
    with pytest.raises(
        DataError, match=f"^{firsts.count(common)} samples of .* begin with {common!r}, .*: give more of it"
    ):
        cache.sample(common)


def test_a_folder_that_is_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a cache"):
        open_cache(tmp_path)


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
