"""The work of a worker that joined a build or a features pass: part after part, each under a lease.

In: all parts in order, leases, and what is visible. Out: what nobody has done of the parts that this worker leased, and
WAIT while other workers hold what is left.
"""

import contextlib
import enum
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Generic, Protocol, Self, TypeVar

from stillroom.cache.catalog import SHARD_NAME, Catalog
from stillroom.errors import CacheConflict, StillroomError
from stillroom.log import format_plural, note
from stillroom.storage.paths import Location
from teacher_cache.prompts.prompts import WorkerShare
from teacher_cache.workers.leases import EXPIRY_S, LIST_S, Leases, leases_folder, new_worker_name
from teacher_cache.writer.commit import Committer, VisibleSamples, Wanted, lock_path, worker_lock

PART_CHAINS = 64
"""Chains under one lease: minutes of work, so that no worker is left with much more than the others at the end."""
WAIT_S = 0.5
"""How often a worker without work looks whether there is some."""


class Wait(enum.Enum):
    """Nothing to do at present: other workers hold all that is left, or it depends on verdicts to come.

    READY comes once, before the first lease for which an engine has to be started.
    """

    WAIT = "wait"
    VERDICTS = "verdicts"
    READY = "ready"


WAIT: Final = Wait.WAIT


def rows_of_builds(catalog: Catalog, wanted: Wanted | None = None) -> list[VisibleSamples]:
    """What counts as done in a build: chains and failures, read with tables of their own."""
    own = Catalog(catalog.root)
    return [VisibleSamples(table, wanted=wanted) for table in (own.chains, own.failures)]


def worker_name(share: WorkerShare | None) -> str:
    """`w0` for a whole build, `w<I>of<N>` for a share, so that builds with different N never share file names, and a
    new name for a worker that joins.
    """
    if share is None:
        return new_worker_name()
    return "w0" if share.count == 1 else f"w{share.index}of{share.count}"


def of_prompts(samples: Mapping[str, int]) -> Wanted:
    """Rows of the first samples of each prompt, as many as `samples` says."""
    # Malformed rows are failures without a prompt.
    return lambda prompt_id, index, _: not prompt_id or index < samples.get(prompt_id, 0)


def of_sources(names: Iterable[str]) -> Wanted:
    """Rows of these sources."""
    known = frozenset(names)
    return lambda _prompt_id, _index, source: source in known


class Sampled(Protocol):
    """What is done once its row is visible."""

    @property
    def sample_id(self) -> str: ...


def is_in(visible: Sequence[VisibleSamples]) -> Callable[[Sampled], bool]:
    """Whether a sample is visible in one of the tables."""
    return lambda one: any(one.sample_id in samples for samples in visible)


T = TypeVar("T")
Leasable = tuple[str, Callable[[], Sequence[T]]]
"""A part's name, which depends on nothing but what is in it, and its contents, made on demand."""


class JoinedWork(Generic[T]):
    """Leases parts of one run or feature set, as a context manager."""

    def __init__(
        self,
        root: Location,
        run_id: str,
        worker: str,
        visible: Sequence[VisibleSamples],
        is_done: Callable[[T], bool],
        on_adopted: Callable[[], object] = lambda: None,
        on_look: Callable[[], None] = lambda: None,
        needs_engine: Callable[[T], bool] = lambda _: True,
    ) -> None:
        """`visible` must be this object's own: tables are not thread-safe. `is_done` says of one thing in a part
        whether it is done, by what was visible at the last look; `on_look` is called at each look. `on_adopted` is
        called after rows of a dead worker became visible. `needs_engine` says of what is not done whether READY has to
        come before it is leased.
        """
        self.leases = Leases(leases_folder(root, run_id), worker, self._adopt)
        self.num_before = 0
        """Chains and failures of all workers at the first look."""
        self._num_visible: Counter[str] = Counter()
        self._num_done = 0
        self._root, self._run_id = root, run_id
        self._visible, self._is_done = visible, is_done
        self._on_adopted, self._on_look, self._needs_engine = on_adopted, on_look, needs_engine
        self._held: dict[str, Sequence[T]] = {}
        self._looked_s = 0.0

    def __enter__(self) -> Self:
        self.leases.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.leases.__exit__()
        with contextlib.suppress(OSError, StillroomError):
            # Nobody else ever takes this name.
            lock_path(self._root, self._run_id, self.leases.worker).unlink(missing_ok=True)

    def items(self, parts: Callable[[], Iterable[Leasable[T]]]) -> Iterator[T | Wait]:
        """What is left of the parts that this worker gets, one by one."""
        for leased in self.parts(parts):
            if isinstance(leased, Wait):
                yield leased
            else:
                yield from leased[1]

    def parts(self, parts: Callable[[], Iterable[Leasable[T]]]) -> Iterator[tuple[str, Sequence[T]] | Wait]:
        """Name and rest of each part that this worker gets. Ends when every part is done or was given out here.

        `parts` is called again for those that other workers hold.
        """
        self._look()
        self.num_before = self.num_done(0)
        settled: set[str] = set()
        is_ready = False
        while True:
            left = []
            for name, make in parts():
                if name in settled:
                    continue
                if not is_ready and not self.leases.is_held(name) and self._undone(made := make()):
                    # What they published needs no engine.
                    self.leases.bury_dead()
                    self._look()
                    if any(map(self._needs_engine, self._undone(made))):
                        # Nothing is leased while an engine loads, perhaps for minutes: others can do it meanwhile.
                        is_ready = True
                        yield Wait.READY
                        self._look()
                if self.leases.is_held(name):
                    left.append(name)
                    continue
                made = make()
                # Before there is a lease: a resumed build passes thousands of parts that are done.
                if not self._undone(made):
                    settled.add(name)
                elif self.leases.claim(name):
                    settled.add(name)
                    self._held[name] = made
                    # Whoever had the part before may have finished it since the last look.
                    self._look()
                    yield name, self._undone(made)
                else:
                    left.append(name)
            if not left:
                # Nobody needs these files, so a failure to remove them does not matter: gc does it later.
                with contextlib.suppress(OSError, StillroomError):
                    self.leases.sweep()
                return
            yield WAIT
            while all(map(self.leases.is_held, left)):
                if time.monotonic() - self._looked_s >= LIST_S:
                    self._look()
                yield WAIT
            self._look()

    def num_done(self, num_own: int) -> int:
        """Chains and failures of all workers, `num_own` of them finished by this one. Never less than before: what died
        uncommitted is counted until it is done again.
        """
        # By worker, because the log and the heartbeats are read at different times: neither alone knows all, and a
        # chain that was just committed is in both.
        num = Counter({one.worker: one.num_done for one in self.leases.others}) | self._num_visible
        num[self.leases.worker] = num_own
        self._num_done = max(self._num_done, num.total())
        return self._num_done

    def settle(self) -> None:
        """Gives back what is done, before an engine takes its time to end: others wait for these parts."""
        # What cannot be given back now is when this ends, or expires.
        with contextlib.suppress(OSError, StillroomError):
            self._look()

    def _undone(self, items: Sequence[T]) -> list[T]:
        return [one for one in items if not self._is_done(one)]

    def _look(self) -> None:
        """Reads what is new in the log, and gives back the parts that are done."""
        for visible in self._visible:
            visible.refresh()
        self._on_look()
        self._num_visible = Counter()
        for one in self._visible:
            for file in one.table.files():
                folder, _, name = file.path.rpartition("/")
                if folder == self._run_id and (match := SHARD_NAME.match(name)) is not None:
                    self._num_visible[match["worker"]] += one.num_wanted(file)
        for name in self.leases.own:
            if all(map(self._is_done, self._held[name])):
                self.leases.release(name)
                del self._held[name]
        self._looked_s = time.monotonic()

    def _adopt(self, worker: str) -> None:
        """Makes visible what a dead worker published and did not commit."""
        num_rows = 0
        lock = lock_path(self._root, self._run_id, worker)
        try:
            with worker_lock(lock, 0.0) as abandoned_s:
                for visible in self._visible:
                    committer = Committer(visible.table, visible, self._run_id, worker)
                    # Without file locks abandoned_s is a day, but a worker this long silent need not be waited for.
                    num_rows += committer.recover(min(abandoned_s, EXPIRY_S))
                lock.unlink(missing_ok=True)
        except CacheConflict:
            # It lives and was only silent: what it still writes is compared with the log, as always.
            return
        if num_rows:
            self._on_adopted()
        adopted = f", adopted {format_plural(num_rows, 'row')}" if num_rows else ""
        note(f"worker {worker} has been silent for {EXPIRY_S:.0f} s: taking over its parts{adopted}")
