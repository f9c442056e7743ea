"""`sampling.until`: more chains of a prompt until enough of them are judged right.

In: prompts, the samples that are visible and which of them are right, verdicts as they come. Out: requests, and
Wait.VERDICTS while all that is left depends on answers that are generated or judged at present. A worker that joins
others leases prompts in parts (JoinedPrompts): all samples of a prompt are up to whoever holds its lease.

Sample i of a prompt is requested only if, whatever comes of the samples before it, fewer than `right` of them can be
right. What is requested is therefore always needed, and a resumed build, which knows the same verdicts from the cache,
requests the same samples. One that failed counts as wrong.
"""

import datetime
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from stillroom.cache.catalog import Catalog, Table
from stillroom.errors import ConfigError
from stillroom.log import format_plural, note
from stillroom.schema.records import Prompt
from stillroom.sql.session import open_session
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.judging.chains import judge_cache
from teacher_cache.judging.queue import MAX_WAITING, judge_of
from teacher_cache.prompts.prompts import TOKENIZE_BATCH, RequestMaker, WorkerShare, part_name, samples_by_source
from teacher_cache.workers.joining import Leasable, Wait, of_prompts, rows_of_builds
from teacher_cache.writer.commit import VisibleSamples, read_columns

Samples = Container[str] | VisibleSamples

PART_PROMPTS = 16
"""Prompts under one lease: few, as each may take many samples."""

MAX_OPEN = MAX_WAITING // 2
"""Samples without a verdict. Judges drop what exceeds their queue, and a dropped answer would never get one here."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt with its counts. Samples from `next_index` on are not requested yet."""

    prompt: Prompt
    is_judged: bool
    least: int
    most: int
    next_index: int = 0
    num_right: int = 0
    num_open: int = 0
    is_waiting: bool = False


class UntilRight:
    """Requests of one worker. `requests` is for the engine's thread; verdicts may come from any thread."""

    def __init__(
        self,
        config: BuildConfig,
        prompts: Sequence[Prompt],
        maker: RequestMaker,
        chains: Samples,
        failures: Samples,
        right: Samples,
        *,
        assume_wrong: bool = False,
    ) -> None:
        """`chains` and `failures` are samples that are not to be generated, `right` those judged right. With
        `assume_wrong` nothing waits for a verdict: the requests are the most that a build may make.
        """
        assert config.sampling.until is not None
        self.num_spared = 0
        """Samples that turned out not to be needed."""
        self._right, self._maker = config.sampling.until.right, maker
        self._chains, self._failures, self._right_samples = chains, failures, right
        self._assume_wrong = assume_wrong
        self._least, self._most = samples_by_source(config), config.sampling.until.samples
        self._ready = deque(map(self._new, prompts))
        self.num_total = sum(one.most for one in self._ready)
        """Samples at most."""
        self._open: dict[str, _Prompt] = {}
        self._num_waiting = 0
        # Appending is atomic: verdicts come from the judges' threads.
        self._events: deque[tuple[str, bool]] = deque()

    def settle(self, sample_id: str, correct: bool) -> None:
        """The verdict on a sample: False also if it failed or its judge could not decide."""
        self._events.append((sample_id, correct))

    def requests(
        self, more: Iterator[Sequence[Prompt | Failure] | Wait] | None = None
    ) -> Iterator[Request | Failure | Wait]:
        """First samples of all prompts, then second ones of those that need them, and so on. `more` is asked for
        further prompts when those at hand are done or wait for verdicts.
        """
        while True:
            self._settle()
            if len(self._open) >= MAX_OPEN:
                yield Wait.VERDICTS
                continue
            if not self._ready:
                given = None if more is None else next(more, None)
                if given is None and not self._num_waiting:
                    return
                if given is None or isinstance(given, Wait):
                    nothing = Wait.VERDICTS if self._num_waiting else Wait.WAIT
                    yield given if given is Wait.READY else nothing
                    continue
                self._ready.extend(self._new(one) for one in given if isinstance(one, Prompt))
                yield from (one for one in given if isinstance(one, Failure))
                continue
            batch = self._batch()
            requests = self._maker.requests(batch[0].next_index, [one.prompt for one in batch])
            for one, request in zip(batch, requests, strict=True):
                self._count(one, request)
                yield request

    def seen(self, prompt: Prompt) -> Iterator[tuple[str, _Prompt]]:
        """Sample by sample that a build requests of the prompt, by what is visible: its id, and the counts before it.
        Ends where no further one is needed.
        """
        one = self._new(prompt)
        while one.next_index < one.least or (one.next_index < one.most and one.num_right < self._right):
            (request,) = self._maker.requests(one.next_index, [prompt])
            yield request.sample_id, one
            one.num_right += request.sample_id in self._chains and request.sample_id in self._right_samples
            one.next_index += 1

    def most_of(self, prompt: Prompt) -> int:
        """The most samples that the prompt may get."""
        return self._new(prompt).most

    def _new(self, prompt: Prompt) -> _Prompt:
        is_judged, least = judge_of(prompt) is not None, self._least[prompt.source]
        return _Prompt(prompt, is_judged, least, self._most if is_judged else least)

    def _batch(self) -> list[_Prompt]:
        """The next prompts, as many as want the same sample."""
        batch = [self._ready.popleft()]
        while self._ready and len(batch) < TOKENIZE_BATCH and self._ready[0].next_index == batch[0].next_index:
            batch.append(self._ready.popleft())
        return batch

    def _count(self, one: _Prompt, request: Request | Failure) -> None:
        one.next_index += 1
        sample_id = request.sample_id
        if sample_id in self._chains:
            one.num_right += sample_id in self._right_samples
        # No verdict will come of these, and none of them is right.
        elif isinstance(request, Failure) or sample_id in self._failures or self._assume_wrong:
            pass
        elif one.is_judged:
            one.num_open += 1
            self._open[sample_id] = one
        self._schedule(one)

    def _schedule(self, one: _Prompt) -> None:
        """Decides on the prompt's next sample: now, after a verdict, or never."""
        if one.next_index < one.most:
            # Open answers count as right: another sample is drawn only when one of them turns out wrong.
            if one.next_index < one.least or one.num_right + one.num_open < self._right:
                self._ready.append(one)
                return
            if one.num_right < self._right:
                one.is_waiting = True
                self._num_waiting += 1
                return
        self.num_spared += one.most - one.next_index

    def _settle(self) -> None:
        while self._events:
            sample_id, correct = self._events.popleft()
            one = self._open.pop(sample_id, None)
            if one is None:
                continue
            one.num_open -= 1
            one.num_right += correct
            if one.is_waiting:
                one.is_waiting = False
                self._num_waiting -= 1
                self._schedule(one)


class JoinedPrompts:
    """Prompts as parts that workers lease. What a dead worker left without a verdict is judged at the takeover."""

    def __init__(
        self,
        config: BuildConfig,
        catalog: Catalog,
        prompts: Sequence[Prompt],
        failures: Sequence[Failure],
        teacher: IdentifiedTeacher,
    ) -> None:
        """`failures` are rows that became no prompt, a part of their own."""
        self._config, self._prompts, self._malformed = config, prompts, failures
        wanted: dict[str, int] = {}
        self.visible = rows_of_builds(catalog, of_prompts(wanted))
        self._chains, self._failures = self.visible
        self._verdicts = SeenVerdicts(Catalog(catalog.root).verdicts)
        maker = RequestMaker(config, prompts, teacher.tokenizer, teacher.record.fingerprint)
        self.until = UntilRight(config, (), maker, self._chains, self._failures, self._verdicts)
        wanted.update((prompt.prompt_id, self.until.most_of(prompt)) for prompt in prompts)
        self.num_total = len(failures) + sum(wanted.values())
        self._own: set[str] = set()
        self._spared: set[str] = set()

    def parts(self) -> Iterator[Leasable[Prompt | Failure]]:
        """All of the build."""
        if self._malformed:
            yield part_name(0, (one.sample_id for one in self._malformed)), lambda: self._malformed
        for start in range(0, len(self._prompts), PART_PROMPTS):
            batch = self._prompts[start : start + PART_PROMPTS]
            yield part_name(0, (one.prompt_id for one in batch)), lambda batch=batch: batch  # type: ignore[misc]

    def look(self) -> None:
        """Reads new verdicts, after new chains."""
        self._verdicts.refresh()

    def is_done(self, one: Prompt | Failure) -> bool:
        """Whether the prompt needs no further chain, and all that it has are judged."""
        if isinstance(one, Failure):
            return one.sample_id in self._failures
        for sample_id, counts in self.until.seen(one):
            if self._lacks_chain(sample_id) or self._lacks_verdict(sample_id, counts):
                return False
        if one.prompt_id not in self._own and one.prompt_id not in self._spared:
            self._spared.add(one.prompt_id)
            self.until.num_spared += counts.most - counts.next_index
        return True

    def needs_engine(self, one: Prompt | Failure) -> bool:
        """Whether it lacks a chain, and not only verdicts, which may spare it further chains."""
        if isinstance(one, Failure):
            return True
        for sample_id, counts in self.until.seen(one):
            if self._lacks_verdict(sample_id, counts):
                return False
            if self._lacks_chain(sample_id):
                return True
        return False

    def requests(
        self, offered: Iterator[tuple[str, Sequence[Prompt | Failure]] | Wait]
    ) -> Iterator[Request | Failure | Wait]:
        """What is left of the parts that this worker gets."""
        for one in self.until.requests(self._claimed(offered)):
            if isinstance(one, Wait) or not (one.sample_id in self._chains or one.sample_id in self._failures):
                yield one

    def _claimed(
        self, offered: Iterator[tuple[str, Sequence[Prompt | Failure]] | Wait]
    ) -> Iterator[Sequence[Prompt | Failure] | Wait]:
        for one in offered:
            if isinstance(one, Wait):
                yield one
                continue
            prompts = [prompt for prompt in one[1] if isinstance(prompt, Prompt)]
            self._judge(prompts)
            self._own.update(prompt.prompt_id for prompt in prompts)
            yield one[1]

    def _judge(self, prompts: Sequence[Prompt]) -> None:
        """Without these verdicts this worker would take right chains for wrong ones, and generate more than needed."""
        unjudged = [
            sample_id
            for prompt in prompts
            for sample_id, counts in self.until.seen(prompt)
            if self._lacks_verdict(sample_id, counts)
        ]
        if unjudged:
            where = f"sample_id IN ({', '.join(map(repr, unjudged))})"
            judge_cache(self._config.cache, where=where, num_processes=self._config.judging.processes)
            self._verdicts.refresh()

    def _lacks_chain(self, sample_id: str) -> bool:
        return sample_id not in self._chains and sample_id not in self._failures

    def _lacks_verdict(self, sample_id: str, counts: _Prompt) -> bool:
        return counts.is_judged and sample_id in self._chains and not self._verdicts.has(sample_id)


class SeenVerdicts:
    """The latest verdict on each sample, updated file by file. Contains the samples that are right."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._read: set[str] = set()
        self._latest: dict[str, tuple[datetime.datetime, bool]] = {}

    def refresh(self) -> None:
        """Reads the log and its new files. Raises CorruptError naming a damaged file."""
        self._table.refresh()
        for file in self._table.files():
            if file.path in self._read:
                continue
            rows = read_columns(self._table.path_of(file), ["sample_id", "judged_at", "correct"])
            for sample_id, judged_at, correct in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                if sample_id not in self._latest or judged_at >= self._latest[sample_id][0]:
                    self._latest[sample_id] = judged_at, correct is True
            self._read.add(file.path)

    def has(self, sample_id: str) -> bool:
        """Whether there is a verdict."""
        return sample_id in self._latest

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and sample_id in self._latest and self._latest[sample_id][1]


def require_judged(prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError if no answer can be judged during a build, and notes prompts whose answers cannot."""
    unjudged = sum(judge_of(one) is None for one in prompts)
    if prompts and unjudged == len(prompts):
        raise ConfigError(
            "sampling.until needs answers that a build can judge: set judge (math, exact, regex or code) and "
            "reference_field for a source, or remove it"
        )
    if unjudged:
        note(f"sampling.until generates no further chains for {format_plural(unjudged, 'prompt')} without a judge")


def judge_what_is_left(config: BuildConfig) -> None:
    """Judges chains that an interrupted build saved without a verdict."""
    if Catalog(config.cache).chains.files():
        judge_cache(config.cache, where=_of_sources(config), num_processes=config.judging.processes)


def right_samples(config: BuildConfig) -> set[str]:
    """Samples of the cache whose latest verdict is right."""
    catalog = Catalog(config.cache)
    if not catalog.chains.files():
        return set()
    with open_session(catalog) as session:
        found = session.arrow(f"SELECT sample_id FROM chains WHERE correct AND {_of_sources(config)}")
    return set(found.column("sample_id").to_pylist())


def own_prompts(prompts: Sequence[Prompt], share: WorkerShare) -> list[Prompt]:
    """Those of a worker."""
    return [one for one in prompts if one.prompt_id in share]


def _of_sources(config: BuildConfig) -> str:
    return f"source IN ({', '.join(repr(source.name) for source in config.prompts.sources)})"
