"""Selections: what a SQL condition picks, frozen at pinned versions, with refusals in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.sql.session import open_session
from student_train.data import freezing
from student_train.data.freezing import CacheSource, OpenCaches, SelectionRequest, freeze, open_selection
from student_train.data.selection import Selection, load_selection
from tests.helpers.caches import SyntheticCache, damage, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("select") / "cache", num_chains=60, num_runs=2, num_workers=2)


def ask(cache: SyntheticCache, where: str | None = None, weight: str | None = None) -> SelectionRequest:
    return SelectionRequest([CacheSource(cache.root)], where, weight)


def ids_of(path: Path) -> list[str]:
    return [str(one) for one in pq.read_table(path).column("sample_id").to_pylist()]


def test_selects_what_the_condition_says(cache: SyntheticCache, tmp_path: Path) -> None:
    where = "correct and split = 'train' and num_tokens < 40"
    selection = freeze(tmp_path / "selection.parquet", ask(cache, where))
    wanted = {one.sample_id: one for one in cache.chains if one.correct and one.split == "train"}
    wanted = {key: one for key, one in wanted.items() if len(one.token_ids) < 40}
    assert set(ids_of(tmp_path / "selection.parquet")) == set(wanted)
    assert selection.num_chains == len(wanted) > 0
    assert selection.header.num_tokens == sum(len(one.token_ids) for one in wanted.values())
    assert selection.header.where == where


def test_locations_point_at_the_rows(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    selection = freeze(path, ask(cache, "source = 'sums'"))
    for row, sample_id in enumerate(ids_of(path)):
        group = int(selection.group_R[row])
        with pq.ParquetFile(selection.path_of(group)) as file:
            table = file.read_row_group(int(selection.row_group_G[group]), columns=["sample_id", "num_tokens"])
        found = table.to_pylist()[int(selection.row_in_group_R[row])]
        assert found == {"sample_id": sample_id, "num_tokens": int(selection.num_tokens_R[row])}
        assert int(selection.key_R[row]) == int(sample_id[:16], 16)


def test_a_selection_survives_the_disk(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    first = freeze(path, ask(cache, "split = 'train'", "1 + mean_entropy"))
    assert same(first, load_selection(path))


def test_selections_of_one_cache_open_and_verify_it_once(
    cache: SyntheticCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheres = ("split = 'train'", "split = 'heldout'", "split = 'train' AND text <> ''")
    alone = [freeze(tmp_path / f"{number}.parquet", ask(cache, where)) for number, where in enumerate(wheres)]
    opened, verified = Mock(wraps=open_session), Mock(wraps=freezing.check_columns)
    monkeypatch.setattr(freezing, "open_session", opened)
    monkeypatch.setattr(freezing, "check_columns", verified)
    with OpenCaches() as caches:
        asked = [replace(ask(cache, where), opened=caches) for where in wheres]
        shared = [freeze(tmp_path / f"again-{number}.parquet", one) for number, one in enumerate(asked)]
    assert all(map(same, shared, alone))
    # Again for the text, which the others do not name.
    assert (opened.call_count, verified.call_count) == (1, 2)


def same(a: Selection, b: Selection) -> bool:
    def arrays(one: Selection) -> list[npt.NDArray[Any]]:
        groups = [one.cache_G, one.file_G, one.row_group_G]
        return [*groups, one.group_R, one.row_in_group_R, one.key_R, one.num_prompt_R, one.num_tokens_R, one.weight_R]

    equal = all(np.array_equal(left, right) for left, right in zip(arrays(a), arrays(b), strict=True))
    return equal and a.header == b.header and a.files == b.files


def test_it_stays_what_it_was_while_the_cache_grows(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=20)
    path = tmp_path / "run" / "selection.parquet"
    frozen = open_selection(path, ask(cache))
    make_cache(tmp_path / "cache", num_chains=20, seed=1)
    assert same(open_selection(path, ask(cache)), frozen)
    assert freeze(tmp_path / "now.parquet", ask(cache)).num_chains == 40
    version = frozen.header.caches[0].chains_version
    then = SelectionRequest([CacheSource(cache.root, chains_version=version)])
    assert freeze(tmp_path / "then.parquet", then).num_chains == 20


def test_weights_are_an_expression(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    selection = freeze(path, ask(cache, None, "case when correct then 2.5 when truncated then 0 else 0.5 end"))
    by_id = {one.sample_id: one for one in cache.chains}
    unfinished = sum(one.finish_reason == "length" for one in cache.chains)
    assert selection.header.num_zero_weight == unfinished > 0
    for sample_id, weight in zip(ids_of(path), selection.weight_R.tolist(), strict=True):
        assert weight == (2.5 if by_id[sample_id].correct else 0.5)


def test_several_caches(cache: SyntheticCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", num_chains=10, seed=5, codec="topk-u8")
    request = SelectionRequest([CacheSource(cache.root), CacheSource(other.root, weight=2.0)])
    selection = freeze(tmp_path / "selection.parquet", request)
    assert selection.num_chains == 70
    assert np.bincount(selection.cache_G[selection.group_R]).tolist() == [60, 10]
    assert selection.header.codecs == ["topk-f32", "topk-u8"]
    assert [one.weight for one in selection.header.caches] == [1.0, 2.0]


def test_max_chains_takes_a_fair_sample_by_id(cache: SyntheticCache, tmp_path: Path) -> None:
    request = SelectionRequest([CacheSource(cache.root)], max_chains=7)
    freeze(tmp_path / "selection.parquet", request)
    assert sorted(ids_of(tmp_path / "selection.parquet")) == sorted(one.sample_id for one in cache.chains)[:7]


@pytest.mark.parametrize(
    ("where", "weight", "message"),
    [
        ("corect", None, "data.where 'corect': there is no column corect: the nearest are correct, [a-z_, ]+$"),
        ("num_tokens <", None, "data.where 'num_tokens <': it ends too early, or its brackets do not match$"),
        ("(correct\nor true", None, "it ends too early, or its brackets do not match$"),
        ("true)", None, "it ends too early, or its brackets do not match$"),
        ("correct or or true", None, "data.where 'correct or or true': syntax error at or near \"or\"$"),
        (" ", None, "data.where is empty: leave it out"),
        ("row_group = 0", None, "data.where 'row_group = 0'"),
        ("true); drop view chains; --", None, "data.where"),
        ("num_tokens > 100000", None, "selects none of the 60 chains"),
        (None, "nonsense", "data.weight 'nonsense'"),
        (None, "score", "data.weight 'score' is nan for"),
        (None, "-1", "data.weight '-1' is -1 for 60 of 60 chains"),
        (None, "1e38", r"data.weight '1e38' is 1e\+38 for 60 of 60 chains: weights lie between 0 and 1e\+06"),
        (None, "0", "have weight 0"),
        ("cast(source as int) = 1", None, "data.where 'cast[^']*': Could not convert string"),
    ],
)
def test_refusals_are_one_line(
    cache: SyntheticCache, tmp_path: Path, where: str | None, weight: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        freeze(tmp_path / "selection.parquet", ask(cache, where, weight))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "selection.parquet").exists()


def test_a_condition_may_end_in_a_comment(cache: SyntheticCache, tmp_path: Path) -> None:
    assert freeze(tmp_path / "selection.parquet", ask(cache, "correct -- only these")).num_chains > 0


def test_two_tokenizers_are_refused_naming_both(cache: SyntheticCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", num_chains=4, tokenizer="another")
    request = SelectionRequest([CacheSource(cache.root), CacheSource(other.root)])
    with pytest.raises(ConfigError, match="two tokenizers") as caught:
        freeze(tmp_path / "selection.parquet", request)
    for one in (cache, other):
        assert one.manifests[0].teacher.tokenizer_fingerprint in str(caught.value)
    text = SelectionRequest(request.sources, any_tokenizer=True)
    assert freeze(tmp_path / "selection.parquet", text).num_chains == 64


def test_one_cache_twice_is_refused(cache: SyntheticCache, tmp_path: Path) -> None:
    request = SelectionRequest([CacheSource(cache.root), CacheSource(cache.root / ".." / "cache")])
    with pytest.raises(ConfigError, match="named twice"):
        freeze(tmp_path / "selection.parquet", request)


@pytest.mark.parametrize("weight", [0.0, 1e-8, -1.0, float("nan"), 2000.0])
def test_cache_weights_have_limits(cache: SyntheticCache, tmp_path: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weights lie between 0\.001 and 1000"):
        freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(cache.root, weight)]))


def test_no_cache_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a cache"):
        freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(tmp_path)]))


def test_a_frozen_selection_answers_only_its_own_request(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    open_selection(path, ask(cache, "correct"))
    open_selection(path, ask(cache, "correct"))
    for request, name in (
        (ask(cache, "not correct"), "where"),
        (ask(cache, "correct", "2"), "weight"),
        (SelectionRequest([CacheSource(cache.root, 2.0)], "correct"), "weight of"),
        (SelectionRequest([CacheSource(cache.root, chains_version=0)], "correct"), "chains_version"),
        (SelectionRequest([CacheSource(cache.root)], "correct", max_chains=1), "max_chains"),
    ):
        with pytest.raises(ConfigError, match=f"frozen with {name}.*choose another run folder"):
            open_selection(path, request)
    with pytest.raises(ConfigError, match="selects from 1 caches, 2 were given"):
        open_selection(path, SelectionRequest([CacheSource(cache.root), CacheSource(tmp_path)], "correct"))


def test_damage_is_found(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "selection.parquet"
    with pytest.raises(DataError, match="does not exist"):
        load_selection(tmp_path / "nothing.parquet")
    whole = freeze(path, ask(cache))
    data, num_found = path.read_bytes(), 0
    for at_frac in np.linspace(0.01, 0.99, 40):
        path.write_bytes(data)
        damage(path, float(at_frac))
        try:
            # A byte that nothing is read from, such as a statistic in the footer.
            assert same(load_selection(path), whole)
        except CorruptError:
            num_found += 1
    assert num_found > 20


@pytest.mark.parametrize("column", ["split", "num_tokens", "text"])
def test_a_changed_byte_selects_nothing(tmp_path: Path, column: str) -> None:
    """DuckDB would read over it, and a held-out chain could come into training."""
    cache = make_cache(tmp_path / "cache", num_chains=12, groups_per_shard=100)
    path = next(cache.root.glob("chains/*/*.parquet"))
    group = pq.ParquetFile(path).metadata.row_group(1)
    chunk = next(one for one in map(group.column, range(group.num_columns)) if one.path_in_schema == column)
    # The last byte of the chunk belongs to its last page.
    place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))
    condition = f"split = 'train' AND num_tokens > 0 AND {column} IS NOT NULL"
    with pytest.raises(CorruptError, match=rf"{path.name}.*row group 1"):
        freeze(tmp_path / "selection.parquet", ask(cache, condition))
    if column == "text":
        # Of a column that no condition names nothing depends on it here.
        assert len(freeze(tmp_path / "selection.parquet", ask(cache, "num_tokens > 0")).key_R) == 12


def test_damaged_verdicts_select_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=12)
    damage(next((cache.root / "verdicts").glob("*/*.parquet")))
    with pytest.raises(CorruptError, match="does not have the bytes"):
        freeze(tmp_path / "selection.parquet", ask(cache, "correct"))
