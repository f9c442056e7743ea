"""A build on a Ray cluster: one actor per replica of the teacher, in a placement group of its size.

An actor starts `teacher-cache ... --join` as a child and reports on it. Chains and distributions never pass through
Ray: children write shards and commit. Ray restarts an actor whose process or node is lost, while others take over its
parts by lease. Whenever the cluster has room for another replica, one more worker joins.
"""

import contextlib
import io
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError, first_line
from stillroom.log import Progress, format_plural, note
from stillroom.program import DAMAGED, INTERRUPTED, StopRequest
from teacher_cache.config import BuildConfig, EmbeddedConfig, ScoreConfig
from teacher_cache.states.config import FeaturesConfig, TransformersConfig, VllmConfig
from teacher_cache.workers.child import Child, Job, Report, refused

POLL_S = 0.5
REMIND_S = 60.0
"""How often to say that the cluster has no room, or who keeps the fleet from ending."""
SILENT_S = 10.0
"""Silence after which a worker is shown as lost: its actor is being restarted, or waits for a node."""
LEAVE_S = 60.0
"""When stopping, how long to wait for a worker that is not heard."""
CLOSE_S = 5.0
MAX_FAILURES = 3
"""Failures of a worker in a row, without new chains between them, after which it is given up."""
COUNTS = ("num_adopted", "num_new_chains", "num_new_tokens", "num_failures")
FEATURE_COUNTS = ("num_adopted", "num_chains", "num_tokens", "size_bytes")
"""What a worker's result says of this worker alone, the third of them tokens; of builds and scores, and of features."""
MISTAKES = (ConfigError.exit_code, DAMAGED)
"""Exit codes that another attempt, or another node, would not change."""


class WorkerFailed(StillroomError):
    """What a worker said last; ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class ReplicaSize:
    """What one replica of the teacher needs. With `spans_nodes` vLLM itself makes the placement group of its GPUs."""

    num_cpus: int
    num_gpus: int
    spans_nodes: bool = False

    def __str__(self) -> str:
        what = format_plural(self.num_gpus, "GPU") if self.num_gpus else format_plural(self.num_cpus, "CPU")
        return what if self.spans_nodes else f"{what} on one node"


def replica_size(config: BuildConfig | ScoreConfig | FeaturesConfig, num_cpus: int | None) -> ReplicaSize:
    """What the engine's settings ask for: GPUs, unless `num_cpus` is given or the teacher is served elsewhere.

    Raises ConfigError for CPUs with Ray's executor.
    """
    engine = config.engine
    if isinstance(engine, (VllmConfig, TransformersConfig)):
        num_gpus = engine.tensor_parallel_size if isinstance(engine, VllmConfig) else 1
        return ReplicaSize(num_gpus, num_gpus) if num_cpus is None else ReplicaSize(num_cpus, 0)
    if not isinstance(engine, EmbeddedConfig):
        return ReplicaSize(num_cpus or 1, 0)
    spans_nodes = engine.distributed_executor_backend == "ray"
    if num_cpus is None:
        num_gpus = engine.tensor_parallel_size * engine.pipeline_parallel_size
        return ReplicaSize(num_gpus, num_gpus, spans_nodes)
    if spans_nodes:
        raise ConfigError("--cpus is for a teacher on the CPUs of one node: remove it or distributed_executor_backend")
    return ReplicaSize(num_cpus, 0)


def joining_job(
    command: str, path: Path, overrides: Sequence[str], config: BuildConfig | ScoreConfig | FeaturesConfig
) -> Job:
    """`teacher-cache COMMAND --join` with this configuration file, whose text travels along."""
    given = (
        [f"cache={json.dumps(str(config.cache.absolute()), ensure_ascii=False)}"]
        if isinstance(config.cache, Path)
        else []
    )
    sets = [part for one in (*overrides, *given) for part in ("--set", one)]
    begin = ("-P", "-m", "teacher_cache.cli", command)
    return Job(
        name=f"{command}-{secrets.token_hex(4)}",
        arguments=(*begin, path.name, *sets, "--join", "--json"),
        cache=str(config.cache.absolute() if isinstance(config.cache, Path) else config.cache),
        files={len(begin): path.read_text(encoding="utf-8")},
        # Several replicas on one node would otherwise all be bound to its first cores.
        environ={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )


def run_on_ray(address: str, job: Job, size: ReplicaSize, max_workers: int | None) -> Json | None:
    """Runs the job on as many workers as the cluster has room for, at most `max_workers`, until everything is done.

    `address` is `ray` (RAY_ADDRESS, this machine's cluster, or else one started for this call) or `ray://HOST:PORT`.
    Returns a worker's result with the counts of all, None if a signal came before there was one. Raises StillroomError
    with the exit code of a worker that met a mistake, or after every worker failed repeatedly.
    """
    with _connected(address), StopRequest() as stop:
        fleet = _Fleet(job, size, max_workers)
        try:
            return fleet.run(stop)
        finally:
            fleet.close()


class Worker:
    """The actor. When Ray restarts it, it starts a new child, which joins like any other."""

    def __init__(self, job: Job, size: ReplicaSize) -> None:
        import ray

        self._job = job
        self._child: Child | None = None
        # vLLM may start actors of its own.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        if size.spans_nodes:
            # Ray hides all GPUs from an actor that needs none itself, and vLLM looks for them.
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self.start()

    def start(self) -> None:
        """Starts the child; again, after it has failed."""
        self._child = None
        self._refused: Report | None = None
        try:
            self._child = Child(self._job)
        except (StillroomError, OSError) as error:
            self._refused = refused(error)

    def poll(self, stop: bool) -> Report:
        """What is new; `stop` has the child save and end."""
        if self._child is None:
            assert self._refused is not None
            return self._refused
        if stop:
            self._child.stop()
        return self._child.report()

    def clean(self) -> None:
        """Removes what the fleet shares; for one worker, at the end."""
        if self._child is not None:
            self._child.remove_mark()


@dataclass(eq=False)
class _Slot:
    """One worker, or the place for one while the cluster has no room (no actor yet) or it was given up."""

    group: Any
    actor: Any = None
    asked: Any = None
    report: Report | None = None
    heard_s: float = 0.0
    last_note: str = ""
    done_before: int = 0
    num_failures: int = 0
    is_given_up: bool = False

    @property
    def num_tokens(self) -> int:
        return 0 if self.report is None or self.report.progress is None else int(self.report.progress["num_tokens"])


class _Fleet:
    """The workers of one run."""

    def __init__(self, job: Job, size: ReplicaSize, max_workers: int | None) -> None:
        self._job, self._size, self._max_workers = job, size, max_workers
        self._slots: list[_Slot] = []
        self._placing: _Slot | None = None
        self._num_engines_before = 0
        self._progress: Progress | None = None
        self._notes: dict[str, str] = {}
        self._done = self._done_before = 0
        self._tokens_lost = 0
        self._started_s = self._reminded_s = time.monotonic()
        self._is_finished = False
        self._failure: StillroomError | None = None
        self._results: list[Json] = []
        self._num_workers = self._num_restarts = 0
        self._said: set[str] = set()
        self._creators: set[tuple[str, int]] = set()

    def run(self, stop: StopRequest) -> Json | None:
        """Until every worker has ended."""
        with contextlib.ExitStack() as bar:
            while True:
                is_ending = stop.is_set or self._failure is not None
                if is_ending or self._is_finished:
                    for slot in [one for one in self._slots if one.actor is None]:
                        self._remove(slot)
                    if not self._slots:
                        break
                else:
                    self._grow()
                self._poll(is_ending)
                self._show(bar)
                if self._is_finished and time.monotonic() - self._reminded_s >= REMIND_S:
                    hosts = sorted({one.report.host for one in self._slots if one.report is not None})
                    note(f"everything is done; workers on {', '.join(hosts)} are still judging answers or unloading")
                    self._reminded_s = time.monotonic()
                time.sleep(POLL_S)
        if self._failure is not None:
            raise self._failure
        if not self._results:
            return None
        done_before = None if self._progress is None else self._done_before
        return {
            **merged(self._results, time.monotonic() - self._started_s, done_before),
            "stopped": "interrupted" if stop.is_set and not self._is_finished else None,
            "num_workers": self._num_workers,
            "num_restarts": self._num_restarts,
        }

    def close(self) -> None:
        """Ends what is left at once: after a second Ctrl-C, or an error."""
        self._clean([slot.actor for slot in self._slots if slot.actor is not None])
        for slot in list(self._slots):
            self._remove(slot)

    def _grow(self) -> None:
        """Starts the waiting worker if there is room for it, and lets the next one wait."""
        if self._is_placing():
            return
        waiting = next((slot for slot in self._slots if slot.actor is None and not slot.is_given_up), None)
        if waiting is None:
            if self._max_workers is None or len(self._slots) < self._max_workers:
                self._slots.append(_Slot(_reserved(self._size)))
        elif (node := _node_of(waiting.group)) is not None:
            self._start(waiting, node)
        elif len(self._slots) == 1 and time.monotonic() - self._reminded_s >= REMIND_S:
            cpus = "" if self._size.num_gpus == 0 else " (for a teacher on CPUs: --cpus N)"
            note(f"waiting for room in the Ray cluster: {self._size}{cpus}")
            self._reminded_s = time.monotonic()

    def _start(self, slot: _Slot, node: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        if self._size.spans_nodes:
            # The reservation only showed that there is room, and where: vLLM makes its own, beginning on its node.
            remove_placement_group(slot.group)
            slot.group, self._placing, self._num_engines_before = None, slot, _num_groups(self._size)
            where: Any = NodeAffinitySchedulingStrategy(node, soft=False)
            needs = {"num_cpus": 1, "num_gpus": 0}
        else:
            where = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=0)
            needs = {"num_cpus": self._size.num_cpus, "num_gpus": self._size.num_gpus}
        actor = ray.remote(Worker).options(max_restarts=-1, scheduling_strategy=where, **needs)
        slot.actor = actor.remote(self._job, self._size)
        slot.heard_s, slot.done_before = time.monotonic(), self._done
        self._num_workers += 1

    def _is_placing(self) -> bool:
        """Whether a worker has yet to make its engine's placement group: until then its GPUs look free."""
        placing = self._placing
        if placing is not None and (
            placing not in self._slots
            or (placing.report is not None and placing.report.progress is not None)
            or _num_groups(self._size) > self._num_engines_before
        ):
            self._placing = None
        return self._placing is not None

    def _poll(self, is_ending: bool) -> None:
        import ray

        active = [slot for slot in self._slots if slot.actor is not None]
        for slot in active:
            if slot.asked is None:
                slot.asked = slot.actor.poll.remote(is_ending)
        if not active:
            return
        answered, _ = ray.wait([slot.asked for slot in active], num_returns=len(active), timeout=POLL_S)
        for slot in active:
            if slot.asked in answered:
                self._hear(slot, is_ending)
            elif (is_ending or self._is_finished) and time.monotonic() - slot.heard_s > LEAVE_S:
                # Its node is gone, and no other has room for it.
                self._remove(slot)

    def _hear(self, slot: _Slot, is_ending: bool) -> None:
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        asked, slot.asked = slot.asked, None
        try:
            report: Report = ray.get(asked)
        except ActorUnavailableError:
            return
        except RayTaskError as error:
            if "failed to import" not in str(error):
                raise
            raise StillroomError(
                f"a node of the Ray cluster lacks stillroom {self._job.version}: install it on every node"
            ) from error
        except RayActorError as error:
            note(f"a worker was lost and cannot be restarted: {first_line(error)}")
            self._remove(slot)
            return
        if slot.report is not None and slot.report.pid != report.pid:
            self._lost(slot, "was lost; Ray restarted it")
        slot.report, slot.heard_s = report, time.monotonic()
        for line in report.notes:
            self._say(slot, report.host, line)
        self._require_shared(report)
        if report.progress is not None:
            self._done = max(self._done, int(report.progress["done"]))
        if report.exit_code is not None and slot.actor is not None:
            self._end(slot, report, is_ending)

    def _end(self, slot: _Slot, report: Report, is_ending: bool) -> None:
        code = report.exit_code
        assert code is not None
        if report.result is not None:
            self._results.append(report.result)
        if code == 0 and not self._is_finished:
            self._is_finished, self._reminded_s = True, time.monotonic()
        if code in MISTAKES and self._failure is None and not is_ending:
            self._failure = WorkerFailed(f"{report.host}: {slot.last_note}", code)
        if code in (0, *MISTAKES) or is_ending or self._is_finished:
            self._remove(slot, has_ended=True)
            return
        self._lost(slot, _what_happened(slot, report))
        if slot.actor is not None:
            slot.actor.start.remote()

    def _lost(self, slot: _Slot, what: str) -> None:
        """Counts a failure of the slot's last child; gives the slot up after too many."""
        report = slot.report
        assert report is not None
        has_progressed = slot.num_tokens > 0 and self._done > slot.done_before
        slot.num_failures = 1 if has_progressed else slot.num_failures + 1
        slot.done_before = self._done
        self._tokens_lost += slot.num_tokens
        self._num_restarts += 1
        slot.report = None
        note(f"{report.host}: the worker {what}")
        if slot.num_failures < MAX_FAILURES:
            return
        note(f"{report.host}: given up after {MAX_FAILURES} failures without new chains")
        self._kill(slot)
        # Its placement group stays: another worker in the same place would fare no better.
        slot.is_given_up = True
        if all(one.is_given_up or one.actor is None for one in self._slots):
            self._failure = WorkerFailed(f"every worker failed; the last one {what}", StillroomError.exit_code)

    def _say(self, slot: _Slot, host: str, line: str) -> None:
        slot.last_note = line.removeprefix("teacher-cache: ")
        # What ends a worker is said when it ends. All workers say how many prompts there are: once is enough.
        if line.startswith(("teacher-cache: ", "Interrupted. ")) or line in self._said:
            return
        self._said.add(line)
        note(f"{host}: {line}")

    def _require_shared(self, report: Report) -> None:
        if report.is_first:
            self._creators.add((report.host, report.pid))
        if len(self._creators) > 1 and self._failure is None:
            hosts = " and ".join(sorted(host for host, _ in self._creators))
            self._failure = DataError(
                f"{hosts} do not see the same {self._job.cache}: use storage that all nodes share, or a URL"
            )

    def _show(self, bar: contextlib.ExitStack) -> None:
        reports = [slot.report for slot in self._slots if slot.report is not None]
        progress = next((one.progress for one in reports if one.progress is not None), None)
        if self._progress is None and progress is not None:
            self._done_before, self._started_s = int(progress["done_before"]), time.monotonic()
            made = Progress(progress["label"], int(progress["total"]), progress["unit"], self._done_before)
            self._progress = bar.enter_context(made)
        if self._progress is None:
            return
        now_s = time.monotonic()
        heard = [slot for slot in self._slots if slot.report is not None and now_s - slot.heard_s < SILENT_S]
        hosts = {slot.report.host for slot in heard if slot.report is not None}
        num_lost = sum(slot.actor is not None for slot in self._slots) - len(heard)
        if heard:
            where = f"{format_plural(len(heard), 'worker')} on {format_plural(len(hosts), 'node')}"
            self._notes = {"": where} | ({"lost": str(num_lost)} if num_lost > 0 else {})
        tokens = self._tokens_lost + sum(slot.num_tokens for slot in self._slots)
        self._progress.update(self._done, tokens, self._notes)

    def _remove(self, slot: _Slot, *, has_ended: bool = False) -> None:
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        self._slots.remove(slot)
        self._tokens_lost += slot.num_tokens
        # Slots without an actor only wait for room.
        if has_ended and all(one.actor is None for one in self._slots):
            self._clean([slot.actor])
        # A cluster that is gone needs no cleaning.
        with contextlib.suppress(RayError):
            self._kill(slot)
            if slot.group is not None:
                remove_placement_group(slot.group)

    def _clean(self, actors: Sequence[Any]) -> None:
        """Has each of them remove what all share, as some may be lost, and others not see the cache."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            if asked := [actor.clean.remote() for actor in actors]:
                ray.wait(asked, num_returns=len(asked), timeout=CLOSE_S)

    def _kill(self, slot: _Slot) -> None:
        import ray

        if slot.actor is not None:
            ray.kill(slot.actor)
            slot.actor = slot.asked = None


def merged(results: Sequence[Json], seconds: float, num_done_before: int | None) -> Json:
    """The newest result, with the counts of all workers that ended by themselves. `num_done_before` is what the first
    one heard said; another one may have begun earlier.
    """
    last = max(results, key=lambda one: int(one.get("chains_version", 0)))
    names = COUNTS if "num_new_chains" in last else FEATURE_COUNTS
    sums = {name: sum(one[name] for one in results) for name in names}
    num_tokens = sums[names[2]]
    before = [one["num_done_before"] for one in results] + ([] if num_done_before is None else [num_done_before])
    return {
        **{name: value for name, value in last.items() if name != "worker"},
        **sums,
        "num_done_before": min(before),
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds if num_tokens else None,
    }


def _what_happened(slot: _Slot, report: Report) -> str:
    code = report.exit_code
    assert code is not None
    if code in (StillroomError.exit_code, INTERRUPTED) and slot.last_note:
        return f"ended with exit code {code} ({slot.last_note})"
    how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    return "\n".join([f"{how}; its output ends:", *(f"  {line}" for line in report.tail)] if report.tail else [how])


def _reserved(size: ReplicaSize) -> Any:
    """A placement group for one replica: created when the cluster has room, at once or later."""
    from ray.util.placement_group import placement_group

    if size.spans_nodes:
        return placement_group([{"GPU": 1}] * size.num_gpus, strategy="PACK")
    gpus = {"GPU": size.num_gpus} if size.num_gpus else {}
    return placement_group([{"CPU": size.num_cpus, **gpus}], strategy="STRICT_PACK")


def _node_of(group: Any) -> str | None:
    """The node of the group's first bundle, None while there is no room for all of them."""
    from ray.util.placement_group import placement_group_table

    made = placement_group_table(group)
    return str(made["bundles_to_node_id"][0]) if made.get("state") == "CREATED" else None


def _num_groups(size: ReplicaSize) -> int:
    """How many placement groups of this size the cluster has, whoever created them."""
    from ray.util.placement_group import placement_group_table

    created = [one["bundles"] for one in placement_group_table().values() if one["state"] == "CREATED"]
    return sum(len(one) == size.num_gpus and all("GPU" in bundle for bundle in one.values()) for one in created)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connects to the cluster, unless the caller has."""
    if address != "ray" and not address.startswith("ray://"):
        raise ConfigError(f"--on {address}: use ray, or ray://HOST:PORT of a cluster's Ray Client server")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--on {address} needs Ray: pip install 'stillroom[ray]'") from error
    if ray.is_initialized():
        yield
        return
    # Of a cluster that this starts; others are the user's.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    note("connecting to Ray" if address != "ray" else "connecting to Ray, or starting it")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ray.init(None if address == "ray" else address, log_to_driver=False, logging_level=logging.ERROR)
    # A Ray that takes too long to start raises nothing more special.
    except Exception as error:
        raise StillroomError(
            f"--on {address}: no connection to the Ray cluster: {first_line(error)}: see `ray status`, and run "
            "the same command again"
        ) from error
    try:
        # Ray tells on stdout what goes wrong in the cluster.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()
