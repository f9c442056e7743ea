"""`teacher-cache features`: states of the teacher at chains that exist, into the table `features`; the same command
resumes.

The unit is a row group of a chains shard. Rows whose sample has features of this set are skipped, files that were
published but not committed are adopted, and the rest is computed. One process per worker; workers meet only in the
Delta log, and in leases if they join (workers.joining). On SIGINT or SIGTERM the current batch is finished, what is
computed becomes visible, and the call returns.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Self

from stillroom.cache.catalog import Catalog
from stillroom.cache.features import SETS_FOLDER
from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, one_line
from stillroom.log import Progress, format_bytes, format_count, format_duration, format_plural, note
from stillroom.program import StopRequest
from stillroom.schema.features import FeatureHeader
from stillroom.schema.manifest import Teacher
from stillroom.storage.paths import Location
from teacher_cache.config import EmbeddedConfig
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.maintenance.feature_checks import drop_chainless
from teacher_cache.prompts.prompts import WorkerShare, part_name
from teacher_cache.states.config import FeaturesConfig, TransformersConfig
from teacher_cache.states.engine import ChainTokens, Shape, States, StatesEngine, Wanted, batches
from teacher_cache.states.model import shape_of, wanted_of
from teacher_cache.states.plan import FeaturesPlan, plan_units
from teacher_cache.states.selection import Place, Unit, choose, num_stored, read_unit
from teacher_cache.states.sets import CREATOR, OpenSet, create_set, find_set, finite_states, set_id_of
from teacher_cache.workers.joining import WAIT, WAIT_S, JoinedWork, Wait, is_in, worker_name
from teacher_cache.writer.commit import Committer, VisibleSamples, recovered_worker
from teacher_cache.writer.feature_file import FeatureFile, FeatureValues
from teacher_cache.writer.recorder import explained

StartEngine = Callable[[Wanted], StatesEngine]
Work = tuple[Unit, Sequence[Place]]
"""A row group and those of its chains that have no features yet."""
ENCODING_THREADS = 4
"""With a basis a thread encodes a few thousand tokens per second, fewer than a GPU computes."""


@dataclass(frozen=True, slots=True)
class FeaturesResult:
    """What one process did. `stopped` says why it ended early; `seconds` is computing, without loading the model."""

    set_id: str
    worker: str
    num_total: int
    num_done_before: int
    num_adopted: int
    num_chains: int
    num_tokens: int
    size_bytes: int
    seconds: float
    stopped: str | None

    @classmethod
    def of(cls, result: Json) -> Self:
        """From the result for programs, of one worker or several."""
        return cls(**{field.name: result.get(field.name, "") for field in fields(cls)})


def features_of_cache(config: FeaturesConfig, share: WorkerShare | None) -> FeaturesResult:
    """Computes the missing features of this worker's share; None joins all workers that have none, by lease.

    Raises StillroomError for everything a user can fix.
    """
    teacher = identify_teacher(config.teacher.as_teacher, EmbeddedConfig()).record
    shape = shape_of(teacher, config.teacher.trust_remote_code)

    def start_engine(wanted: Wanted) -> StatesEngine:
        if isinstance(config.engine, TransformersConfig):
            from teacher_cache.states.transformers import TransformersStates

            return TransformersStates(teacher, config.teacher.trust_remote_code, config.engine, wanted)
        from teacher_cache.states.vllm import VllmStates

        return VllmStates(teacher, config.teacher.trust_remote_code, config.engine, wanted, shape)

    with contextlib.closing(FeaturesPass(config, teacher, shape, share)) as features:
        return features.run(start_engine)


class FeaturesPass:
    """One worker's pass. The worker is locked until `close`."""

    def __init__(self, config: FeaturesConfig, teacher: Teacher, shape: Shape, share: WorkerShare | None) -> None:
        """Chooses the chains, locks the worker, and recovers what a crash left behind.

        Raises ConfigError if no chain is selected or the set would exceed max_bytes, CacheConflict if another process
        runs as this worker, DataError if the cache cannot be written, CorruptError if a registered file is damaged.
        """
        self.config, self.teacher, self.shape, self.share = config, teacher, shape, share
        self.wanted = wanted_of(config, shape)
        self.set_id = set_id_of(config, teacher, self.wanted)
        self.worker = worker_name(share)
        self._joined: JoinedWork[Place] | None = None
        self.catalog = Catalog(config.cache)
        self.units = choose(self.catalog, config.chains, teacher)
        with contextlib.ExitStack() as locks:
            try:
                planned = plan_units(self.catalog, config, self.wanted, self.shape, self.set_id, self.units)
                _require_size(planned, config.max_bytes)
                self.table = self.catalog.create_features()
                self._visible = VisibleSamples(self.table, self.set_id)
                self._committer = Committer(self.table, self._visible, self.set_id, self.worker)
                recovered = recovered_worker(config.cache, self.set_id, self.worker, [self._visible])
                self.num_adopted = locks.enter_context(recovered)
                if self.num_adopted:
                    drop_chainless(self.catalog)
                    self._visible.refresh()
            except OSError as error:
                raise DataError(f"{config.cache} cannot be opened for writing: {one_line(error)}") from error
            self._locks = locks.pop_all()

    def close(self) -> None:
        """Releases the worker's lock."""
        self._locks.close()

    def run(self, start_engine: StartEngine) -> FeaturesResult:
        """Computes what is not done. The engine is started only if something is left.

        Raises StillroomError if the engine dies, after making finished rows visible.
        """
        own = [unit for unit in self.units if self.share is None or unit.is_of(self.share)]
        num_total = sum(len(unit.places) for unit in own)
        num_before = sum(self._is_done(place) for unit in own for place in unit.places)
        if self.share is not None:
            rest = ((unit, [one for one in unit.places if not self._is_done(one)]) for unit in own)
            return self._run((work for work in rest if work[1]), num_total, num_before, start_engine)
        # A table of its own, as JoinedWork demands.
        visible = VisibleSamples(Catalog(self.config.cache).create_features(), self.set_id)
        # The chains of rows that a dead worker wrote may have been dropped since.
        drop_gone = functools.partial(drop_chainless, self.catalog)
        with JoinedWork[Place](
            self.config.cache, self.set_id, self.worker, [visible], is_in([visible]), drop_gone
        ) as joined:
            self._joined = joined
            return self._run(self._leased(joined), num_total, num_before, start_engine)

    def drop_if_gone(self, chains_file: str) -> None:
        """Removes features of chains that were dropped or quarantined while their states were computed."""
        self.catalog.chains.refresh()
        if all(file.path != chains_file for file in self.catalog.chains.files()):
            num = sum(drop_chainless(self.catalog).values())
            note(f"{chains_file} is no longer visible: features of {format_plural(num, 'chain')} removed")

    def _run(
        self, left: Iterator[Work | Wait], num_total: int, num_before: int, start_engine: StartEngine
    ) -> FeaturesResult:
        first = next(left, None)
        if first is WAIT:
            note("other workers hold all that is left: waiting, in case one of them dies")
        while first is WAIT:
            # No engine yet: it takes minutes and a GPU, and may not be needed.
            time.sleep(WAIT_S)
            first = next(left, None)
        if first is None:
            return self._result(num_total, num_before, _Done(), 0.0, None)
        engine = start_engine(self.wanted)
        try:
            # Outside the block: until there is something to save, Ctrl-C ends the command at once.
            opened = self._open_set(engine)
            with StopRequest() as stop:
                return self._compute(engine, opened, itertools.chain([first], left), num_total, num_before, stop)
        finally:
            engine.close()

    def _leased(self, joined: JoinedWork[Place]) -> Iterator[Work | Wait]:
        units = {part_name(unit.group, [unit.file]): unit for unit in self.units}
        parts = [(name, functools.partial(tuple[Place, ...], unit.places)) for name, unit in units.items()]
        for leased in joined.parts(lambda: parts):
            if isinstance(leased, Wait):
                yield leased
            elif leased[1]:
                yield units[leased[0]], leased[1]

    def _open_set(self, engine: StatesEngine) -> OpenSet:
        while (opened := find_set(self.catalog, self.set_id)) is None:
            if self._joined is None:
                return self._create_set(engine)
            # An object store has no locks, and constants that two workers fitted would not be the same.
            if self._joined.leases.claim(CREATOR):
                opened = self._create_set(engine)
                self._joined.leases.release(CREATOR)
                return opened
            time.sleep(WAIT_S)
        return opened

    def _is_done(self, place: Place) -> bool:
        return place.sample_id in self._visible

    def _create_set(self, engine: StatesEngine) -> OpenSet:
        """Calibrates on the first chains by hash, whichever worker has them."""
        # By hash over all shards: the chains of one shard may be of one source.
        chains = sorted((place.sample_id, unit, place) for unit in self.units for place in unit.places)
        chosen: dict[tuple[str, int], list[Place]] = {}
        units: dict[tuple[str, int], Unit] = {}
        num_tokens, frac = 0, self.config.tokens.entropy_frac
        for _, unit, place in chains:
            if num_tokens >= self.config.calibration.tokens:
                break
            units[unit.file, unit.group] = unit
            chosen.setdefault((unit.file, unit.group), []).append(place)
            num_tokens += num_stored(place.num_tokens, frac)
        calibration = [
            one for key, places in chosen.items() for one in read_unit(self.catalog, units[key], places, frac)
        ]
        try:
            return create_set(self.catalog, self.config, self.teacher, self.shape, self.wanted, engine, calibration)
        except OSError as error:
            raise explained(error) from error

    def _compute(
        self,
        engine: StatesEngine,
        opened: OpenSet,
        left: Iterator[Work | Wait],
        num_total: int,
        num_before: int,
        stop: StopRequest,
    ) -> FeaturesResult:
        started_s = time.monotonic()
        done = _Done()
        stopped: str | None = None
        frac = opened.manifest.entropy_frac

        def save(unit: Unit, batch: Sequence[ChainTokens], rows: Sequence[FeatureValues]) -> None:
            for row in rows:
                out.add(unit, row)
            done.add(batch, out.size_bytes)
            show()

        def show() -> None:
            self._report(done, time.monotonic() - started_s)
            progress.update(self._num_done(num_before, num_total, done), done.num_tokens, self._notes(done))

        # Left in reverse: encoding saves its last batch into `out`, which then commits, and both show progress.
        with (
            Progress("features", num_total, "chains", done_before=num_before) as progress,
            _Output(self, opened) as out,
            _Encoding(opened, save) as encoding,
        ):
            for work in self._batches(left, frac):
                if isinstance(work, Wait):
                    # What is finished here is all that keeps others waiting in turn.
                    encoding.flush()
                    out.commit()
                    show()
                    time.sleep(WAIT_S)
                else:
                    encoding.add(*work, finite_states(engine, work[1]))
                if stop.is_set:
                    stopped = "interrupted"
                    note("interrupted: saving finished chains")
                    break
        # After the block, whose end has saved and committed the last batch.
        done.size_bytes = out.size_bytes
        if self._joined is not None:
            self._joined.settle()
        return self._result(num_total, num_before, done, time.monotonic() - started_s, stopped)

    def _batches(
        self, left: Iterator[Work | Wait], frac: float | None
    ) -> Iterator[tuple[Unit, list[ChainTokens]] | Wait]:
        for work in left:
            if isinstance(work, Wait):
                yield work
                continue
            unit, todo = work
            for batch in batches(read_unit(self.catalog, unit, todo, frac), self.config.engine.batch_tokens):
                yield unit, batch

    def _num_done(self, num_before: int, num_total: int, done: "_Done") -> int:
        """Chains so far: of this worker's share, or of all workers that joined."""
        if self._joined is None:
            return num_before + done.num_chains
        # The set may have more chains than were chosen.
        return min(num_total, self._joined.num_done(done.num_chains))

    def _notes(self, done: "_Done") -> dict[str, str]:
        size = {"": f"{done.size_bytes / max(done.num_tokens, 1):.0f} B/token"}
        return size if self._joined is None else {**size, "others": self._joined.leases.pace_of_others}

    def _report(self, done: "_Done", seconds: float) -> None:
        if self._joined is not None:
            rate = done.num_tokens / max(seconds, 1e-9)
            self._joined.leases.report(num_tokens=done.num_tokens, tokens_per_s=rate, num_done=done.num_chains)

    def _result(
        self, num_total: int, num_before: int, done: "_Done", seconds: float, stopped: str | None
    ) -> FeaturesResult:
        return FeaturesResult(
            *(self.set_id, self.worker, num_total, num_before, self.num_adopted),
            *(done.num_chains, done.num_tokens, done.size_bytes, seconds, stopped),
        )


@dataclass(slots=True)
class _Done:
    """What this process has computed."""

    num_chains: int = 0
    num_tokens: int = 0
    size_bytes: int = 0

    def add(self, batch: Sequence[ChainTokens], size_bytes: int) -> None:
        self.num_chains += len(batch)
        self.num_tokens += sum(len(one.positions_P) for one in batch)
        self.size_bytes = size_bytes


class _Encoding:
    """Encodes a batch in threads while the engine computes the next, then saves it."""

    def __init__(self, opened: OpenSet, save: Callable[[Unit, Sequence[ChainTokens], Sequence[FeatureValues]], None]):
        self._opened, self._save = opened, save
        self._pool = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encode")
        self._pending: tuple[Unit, Sequence[ChainTokens], list[Future[FeatureValues]]] | None = None

    def __enter__(self) -> "_Encoding":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            # After an error too: what is computed is kept. Not if Ctrl-C was pressed twice, to stop at once.
            if kind is None or not issubclass(kind, KeyboardInterrupt):
                self.flush()

    def add(self, unit: Unit, batch: Sequence[ChainTokens], states: Sequence[States]) -> None:
        # One batch at a time: waiting here bounds the states in memory.
        self.flush()
        rows = [self._pool.submit(self._opened.encoded, *one) for one in zip(batch, states, strict=True)]
        self._pending = unit, batch, rows

    def flush(self) -> None:
        """Waits for the batch that is being encoded, and saves it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            unit, batch, rows = pending
            self._save(unit, batch, [row.result() for row in rows])


class _Output:
    """Rows into files: one file at a time, closed by size, by age, and where the next chains shard begins."""

    def __init__(self, features: FeaturesPass, opened: OpenSet) -> None:
        self._features, self._opened = features, opened
        self._file: FeatureFile | None = None
        self._unit: Unit | None = None
        self._opened_s = 0.0
        self.size_bytes = 0

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            # Stop at once, as the second Ctrl-C asks.
            if self._file is not None:
                self._file.discard()
            return
        # After an error too: what is computed is kept.
        self.commit()

    def add(self, unit: Unit, row: FeatureValues) -> None:
        before, self._unit = self._unit, unit
        if before is not None and before.file != unit.file:
            self.commit()
        elif before is not None and before.group != unit.group and self._file is not None:
            # Row groups end with those of the chains.
            self._file.end_group()
        if self._file is None:
            self._file = FeatureFile(self._features._committer.temp_path(), self._header(unit))
            self._opened_s = time.monotonic()
        self._file.add(row)
        self.size_bytes += row.num_bytes
        shard = self._features.config.shard
        is_old = time.monotonic() - self._opened_s >= 60 * shard.max_minutes
        if is_old or self._file.num_bytes >= 1e6 * shard.max_mb:
            self.commit()

    def commit(self) -> None:
        """Makes all rows visible that were added."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
            self._features._committer.commit(file.temp, file.sample_ids)
            self._features.drop_if_gone(file.chains_file)
        except OSError as error:
            file.discard()
            raise explained(error) from error

    def _header(self, unit: Unit) -> FeatureHeader:
        features = self._features
        return FeatureHeader(
            set_id=features.set_id,
            worker=features.worker,
            constants=self._opened.manifest.constants,
            teacher_fingerprint=features.teacher.fingerprint,
            chains_file=unit.file,
        )


def _require_size(planned: FeaturesPlan, max_bytes: int | None) -> None:
    if max_bytes is not None and planned.total_bytes > max_bytes:
        raise ConfigError(
            f"max_bytes={max_bytes}: the set would take {planned.total_bytes:.0f} bytes "
            f"({format_count(planned.num_tokens)} tokens of {planned.bytes_per_token:.1f} B and "
            f"{format_bytes(planned.constant_bytes)} of constants): store fewer chains, tokens, layers or coefficients"
        )


def result_json(result: FeaturesResult) -> Json:
    """The result for programs."""
    from dataclasses import asdict

    tokens_per_s = result.num_tokens / result.seconds if result.num_tokens and result.seconds else None
    bytes_per_token = result.size_bytes / result.num_tokens if result.num_tokens else None
    return {**asdict(result), "tokens_per_s": tokens_per_s, "bytes_per_token": bytes_per_token}


def result_lines(result: FeaturesResult, cache: Location) -> list[str]:
    """The result for a person."""
    rate = "" if not result.num_tokens else f" at {result.num_tokens / max(result.seconds, 1e-9):.0f} tok/s"
    size = "" if not result.num_tokens else f", {result.size_bytes / result.num_tokens:.1f} B/token"
    took = f"{format_count(result.num_tokens)} tokens in {format_duration(result.seconds)}{rate}{size}"
    return [
        f"new     {format_plural(result.num_chains, 'chain')}, {took}; {result.num_done_before} done before",
        f"set     {result.set_id} of {cache / SETS_FOLDER}",
    ]
