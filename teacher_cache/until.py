"""`sampling.until`: more chains of a prompt until enough of them are judged right.

In: prompts, the samples that are visible and which of them are right, verdicts as they come. Out: requests, and
Wait.VERDICTS while all that is left depends on answers that are generated or judged at present.

Sample i of a prompt is requested only if, whatever comes of the samples before it, fewer than `right` of them can be
right. What is requested is therefore always needed, and a resumed build, which knows the same verdicts from the cache,
requests the same samples. One that failed counts as wrong.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError
from stillroom.log import format_plural, note
from stillroom.schema.records import Prompt
from stillroom.sql.session import open_session
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.joining import Wait
from teacher_cache.judging import MAX_WAITING, judge_cache, judge_of
from teacher_cache.prompts.prompts import TOKENIZE_BATCH, RequestMaker, WorkerShare, samples_by_source
from teacher_cache.writer.commit import VisibleSamples

Samples = VisibleSamples | Collection[str]

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
        least, most = samples_by_source(config), config.sampling.until.samples
        self._ready: deque[_Prompt] = deque()
        for prompt in prompts:
            is_judged, samples = judge_of(prompt) is not None, least[prompt.source]
            self._ready.append(_Prompt(prompt, is_judged, samples, most if is_judged else samples))
        self.num_total = sum(one.most for one in self._ready)
        """Samples at most."""
        self._open: dict[str, _Prompt] = {}
        self._num_waiting = 0
        # Appending is atomic: verdicts come from the judges' threads.
        self._events: deque[tuple[str, bool]] = deque()

    def settle(self, sample_id: str, correct: bool) -> None:
        """The verdict on a sample: False also if it failed or its judge could not decide."""
        self._events.append((sample_id, correct))

    def requests(self) -> Iterator[Request | Failure | Wait]:
        """First samples of all prompts, then second ones of those that need them, and so on."""
        while True:
            self._settle()
            if not self._ready and not self._num_waiting:
                return
            if not self._ready or len(self._open) >= MAX_OPEN:
                yield Wait.VERDICTS
                continue
            batch = self._batch()
            requests = self._maker.requests(batch[0].next_index, [one.prompt for one in batch])
            for one, request in zip(batch, requests, strict=True):
                self._count(one, request)
                yield request

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
        elif isinstance(request, Failure) or sample_id in self._failures or self._assume_wrong:
            pass
        elif one.is_judged:
            one.num_open += 1
            self._open[sample_id] = one
        self._schedule(one)

    def _schedule(self, one: _Prompt) -> None:
        """Decides on the prompt's next sample: now, after a verdict, or never."""
        if one.next_index < one.most:
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


def require_judged(prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError if no answer can be judged during a build, and notes prompts whose answers cannot."""
    unjudged = sum(judge_of(one) is None for one in prompts)
    if unjudged == len(prompts):
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
