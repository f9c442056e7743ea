"""One worker's build of one cache: what a crash left is recovered, what is left is generated, and the call resumes.

Samples that are visible are skipped, files that were published but not committed are adopted, and the rest is
generated. One process per worker; workers meet only in the Delta log, and in leases if they join (joining). On SIGINT
or SIGTERM nothing new is started, what is finished becomes visible, and the call returns.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, DataError, StillroomError, one_line
from stillroom.log import Progress, format_plural, note
from stillroom.program import StopRequest
from stillroom.schema.records import Prompt
from teacher_cache.building.loop import Loop, Pending
from teacher_cache.building.result import BuildResult
from teacher_cache.building.run_manifest import RunDescription, run_id_of
from teacher_cache.building.until import JoinedPrompts, UntilRight, judge_what_is_left, own_prompts, right_samples
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import Engine, Failure, Request
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.judging.chains import judge_cache
from teacher_cache.prompts.prompts import Part, RequestMaker, WorkerShare
from teacher_cache.scrub.chains import ChainCheck
from teacher_cache.scrub.rows import Scrubber
from teacher_cache.workers.joining import WAIT_S, JoinedWork, Wait, is_in, rows_of_builds
from teacher_cache.writer.commit import VisibleSamples, Wanted, recovered_worker
from teacher_cache.writer.recorder import MetricsLog, Recorded, Recorder
from teacher_cache.writer.rows import RowMaker


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
        self._until: UntilRight | None = None
        with contextlib.ExitStack() as locks:
            try:
                self.catalog = Catalog.create(config.cache)
                self._chains = VisibleSamples(self.catalog.chains)
                self._failures = VisibleSamples(self.catalog.failures)
                visible = [self._chains, self._failures]
                self.num_adopted = locks.enter_context(recovered_worker(config.cache, self.run_id, worker, visible))
            except OSError as error:
                raise DataError(f"{config.cache} cannot be opened for writing: {one_line(error)}") from error
            # Nothing failed: the worker stays locked until `close`.
            self._locks = locks.pop_all()
        self._lacks_verdicts = self.num_adopted > 0
        self._description = RunDescription(self.catalog, config, teacher)

    def join(
        self,
        parts: Callable[[], Iterable[Part]],
        num_total: int,
        start_engine: Callable[[], Engine],
        wanted: Wanted | None = None,
        *,
        retry_failures: bool,
    ) -> BuildResult:
        """Like `run`, for the parts that no other worker has. Ends when everything is done, by any worker. Of a run
        with other rows, progress counts only those that are `wanted`.
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
            raise ConfigError("with --join every worker would retry each failure: use --retry-failures without --join")
        with joined:
            self._joined = joined
            result = self.run(requests, num_total, start_engine, until=until)
            joined.settle()
            if joined.leases.own and result.stopped is None and not result.recorded.num_unjudged:
                # Of two workers that had a part, one counted answers of its own that are not stored.
                note("some prompts still lack chains, as two workers wrote the same ones: run the same command again")
            return result

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
        pending = Pending(requests, functools.partial(self._is_done, retry_failures=retry_failures))
        if pending.is_waiting():
            note("other workers hold all that is left: waiting, in case one of them dies")
        while pending.is_waiting():
            # No engine yet: it takes minutes and a GPU, and may not be needed.
            time.sleep(WAIT_S)
            pending.pop()
        if pending.is_empty():
            self._description.restore()
            result = self._result(num_total, pending, Recorded(), 0.0, None)
        else:
            engine = start_engine()
            try:
                with StopRequest() as stop:
                    result = self._generate(engine, pending, num_total, stop)
            finally:
                engine.close()
        if self._lacks_verdicts and result.stopped is None:
            # Verdicts on a dead worker's last rows died with it.
            judge_cache(self.catalog.root, where=f"run_id = '{self.run_id}'", num_processes=config.judging.processes)
        return result

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

    def _adopted(self) -> None:
        self._lacks_verdicts = True

    def _is_done(self, sample_id: str, *, retry_failures: bool) -> bool:
        if self._joined is not None and self._until is not None:
            # What another worker commits just now, without a lease by then, would be waited for here in vain.
            return False
        return sample_id in self._chains or (not retry_failures and sample_id in self._failures)

    def _generate(self, engine: Engine, pending: Pending, num_total: int, stop: StopRequest) -> BuildResult:
        self._description.write(engine.info)
        config = self.config
        rows = RowMaker(self.teacher.tokenizer, config.capture, config.reasoning, self.run_id, self.worker)
        header = self._description.header(engine.info, self.worker)
        started_s = time.monotonic()

        def show() -> int:
            done = self._num_done(pending, recorded)
            progress.update(min(done, num_total), engine.num_tokens, self._notes(recorded))
            return done

        with (
            Recorder(
                *(self.catalog, header, config.shard, rows, self._chains, self._failures),
                *(config.judging, self._until, self._check),
            ) as recorder,
            Progress("build", num_total, "chains", done_before=self._num_done(pending, Recorded())) as progress,
            MetricsLog(config.cache / "runs" / f"{self.run_id}.{self.worker}.metrics.jsonl") as metrics,
        ):
            recorded = recorder.recorded
            loop = Loop(engine, pending, recorder, config.failures.max_consecutive, stop, self._check)
            for _ in loop:
                metrics.write(show(), num_total, engine.num_tokens, recorded)
                self._report(engine.num_tokens, time.monotonic() - started_s, recorded)
            if loop.stopped is not None:
                note(f"{loop.stopped}: saving finished chains")
            recorder.finish(stop)
            if self._joined is not None:
                self._joined.settle()
            # The recorder's thread has counted the last outcomes only now.
            show()
        # Verdicts on chains that another worker's replaced were dropped with them.
        self._lacks_verdicts |= recorder.has_superseded
        seconds = (recorder.closed_s or time.monotonic()) - started_s
        if recorded.num_unjudged:
            num = format_plural(recorded.num_unjudged, "chain")
            note(f"{num} without a verdict. Judge with: teacher-cache judge {config.cache}")
        if loop.stopped is not None and not stop.is_set:
            # Only now, when everything that had finished is visible.
            raise StillroomError(loop.stopped)
        return self._result(num_total, pending, recorded, seconds, loop.stopped)

    def _num_done(self, pending: Pending, recorded: Recorded) -> int:
        """Chains and failures so far: of this worker's share, or of all workers that joined."""
        spared = 0 if self._until is None else self._until.num_spared
        if self._joined is None:
            return pending.num_skipped + recorded.num_outcomes + spared
        return self._joined.num_done(recorded.num_outcomes) + spared

    def _notes(self, recorded: Recorded) -> dict[str, str]:
        size = {} if recorded.bytes_per_token is None else {"": f"{recorded.bytes_per_token:.0f} B/token"}
        notes = {**size, "failed": str(recorded.num_failures)}
        if self._joined is None:
            return notes
        return {**notes, "others": self._joined.leases.pace_of_others}

    def _report(self, num_tokens: int, seconds: float, recorded: Recorded) -> None:
        if self._joined is not None:
            rate, num_done = num_tokens / max(seconds, 1e-9), recorded.num_outcomes
            self._joined.leases.report(num_tokens=num_tokens, tokens_per_s=rate, num_done=num_done)

    def _result(
        self, num_total: int, pending: Pending, recorded: Recorded, seconds: float, stopped: str | None
    ) -> BuildResult:
        num_done_before = pending.num_skipped if self._joined is None else self._joined.num_before
        num_total -= 0 if self._until is None else self._until.num_spared
        return BuildResult(
            self.run_id, self.worker, num_total, num_done_before, self.num_adopted, recorded, seconds, stopped
        )
