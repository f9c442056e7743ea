"""Two workers that Ray starts against two started by hand, in turns.

    python -m benchmarks.fleet [--prompts N] [--rounds R] [--json]

Every worker joins the same kind of build with a fake engine; all else is real. `tokens_per_s` is the sum over both
workers from the start of their engines to the end, so what starting takes counts apart, in `start_s`: until both
generate. `cpu_s` is that of all processes, Ray's own among them; `worker_cpu_s` of the two workers. Ratios are of
medians over rounds, Ray to by hand. The last line is one JSON object; with --json it is the only one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from stillroom.log import note
from stillroom.program import obey_parent, print_result
from teacher_cache.building.result import result_json
from teacher_cache.workers.child import Job
from teacher_cache.workers.on_ray import ReplicaSize, run_on_ray
from tests.helpers.fake_builds import join_build, make_config, make_engine, make_requests

NUM_WORKERS = 2
SAMPLE_S = 0.5
MODULE = ("-m", "benchmarks.fleet", "--worker")

Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prompts < 1 or options.rounds < 1:
        parser.error("--prompts and --rounds must be at least 1")
    if options.worker is not None:
        _work(Path(options.worker), options.prompts)
        return
    arms: dict[str, Callable[[Path, int], None]] = {"by_hand": _by_hand, "ray": _on_ray}
    found: dict[str, list[Numbers]] = {name: [] for name in arms}
    for number in range(options.rounds):
        for name, run in arms.items():
            with tempfile.TemporaryDirectory(prefix="stillroom-fleet-") as folder:
                found[name].append(_measured(run, Path(folder) / "cache", options.prompts))
            if not options.json:
                note(f"round {number}  {name}  {found[name][-1]}")
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    ratios = {key: medians["ray"][key] / medians["by_hand"][key] for key in medians["ray"]}
    print(json.dumps({"prompts": options.prompts, "rounds": found, **medians, "ratio": ratios}))


def _measured(run: Callable[[Path, int], None], cache: Path, num_prompts: int) -> Numbers:
    started_s, seen = time.time(), _CpuTimes()
    with seen:
        run(cache, num_prompts)
    ends = [json.loads(path.read_text().splitlines()[-1]) for path in cache.glob("runs/*.metrics.jsonl")]
    assert sum(one["num_chains"] for one in ends) >= num_prompts, ends
    generating_s = max(one["time"] - one["seconds"] for one in ends)
    return {
        "tokens_per_s": sum(one["num_tokens"] / one["seconds"] for one in ends),
        "start_s": generating_s - started_s,
        "seconds": time.time() - started_s,
        "cpu_s": seen.total_s(lambda line: True),
        "worker_cpu_s": seen.total_s(lambda line: "--worker" in line),
    }


def _by_hand(cache: Path, num_prompts: int) -> None:
    line = [sys.executable, *MODULE, str(cache), "--prompts", str(num_prompts)]
    workers = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(NUM_WORKERS)]
    assert [one.wait() for one in workers] == [0] * NUM_WORKERS


def _on_ray(cache: Path, num_prompts: int) -> None:
    job = Job("fleet", (*MODULE, str(cache), "--prompts", str(num_prompts)), str(cache))
    result = run_on_ray("ray", job, ReplicaSize(1, 0), NUM_WORKERS)
    assert result is not None
    assert result["num_restarts"] == 0, result


def _work(cache: Path, num_prompts: int) -> None:
    obey_parent()
    config = make_config(cache)
    config = config.updated(shard={"max_mb": 8.0})
    result = join_build(config, make_requests(num_prompts), make_engine)
    print_result(result_json(config, result), [], as_json=True)


class _CpuTimes:
    """CPU seconds of every process below this one, and its own, by command line; looks every SAMPLE_S."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, float]] = {}
        self._own = psutil.Process()
        self._own_before_s = _cpu_s(self._own)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def total_s(self, counts: Callable[[str], bool]) -> float:
        """CPU seconds of the processes whose command line counts, at the last sample."""
        return round(sum(seconds for line, seconds in self._found.values() if counts(line)), 2)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            for process in self._own.children(recursive=True):
                try:
                    self._found[process.pid] = (" ".join(process.cmdline()), _cpu_s(process))
                except psutil.NoSuchProcess:
                    continue
            self._found[self._own.pid] = ("", _cpu_s(self._own) - self._own_before_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
