"""A build on a Ray cluster: workers in actors, one killed and replaced; and what goes to them."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, StillroomError
from teacher_cache.cli import main
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.states.passes import FeaturesResult
from teacher_cache.workers.child import Child, Job
from teacher_cache.workers.on_ray import (
    ReplicaSize,
    Worker,
    _connected,
    _Fleet,
    _Slot,
    joining_job,
    merged,
    replica_size,
)
from tests.helpers.caches import visible_ids
from tests.helpers.fake_builds import make_config, make_requests, silence
from tests.helpers.programs import Program

NUM_PROMPTS = 320


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'stillroom[ray]'")
def test_a_killed_actor_is_replaced_and_every_row_is_there_once(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    fleet = Program(["tests.helpers.ray_builds", str(cache), str(NUM_PROMPTS), "0.5"])
    victim, name = _wait_for_workers(cache, 2, fleet)[0]
    deadline_s = time.monotonic() + 60
    while name not in _committers(cache):
        assert time.monotonic() < deadline_s, fleet.stderr_so_far()
        time.sleep(0.05)
    # The actor, which is the parent of the child that works. The child must end with it.
    os.kill(_parent_of(victim), signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{victim}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    for folder in cache.glob("runs/*.leases"):
        silence(folder, name)
    # The two at the start, and the one in the restarted actor.
    deadline_s = time.monotonic() + 60
    while len(_committers(cache)) < 3:
        assert time.monotonic() < deadline_s, fleet.stderr_so_far()
        time.sleep(0.05)
    cache.with_suffix(".hurry").touch()
    code, out, err = fleet.communicate()
    assert code == 0, err
    result = json.loads(out)
    assert (result["num_workers"], result["num_restarts"], result["stopped"]) == (2, 1, None)
    assert "was lost; Ray restarted it" in err
    assert f"{NUM_PROMPTS}/{NUM_PROMPTS} chains" in err
    assert visible_ids(cache) == sorted(request.sample_id for request in make_requests(NUM_PROMPTS))
    report = verify_cache(cache)
    assert (report.ok, report.orphans) == (True, [])
    assert len(_committers(cache)) == 3
    assert list(cache.glob("runs/*.fleet")) == []


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'stillroom[ray]'")
@pytest.mark.parametrize("is_cut_short", [False, True])
def test_the_last_worker_cleans_up_while_another_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut_short: bool
) -> None:
    actor = Mock()
    monkeypatch.setattr("ray.wait", lambda *_, **__: None)
    monkeypatch.setattr("ray.kill", lambda _: None)
    fleet = _Fleet(Job("one", (), str(tmp_path)), ReplicaSize(1, 0), None)
    fleet._slots = [ended := _Slot(None, actor), _Slot(None)]
    if is_cut_short:
        fleet.close()
    else:
        fleet._remove(ended, has_ended=True)
    actor.clean.remote.assert_called_once_with()


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'stillroom[ray]'")
def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setattr("ray.init", init)
    with (
        pytest.raises(StillroomError, match=r"^--on ray: .* timed out during startup\.: see `ray status`"),
        _connected("ray"),
    ):
        pass


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'stillroom[ray]'")
def test_a_child_reads_a_file_that_nothing_is_left_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: Mock(gcs_address="here"))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    show = ("-c", "import sys; print(*map(open(sys.argv[1]).read, (2, -1)), sys.argv[2])", "same", "same")
    worker = Worker(Job("one", show, str(tmp_path / "c"), {2: "text"}), ReplicaSize(1, 0))
    for _ in range(2):
        while (report := worker.poll(stop=False)).exit_code is None:
            time.sleep(0.05)
        assert report.tail == ["te xt same"]
        worker.start()
    while worker.poll(stop=False).exit_code is None:
        time.sleep(0.05)
    worker.clean()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("engine", "num_cpus", "size"),
    [
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, None, ReplicaSize(8, 8)),
        ({"tensor_parallel_size": 8, "distributed_executor_backend": "ray"}, None, ReplicaSize(8, 8, spans_nodes=True)),
        ({}, 16, ReplicaSize(16, 0)),
        ({"kind": "server", "endpoints": ["http://gpu:8000"]}, None, ReplicaSize(1, 0)),
    ],
)
def test_a_replica_takes_what_its_engine_needs(
    tmp_path: Path, engine: dict[str, object], num_cpus: int | None, size: ReplicaSize
) -> None:
    assert replica_size(make_config(tmp_path, engine=engine), num_cpus) == size


def test_results_of_workers_are_added_up() -> None:
    one = {"worker": "ja", "num_adopted": 0, "num_done_before": 3, "tokens_per_s": 9.0, "seconds": 1.0}
    build = {**one, "num_new_chains": 2, "num_new_tokens": 30, "num_failures": 1, "chains_version": 4, "num_chains": 7}
    newer = {**build, "worker": "jb", "chains_version": 5, "num_chains": 9}
    found = merged([newer, {**build, "num_done_before": 8}], 10.0, 5)
    assert "worker" not in found
    assert (found["num_new_chains"], found["num_new_tokens"], found["num_failures"]) == (4, 60, 2)
    assert (found["num_chains"], found["num_done_before"], found["tokens_per_s"]) == (9, 3, 6.0)
    features = {
        **one,
        "set_id": "s",
        "num_total": 9,
        "num_chains": 2,
        "num_tokens": 30,
        "size_bytes": 8,
        "stopped": None,
    }
    of_all = FeaturesResult.of(merged([features, features], 10.0, None))
    assert of_all == FeaturesResult("s", "", 9, 3, 0, 4, 60, 16, 10.0, None)


def test_the_text_of_the_configuration_travels_and_the_cache_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("run: mine")
    monkeypatch.chdir(tmp_path)
    job = joining_job("score", path, ["engine.max_num_seqs=2"], make_config(Path("c")))
    assert [(job.arguments[place], text) for place, text in job.files.items()] == [("teacher.yaml", "run: mine")]
    sets = ("--set", "engine.max_num_seqs=2", "--set", f'cache="{tmp_path}/c"')
    assert job.arguments[-8:] == ("score", "teacher.yaml", *sets, "--join", "--json")[-8:]


def test_a_node_with_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has stillroom .*, the command runs 0\.0\.1: install the same version"):
        Child(Job("one", (), str(tmp_path), version="0.0.1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "spark"], "--on spark: use ray, or ray://HOST:PORT"),
        (["--on", "ray", "--join"], "--on starts workers with --join: remove --join"),
        (["--workers", "2"], "--workers and --cpus have no effect without --on"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    config = tmp_path / "teacher.yaml"
    config.write_text(json.dumps(make_config(tmp_path / "c").model_dump(mode="json", exclude_none=True)))
    monkeypatch.setattr("sys.argv", ["teacher-cache", "build", str(config), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def _wait_for_workers(cache: Path, num: int, fleet: Program) -> list[tuple[int, str]]:
    """Process ids and names of workers that hold parts."""
    deadline_s = time.monotonic() + 120
    while True:
        holders = {path.read_text() for path in cache.glob("runs/*.leases/*.lease")}
        states = [path for path in cache.glob("runs/*.leases/*.json") if path.stem in holders]
        if len(states) >= num:
            return [(json.loads(path.read_text())["pid"], path.stem) for path in states]
        assert fleet.poll() is None, fleet.communicate()
        assert time.monotonic() < deadline_s, fleet.stderr_so_far()
        time.sleep(0.05)


def _committers(cache: Path) -> set[str]:
    """Workers with visible shards."""
    files = Catalog(cache).chains.files() if (cache / "chains" / "_delta_log").exists() else []
    return {file.path.rpartition("/")[2].partition("-")[0] for file in files}


def _parent_of(pid: int) -> int:
    # `pid (name) state ppid ...`; the name may hold spaces.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
