"""What crashes leave is adopted or swept, a worker at work is left alone, dropped runs stay readable until deleted."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillroom.cache.catalog import Catalog
from stillroom.errors import CacheConflict, ConfigError, CorruptError
from teacher_cache.cli import app
from teacher_cache.maintenance.gc import GcReport, gc_cache, gc_lines
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.workers.leases import Leases, leases_folder
from teacher_cache.writer.commit import lock_path, read_sample_ids, worker_lock
from tests.helpers.caches import make_cache, visible_ids
from tests.helpers.fake_builds import killed_before_commit, make_config, make_requests, run_build


def gc(root: Path, **options: object) -> GcReport:
    return gc_cache(root, **{"dry_run": False, "grace_s": 0.0, **options})  # type: ignore[arg-type]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of 30 rows that died between the rename of its second part and the commit, and an unfinished file."""
    root = tmp_path / "c"
    run_build(make_config(root), make_requests(10))
    with killed_before_commit(monkeypatch):
        run_build(make_config(root), make_requests(30))
    (run_id,) = Catalog(root).runs()
    (root / "chains" / run_id / ".w0-000009.12ab34cd.tmp").write_bytes(b"half a shard")
    (root / "runs" / f".{run_id}.json.12ab34cd.tmp").write_bytes(b"{")
    return root


def test_written_shards_are_adopted_and_unfinished_ones_swept(crashed: Path) -> None:
    before = contents(crashed)
    planned = gc(crashed, dry_run=True)
    assert contents(crashed) == before
    assert len(planned.adoptable) == 1
    report = gc(crashed)
    assert [item.file for item in report.swept] == [item.file for item in planned.swept]
    assert [item.size_bytes for item in report.swept] == [12, 1]
    assert report.num_adopted > 0
    assert len(visible_ids(crashed)) == len(set(visible_ids(crashed))) == 10 + report.num_adopted
    assert not list(crashed.rglob("*.tmp"))
    assert verify_cache(crashed).ok
    again = gc(crashed)
    assert (again.num_adopted, again.swept, again.freed_bytes) == (0, [], 0)
    assert gc_lines(again) == ["nothing to free"]


def test_young_files_and_those_of_a_running_worker_stay(crashed: Path) -> None:
    before = contents(crashed)
    young = gc(crashed, grace_s=3600.0)
    assert {item.why for item in young.kept} == {"younger than the grace period"}
    assert len(young.kept) == 3
    (run_id,) = Catalog(crashed).runs()
    with worker_lock(lock_path(crashed, run_id, "w0"), 0.0):
        (crashed / "runs" / f".{run_id}.json.12ab34cd.tmp").unlink()
        working = gc(crashed)
    assert [item.why for item in working.kept] == ["its worker is running"] * 2
    after = contents(crashed)
    assert {name for name in before if before[name] != after.get(name)} == {f"runs/.{run_id}.json.12ab34cd.tmp"}


def test_what_dead_workers_that_had_joined_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "c"
    run_build(make_config(root), make_requests(3))
    runs = root / "runs"
    (run_id,) = Catalog(root).runs()
    folder = leases_folder(root, run_id)
    names = {
        f"{run_id}.j0123abcd.lock",
        "build-12ab.fleet",
        f"{folder.name}/0-a.000000.lease",
        f"{folder.name}/jx.json",
    }
    left = {f"runs/{name}" for name in names}
    with Leases(folder, "jalive", lambda _: None):
        for name in names:
            (runs / name).write_text("jx")
        # A fleet at work keeps its mark, and its own run keeps everything.
        assert {item.file for item in gc(root).swept} == {f"runs/{run_id}.j0123abcd.lock"}
        with pytest.raises(CacheConflict, match=r"is being built \(jalive on "):
            gc(root, drop_runs=[run_id])
    for path in runs.glob("*.leases/*.json"):
        os.utime(path, (0, 0))
    assert {item.file for item in gc(root, grace_s=3600.0).swept} == {f"runs/{folder.name}/jx.json"}
    gc(root)
    assert left.isdisjoint(contents(root))
    assert verify_cache(root).ok


def test_age_is_by_the_clock_of_the_file_system(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e12)
    assert gc(crashed, grace_s=3600.0).swept == []


def test_nothing_is_swept_while_the_log_lacks_an_entry(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=30).root
    log = root / "chains" / "_delta_log"
    newest = sorted(log.glob("*.json"))[-1]
    saved = newest.read_bytes()
    newest.unlink()
    before = contents(root)
    with pytest.raises(CorruptError, match="nothing is deleted from a damaged cache"):
        gc(root)
    newest.write_bytes(saved)
    middle = log / f"{1:020d}.json"
    middle.unlink()
    with pytest.raises(CorruptError):
        gc(root)
    assert {name for name in before if name not in contents(root)} == {f"chains/_delta_log/{1:020d}.json"}


def test_a_file_of_another_program_is_kept(crashed: Path) -> None:
    (crashed / "chains" / "notes.txt").write_text("mine")
    report = gc(crashed)
    assert [(item.file, item.why) for item in report.kept] == [("chains/notes.txt", "not written by this program")]


def test_a_dropped_run_stays_in_older_versions_until_it_is_deleted(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=48, num_runs=2, judged=False).root
    catalog = Catalog(root)
    pinned, num_before = catalog.chains.version, len(visible_ids(root))
    doomed = [file for file in catalog.chains.files() if file.path.startswith(catalog.chains.files()[0].path[:16])]
    run_id = doomed[0].path.partition("/")[0]
    name = catalog.runs()[run_id].name
    planned = gc(root, drop_runs=[name], delete_removed=True, dry_run=True)
    assert len(visible_ids(root)) == num_before
    report = gc(root, drop_runs=[name])
    assert report.dropped == planned.dropped
    assert report.dropped[0].num_chains == sum(file.num_rows for file in doomed)
    assert len(visible_ids(root)) == num_before - report.dropped[0].num_chains
    assert {one.file for one in report.removed} == {f"chains/{file.path}" for file in doomed}
    old = Catalog(root, pinned).chains
    assert sum(len(read_sample_ids(old.path_of(file))) for file in old.files()) == num_before
    checked = verify_cache(root)
    assert checked.ok
    assert len(checked.removed) == len(doomed)
    assert gc(root).removed == report.removed
    assert any(re.match(r"no longer in the latest version: \d+ files? \(", line) for line in gc_lines(report))
    deleted = gc(root, delete_removed=True)
    assert deleted.freed_bytes == planned.freed_bytes == sum(file.size_bytes for file in doomed)
    assert deleted.unreadable == planned.unreadable == {"chains": [(1, pinned)]}
    assert any(f"versions 1 to {pinned} of chains can no longer be read" in line for line in gc_lines(deleted))
    assert verify_cache(root).ok
    assert gc(root, delete_removed=True).deleted == []


def test_verdicts_leave_with_a_dropped_run(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=48, num_runs=2).root
    name = min(run.name for run in Catalog(root).runs().values())
    planned, report = gc(root, drop_runs=[name], dry_run=True), gc(root, drop_runs=[name])
    assert report.dropped == planned.dropped
    assert report.dropped[0].num_verdicts > 0
    table = Catalog(root).verdicts
    judged = {one for file in table.files() for one in read_sample_ids(table.path_of(file))}
    assert judged
    assert judged <= set(visible_ids(root))
    assert verify_cache(root).ok


def test_a_dropped_run_is_built_again(tmp_path: Path) -> None:
    config, requests = make_config(tmp_path / "c"), make_requests(30)
    run_build(config, requests)
    assert gc(tmp_path / "c", drop_runs=["fake"]).dropped[0].num_chains == 30
    result = run_build(config, requests)
    assert (result.num_adopted, result.recorded.num_chains) == (0, 30)
    assert visible_ids(tmp_path / "c") == sorted(one.sample_id for one in requests)
    assert verify_cache(tmp_path / "c").ok


def test_a_running_run_is_not_dropped_and_an_unknown_one_is_named(crashed: Path) -> None:
    (run_id,) = Catalog(crashed).runs()
    with (
        worker_lock(lock_path(crashed, run_id, "w0"), 0.0),
        pytest.raises(CacheConflict, match="stop its workers first"),
    ):
        gc(crashed, drop_runs=[run_id])
    with pytest.raises(ConfigError, match="did you mean 'fake'"):
        gc(crashed, drop_runs=["fakes"])


def test_a_dry_run_writes_nothing(crashed: Path) -> None:
    before = contents(crashed)
    ended = CliRunner().invoke(app, ["gc", str(crashed), "--dry-run", "--grace-hours", "0", "--json"])
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["dry_run"] is True
    assert contents(crashed) == before


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
def test_a_dropped_run_does_not_come_back_by_what_a_crash_left_of_it(crashed: Path, grace_s: float) -> None:
    (run_id,) = Catalog(crashed).runs()
    planned = gc(crashed, drop_runs=[run_id], dry_run=True, grace_s=grace_s)
    report = gc(crashed, drop_runs=[run_id], grace_s=grace_s)
    assert [item.file for item in planned.swept] == [item.file for item in report.swept]
    assert "its run is dropped" in "\n".join(gc_lines(report))
    assert (report.num_adopted, visible_ids(crashed), gc(crashed).num_adopted, visible_ids(crashed)) == (0, [], 0, [])
    result = run_build(make_config(crashed), make_requests(30))
    assert (result.num_done_before, result.recorded.num_committed) == (0, 30)
    assert verify_cache(crashed).ok


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_empty_cache_is_clean(tmp_path: Path, dry_run: bool) -> None:
    Catalog.create(tmp_path / "c")
    assert gc(tmp_path / "c", dry_run=dry_run).freed_bytes == 0
