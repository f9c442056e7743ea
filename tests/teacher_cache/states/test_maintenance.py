"""The second table is verified, collected, copied and quarantined with its chains."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import FeatureSet
from stillroom.errors import ConfigError, CorruptError
from stillroom.sql.session import open_session
from teacher_cache.cli import app
from teacher_cache.inspect.stats import cache_stats, stats_text
from teacher_cache.maintenance import verify
from teacher_cache.maintenance.copy import copy_caches
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.quarantine import verify_command
from teacher_cache.maintenance.verify import verify_cache
from tests.helpers.caches import CacheShape, damage, make_cache, write_cache
from tests.helpers.fake_builds import killed_before_commit
from tests.helpers.feature_sets import add_features


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 chains in three shards of two runs, all with features."""
    root = make_cache(tmp_path_factory.mktemp("made") / "c", num_chains=36, num_runs=2).root
    add_features(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "c"))


def files_of(root: Path) -> list[Path]:
    table = Catalog(root).features
    assert table is not None
    return [root / "features" / file.path for file in table.files()]


def stored(root: Path) -> set[str]:
    return set(FeatureSet.open(root).sample_ids())


def visible(root: Path) -> set[str]:
    with open_session(Catalog(root)) as session:
        return set(session.arrow("SELECT sample_id FROM chains").column(0).to_pylist())


def test_sql_and_stats_count_what_is_there(root: Path) -> None:
    manifest = FeatureSet.open(root).manifest
    with open_session(Catalog(root)) as session:
        (row,) = session.arrow(
            "SELECT count(*) AS n, sum(f.num_stored)::BIGINT AS tokens, sum(c.num_tokens)::BIGINT AS all_tokens,"
            " sum(bytes)::BIGINT AS bytes, any_value(feature_set) AS name"
            " FROM features f JOIN chains c USING (sample_id)"
        ).to_pylist()
        (described,) = session.arrow("SELECT * FROM feature_sets").to_pylist()
    assert (row["n"], row["name"]) == (36, "all")
    assert row["tokens"] == row["all_tokens"]
    # 2 + 16 bytes of hidden state, two layers of 2 + 8, two heads of three keys.
    assert row["bytes"] == row["tokens"] * (18 + 20 + 2 * (3 * 3 + 1))
    assert (described["set_id"], described["hidden"], described["layers"]) == (manifest.set_id, True, [1, 2])
    stats = cache_stats(Catalog(root))
    assert stats.features[manifest.set_id].num_chains == 36
    assert f"features {manifest.set_id}: 36 chains" in stats_text(stats)


def test_verify_finds_damage_and_quarantine_removes_it(root: Path) -> None:
    report = verify_cache(root)
    assert report.ok, report.problems
    assert report.num_feature_files == len(files_of(root)) == 3
    broken = files_of(root)[0]
    damage(broken)
    found = verify_cache(root)
    assert {problem.file for problem in found.problems} == {f"features/{broken.relative_to(root / 'features')}"}
    with pytest.raises(CorruptError, match="row group"):
        FeatureSet.open(root).read(visible(root))
    result, lines = verify_command(root, quarantine=True)
    assert result["ok"]
    assert any("until their pass runs again" in line for line in lines)
    assert len(stored(root)) < 36
    assert len(visible(root)) == 36
    add_features(root)
    assert stored(root) == visible(root)
    assert verify_cache(root).ok


def test_features_of_quarantined_chains_go_too(root: Path) -> None:
    shard = sorted((root / "chains").rglob("w*.parquet"))[0]
    damage(shard)
    result, _ = verify_command(root, quarantine=True)
    assert result["ok"]
    assert stored(root) == visible(root)
    assert len(stored(root)) < 36
    assert verify_cache(root).ok


@pytest.mark.parametrize("name", ["constants", "head", "manifest"])
def test_damaged_constants_are_named(root: Path, name: str) -> None:
    (path,) = (root / "feature_sets").rglob(f"{name}*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    found = verify_cache(root).problems
    assert any(name in problem.file or name in problem.problem for problem in found)
    # Rows are kept: a copy of the small file restores them all.
    result, _ = verify_command(root, quarantine=True)
    assert not result["ok"]
    path.write_bytes(whole)
    assert len(stored(root)) == 36


def test_rows_without_a_chain_or_with_other_tokens_are_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_cache.maintenance import feature_checks

    real = feature_checks.visible_chains

    def changed(catalog: Catalog) -> dict[str, feature_checks.ChainAt]:
        chains = real(catalog)
        first, second, third, *_ = sorted(chains)
        del chains[first]
        chains[second] = feature_checks.ChainAt("0" * 32, *list_of(chains[second])[1:])
        chains[third] = feature_checks.ChainAt(chains[third].chain_id, "other.parquet", *list_of(chains[third])[2:])
        return chains

    def list_of(chain: feature_checks.ChainAt) -> tuple[str, str, int, int]:
        return chain.chain_id, chain.file, chain.num_tokens, chain.num_context

    monkeypatch.setattr(verify, "visible_chains", changed)
    problems = " ".join(problem.problem for problem in verify_cache(root).problems)
    # One problem per row group, so that at least one of the three is named.
    assert any(one in problems for one in ("is not a visible chain", "has other tokens", "not in the shard"))


def test_features_of_chains_that_come_during_verify_are_sound(root: Path) -> None:
    # As of before the last shard came.
    catalog, report = Catalog(root, Catalog(root).chains.version - 1), verify.VerifyReport()
    assert sum(file.num_rows for file in catalog.chains.files()) < 36
    verify._verify_features(catalog, report)
    assert report.problems == []


def test_copies_hold_features_once(root: Path, tmp_path: Path) -> None:
    dest = tmp_path / "d"
    report = copy_caches([root], dest)
    assert report.num_features == 36
    assert copy_caches([root], dest).num_features == 0
    sample_id = sorted(stored(root))[0]
    one, other = (FeatureSet.open(place).read([sample_id])[sample_id] for place in (root, dest))
    assert one.hidden_PD is not None
    assert other.hidden_PD is not None
    assert (one.hidden_PD == other.hidden_PD).all()
    assert verify_cache(dest).ok
    # The copy continues the pass.
    assert add_features(dest).num_done_before == 36


def test_sets_fitted_twice_cannot_be_merged(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_cache(other, CacheShape(num_chains=36, num_runs=2))
    add_features(other, calibration={"tokens": 100})
    with pytest.raises(ConfigError, match="was fitted separately, with different scales: drop one of them"):
        copy_caches([root, other], tmp_path / "d")


def test_gc_adopts_what_a_kill_left_and_drops_sets_and_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_cache(tmp_path / "fresh", num_chains=12).root
    with killed_before_commit(monkeypatch):
        add_features(fresh)
    assert gc_cache(fresh, dry_run=False, grace_s=0.0).num_adopted == 12
    assert stored(fresh) == visible(fresh)

    run_id = sorted(Catalog(root).runs())[0]
    planned = gc_cache(root, dry_run=True, grace_s=0.0, drop_runs=[run_id])
    report = gc_cache(root, dry_run=False, grace_s=0.0, drop_runs=[run_id])
    assert planned.dropped[0].num_features == report.dropped[0].num_features > 0
    assert stored(root) == visible(root)
    assert verify_cache(root).ok
    gc_cache(root, dry_run=False, grace_s=0.0, drop_runs=["all"], delete_removed=True)
    assert [path for path in (root / "feature_sets").rglob("*") if path.is_file()] == []
    assert list((root / "features").rglob("w0*.parquet")) == []
    assert verify_cache(root).ok


def test_the_files_of_the_table_are_listed(root: Path) -> None:
    ended = CliRunner().invoke(app, ["files", str(root), "--table", "features", "--json"])
    assert {Path(one["path"]) for one in json.loads(ended.stdout)["files"]} == set(files_of(root))
