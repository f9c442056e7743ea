"""Kills builders at random until it has killed enough, lets the last ones finish, and counts what is there.

    python -m benchmarks.crash [--features] [--join] [--kills N] [--workers W] [--seed S] [--json]

Real processes build one cache with a fake engine: everything but the model is real. Each round starts W of them at
once, every third round with one that has all prompts, so that shares overlap, and kills each with SIGKILL at a random
moment: while it starts, generates, encodes, renames or commits. Beside them `gc` without any grace adopts and sweeps,
and is killed like the others. Then W workers finish, and one more looks after them.
`lost` are expected rows that are not visible, `duplicated` visible rows beyond the first of their sample, `orphans`
files that no log names. With --features the cache is built in peace, and what is killed are passes that store invented
states of its chains. With --join W workers take parts by lease all the time, each killed one is followed by a new one,
and `takeover_s` are the seconds from a kill until others have its leases. Exit code 1 unless nothing is lost, nothing
is duplicated and `verify` finds no fault. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from stillroom.errors import StillroomError
from stillroom.log import note
from teacher_cache.engine.api import Request
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.prompts.prompts import WHOLE, WorkerShare
from tests.helpers.fake_builds import join_build, make_config, make_engine, make_requests, run_build
from tests.helpers.feature_sets import add_features

ROWS_A_KILL = 60
"""Prompts that each round adds: more than it gets done, so that a kill never meets an idle process."""
STEP_S = 0.01
EARLY_FRAC, EARLY_S, LATE_S = 0.3, 0.3, 2.5
"""Kills come within EARLY_S of the start for this share of processes, within LATE_S for the others."""
FINISH_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class CrashResult:
    """What was asked for and what is visible, in rows."""

    kills: int
    workers: int
    rows_expected: int
    rows_found: int
    lost: int
    duplicated: int
    orphans: int
    num_shards: int
    verify_ok: bool
    seconds: float
    takeovers: int | None = None
    takeover_median_s: float | None = None
    takeover_max_s: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether every row is there exactly once and sound."""
        return self.verify_ok and not self.lost and not self.duplicated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", action="store_true", help="kill passes of `teacher-cache features` instead")
    parser.add_argument("--join", action="store_true", help="kill workers that take parts by lease instead")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    options = parser.parse_args()
    if options.kills < 1 or options.workers < 1:
        parser.error("--kills and --workers must be at least 1")
    with tempfile.TemporaryDirectory(prefix="stillroom-crash-") as folder:
        kill = crash_features if options.features else crash
        if options.join:
            kill = functools.partial(crash_joined, features=options.features)
        result = kill(Path(folder) / "cache", options.kills, options.workers, options.seed, quiet=options.json)
    print(json.dumps(asdict(result)))
    sys.exit(0 if result.is_good else 1)


def crash(cache: Path, num_kills: int, num_workers: int, seed: int, *, quiet: bool) -> CrashResult:
    """Builds `cache` against all odds. Forks: the calling process must not have opened a cache before."""
    started_s = time.monotonic()

    # Kept for the round: workers should start as close to each other as they can.
    @functools.lru_cache(maxsize=1)
    def requests_of(number: int) -> list[Request]:
        return make_requests(number * num_workers * ROWS_A_KILL)

    def start(number: int, share: WorkerShare) -> BaseProcess:
        return _fork(_work, cache, requests_of(number), share)

    killed, number = _kill_rounds(cache, num_kills, num_workers, seed, start, quiet=quiet)
    _let_finish(num_workers, lambda share: start(number, share))
    return _count(cache, requests_of(number), killed, num_workers, time.monotonic() - started_s)


def crash_features(cache: Path, num_kills: int, num_workers: int, seed: int, *, quiet: bool) -> CrashResult:
    """Stores features of a finished cache against all odds. Forks, as `crash` does."""
    started_s = time.monotonic()
    requests = make_requests((num_kills + num_workers) * ROWS_A_KILL)
    # In a process of its own: this one must not have opened the cache before it forks.
    _finish([_fork(_work, cache, requests, WHOLE, 0.0)])
    killed, _ = _kill_rounds(
        cache, num_kills, num_workers, seed, lambda _, share: _fork(_add_features, cache, share), quiet=quiet
    )
    _let_finish(num_workers, lambda share: _fork(_add_features, cache, share, 0.0))
    return _count(cache, requests, killed, num_workers, time.monotonic() - started_s, table_name="features")


def _kill_rounds(
    cache: Path,
    num_kills: int,
    num_workers: int,
    seed: int,
    start: Callable[[int, WorkerShare], BaseProcess],
    *,
    quiet: bool,
) -> tuple[int, int]:
    """Starts and kills workers round by round, from 1, beside a `gc`; returns how many kills and rounds there were."""
    rng = random.Random(seed)
    started_s = time.monotonic()
    killed = number = 0
    while killed < num_kills:
        number += 1
        shares = _shares(num_workers)
        if number % 3 == 0:
            shares[-1] = WHOLE
        processes = [start(number, share) for share in shares]
        sweeper = _fork(_sweep, cache)
        killed += _kill_all(processes, rng, num_kills - killed)
        _end_sweeper(sweeper)
        if not quiet and number % 10 == 0:
            note(f"{killed}/{num_kills} kills in {time.monotonic() - started_s:.0f} s")
    return killed, number


def _let_finish(num_workers: int, start: Callable[[WorkerShare], BaseProcess]) -> None:
    """All workers to their end, then one that looks after them."""
    for shares in (_shares(num_workers), [WHOLE]):
        _finish([start(share) for share in shares])


def _shares(num_workers: int) -> list[WorkerShare]:
    return [WorkerShare(index, num_workers) for index in range(num_workers)]


def crash_joined(
    cache: Path, num_kills: int, num_workers: int, seed: int, *, features: bool = False, quiet: bool
) -> CrashResult:
    """Builds `cache`, or stores its features, by lease, with a new worker for each that is killed. Forks, as `crash`
    does.
    """
    rng = random.Random(seed)
    started_s = time.monotonic()
    requests = make_requests((num_kills + num_workers) * ROWS_A_KILL // 2)
    if features:
        _finish([_fork(_work, cache, requests, WHOLE, 0.0)])

    def start() -> BaseProcess:
        return _fork(_add_features, cache, None) if features else _fork(_join, cache, requests)

    watch = _TakeoverWatch(cache / "runs")
    workers = [start() for _ in range(num_workers)]
    for killed in range(num_kills):
        watch.look_until(time.monotonic() + rng.uniform(0, EARLY_S if rng.random() < EARLY_FRAC else LATE_S))
        victim = rng.randrange(num_workers)
        watch.kill(workers[victim])
        workers[victim] = start()
        if not quiet and (killed + 1) % 20 == 0:
            note(f"{killed + 1}/{num_kills} kills in {time.monotonic() - started_s:.0f} s")
    deadline_s = time.monotonic() + FINISH_TIMEOUT_S
    while any(one.is_alive() for one in workers) and time.monotonic() < deadline_s:
        watch.look_until(time.monotonic() + 1.0)
    _finish(workers)
    # One more, alone, adopts what was published and not committed.
    _finish([start()])
    table_name = "features" if features else "chains"
    counted = _count(cache, requests, watch.num_killed, num_workers, time.monotonic() - started_s, table_name)
    return replace(
        counted,
        takeovers=len(watch.taken_s),
        takeover_median_s=round(statistics.median(watch.taken_s), 1) if watch.taken_s else None,
        takeover_max_s=round(max(watch.taken_s), 1) if watch.taken_s else None,
    )


class _TakeoverWatch:
    """Kills workers, and sees from the leases' folder when others have taken over what they held."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self.num_killed = 0
        self.taken_s: list[float] = []
        # When each was killed, by heartbeat.
        self._open: dict[Path, float] = {}

    def kill(self, worker: BaseProcess) -> None:
        """Kills one; if it holds a lease, its takeover is waited for."""
        worker.kill()
        worker.join()
        if worker.exitcode != -signal.SIGKILL:
            return
        self.num_killed += 1
        for heartbeat in self._runs.glob("*.leases/*.json"):
            with contextlib.suppress(OSError, ValueError):
                if json.loads(heartbeat.read_text())["pid"] == worker.pid and self._holds_a_lease(heartbeat):
                    self._open[heartbeat] = time.monotonic()

    def look_until(self, until_s: float) -> None:
        """Watches for this long."""
        while True:
            for heartbeat, killed_s in list(self._open.items()):
                if not heartbeat.exists():
                    self.taken_s.append(time.monotonic() - killed_s)
                    del self._open[heartbeat]
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(left_s, 0.2))

    def _holds_a_lease(self, heartbeat: Path) -> bool:
        for lease in heartbeat.parent.glob("*.lease"):
            with contextlib.suppress(OSError):
                if lease.read_text() == heartbeat.stem:
                    return True
        return False


def _join(cache: Path, requests: Sequence[Request]) -> None:
    _silence()
    config = make_config(cache, shard={"row_group_tokens": 400, "max_mb": 0.03, "max_minutes": 0.02})
    join_build(config, requests, lambda: make_engine(STEP_S))


def _fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    # Forked, because a fresh interpreter spends its seconds on imports, where a kill shows nothing.
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def _sweep(cache: Path) -> None:
    _silence()
    while True:
        # There is no cache yet, or a worker that is about to start holds what this wants.
        with contextlib.suppress(StillroomError):
            gc_cache(cache, dry_run=False, grace_s=0.0)
        time.sleep(STEP_S)


def _silence() -> None:
    with open(os.devnull, "w") as sink:  # noqa: PTH123 - a descriptor is what counts here
        os.dup2(sink.fileno(), 2)


def _end_sweeper(sweeper: BaseProcess) -> None:
    sweeper.kill()
    sweeper.join()
    if sweeper.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"gc beside workers ended by itself, with {sweeper.exitcode}")


def _add_features(cache: Path, share: WorkerShare | None, step_s: float = STEP_S) -> None:
    _silence()
    # Files of a few batches, so that kills meet all of: computing, writing, renaming, committing.
    shard = {"max_mb": 0.02, "max_minutes": 0.02}
    add_features(cache, share, step_s, teacher={"model": "fake"}, shard=shard)


def _work(cache: Path, requests: Sequence[Request], share: WorkerShare, step_s: float = STEP_S) -> None:
    _silence()
    config = make_config(cache, shard={"row_group_tokens": 400, "max_mb": 0.03, "max_minutes": 0.02})
    own, worker = requests[share.index :: share.count], f"w{share.index}of{share.count}"
    run_build(config, own, lambda: make_engine(step_s), worker)


def _kill_all(processes: Sequence[BaseProcess], rng: random.Random, at_most: int) -> int:
    """Kills each process at its own moment; how many were still at work then."""
    now_s = time.monotonic()
    limits = [EARLY_S if rng.random() < EARLY_FRAC else LATE_S for _ in processes]
    moments = sorted(((now_s + rng.uniform(0, limit), i) for i, limit in enumerate(limits)), key=lambda one: one[0])
    num_killed = 0
    for moment_s, i in moments:
        time.sleep(max(0.0, moment_s - time.monotonic()))
        processes[i].kill()
        processes[i].join()
        num_killed += processes[i].exitcode == -signal.SIGKILL
    return min(num_killed, at_most)


def _finish(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.join(FINISH_TIMEOUT_S)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"a worker that nobody killed ended with {process.exitcode}")


def _count(
    cache: Path,
    requests: Sequence[Request],
    num_kills: int,
    num_workers: int,
    seconds: float,
    table_name: str = "chains",
) -> CrashResult:
    from stillroom.cache.catalog import Catalog
    from teacher_cache.maintenance.verify import verify_cache
    from teacher_cache.writer.commit import read_sample_ids

    catalog = Catalog(cache)
    table = next(one for one in catalog.tables() if one.folder.name == table_name)
    found = [one for file in table.files() for one in read_sample_ids(table.path_of(file))]
    expected = {request.sample_id for request in requests}
    report = verify_cache(cache)
    for problem in report.problems:
        note(f"{problem.file}: {problem.problem}")
    return CrashResult(
        kills=num_kills,
        workers=num_workers,
        rows_expected=len(expected),
        rows_found=len(found),
        lost=len(expected - set(found)),
        duplicated=len(found) - len(set(found)),
        orphans=len(report.orphans),
        num_shards=len(table.files()),
        verify_ok=not report.problems,
        seconds=round(seconds, 1),
    )


if __name__ == "__main__":
    main()
