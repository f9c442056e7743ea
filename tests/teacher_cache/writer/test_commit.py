"""What a crash leaves between rename and commit: adopted, reduced or swept, and never twice."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.catalog import Catalog, DataFile, Table, check_hash
from stillroom.errors import CacheConflict, CorruptError
from stillroom.storage.paths import Location
from teacher_cache.building.build import Build
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.writer.commit import Committer, VisibleSamples, read_sample_ids, remove_files, worker_lock
from tests.helpers.fake_builds import killed_before_commit, make_config, make_requests, make_teacher, run_build


def _without_commits(root: Path, num_prompts: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A build that dies between the rename of its first shard and the commit; returns what lies there."""
    with killed_before_commit(monkeypatch):
        run_build(make_config(root), make_requests(num_prompts))
    return sorted((root / "chains").glob("*/*.parquet"))


def _visible(root: Path) -> list[str]:
    table = Catalog(root).chains
    return [one for file in table.files() for one in read_sample_ids(table.path_of(file))]


def test_an_orphan_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (orphan,) = _without_commits(tmp_path / "c", 20, monkeypatch)
    assert _visible(tmp_path / "c") == []
    result = run_build(make_config(tmp_path / "c"), make_requests(20))
    assert result.num_adopted == result.num_done_before == 20
    assert [tmp_path / "c" / "chains" / file.path for file in Catalog(tmp_path / "c").chains.files()] == [orphan]


def test_the_orphan_of_another_worker_is_adopted_unless_that_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (orphan,) = _without_commits(tmp_path / "c", 20, monkeypatch)
    config = make_config(tmp_path / "c")
    with worker_lock(tmp_path / "c" / "runs" / f"{orphan.parent.name}.w0.lock", 0.0):
        at_work = Build(config, make_teacher(), "w1")
        at_work.close()
    assert at_work.num_adopted == 0
    assert run_build(config, make_requests(20), worker="w1").num_adopted == 20


def test_a_damaged_orphan_is_swept_and_its_chains_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (orphan,) = _without_commits(tmp_path / "c", 20, monkeypatch)
    orphan.write_bytes(orphan.read_bytes()[:-100])
    (orphan.parent / ".w0-000000.tmp").write_bytes(b"half a shard")
    result = run_build(make_config(tmp_path / "c"), make_requests(20))
    assert (result.num_adopted, result.recorded.num_chains) == (0, 20)
    assert not orphan.exists()
    assert not list((tmp_path / "c").rglob("*.tmp"))


def test_an_orphan_whose_rows_are_partly_visible_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (orphan,) = _without_commits(tmp_path / "c", 20, monkeypatch)
    saved = tmp_path / orphan.name
    shutil.move(orphan, saved)
    run_build(make_config(tmp_path / "c"), make_requests(12), worker="w1")
    shutil.move(saved, orphan)
    assert run_build(make_config(tmp_path / "c"), make_requests(20)).num_adopted == 8
    assert sorted(_visible(tmp_path / "c")) == sorted(request.sample_id for request in make_requests(20))
    assert not orphan.exists()
    table = Catalog(tmp_path / "c").chains
    for file in table.files():
        check_hash(table.path_of(file))


def test_a_file_registered_meanwhile_is_not_an_orphan(tmp_path: Path) -> None:
    """Regression: a table opened before another process committed took the new file for an orphan and removed it."""
    requests = make_requests(20)
    run_build(make_config(tmp_path / "c"), requests[:5])
    stale = Catalog(tmp_path / "c").chains
    (run_id,) = Catalog(tmp_path / "c").runs()
    run_build(make_config(tmp_path / "c"), requests)
    assert Committer(stale, VisibleSamples(stale), run_id, "w0").recover() == 0
    assert len(_visible(tmp_path / "c")) == 20


def test_a_commit_that_only_seemed_to_fail_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Table.commit

    def ambiguous(self: Table, files: list[DataFile], application: str, sequence: int) -> None:
        commit(self, files, application, sequence)
        raise CacheConflict("the answer was lost")

    monkeypatch.setattr(Table, "commit", ambiguous)
    assert run_build(make_config(tmp_path / "c"), make_requests(20)).recorded.num_committed == 20
    assert len(_visible(tmp_path / "c")) == 20


def test_a_worker_whose_file_is_adopted_while_it_commits_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, as on an object store: it was taken for dead after it had lost a race for some of its rows."""
    config, requests = make_config(tmp_path / "c"), make_requests(20)
    commit, rewrite = Table.commit, Committer._rewrite

    def late(self: Table, *given: Any) -> None:
        monkeypatch.setattr(Table, "commit", commit)
        run_build(config, requests[:12], worker="w1")
        commit(self, *given)

    def adopted(self: Committer, path: Location) -> DataFile:
        monkeypatch.setattr(Committer, "_rewrite", rewrite)
        table = Catalog(tmp_path / "c").chains
        assert Committer(table, VisibleSamples(table), path.parent.name, "w0").recover() == 8
        return rewrite(self, path)

    monkeypatch.setattr(Table, "commit", late)
    monkeypatch.setattr(Committer, "_rewrite", adopted)
    assert run_build(config, requests).stopped is None
    assert sorted(_visible(tmp_path / "c")) == sorted(request.sample_id for request in requests)
    assert verify_cache(tmp_path / "c").orphans == []


def test_chains_that_another_process_removes_are_not_done(tmp_path: Path) -> None:
    run_build(make_config(tmp_path / "c"), make_requests(5))
    table = Catalog(tmp_path / "c").chains
    visible = VisibleSamples(table)
    visible.refresh()
    removed = read_sample_ids(table.path_of(table.files()[0]))
    assert removed[0] in visible
    remove_files(Catalog(tmp_path / "c").chains, lambda _: True)
    visible.refresh()
    assert removed[0] not in visible
    assert len(visible) == 0


def test_a_flipped_byte_is_found_by_the_hash(tmp_path: Path) -> None:
    run_build(make_config(tmp_path / "c"), make_requests(20))
    table = Catalog(tmp_path / "c").chains
    path = table.path_of(table.files()[0])
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=path.name):
        check_hash(path)


def test_a_shard_cut_short_stops_the_next_build_by_name(tmp_path: Path) -> None:
    run_build(make_config(tmp_path / "c"), make_requests(20))
    table = Catalog(tmp_path / "c").chains
    path = table.path_of(table.files()[0])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CorruptError, match=f"{path.name} cannot be read"):
        run_build(make_config(tmp_path / "c"), make_requests(30))


def test_a_build_does_not_read_its_own_shards_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Location) -> list[str]:
        read.append(path.name)
        return read_sample_ids(path)

    monkeypatch.setattr("teacher_cache.writer.commit.read_sample_ids", reading)
    config = make_config(tmp_path / "c", shard={"row_group_tokens": 100, "max_mb": 0.01})
    assert run_build(config, make_requests(60)).recorded.num_shards > 1
    assert read == []
    run_build(config, make_requests(61))
    assert len(read) == len(set(read)) > 1, "a later process reads each shard once"
