"""What happens to a cache when the machine fails it: a full disk, a disk that is read-only, locks that do not exist,
a second process as the same worker, bytes that change. Nothing is lost, nothing is there twice, every error is a line.
"""

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillroom.cache.catalog import Catalog
from stillroom.errors import CacheConflict, CorruptError, DataError, StillroomError
from stillroom.sql.session import open_session
from teacher_cache.building.build import Build
from teacher_cache.maintenance.verify import verify_cache
from tests.helpers.caches import damage, make_cache, visible_ids
from tests.helpers.fake_builds import make_config, make_requests, make_teacher, run_build
from tests.helpers.programs import Program

NUM_ROWS = 60
SHARDS = {"row_group_tokens": 200, "max_mb": 0.01}


def expected(num_rows: int = NUM_ROWS) -> list[str]:
    return sorted(request.sample_id for request in make_requests(num_rows))


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in `folder`; skips the test where this user may not mount."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs to mount a file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"may not mount a file system: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.parametrize("size_kib", [60, 100, 132, 160, 200, 232])
def test_a_full_disk_costs_nothing_that_was_committed(tmp_path: Path, size_kib: int) -> None:
    """ENOSPC in a shard, in a rename, in the log: one line, and the same command ends with every row once."""
    config = make_config(tmp_path / "c", shard=SHARDS)
    with mounted(tmp_path, f"size={size_kib}k"):
        with pytest.raises(StillroomError, match="No space left on device") as failure:
            run_build(config, make_requests(NUM_ROWS))
        assert "\n" not in str(failure.value)
        assert "\x1b" not in str(failure.value)
        remount(tmp_path, "size=64m")
        run_build(config, make_requests(NUM_ROWS))
        assert visible_ids(tmp_path / "c") == expected()
        report = verify_cache(tmp_path / "c")
        assert (report.problems, report.orphans) == ([], [])


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    """EFBIG, as quotas of some file systems say it; works without root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = make_config(tmp_path / "c", shard={"row_group_tokens": 200, "max_mb": 50})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(StillroomError, match=r"cannot be written: .*File too large"):
            run_build(config, make_requests(NUM_ROWS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    run_build(config, make_requests(NUM_ROWS))
    assert visible_ids(tmp_path / "c") == expected()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_read_only_cache_is_read_and_refuses_a_build_in_one_line(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=64m"):
        run_build(make_config(tmp_path / "c"), make_requests(20))
        remount(tmp_path, "ro")
        with pytest.raises(DataError, match=r"cannot be opened for writing: .*Read-only file system"):
            run_build(make_config(tmp_path / "c"), make_requests(30))
        assert verify_cache(tmp_path / "c").ok
        with open_session(Catalog(tmp_path / "c")) as session:
            assert session.arrow("SELECT count(*) AS n FROM chains").to_pylist() == [{"n": 20}]
        for command, *options in (["gc", "--dry-run"], ["verify"], ["stats"]):
            Program(["teacher-cache", command, str(tmp_path / "c"), *options]).wait(expect=0)
        for command, *options in (["gc"], ["judge", "--judge", "exact"]):
            code, _, said = Program(["teacher-cache", command, str(tmp_path / "c"), *options]).communicate()
            assert code in (1, 2)
            assert "Read-only file system" in said
            assert "Traceback" not in said


def test_without_locks_a_second_process_leaves_the_first_ones_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    config, requests = make_config(tmp_path / "c"), make_requests(NUM_ROWS)
    run_build(config, requests[:10])
    monkeypatch.setattr(fcntl, "flock", none)
    (run_id,) = Catalog(tmp_path / "c").runs()
    folder = tmp_path / "c" / "chains" / run_id
    young, old = folder / ".w0-000001.aaaa.tmp", folder / ".w0-000001.bbbb.tmp"
    for path in (young, old):
        path.write_bytes(b"half a shard")
    two_days_ago = time.time() - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))
    Build(config, make_teacher(), "w0").close()
    assert (young.exists(), old.exists()) == (True, False)


def test_a_lock_is_refused_to_a_second_process_while_the_first_lives(tmp_path: Path) -> None:
    first = Program(["tests.helpers.fake_builds", str(tmp_path / "c"), "0/1", "4000", "0.05"])
    try:
        for _ in range(1200):
            if list((tmp_path / "c" / "chains").glob("*/*.parquet")):
                break
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("teacher_cache.writer.commit.OWN_LOCK_WAIT_S", 0.0)
            with pytest.raises(CacheConflict, match="another process builds as this worker"):
                Build(make_config(tmp_path / "c", shard=SHARDS), make_teacher(), "w0of1")
    finally:
        first.kill()


@pytest.mark.parametrize("name", ["50%", "a b", "ü", "a#b", "a?b", "a[1]", "a*b", "it's", "=x"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    root = tmp_path / name / "c"
    run_build(make_config(root), make_requests(20))
    run_build(make_config(root), make_requests(30))
    assert visible_ids(root) == expected(30)
    assert verify_cache(root).ok
    with open_session(Catalog(root)) as session:
        assert session.arrow("SELECT count(*) AS n FROM chains").to_pylist() == [{"n": 30}]
        assert session.arrow("SELECT count(*) > 0 AS some FROM tokens").to_pylist() == [{"some": True}]


def test_a_name_that_deltalake_cannot_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a % before two hex digits"):
        Catalog.create(tmp_path / "a%20b" / "c")


def test_a_lost_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=20).root
    Catalog(root).chains._delta.create_checkpoint()
    log = root / "chains" / "_delta_log"
    next(log.glob("*.checkpoint.parquet")).unlink()
    with pytest.raises(CorruptError, match="_delta_log cannot be read"):
        Catalog(root)
    (found,) = verify_cache(root).problems
    assert "named by _last_checkpoint, is missing" in found.problem
    (log / "_last_checkpoint").unlink()
    assert verify_cache(root).ok
    assert verify_cache(root).num_chains == 20


def test_a_clock_set_back_breaks_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and transactions are counted, not timed."""
    config = make_config(tmp_path / "c", shard=SHARDS)
    run_build(config, make_requests(30))
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    run_build(config, make_requests(NUM_ROWS))
    monkeypatch.undo()
    assert visible_ids(tmp_path / "c") == expected()
    assert verify_cache(tmp_path / "c").ok


def test_a_changed_byte_stops_a_build_only_where_it_matters(tmp_path: Path) -> None:
    """A build reads sample ids alone: damage elsewhere is verify's to find, damage there is named."""
    run_build(make_config(tmp_path / "c"), make_requests(20))
    table = Catalog(tmp_path / "c").chains
    path = table.path_of(table.files()[0])
    damage(path)
    with contextlib.suppress(CorruptError):
        run_build(make_config(tmp_path / "c"), make_requests(30))
    assert {one.file for one in verify_cache(tmp_path / "c").problems} == {f"chains/{table.files()[0].path}"}
