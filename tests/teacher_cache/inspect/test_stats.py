"""The numbers of a cache are those of its rows and files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.cache.reader import repeated_frac
from stillroom.sql.session import open_session
from teacher_cache.inspect.stats import SIGNAL_COLUMNS, Usage, _cost, cache_stats, stats_text
from teacher_cache.judging.chains import judge_cache
from tests.helpers.caches import make_cache
from tests.helpers.fake_builds import make_config, make_requests, run_build


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_counts_and_bytes_are_those_of_rows_and_files(tmp_path: Path, codec: str) -> None:
    made = make_cache(tmp_path / "cache", codec=codec, num_runs=2)
    stats = cache_stats(made.catalog)
    tokens = sum(len(chain.token_ids) for chain in made.chains)
    shards = list((made.root / "chains").rglob("*-*.parquet"))
    shards = [path for path in shards if "_delta_log" not in path.parts]
    judged = [chain.correct for chain in made.chains if chain.correct is not None]
    assert (stats.num_chains, stats.num_tokens) == (len(made.chains), tokens)
    assert stats.num_prompts == len({chain.prompt for chain in made.chains})
    assert stats.num_truncated == sum(chain.finish_reason == "length" for chain in made.chains)
    assert (stats.num_judged, stats.pass_rate) == (len(judged), sum(judged) / len(judged))
    assert (stats.num_shards, stats.shard_bytes) == (len(shards), sum(path.stat().st_size for path in shards))
    assert stats.bytes_per_token == stats.shard_bytes / tokens
    assert stats.signal_bytes == sum(signal_bytes(path) for path in shards)
    assert sum(one.num_chains for one in stats.by_source.values()) == len(made.chains)
    assert sum(one.num_tokens for one in stats.by_run.values()) == tokens
    assert set(stats.by_split) == {chain.split for chain in made.chains}
    text = stats_text(stats)
    assert f"{tokens:,} completion tokens" in text
    assert f"{stats.bytes_per_token:.1f} B/token" in text


def test_a_field_that_rows_call_scrubbed_is_not_a_count(tmp_path: Path) -> None:
    config, values = make_config(tmp_path / "c"), (True, {"phone": 2, "by": "us"}, "no")
    requests = [
        replace(one, prompt=replace(one.prompt, metadata={"scrubbed": value}))
        for one, value in zip(make_requests(len(values)), values, strict=True)
    ]
    run_build(config, requests)
    assert cache_stats(Catalog(config.cache)).scrubbed == {"phone": 2}


def signal_bytes(path: Path) -> int:
    metadata = pq.read_metadata(path)
    columns = [
        metadata.row_group(group).column(index)
        for group in range(metadata.num_row_groups)
        for index in range(metadata.num_columns)
    ]
    return sum(one.total_compressed_size for one in columns if one.path_in_schema.split(".")[0] in SIGNAL_COLUMNS)


def test_loops_are_chains_that_repeat_their_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_cache(tmp_path / "cache", num_chains=30)
    query = "SELECT sample_id, token_ids, repeated_frac FROM chains JOIN shards USING (sample_id)"
    with open_session(made.catalog) as session:
        for row in session.arrow(query).to_pylist():
            ids = row["token_ids"]
            windows = [tuple(ids[at : at + 16]) for at in range(len(ids) - 15)]
            wanted = 1 - len(set(windows)) / len(windows) if windows else 0
            assert row["repeated_frac"] == pytest.approx(wanted)
    assert repeated_frac(np.tile(np.arange(100, dtype=np.int32), 10)) == pytest.approx(1 - 100 / 985)
    assert cache_stats(made.catalog).loop_frac == 0
    monkeypatch.setattr("teacher_cache.inspect.stats.LOOP_TOKENS", 200)
    sampled = cache_stats(made.catalog)
    assert 0 < sampled.num_chains_read < 30
    assert f"loops of a sample of {sampled.num_chains_read}" in stats_text(sampled)


def test_an_empty_cache_has_numbers_too(tmp_path: Path) -> None:
    stats = cache_stats(Catalog.create(tmp_path / "empty"))
    assert (stats.num_chains, stats.bytes_per_token, stats.pass_rate) == (0, None, None)
    assert "0 chains" in stats_text(stats)


def test_undecided_chains_come_with_a_remedy(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=24, judged=False)
    judge_cache(made.root, kind="code")
    stats = cache_stats(Catalog(made.root))
    assert (stats.num_judged, stats.num_undecided) == (0, 24)
    text = stats_text(stats)
    assert "0 judged, 24 undecided (no reference, or the check timed out: `teacher-cache judge` tries again" in text
    assert judge_cache(made.root, kind="regex").by_judge["regex"].num_undecided == 0
    assert "undecided" not in stats_text(cache_stats(Catalog(made.root)))


def test_worker_time_has_a_price(tmp_path: Path) -> None:
    run_build(make_config(tmp_path / "cache"), make_requests(20))
    stats = cache_stats(Catalog(tmp_path / "cache"), 3.6e6)
    assert stats.usage.num_workers == 1
    assert stats.cost is not None
    assert stats.cost.cost == pytest.approx(1000 * stats.usage.worker_seconds)
    assert stats.cost.per_right_answer is None
    assert "at 3.6e+06 a worker-hour" in stats_text(stats)
    half_hour = Usage(worker_seconds=1800, num_workers=1, devices=["H200"])
    found = _cost(half_hour, {"num_tokens": 1000, "num_judged": 20, "pass_rate": 0.5}, 2.0)
    assert (found.cost, found.per_million_tokens, found.per_right_answer) == (1.0, 1000.0, 0.1)
    text = stats_text(stats.model_copy(update={"usage": half_hour}))
    assert "worker time 30:00, 1 worker (H200); loading and pauses over 10 minutes excluded" in text
