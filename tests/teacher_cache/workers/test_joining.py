"""Workers that join a build: parts by lease, each done once, and those of the dead taken over."""

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import set_folder
from stillroom.errors import ConfigError, DataError
from stillroom.log import Progress
from stillroom.storage.paths import create_file
from teacher_cache.building.build import Build
from teacher_cache.building.commands import warn_of_joined
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.inspect.stats import cache_stats, stats_text
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.prompts.prompts import own_share
from teacher_cache.workers import leases
from teacher_cache.workers.joining import WAIT, JoinedWork, is_in, of_sources, rows_of_builds
from teacher_cache.workers.leases import Leases, WorkerState, leases_folder
from teacher_cache.writer.commit import read_sample_ids
from tests.helpers.caches import make_cache, on_disk, visible_ids
from tests.helpers.fake_builds import (
    EOS_ID,
    IMPATIENCE,
    VOCAB_SIZE,
    K,
    fall_silent,
    join_build,
    make_config,
    make_engine,
    make_requests,
    make_teacher,
    parts_of,
    silence,
)
from tests.helpers.feature_sets import add_features
from tests.helpers.programs import Program


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """See IMPATIENCE."""
    for name, value in IMPATIENCE.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def dead() -> list[str]:
    """Workers that were declared dead."""
    return []


def test_a_file_is_created_once_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "one"
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(lambda number: create_file(path, b"%d" % number), range(64)))
    assert created.count(True) == 1
    assert path.read_bytes() == b"%d" % created.index(True)
    assert list(path.parent.iterdir()) == [path]


def test_a_part_has_one_holder_until_it_is_given_back(tmp_path: Path, dead: list[str]) -> None:
    with Leases(tmp_path, "ja", dead.append) as one, Leases(tmp_path, "jb", dead.append) as other:
        assert one.claim("0-a")
        assert not other.claim("0-a")
        assert other.claim("0-b")
        time.sleep(leases.LIST_S)
        assert (other.is_held("0-a"), one.is_held("0-b"), one.is_held("0-c")) == (True, True, False)
        one.release("0-a")
        time.sleep(leases.LIST_S)
        assert other.claim("0-a")
    assert list(tmp_path.iterdir()) == []
    assert dead == []


def test_the_silent_are_declared_dead_once_and_what_they_held_is_free(tmp_path: Path, dead: list[str]) -> None:
    silent = Leases(tmp_path, "ja", dead.append)
    silent._beat()
    assert silent.claim("0-a")
    assert silent.claim("0-b")
    with Leases(tmp_path, "jb", dead.append) as other:
        assert not other.claim("0-a")
        silence(tmp_path, "ja")
        time.sleep(leases.LIST_S)
        assert other.claim("0-a")
        assert other.claim("0-b")
        assert dead == ["ja"]
        # It was only slow: it learns that others have its parts, and gives back nothing of theirs.
        silent._beat()
        time.sleep(leases.LIST_S)
        assert silent.is_held("0-c") is False
        silent.release("0-a")
        silent.release("0-b")
        assert not silent.claim("0-a")
    assert [path.name for path in tmp_path.iterdir()] == ["ja.json"]


def test_who_was_only_slow_is_not_declared_dead_again(tmp_path: Path, dead: list[str]) -> None:
    slow, second = Leases(tmp_path, "ja", dead.append), Leases(tmp_path, "jb", dead.append)
    slow._beat()
    assert slow.claim("0-a")
    silence(tmp_path)
    second._beat()
    assert second.claim("0-a")
    silence(tmp_path)
    slow._beat()
    with Leases(tmp_path, "jc", dead.append) as third:
        assert third.claim("0-a")
    assert dead == ["ja", "jb"]


def test_after_an_outage_of_the_storage_nobody_is_dead_at_once(tmp_path: Path, dead: list[str]) -> None:
    """It silenced everybody, and the first one that reaches it again must not take all parts."""
    first, other = Leases(tmp_path, "ja", dead.append), Leases(tmp_path, "jb", dead.append)
    first._beat()
    other._beat()
    assert other.claim("0-a")
    silence(tmp_path)
    assert first._beat_s is not None
    first._beat_s -= 2 * leases.EXPIRY_S
    first._beat()
    assert not first.claim("0-a")
    first._trusted_s = 0.0
    assert first.claim("0-a")
    assert dead == ["jb"]


def test_a_lease_is_held_although_the_storage_lost_its_answer(
    tmp_path: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks again, and the storage refuses, because the file is there."""
    with Leases(tmp_path, "ja", dead.append) as one:
        monkeypatch.setattr(leases, "create_file", lambda *given: create_file(*given) and False)
        assert one.claim("0-a")
    assert list(tmp_path.iterdir()) == []


def test_storage_that_creates_a_file_twice_is_refused(
    tmp_path: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "create_file", lambda *_: True)
    with pytest.raises(DataError, match="creates the same file twice"), Leases(tmp_path, "ja", dead.append):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_hangs_falls_silent(tmp_path: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALL_S", 0.0)
    with Leases(tmp_path, "ja", dead.append) as hanging, Leases(tmp_path, "jb", dead.append) as other:
        hanging.report(num_tokens=1)
        assert hanging.claim("0-a")
        silence(tmp_path, "ja")
        # Another heartbeat would come meanwhile.
        time.sleep(3 * leases.HEARTBEAT_S)
        assert other.claim("0-a")


def test_joined_workers_do_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, requests = tmp_path / "c", make_requests(160)
    shown: defaultdict[Progress, list[int]] = defaultdict(list)
    monkeypatch.setattr(Progress, "update", lambda progress, done, *_: shown[progress].append(done))
    with ThreadPoolExecutor(3) as pool:
        results = list(
            pool.map(lambda _: join_build(make_config(cache), requests, lambda: make_engine(0.02)), range(3))
        )
    assert visible_ids(cache) == sorted(request.sample_id for request in requests)
    done = [result.recorded.num_chains for result in results]
    # No chain was generated twice, and no worker sat idle.
    assert sum(done) == 160
    assert min(done) > 0
    # Progress never goes back, and the last worker to end shows what is there.
    assert all(counts == sorted(counts) for counts in shown.values())
    assert max(counts[-1] for counts in shown.values()) == 160
    report = verify_cache(cache)
    assert (report.ok, report.orphans) == (True, [])
    run = Catalog(cache).chains.files()[0].path.partition("/")[0]
    assert list(leases_folder(cache, run).iterdir()) == []
    assert list((cache / "runs").glob("*.lock")) == []


def test_chains_of_other_prompts_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, requests = tmp_path / "c", make_requests(40)
    join_build(make_config(cache), requests[:20], make_engine)
    shown: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda _, done, *__: shown.append(done))
    result = join_build(make_config(cache), requests[15:], make_engine)
    assert (result.num_done_before, result.recorded.num_chains, result.num_total) == (5, 20, 25)
    assert (min(shown), shown[-1]) == (5, 25)
    for source, num in (("fake", 40), ("other", 0)):
        visible, _ = rows_of_builds(Catalog(cache), of_sources([source]))
        visible.refresh()
        assert sum(map(visible.num_wanted, visible.table.files())) == num


def test_what_a_heartbeat_and_the_log_both_tell_counts_once(tmp_path: Path) -> None:
    cache, requests = tmp_path / "c", make_requests(16)
    first = join_build(make_config(cache), requests[:8], make_engine)
    visible = rows_of_builds(Catalog(cache))
    work: JoinedWork[Any] = JoinedWork(cache, first.run_id, "jnew", visible, is_in(visible))
    states = work.leases._others = [WorkerState(worker=first.worker, host="", pid=1, started_at=0.0, num_done=11)]
    assert work.num_done(2) == 13
    work._look()
    assert work.num_done(2) == 13
    states.clear()
    # It left, or died with three chains uncommitted: they count until they are done again.
    assert (work.num_done(2), work.num_done(6)) == (13, 14)


@pytest.mark.parametrize("slow", ["to start", "to end"])
def test_nobody_waits_for_the_engine_of_another_worker(tmp_path: Path, slow: str) -> None:
    cache, requests = tmp_path / "c", make_requests(40)
    is_starting, others_are_done = threading.Event(), threading.Event()

    class SlowToEnd(FakeEngine):
        def close(self) -> None:
            assert slow == "to start" or others_are_done.wait(30)

    def start_slow() -> FakeEngine:
        is_starting.set()
        assert slow == "to end" or others_are_done.wait(30)
        return SlowToEnd(VOCAB_SIZE, K, mean_tokens=40, eos_id=EOS_ID, step_s=0.02)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(join_build, make_config(cache), requests, start_slow)
        assert is_starting.wait(30)
        join_build(make_config(cache), requests, lambda: make_engine(0.02))
        others_are_done.set()
        assert (other.result().recorded.num_chains > 0) == (slow == "to end")
    assert len(visible_ids(cache)) == 40


def test_what_a_killed_worker_held_is_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache, requests = tmp_path / "c", make_requests(60)
    victim = Program(["tests.helpers.fake_builds", str(cache), "join", "60", "0.5"])
    deadline_s = time.monotonic() + 60
    while not list(cache.glob("runs/*.leases/*.lease")):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    victim.kill()
    for folder in cache.glob("runs/*.leases"):
        silence(folder)
    result = join_build(make_config(cache), requests, make_engine)
    assert result.recorded.num_chains == 60
    assert visible_ids(cache) == sorted(request.sample_id for request in requests)
    assert "has been silent" in capfd.readouterr().err
    assert list(cache.glob("runs/*.leases/*")) == list(cache.glob("runs/*.lock")) == []


def test_what_a_dead_worker_published_is_adopted_at_the_takeover(tmp_path: Path) -> None:
    """It died between the rename and the commit."""
    cache, requests = tmp_path / "c", make_requests(16)
    # No run yet, so that only the takeover can adopt.
    build = Build(make_config(cache), make_teacher(), "jdead")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillroom.cache.catalog.Table.commit", _dies)
        with pytest.raises(RuntimeError, match="killed"):
            build.join(lambda: parts_of(requests), 16, make_engine, retry_failures=False)
    build.close()
    (file,) = (cache / "chains" / build.run_id).glob("jdead-*.parquet")
    folder = leases_folder(cache, build.run_id)
    dead = Leases(folder, "jdead", lambda _: None)
    dead._beat()
    assert all(dead.claim(name) for name, _ in parts_of(requests))
    silence(on_disk(folder))
    visible = rows_of_builds(Catalog(cache))
    work: JoinedWork[Any] = JoinedWork(cache, build.run_id, "jnew", visible, is_in(visible))
    with work:
        offered = work.items(lambda: parts_of(requests))
        asked = []
        for one in offered:
            if one is WAIT:
                time.sleep(0.1)
            else:
                asked.append(one)
    assert asked == []
    assert len(visible_ids(cache)) == 16
    assert file.exists()
    # Also leases on parts that were found done.
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("last_call", ["states.sets.constants_of", "writer.commit.Table.commit"])
def test_workers_join_a_features_pass_and_take_over_from_the_dead(tmp_path: Path, last_call: str) -> None:
    """One dies while it fits the set, or between the rename and the commit of its first file."""
    cache = make_cache(tmp_path / "c", num_chains=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"teacher_cache.{last_call}", _dies)
        patch.setattr(JoinedWork, "__exit__", fall_silent)
        with pytest.raises(RuntimeError, match="killed"):
            add_features(cache.root, None)
    assert list(cache.root.glob("runs/*.leases/*.lease"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: add_features(cache.root, None, step_s=0.05), range(2))
    table = cache.catalog.features
    assert table is not None
    stored = [one for file in table.files() for one in read_sample_ids(table.path_of(file))]
    assert sorted(stored) == sorted(chain.sample_id for chain in cache.chains)
    # Nothing was computed twice, and no worker sat idle.
    num_adopted = 0 if "constants" in last_call else 12
    assert first.num_chains + second.num_chains + num_adopted == 24
    assert min(first.num_chains, second.num_chains) > 0
    assert verify_cache(cache.root).ok
    assert list(cache.root.glob("runs/*.leases/*")) == []


def test_workers_that_are_alive_are_in_stats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "c"
    join_build(make_config(cache), make_requests(8), make_engine)
    catalog = Catalog(cache)
    assert cache_stats(catalog).workers == []
    run = catalog.chains.files()[0].path.partition("/")[0]
    # None but the one below, whose temporary file would be seen.
    monkeypatch.setattr(leases, "HEARTBEAT_S", 60.0)
    with Leases(leases_folder(cache, run), "ja", lambda _: None) as held:
        held.report(tokens_per_s=12.0, num_tokens=34)
        held._beat()
        # Also for a reader whose clock is wrong.
        monkeypatch.setattr("time.time", lambda: 1e10)
        (worker,) = (stats := cache_stats(catalog)).workers
        warn_of_joined(cache)
        assert list(on_disk(held.folder).iterdir()) == [held.folder / "ja.json"]
        assert "1 worker with --join may generate the same chains" in capsys.readouterr().err
        # As if the run were a set of features.
        set_folder(cache, run).mkdir(parents=True)
        warn_of_joined(cache)
    assert capsys.readouterr().err == ""
    assert (worker.worker, worker.num_tokens) == ("ja", 34)
    assert "building now: 1 worker, 12 tok/s (ja on " in stats_text(stats)


def test_join_goes_with_neither_a_share_nor_retries(tmp_path: Path) -> None:
    assert own_share("0/1", join=True) is None
    with pytest.raises(ConfigError, match="either --join or --worker"):
        own_share("0/2", join=True)
    build = Build(make_config(tmp_path / "c"), make_teacher(), "ja")
    with pytest.raises(ConfigError, match="use --retry-failures without --join"):
        build.join(lambda: (), 0, make_engine, retry_failures=True)
    build.close()


def _dies(*_: Any) -> None:
    raise RuntimeError("killed")
