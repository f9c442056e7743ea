"""`teacher-cache build` and `score`: requests through an engine into a cache; the same command resumes.

Samples that are visible are skipped, files that were published but not committed are adopted, and the rest is
generated. One process per worker; workers meet only in the Delta log, and in leases if they join (joining). On SIGINT
or SIGTERM nothing new is started, what is finished becomes visible, and the call returns.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.cache.catalog import SHARD_NAME, Catalog
from stillroom.cache.shards import open_shard
from stillroom.config import Json, plain
from stillroom.errors import CacheConflict, ConfigError, DataError, StillroomError, one_line
from stillroom.log import Progress, format_bytes, format_count, format_duration, format_plural, note, warn
from stillroom.models import write_vocab
from stillroom.program import StopRequest
from stillroom.schema.manifest import RunManifest, ShardHeader, Teacher, run_id_for
from stillroom.schema.records import Prompt
from stillroom.storage.paths import Location, matching, relative_name
from teacher_cache.config import BuildConfig, OpenAIConfig, ScoreConfig, ServerConfig, extra_sampling
from teacher_cache.engine.api import Engine, EngineInfo, Failure, Outcome, Request
from teacher_cache.engine.shared import SharedEngine
from teacher_cache.engine.switches import note_unknown
from teacher_cache.engine.teacher import IdentifiedTeacher, identify_teacher
from teacher_cache.joining import PART_CHAINS, WAIT_S, JoinedWork, Wait, is_in, rows_of_builds
from teacher_cache.judge_queue import require_judges
from teacher_cache.judging import judge_cache
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import (
    WHOLE,
    LoadedPrompts,
    Part,
    RequestMaker,
    WorkerShare,
    heldout_problem,
    load_prompts,
    num_requests,
    part_name,
    requests,
    samples_by_source,
    sampling_of,
)
from teacher_cache.scrub.chains import ChainCheck
from teacher_cache.scrub.counts import counted, total_of
from teacher_cache.scrub.rows import Scrubber
from teacher_cache.scrub.settings import (
    manifest_entries,
    require_clean_settings,
    unscrubbed_chains,
    unscrubbed_problem,
)
from teacher_cache.until import (
    JoinedPrompts,
    UntilRight,
    judge_what_is_left,
    own_prompts,
    require_judged,
    right_samples,
)
from teacher_cache.writer.commit import Committer, VisibleSamples, lock_path, worker_lock
from teacher_cache.writer.leases import new_worker_name
from teacher_cache.writer.recorder import MetricsLog, Recorded, Recorder, explained
from teacher_cache.writer.rows import RowMaker

SHOW_INTERVAL_S = 0.25
TYPICAL_LENGTH_FRAC = 0.5
"""Typical length of a chain as a fraction of max_tokens; the demo's chains have 0.48. Decides whether to compile."""
VERDICT_WAIT_S = 0.05
"""Like WAIT_S, where it depends on a judge of this process."""
OWN_LOCK_WAIT_S = 20.0
"""Another worker holds this worker's lock briefly while it adopts what a crash left behind."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one process did. `seconds` is generation without loading the model; `stopped` says why it ended early."""

    run_id: str
    worker: str
    num_total: int
    num_done_before: int
    num_adopted: int
    recorded: Recorded
    seconds: float
    stopped: str | None

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens per second of generation, None if nothing was generated."""
        return self.recorded.num_tokens / self.seconds if self.recorded.num_tokens else None


def build_cache(config: BuildConfig, share: WorkerShare | None, *, retry_failures: bool) -> BuildResult:
    """Generates the missing chains of this worker's share; None joins all workers that have none, by lease.

    Raises StillroomError for everything a user can fix.
    """
    scrubber = scrubber_of(config)
    loaded = load_prompts(config.prompts, scrubber)
    _note_loaded(loaded)
    if (problem := heldout_problem(config.prompts, loaded.prompts)) is not None:
        note(problem)
    if loaded.unanswered:
        raise ConfigError(
            f"{format_plural(loaded.unanswered.total(), 'variant')} of prompts.augment still need the teacher: run "
            "teacher-cache augment with this configuration first"
        )
    return build_loaded(config, loaded, share, scrubber, retry_failures=retry_failures)


def build_loaded(
    config: BuildConfig,
    loaded: LoadedPrompts,
    share: WorkerShare | None,
    scrubber: Scrubber | None,
    *,
    retry_failures: bool,
    shared: SharedEngine | None = None,
) -> BuildResult:
    """`build_cache` for prompts that are read already; config.prompts says how they are sampled. Builds in a row with
    equal settings may share an engine.
    """
    require_judges(loaded.prompts)
    if config.sampling.until is not None:
        require_judged(loaded.prompts)
    teacher = identify_teacher(config.teacher, config.engine)
    with contextlib.closing(Build(config, teacher, worker_name(share), scrubber)) as build:
        # Malformed rows belong to no share: the first worker records them.
        failures = loaded.failures if share is None or share.index == 0 else []
        num_total = num_requests(config, loaded.prompts, share or WHOLE) + len(failures)

        # A function, because an engine is loaded only if something is left to do.
        def start_engine() -> Engine:
            longest = min(config.sampling.max_tokens, config.engine.max_model_len or config.sampling.max_tokens)
            tokens_left = build.num_left(num_total) * longest * TYPICAL_LENGTH_FRAC
            start = functools.partial(_start_engine, config, teacher, tokens_left)
            return start() if shared is None else shared.start(start)

        if config.sampling.until is not None and share is None:
            joined = JoinedPrompts(config, build.catalog, loaded.prompts, failures, teacher)
            return build.join_prompts(joined, start_engine, retry_failures=retry_failures)
        if config.sampling.until is not None:
            assert share is not None
            until = build.until(loaded.prompts, share, retry_failures=retry_failures)
            stream = itertools.chain(failures, until.requests())
            num_total = until.num_total + len(failures)
            return build.run(stream, num_total, start_engine, retry_failures=retry_failures, until=until)
        if share is None:
            maker = RequestMaker(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint)
            parts = functools.partial(_parts, maker, failures)
            samples = samples_by_source(config)
            of_prompts = {prompt.prompt_id: samples[prompt.source] for prompt in loaded.prompts}
            return build.join(parts, num_total, start_engine, of_prompts, retry_failures=retry_failures)
        wanted = requests(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint, share)
        return build.run(itertools.chain(failures, wanted), num_total, start_engine, retry_failures=retry_failures)


def score_cache(config: ScoreConfig, share: WorkerShare | None, *, retry_failures: bool) -> BuildResult:
    """Scores the remaining completions of this share; None joins. Raises StillroomError for everything a user can
    fix.
    """
    teacher, scrubber = identify_teacher(config.teacher, config.engine), scrubber_of(config)
    with Completions(config, teacher, scrubber) as completions:
        num_total = completions.count(share or WHOLE)
        note(format_plural(num_total, "completion"))
        require_judges(Prompt(kind, (), "", "", metadata={"judge": kind}) for kind in completions.judges())
        with contextlib.closing(Build(config, teacher, worker_name(share), scrubber)) as build:
            start_engine = functools.partial(_start_engine, config, teacher)
            if share is None:
                parts = functools.partial(completions.parts, PART_CHAINS)
                result = build.join(parts, num_total, start_engine, retry_failures=retry_failures)
            else:
                result = build.run(completions.requests(share), num_total, start_engine, retry_failures=retry_failures)
        if completions.contaminated:
            num = format_plural(len(completions.contaminated), "completion")
            note(f"{num} skipped: their prompts overlap the evaluation set")
        return result


class Build:
    """One worker's build of one cache. The cache is open and the worker locked until `close`."""

    def __init__(
        self,
        config: BuildConfig | ScoreConfig,
        teacher: IdentifiedTeacher,
        worker: str,
        scrubber: Scrubber | None = None,
    ) -> None:
        """Opens or creates the cache, locks the worker, and recovers what a crash left behind.

        Raises CacheConflict if another process runs as this worker, DataError if the cache cannot be written,
        CorruptError if a registered file is damaged.
        """
        self.config, self.teacher, self.worker = config, teacher, worker
        scrub = config.scrub
        self._check = None if scrub is None or scrubber is None else ChainCheck(scrub, scrubber.recognisers)
        self.run_id = run_id_of(config, teacher.record)
        self._joined: JoinedWork[Any] | None = None
        self._is_adopted = False
        self._until: UntilRight | None = None
        with contextlib.ExitStack() as locks:
            try:
                self.catalog = Catalog.create(config.cache)
                own_abandoned_s = locks.enter_context(worker_lock(self._lock_path(worker), OWN_LOCK_WAIT_S))
                self._chains = VisibleSamples(self.catalog.chains)
                self._failures = VisibleSamples(self.catalog.failures)
                self.num_adopted = self._recover(own_abandoned_s)
                self._is_adopted = self.num_adopted > 0
                # After recovery, so that adopted rows count as done.
                self._chains.refresh()
                self._failures.refresh()
            except OSError as error:
                raise DataError(f"{config.cache} cannot be opened for writing: {one_line(error)}") from error
            # Nothing failed: the worker stays locked until `close`.
            self._locks = locks.pop_all()

    def join(
        self,
        parts: Callable[[], Iterable[Part]],
        num_total: int,
        start_engine: Callable[[], Engine],
        wanted: Mapping[str, int] | None = None,
        *,
        retry_failures: bool,
    ) -> BuildResult:
        """Like `run`, for the parts that no other worker has. Ends when everything is done, by whomever. Of a run with
        more prompts, progress counts only those in `wanted`, the number of samples of each.
        """
        visible = rows_of_builds(self.catalog, wanted)
        joined = JoinedWork[Request | Failure](
            self.catalog.root, self.run_id, self.worker, visible, is_in(visible), self._adopted
        )
        return self._join(joined, joined.items(parts), num_total, start_engine, retry_failures=retry_failures)

    def join_prompts(
        self, prompts: JoinedPrompts, start_engine: Callable[[], Engine], *, retry_failures: bool
    ) -> BuildResult:
        """The same where verdicts decide how many chains a prompt gets."""
        joined = JoinedWork[Prompt | Failure](
            *(self.catalog.root, self.run_id, self.worker, prompts.visible, prompts.is_done, self._adopted),
            on_look=prompts.look,
            needs_engine=prompts.needs_engine,
        )
        wanted = prompts.requests(joined.parts(prompts.parts))
        return self._join(
            joined, wanted, prompts.num_total, start_engine, retry_failures=retry_failures, until=prompts.until
        )

    def _join(
        self,
        joined: JoinedWork[Any],
        requests: Iterable[Request | Failure | Wait],
        num_total: int,
        start_engine: Callable[[], Engine],
        *,
        retry_failures: bool,
        until: UntilRight | None = None,
    ) -> BuildResult:
        if retry_failures:
            raise ConfigError("every worker that joins would retry each failure: retry them with one that does not")
        with joined:
            self._joined = joined
            return self.run(requests, num_total, start_engine, until=until)

    def until(self, prompts: Sequence[Prompt], share: WorkerShare, *, retry_failures: bool) -> UntilRight:
        """The requests of `sampling.until`, by the verdicts that the cache has."""
        config = self.config
        assert isinstance(config, BuildConfig)
        judge_what_is_left(config)
        own = own_prompts(prompts, share)
        maker = RequestMaker(config, own, self.teacher.tokenizer, self.teacher.record.fingerprint)
        failures = () if retry_failures else self._failures
        return UntilRight(config, own, maker, self._chains, failures, right_samples(config))

    def run(
        self,
        requests: Iterable[Request | Failure | Wait],
        num_total: int,
        start_engine: Callable[[], Engine],
        *,
        retry_failures: bool = False,
        until: UntilRight | None = None,
    ) -> BuildResult:
        """Generates what is not done. The engine is started only if something is left to do. `until` made the requests
        and hears what becomes of them.

        Raises StillroomError, after making finished chains visible, when the engine dies or after
        `failures.max_consecutive` consecutive failures.
        """
        self._until, config = until, self.config
        if config.scrub is not None and (old := unscrubbed_chains(self.catalog, config.scrub)):
            warn(unscrubbed_problem(old, config.cache))
        pending = _Pending(requests, functools.partial(self._is_done, retry_failures=retry_failures))
        if pending.is_waiting():
            note("other workers hold all that is left: waiting, in case one of them dies")
        while pending.is_waiting():
            # No engine yet: it takes minutes and a GPU, and may not be needed.
            time.sleep(WAIT_S)
            pending.pop()
        if pending.is_empty():
            self._restore_description()
            result = self._result(num_total, pending, Recorded(), 0.0, None)
        else:
            engine = start_engine()
            try:
                with StopRequest() as stop:
                    result = self._generate(engine, pending, num_total, stop)
            finally:
                engine.close()
        if self._is_adopted and result.stopped is None:
            # Verdicts on a dead worker's last rows died with it.
            judge_cache(self.catalog.root, where=f"run_id = '{self.run_id}'", num_processes=config.judging.processes)
        return result

    def _adopted(self) -> None:
        self._is_adopted = True

    def num_left(self, num_total: int) -> int:
        """Roughly how many chains are left: exact where this worker wrote all that is there of the run."""
        if self._joined is not None:
            return max(0, num_total - self._joined.num_done(0))
        own = f"{self.run_id}/{self.worker}-"
        return max(
            0, num_total - sum(file.num_rows for file in self.catalog.chains.files() if file.path.startswith(own))
        )

    def close(self) -> None:
        """Releases the worker's lock."""
        self._locks.close()

    def _is_done(self, sample_id: str, *, retry_failures: bool) -> bool:
        if self._joined is not None and self._until is not None:
            # What another worker commits just now, without a lease by then, would be waited for here in vain.
            return False
        return sample_id in self._chains or (not retry_failures and sample_id in self._failures)

    def _generate(self, engine: Engine, pending: "_Pending", num_total: int, stop: StopRequest) -> BuildResult:
        try:
            self._describe_run(engine.info)
        except OSError as error:
            raise explained(error) from error
        config = self.config
        rows = RowMaker(self.teacher.tokenizer, config.capture, config.reasoning, self.run_id, self.worker)
        header = self._header(engine.info)
        started_s = time.monotonic()
        with (
            Recorder(
                self.catalog,
                header,
                config.shard,
                rows,
                self._chains,
                self._failures,
                config.judging,
                self._until,
                self._check,
            ) as recorder,
            Progress("build", num_total, "chains", done_before=self._num_done(pending, Recorded())) as progress,
            MetricsLog(config.cache / "runs" / f"{self.run_id}.{self.worker}.metrics.jsonl") as metrics,
        ):
            recorded = recorder.recorded
            loop = _Loop(engine, pending, recorder, config.failures.max_consecutive, stop, self._check)
            for _ in loop:
                done = self._num_done(pending, recorded)
                progress.update(min(done, num_total), engine.num_tokens, self._notes(recorded))
                metrics.write(done, num_total, engine.num_tokens, recorded)
                self._report(engine.num_tokens, time.monotonic() - started_s, recorded)
            if loop.stopped is not None:
                note(f"{loop.stopped}: saving finished chains")
            recorder.finish(stop)
            if self._joined is not None:
                self._joined.settle()
            # The recorder's thread has counted the last outcomes only now.
            done = self._num_done(pending, recorded)
            progress.update(min(done, num_total), engine.num_tokens, self._notes(recorded))
        seconds = (recorder.closed_s or time.monotonic()) - started_s
        if recorded.num_unjudged:
            num = format_plural(recorded.num_unjudged, "chain")
            note(f"{num} without a verdict. Judge with: teacher-cache judge {config.cache}")
        if loop.stopped is not None and not stop.is_set:
            # Only now, when everything that had finished is visible.
            raise StillroomError(loop.stopped)
        return self._result(num_total, pending, recorded, seconds, loop.stopped)

    def _num_done(self, pending: "_Pending", recorded: Recorded) -> int:
        """Chains and failures so far: of this worker's share, or of all workers that joined."""
        spared = 0 if self._until is None else self._until.num_spared
        if self._joined is None:
            return pending.num_skipped + recorded.num_chains + recorded.num_failures + spared
        return self._joined.num_done(_num_recorded(recorded)) + spared

    def _notes(self, recorded: Recorded) -> dict[str, str]:
        size = {} if recorded.bytes_per_token is None else {"": f"{recorded.bytes_per_token:.0f} B/token"}
        notes = {**size, "failed": str(recorded.num_failures)}
        if self._joined is None:
            return notes
        return {**notes, "others": self._joined.leases.pace_of_others}

    def _report(self, num_tokens: int, seconds: float, recorded: Recorded) -> None:
        if self._joined is not None:
            rate, num_done = num_tokens / max(seconds, 1e-9), _num_recorded(recorded)
            self._joined.leases.report(num_tokens=num_tokens, tokens_per_s=rate, num_done=num_done)

    def _result(
        self, num_total: int, pending: "_Pending", recorded: Recorded, seconds: float, stopped: str | None
    ) -> BuildResult:
        num_done_before = pending.num_skipped if self._joined is None else self._joined.num_before
        num_adopted = self.num_adopted
        num_total -= 0 if self._until is None else self._until.num_spared
        return BuildResult(
            self.run_id, self.worker, num_total, num_done_before, num_adopted, recorded, seconds, stopped
        )

    def _recover(self, own_abandoned_s: float) -> int:
        """Adopts files that workers of this run published but did not commit, except those of running workers."""
        num_rows = 0
        # Other workers too: the next build may run with another N, in which a dead worker never comes back.
        for worker in sorted({self.worker, *self._workers_with_files()}):
            abandoned_s = own_abandoned_s
            with contextlib.ExitStack() as stack:
                if worker != self.worker:
                    try:
                        abandoned_s = stack.enter_context(worker_lock(self._lock_path(worker), 0.0))
                    except CacheConflict:
                        continue
                for table, visible in ((self.catalog.chains, self._chains), (self.catalog.failures, self._failures)):
                    num_rows += Committer(table, visible, self.run_id, worker).recover(abandoned_s)
        if num_rows:
            note(f"adopted {format_plural(num_rows, 'row')} that an interrupted build had written but not registered")
        return num_rows

    def _workers_with_files(self) -> set[str]:
        found = set()
        for table in (self.catalog.chains, self.catalog.failures):
            known = {file.path for file in table.files()}
            for path in matching(table.folder / self.run_id, "*.parquet"):
                name = SHARD_NAME.match(path.name)
                if name is not None and relative_name(path, table.folder) not in known:
                    found.add(name["worker"])
        return found

    def _lock_path(self, worker: str) -> Location:
        return lock_path(self.config.cache, self.run_id, worker)

    def _describe_run(self, info: EngineInfo) -> None:
        """Writes manifest and vocabulary, before the first row refers to them."""
        config, teacher = self.config, self.teacher.record
        known = self.catalog.runs().get(self.run_id)
        if known is not None:
            _warn_of_other_entropies(known, info)
        self.catalog.write_run(
            RunManifest(
                run_id=self.run_id,
                name=config.run,
                kind=_kind(config),
                # A resumed run keeps its age; all else describes its newest start.
                created_at=known.created_at if known else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                teacher=teacher.model_copy(update={"vocab_size": info.vocab_size}),
                sampling=_sampling(config),
                capture=plain(config.capture),
                engine={**plain(config.engine), **info.settings},
                prompts={
                    **plain(config.prompts if isinstance(config, BuildConfig) else config.completions),
                    **manifest_entries(known, config.scrub),
                },
                reasoning=plain(config.reasoning),
                chat_template_kwargs=plain(config.teacher)["chat_template_kwargs"],
                software=dict(info.software),
            )
        )
        self._write_vocab()

    def _restore_description(self) -> None:
        """Rewrites a missing manifest or vocabulary of a finished cache. No engine runs then, so the manifest lacks
        what the engine resolves at startup.
        """
        shards = [file for file in self.catalog.chains.files() if file.path.startswith(f"{self.run_id}/")]
        if not shards:
            return
        try:
            if (self.config.cache / "runs" / f"{self.run_id}.json").exists():
                self._write_vocab()
                return
            parquet, header = open_shard(self.catalog.chains.path_of(shards[0]))
            parquet.close()
            self._describe_run(EngineInfo(header.vocab_size, 0, header.entropy, {}, {}))
            note(f"rewrote runs/{self.run_id}.json, which was missing")
        except OSError as error:
            raise explained(error) from error

    def _write_vocab(self) -> None:
        path = self.catalog.vocab_path(self.teacher.record.tokenizer_fingerprint)
        if not path.exists():
            write_vocab(path, self.teacher.tokenizer)

    def _header(self, info: EngineInfo) -> ShardHeader:
        capture, teacher = self.config.capture, self.teacher.record
        return ShardHeader(
            codec=capture.codec,
            # Readers check counts against the header, and a small vocabulary has fewer candidates than were asked for.
            max_support=min(capture.max_support, info.vocab_size),
            nucleus=capture.nucleus,
            draws=capture.draws,
            temperatures=capture.temperatures,
            entropy=info.entropy,
            vocab_size=info.vocab_size,
            run_id=self.run_id,
            worker=self.worker,
            teacher_fingerprint=teacher.fingerprint,
            tokenizer_fingerprint=teacher.tokenizer_fingerprint,
            template_fingerprint=teacher.template_fingerprint,
        )


def run_id_of(config: BuildConfig | ScoreConfig, teacher: Teacher) -> str:
    """`<run>_<8 hex>`: a different teacher, capture, reasoning, sampling or argument of the chat template makes a
    different run, and so does scoring; more prompts, samples or completions do not.
    """
    capture, reasoning = plain(config.capture), plain(config.reasoning)
    template = plain(config.teacher)["chat_template_kwargs"]
    return run_id_for(config.run, _kind(config), teacher.fingerprint, _sampling(config), capture, reasoning, template)


def worker_name(share: WorkerShare | None) -> str:
    """`w0` for a whole build, `w<I>of<N>` for a share, so that builds with different N never share file names, and a
    new name for a worker that joins.
    """
    if share is None:
        return new_worker_name()
    return "w0" if share.count == 1 else f"w{share.index}of{share.count}"


def result_json(config: BuildConfig | ScoreConfig, result: BuildResult) -> Json:
    """The result for programs. Totals are of the whole cache, rates of this process."""
    from teacher_cache.inspect.stats import cache_stats

    catalog = Catalog(config.cache)
    stats, run = cache_stats(catalog), catalog.runs().get(result.run_id)
    return {
        "run_id": result.run_id,
        "worker": result.worker,
        "device": None if run is None else run.engine.get("device"),
        "num_wanted": result.num_total,
        "num_done_before": result.num_done_before,
        "num_adopted": result.num_adopted,
        "num_new_chains": result.recorded.num_chains,
        "num_new_tokens": result.recorded.num_tokens,
        "num_failures": result.recorded.num_failures,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
        "num_chains": stats.num_chains,
        "num_tokens": stats.num_tokens,
        "bytes_per_token": stats.bytes_per_token,
        "signal_bytes_per_token": stats.signal_bytes_per_token,
        "pass_rate": stats.pass_rate,
        "chains_version": stats.chains_version,
        "stopped": result.stopped,
    }


def result_lines(result: Json, cache: str) -> list[str]:
    """The result for a person."""
    rate = "" if result["tokens_per_s"] is None else f" at {result['tokens_per_s']:.0f} tok/s"
    took = f"{format_count(result['num_new_tokens'])} tokens in {format_duration(result['seconds'])}{rate}"
    others = f"{result['num_failures']} failed, {result['num_done_before']} done before"
    size = "" if result["bytes_per_token"] is None else f", {result['bytes_per_token']:.1f} B/token"
    total = format_bytes((result["bytes_per_token"] or 0.0) * result["num_tokens"])
    counts = f"{format_plural(result['num_chains'], 'chain')}, {format_count(result['num_tokens'])} tokens"
    return [
        f"new     {format_plural(result['num_new_chains'], 'chain')}, {took}; {others}",
        f"cache   {cache}: {counts}, {total}{size}",
    ]


class _Pending:
    """Requests that are not done, read one ahead, with failures of loading in between."""

    def __init__(self, requests: Iterable[Request | Failure | Wait], is_done: Callable[[str], bool]) -> None:
        self.num_skipped = 0
        self._seen: set[str] = set()
        self._remaining = self._undone(requests, is_done)
        # One ahead: whether anything is left must be known before a model is loaded.
        self._next = next(self._remaining, None)

    def is_empty(self) -> bool:
        return self._next is None

    def is_waiting(self) -> bool:
        """Whether the next one depends on something that is still to come."""
        return isinstance(self._next, Wait) and self._next is not Wait.READY

    def waits_for_verdicts(self) -> bool:
        """Whether it depends on what this process judges."""
        return self._next is Wait.VERDICTS

    def pop(self) -> Request | Failure | Wait | None:
        """The next one, None at the end. WAIT: ask again later."""
        popped, self._next = self._next, next(self._remaining, None) if self._next is not None else None
        return popped

    def _undone(
        self, requests: Iterable[Request | Failure | Wait], is_done: Callable[[str], bool]
    ) -> Iterator[Request | Failure | Wait]:
        for request in requests:
            if isinstance(request, Wait):
                yield request
                continue
            # Commits compare a shard with visible rows only, so a repeat within a shard would go unnoticed.
            if is_done(request.sample_id) or request.sample_id in self._seen:
                self.num_skipped += 1
            else:
                self._seen.add(request.sample_id)
                yield request


class _Loop:
    """Keeps the engine full and records its outcomes; `stopped` says why it ended early."""

    def __init__(
        self,
        engine: Engine,
        pending: _Pending,
        recorder: Recorder,
        max_consecutive: int | None,
        stop: StopRequest,
        check: ChainCheck | None = None,
    ) -> None:
        self.stopped: str | None = None
        self._check = check
        self._engine, self._pending, self._recorder = engine, pending, recorder
        self._max_consecutive, self._stop = max_consecutive, stop
        self._consecutive = 0

    def __iter__(self) -> Iterator[None]:
        """Yields every SHOW_INTERVAL_S, for progress, and once at the end."""
        shown_s = 0.0
        while self.stopped is None and (self._fill() or self._engine.num_unfinished):
            if self._pending.is_waiting() and not self._engine.num_unfinished:
                # Nothing is put into the recorder, so nothing else would tell that it has ended.
                self._recorder.check()
                if not self._pending.waits_for_verdicts():
                    # What is finished here is all that keeps others waiting in turn.
                    self._recorder.flush()
                time.sleep(VERDICT_WAIT_S if self._pending.waits_for_verdicts() else WAIT_S)
            for outcome in self._step():
                if isinstance(outcome, Failure) and self._check is not None:
                    outcome = self._check.failure(outcome)
                self._count(outcome)
                self._recorder.put(outcome)
            if time.monotonic() - shown_s >= SHOW_INTERVAL_S:
                yield
                shown_s = time.monotonic()
        yield

    def _fill(self) -> bool:
        """Submits while the engine has room; False once everything is submitted."""
        while self._engine.has_room() and not self._pending.is_empty():
            request = self._pending.pop()
            if request is Wait.READY:
                continue
            if isinstance(request, Wait):
                return True
            if isinstance(request, Failure):
                self._recorder.put(request)
            elif request is not None:
                self._engine.submit(request)
        return not self._pending.is_empty()

    def _step(self) -> list[Outcome]:
        try:
            outcomes = self._engine.step()
        except StillroomError:
            # Ctrl-C reaches the engine's processes too, so after it a dead engine is expected.
            if not self._stop.is_set:
                raise
            outcomes = []
        if self._stop.is_set:
            self.stopped = "interrupted"
        return outcomes

    def _count(self, outcome: Outcome) -> None:
        self._consecutive = self._consecutive + 1 if isinstance(outcome, Failure) else 0
        limit = self._max_consecutive
        if isinstance(outcome, Failure) and limit is not None and self._consecutive >= limit and self.stopped is None:
            self.stopped = (
                f"{self._consecutive} prompts in a row failed, the last with: {outcome.message} "
                "(failures.max_consecutive is the limit; failed prompts are retried with --retry-failures)"
            )


def scrubber_of(config: BuildConfig | ScoreConfig) -> Scrubber | None:
    """Raises ConfigError if a recogniser is not installed, or if the configuration itself contains personal data."""
    if config.scrub is None:
        return None
    scrubber = Scrubber(config.scrub)
    require_clean_settings(config, scrubber.recognisers)
    return scrubber


def _kind(config: BuildConfig | ScoreConfig) -> str:
    return "generate" if isinstance(config, BuildConfig) else "score"


def _sampling(config: BuildConfig | ScoreConfig) -> Json:
    """As in the manifest: settings that decide tokens, vLLM's own among them where there are any."""
    engine = {"engine": config.engine.switches} if config.engine.switches else {}
    if isinstance(config, ScoreConfig):
        return engine
    return {**plain(config.sampling.updated(vllm=extra_sampling(config))), **engine}


def _warn_of_other_entropies(known: RunManifest, info: EngineInfo) -> None:
    """Warns if the run was started with the sampler plugin and continues without it, or the other way round."""
    before, now = known.engine.get("sampler"), info.settings.get("sampler")
    if before is not None and now is not None and before != now:
        kinds = {"plugin": "exact entropies", "vllm": "entropies of the stored support"}
        warn(
            f"run {known.run_id} was started with {kinds.get(before, before)} and continues with "
            f"{kinds.get(now, now)}: each shard's header says which it holds"
        )


def _num_recorded(recorded: Recorded) -> int:
    return recorded.num_chains + recorded.num_failures


def _parts(maker: RequestMaker, failures: Sequence[Failure]) -> Iterator[Part]:
    """All of a build in the order in which one worker would do it."""
    if failures:
        yield part_name(0, (one.sample_id for one in failures)), lambda: failures
    for sample_index, batch in maker.batches(PART_CHAINS):
        name = part_name(sample_index, (prompt.prompt_id for prompt in batch))
        yield name, lambda sample_index=sample_index, batch=batch: [*maker.requests(sample_index, batch)]  # type: ignore[misc]


def _start_engine(
    config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher, tokens_left: float | None = None
) -> Engine:
    engine = config.engine
    if isinstance(engine, ServerConfig):
        from teacher_cache.engine.http.server import ServerEngine

        note(f"connecting to {', '.join(engine.endpoints)}")
        note_unknown("sampling", extra_sampling(config))
        return ServerEngine(engine, teacher.record, teacher.tokenizer, config.capture, extra_sampling(config))
    if isinstance(engine, OpenAIConfig):
        from teacher_cache.engine.http.openai import OpenAIChat, OpenAIEngine

        note(f"connecting to {engine.endpoint}")
        if engine.signals == "none":
            note("engine.signals: none stores text without distributions: students train on it with data.kind: text")
        template_kwargs = config.teacher.chat_template_kwargs
        chat = OpenAIChat(engine, teacher, config.capture, config.reasoning, template_kwargs)
        return OpenAIEngine(engine, teacher.record.vocab_size, chat, _samplings(config))
    from teacher_cache.engine.vllm import EmbeddedEngine

    # Load the commit that was fingerprinted, even if the branch has moved on since.
    pinned = config.teacher.updated(revision=teacher.record.revision)
    return EmbeddedEngine(
        pinned,
        engine,
        config.capture,
        scores=isinstance(config, ScoreConfig),
        sampling=_samplings(config),
        tokens_left=tokens_left,
    )


def _samplings(config: BuildConfig | ScoreConfig) -> list[Json]:
    """Sampling parameters of each source."""
    if isinstance(config, ScoreConfig):
        return []
    return [sampling_of(config.sampling, source) for source in config.prompts.sources]


def _note_loaded(loaded: LoadedPrompts) -> None:
    note(format_plural(len(loaded.prompts), "prompt"))
    if loaded.failures:
        rows, first = format_plural(len(loaded.failures), "malformed row"), loaded.failures[0].message
        note(f"{rows} will be recorded as failures; the first: {first}")
    if scrubbed := total_of(one.metadata for one in loaded.prompts):
        note(f"replaced personal data in prompts: {counted(scrubbed)}")
    if loaded.duplicates:
        twins, twin = format_plural(len(loaded.duplicates), "duplicate"), loaded.duplicates[0]
        note(f"{twins} skipped; the first: {twin}")
    if loaded.near_duplicates:
        alike, near = format_plural(len(loaded.near_duplicates), "near-duplicate"), loaded.near_duplicates[0]
        note(f"{alike} skipped; the first: {near}")
    if loaded.variants:
        kinds = ", ".join(f"{num:,} {kind}" for kind, num in sorted(loaded.variants.items()))
        note(f"including {format_plural(loaded.variants.total(), 'variant')}: {kinds}")
    if loaded.without_variant:
        reasons = ", ".join(f"{reason} ({num:,})" for reason, num in loaded.without_variant.most_common())
        note(f"{format_plural(loaded.without_variant.total(), 'variant')} could not be made: {reasons}")
    if loaded.contaminated:
        note(f"{format_plural(len(loaded.contaminated), 'prompt')} skipped that overlap the evaluation set")
    for source, num in loaded.judgeless():
        note(f"{format_plural(num, 'prompt')} of {source} with a reference but no judge: the answers get no verdict")
