"""`teacher-cache build` and `score`: requests through an engine into a cache; the same command resumes.

What is visible is skipped, what was published but not committed is adopted, the rest is generated. One process a
worker; workers meet only in the Delta log. SIGINT and SIGTERM finish nothing new, make visible what is finished, and
return.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from schemas.manifest import RunManifest, ShardHeader, Teacher, run_id_for
from shared.catalog import SHARD_NAME, Catalog
from shared.config import Json, plain
from shared.errors import CacheConflict, DataError, StillroomError, one_line
from shared.interrupt import StopRequest
from shared.log import Progress, note, warn
from shared.shards import open_shard
from shared.storage import Location, matching, relative_name
from shared.tokens import write_vocab
from teacher_cache.commits import Committer, VisibleSamples
from teacher_cache.config import BuildConfig
from teacher_cache.generate import Loop, Pending
from teacher_cache.intake.sources import LoadFailure
from teacher_cache.locks import lock_path, worker_lock
from teacher_cache.metrics import MetricsLog
from teacher_cache.recorder import Recorded, Recorder, explained
from teacher_cache.requests import Engine, EngineInfo, Request
from teacher_cache.rows import RowMaker
from teacher_cache.score_config import ScoreConfig
from teacher_cache.teacher import IdentifiedTeacher

OWN_LOCK_WAIT_S = 20.0
"""Another worker holds this one's lock for a moment while it adopts what a crash left; a living worker keeps it."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one process did. `seconds` is generation alone, without loading the model; `stopped` says why it ended
    early.
    """

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
        """Completion tokens a second of generation, None where nothing was generated."""
        return self.recorded.num_tokens / self.seconds if self.recorded.num_tokens else None


class Build:
    """One worker's build of one cache: open it, look at what is left, run it."""

    def __init__(self, config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher, worker: str) -> None:
        """Opens or makes the cache and takes this worker's lock until `close`; recovers what a crash left behind.

        Raises CacheConflict when another process works as this worker, DataError when the cache cannot be written,
        CorruptError when a registered file is damaged.
        """
        self.config, self.teacher, self.worker = config, teacher, worker
        self.run_id = run_id_of(config, teacher.record)
        with contextlib.ExitStack() as locks:
            try:
                self.catalog = Catalog.create(config.cache)
                own_abandoned_s = locks.enter_context(worker_lock(self._lock_path(worker), OWN_LOCK_WAIT_S))
                self._chains = VisibleSamples(self.catalog.chains)
                self._failures = VisibleSamples(self.catalog.failures)
                self.num_adopted = self._recover(own_abandoned_s)
                self._chains.refresh()
                self._failures.refresh()
            except OSError as error:
                raise DataError(f"{config.cache} cannot be opened for writing: {one_line(error)}") from error
            self._locks = locks.pop_all()

    def is_done(self, sample_id: str, *, retry_failures: bool) -> bool:
        """Whether this sample needs nothing more."""
        return sample_id in self._chains or (not retry_failures and sample_id in self._failures)

    def run(
        self,
        requests: Iterable[Request | LoadFailure],
        num_total: int,
        start_engine: Callable[[], Engine],
        *,
        retry_failures: bool = False,
    ) -> BuildResult:
        """Generates what is not done. The engine is started only when something is left.

        Raises StillroomError after making visible what is finished: when the engine dies, or after
        `failures.max_consecutive` failures in a row.
        """
        pending = Pending(requests, lambda sample_id: self.is_done(sample_id, retry_failures=retry_failures))
        if pending.is_empty():
            self._restore_description()
            return BuildResult(
                self.run_id, self.worker, num_total, pending.num_skipped, self.num_adopted, Recorded(), 0.0, None
            )
        engine = start_engine()
        try:
            with StopRequest() as stop:
                return self._generate(engine, pending, num_total, stop)
        finally:
            engine.close()

    def close(self) -> None:
        """Gives the worker's lock back."""
        self._locks.close()

    def _generate(self, engine: Engine, pending: Pending, num_total: int, stop: StopRequest) -> BuildResult:
        try:
            self._describe_run(engine.info)
        except OSError as error:
            raise explained(error) from error
        rows = RowMaker(self.teacher.tokenizer, self.config.capture, self.config.reasoning, self.run_id, self.worker)
        header = self._header(engine.info)
        started_s = time.monotonic()
        with (
            Recorder(
                self.catalog, header, self.config.shard, rows, self._chains, self._failures, self.config.judging
            ) as recorder,
            Progress("build", num_total, "chains", done_before=pending.num_skipped) as progress,
            MetricsLog(self.config.cache / "runs" / f"{self.run_id}.{self.worker}.metrics.jsonl") as metrics,
        ):
            loop = Loop(engine, pending, recorder, self.config.failures.max_consecutive, stop)
            for _ in loop:
                done = _num_done(pending, recorder)
                progress.update(done, engine.num_tokens, _notes(recorder.recorded))
                metrics.write(done, num_total, engine.num_tokens, recorder.recorded)
            if loop.stopped is not None:
                note(f"{loop.stopped}: making visible what is finished")
            recorder.finish(stop)
            # Its thread took the last outcomes after the loop had looked.
            progress.update(_num_done(pending, recorder), engine.num_tokens, _notes(recorder.recorded))
        seconds = (recorder.closed_s or time.monotonic()) - started_s
        if recorder.recorded.num_unjudged:
            num = recorder.recorded.num_unjudged
            note(f"{num} chains have no verdict yet: teacher-cache judge {self.config.cache}")
        if loop.stopped is not None and not stop.is_set:
            raise StillroomError(loop.stopped)
        return BuildResult(
            self.run_id,
            self.worker,
            num_total,
            pending.num_skipped,
            self.num_adopted,
            recorder.recorded,
            seconds,
            loop.stopped,
        )

    def _recover(self, own_abandoned_s: float) -> int:
        """Adopts files that any worker of this run published and did not commit, if that worker is not at work."""
        num_rows = 0
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
            note(f"adopted {num_rows} rows that were written but not yet registered when the last process ended")
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
                created_at=known.created_at if known else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                teacher=teacher.model_copy(update={"vocab_size": info.vocab_size}),
                sampling=_sampling(config),
                capture=plain(config.capture),
                engine={**plain(config.engine), **info.settings},
                prompts=plain(config.prompts if isinstance(config, BuildConfig) else config.completions),
                reasoning=plain(config.reasoning),
                software=dict(info.software),
            )
        )
        self._write_vocab()

    def _restore_description(self) -> None:
        """Writes manifest and vocabulary again where a finished cache has lost them; no engine runs then, so what the
        engine says of itself stays out of the manifest.
        """
        shards = [file for file in self.catalog.chains.files() if file.path.startswith(f"{self.run_id}/")]
        if not shards:
            return
        try:
            if not (self.config.cache / "runs" / f"{self.run_id}.json").exists():
                parquet, header = open_shard(self.catalog.chains.path_of(shards[0]))
                parquet.close()
                self._describe_run(EngineInfo(header.vocab_size, 0, header.entropy, {}, {}))
                note(f"wrote runs/{self.run_id}.json again, which was missing")
            else:
                self._write_vocab()
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
    """`<run>_<8 hex>`: another teacher, capture, reasoning or sampling is another run, and so is scoring; more prompts,
    samples or completions are not.
    """
    capture, reasoning = plain(config.capture), plain(config.reasoning)
    return run_id_for(config.run, _kind(config), teacher.fingerprint, _sampling(config), capture, reasoning)


def _kind(config: BuildConfig | ScoreConfig) -> str:
    return "generate" if isinstance(config, BuildConfig) else "score"


def _sampling(config: BuildConfig | ScoreConfig) -> Json:
    return plain(config.sampling) if isinstance(config, BuildConfig) else {}


def _warn_of_other_entropies(known: RunManifest, info: EngineInfo) -> None:
    """An engine without the sampler plugin goes on where one with it began, or the other way round."""
    before, now = known.engine.get("sampler"), info.settings.get("sampler")
    if before is not None and now is not None and before != now:
        kinds = {"plugin": "exact entropies", "vllm": "entropies of the stored support"}
        warn(
            f"{known.run_id} was begun with {kinds.get(before, before)}, this engine gives {kinds.get(now, now)}: "
            "the header of each shard says which it holds"
        )


def _num_done(pending: Pending, recorder: Recorder) -> int:
    return pending.num_skipped + recorder.recorded.num_chains + recorder.recorded.num_failures


def _notes(recorded: Recorded) -> dict[str, str]:
    notes = {"failed": str(recorded.num_failures)}
    if recorded.bytes_per_token is not None:
        return {"": f"{recorded.bytes_per_token:.0f} B/token", **notes}
    return notes
