"""Work by lease: a part of a build is held by one worker at a time, and taken over when that worker dies.

A lease is a file that only one worker can create, `<part>.<epoch>.lease`; its content names the holder. Every worker
writes a heartbeat, `<worker>.json`, each HEARTBEAT_S. A lease whose holder has been silent for EXPIRY_S is free:
whoever creates the file of the next epoch holds it. Ages are by the storage's clock, which the own heartbeat tells.

Leases save double work and decide nothing. What is done is what the Delta log shows: a worker that was only slow costs
double work, never a double row.
"""

import contextlib
import itertools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import DataError, StillroomError, one_line
from stillroom.log import warn
from stillroom.storage.paths import Location, create_file, file_clock_s, matching, modified, write_text_atomic

HEARTBEAT_S = 15.0
EXPIRY_S = 60.0
"""Silence after which a worker counts as dead. A store may be unavailable for some heartbeats."""
LIST_S = 5.0
"""How often the folder is listed while a worker waits for others."""
STALL_S = 1800.0
"""A worker whose engine has not stepped for so long hangs: its heartbeat ends, so that others take over."""
_LEASE = re.compile(r"^(?P<part>[0-9a-z-]+)\.(?P<epoch>\d{6})\.lease$")


class WorkerState(BaseModel):
    """A heartbeat. `num_done` chains and failures are finished, in the Delta log or not yet."""

    model_config = ConfigDict(frozen=True)

    worker: str
    host: str
    pid: int
    started_at: float
    num_done: int = 0
    num_tokens: int = 0
    tokens_per_s: float = 0.0


def leases_folder(cache: Location, run_id: str) -> Location:
    """Where the leases and heartbeats of a run are."""
    return cache / "runs" / f"{run_id}.leases"


def new_worker_name() -> str:
    """A name that no other worker has: `j` and eight hex digits."""
    return f"j{secrets.token_hex(4)}"


class Leases:
    """One worker's leases, as a context manager: entering joins, leaving gives everything back.

    Raises OSError or StillroomError if the folder cannot be written. Not thread-safe, except for `report`.
    """

    def __init__(self, folder: Location, worker: str, on_takeover: Callable[[str], None]) -> None:
        """`on_takeover` is called with a dead worker's name before its first part changes hands."""
        self.folder, self.worker = folder, worker
        self._on_takeover = on_takeover
        self._own: dict[str, Location] = {}
        # In the past by LIST_S, so that the first question lists the folder whatever the monotonic clock says.
        self._listed_s = -LIST_S
        self._files: dict[str, list[Location]] = {}
        # By the lease's path. A lease never changes, so each is read once.
        self._holders: dict[Location, str] = {}
        self._silent_s: dict[str, float] = {}
        self._others: list[WorkerState] = []
        self._state = WorkerState(worker=worker, host=socket.gethostname(), pid=os.getpid(), started_at=time.time())
        self._reported_s: float | None = None
        # The storage's clock minus the monotonic one, which no correction of this machine's time moves.
        self._storage_offset_s = 0.0
        self._beat_s: float | None = None
        self._trusted_s = 0.0
        self._ended = threading.Event()
        # A daemon: a worker that dies of an error must not seem to live on.
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        # Apart from the heartbeat: of many workers on a slow store, reading all takes longer than EXPIRY_S.
        self._watcher = threading.Thread(target=self._watch_others, name="other workers", daemon=True)

    def __enter__(self) -> Self:
        self._require_exclusion()
        self._beat()
        self._thread.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # Joined before the heartbeat is removed: a late beat would write it again.
        self._thread.join()
        self._watcher.join(HEARTBEAT_S)
        # What cannot be given back expires.
        with contextlib.suppress(OSError, StillroomError):
            for part in list(self._own):
                self.release(part)
            self._heartbeat_path(self.worker).unlink(missing_ok=True)

    @property
    def own(self) -> Sequence[str]:
        """Parts that this worker holds."""
        return list(self._own)

    @property
    def others(self) -> Sequence[WorkerState]:
        """Other workers that are alive, as of the last look, every HEARTBEAT_S."""
        return self._others

    @property
    def pace_of_others(self) -> str:
        """For the progress line. Example: 3 at 1250 tok/s."""
        return f"{len(self._others)} at {sum(one.tokens_per_s for one in self._others):.0f} tok/s"

    def claim(self, part: str) -> bool:
        """Takes a part that no living worker holds; False if another one has it."""
        if self.is_held(part):
            return False
        files = self._files.get(part, [])
        epoch = 1 + max((_epoch_of(path) for path in files), default=-1)
        for holder in sorted({self._holder_of(path) for path in files}):
            # One of an earlier epoch may have been slow only, and lives.
            if not self._is_alive(holder):
                self._bury(holder)
        path = self.folder / f"{part}.{epoch:06d}.lease"
        # A store whose first answer was lost refuses its client's second attempt: the file may be this worker's own.
        if not create_file(path, self.worker.encode()) and self._holder_of(path) != self.worker:
            # Another worker was faster: what was listed is out of date.
            self._listed_s = -LIST_S
            return False
        self._own[part] = path
        return True

    def is_held(self, part: str) -> bool:
        """Whether a living worker holds the part, as of the last listing (at most LIST_S ago)."""
        if part in self._own:
            return True
        if time.monotonic() - self._listed_s >= LIST_S:
            self._list()
        files = self._files.get(part, [])
        return bool(files) and self._is_alive(self._holder_of(max(files, key=_epoch_of)))

    def release(self, part: str) -> None:
        """Gives a part back, with what dead workers left of it."""
        own, listed = self._own.pop(part), self._files.get(part, [])
        # A later epoch is the lease of a worker that took this one for dead, and works on the part.
        self._files[part] = [path for path in listed if _epoch_of(path) > _epoch_of(own)]
        for path in {own, *listed}.difference(self._files[part]):
            path.unlink(missing_ok=True)

    def bury_dead(self) -> None:
        """Declares every silent worker dead, also one that holds nothing anybody still needs."""
        self._list()
        for worker in [one for one in self._silent_s if not self._is_alive(one)]:
            self._bury(worker)

    def sweep(self) -> None:
        """Removes what dead workers left. For the end of a run: of parts that are left, some would be done twice."""
        self.bury_dead()
        for path in itertools.chain.from_iterable(self._files.values()):
            if not self._is_alive(self._holder_of(path)):
                path.unlink(missing_ok=True)

    def report(self, **state: Any) -> None:
        """What the next heartbeat says; also shows that this worker does not hang."""
        # One assignment of a frozen state: the heartbeat's thread reads the old one or the new one, never a mixture.
        self._state, self._reported_s = self._state.model_copy(update=state), time.monotonic()

    def _list(self) -> None:
        # One request: the engine waits for it.
        self._files, self._silent_s = {}, {}
        now_s = time.monotonic() + self._storage_offset_s
        for path, modified_s in modified(self.folder).items():
            match = _LEASE.match(path.name)
            if match is not None:
                self._files.setdefault(match["part"], []).append(path)
            elif path.name.endswith(".json") and path.stem != self.worker:
                self._silent_s[path.stem] = now_s - modified_s
        known = {path for paths in self._files.values() for path in paths}
        self._holders = {path: holder for path, holder in self._holders.items() if path in known}
        self._listed_s = time.monotonic()

    def _holder_of(self, path: Location) -> str:
        if path not in self._holders:
            try:
                self._holders[path] = path.read_bytes().decode("utf-8", "replace")
            except FileNotFoundError:
                # Given back since the listing. Nobody has the empty name, so the part counts as free.
                return ""
        return self._holders[path]

    def _is_alive(self, worker: str) -> bool:
        # Without a heartbeat a worker has left, or somebody has declared it dead.
        if worker == self.worker or worker not in self._silent_s:
            return worker == self.worker
        return self._silent_s[worker] < EXPIRY_S or time.monotonic() < self._trusted_s

    def _bury(self, worker: str) -> None:
        if worker and worker in self._silent_s:
            self._on_takeover(worker)
            self._heartbeat_path(worker).unlink(missing_ok=True)
            # Several parts of one dead worker are taken over one by one; `on_takeover` is for the first.
            del self._silent_s[worker]

    def _require_exclusion(self) -> None:
        probe = self.folder / f"{self.worker}.probe"
        try:
            create_file(probe, b"")
            if create_file(probe, b""):
                raise DataError(
                    f"{self.folder}: this storage creates the same file twice (it ignores the condition of a put), so "
                    "workers would overwrite each other's commits: use a shared folder, or a store with conditional "
                    "puts (S3, Google Cloud Storage, Azure, MinIO, SeaweedFS)"
                )
        finally:
            probe.unlink(missing_ok=True)

    def _beat_on(self) -> None:
        has_warned = False
        while not self._ended.wait(HEARTBEAT_S):
            if self._reported_s is not None and time.monotonic() - self._reported_s > STALL_S:
                if not has_warned:
                    warn(f"no progress for {STALL_S / 60:.0f} minutes: other workers take over the parts of this one")
                    has_warned = True
                # Not ended: an engine that steps again after all gets its heartbeat back.
                continue
            try:
                self._beat()
                has_warned = False
            except (OSError, StillroomError) as error:
                if not has_warned:
                    warn(f"the heartbeat cannot be written, so others may repeat this work: {one_line(error)}")
                    has_warned = True

    def _watch_others(self) -> None:
        while True:
            # Here rather than in `_list`: a request for each worker, at every heartbeat of theirs.
            with contextlib.suppress(OSError, StillroomError):
                alive = living_workers(self.folder, time.monotonic() + self._storage_offset_s)
                self._others = [one for one in alive if one.worker != self.worker]
            if self._ended.wait(HEARTBEAT_S):
                return

    def _beat(self) -> None:
        path = self._heartbeat_path(self.worker)
        write_text_atomic(path, self._state.model_dump_json() + "\n")
        beat_s, now_s = path.stat().st_mtime, time.monotonic()
        if self._beat_s is not None and beat_s - self._beat_s >= EXPIRY_S:
            # Storage that was gone, or a machine that slept, silenced the others too: they get time to speak again.
            self._trusted_s = now_s + EXPIRY_S
        self._beat_s, self._storage_offset_s = beat_s, beat_s - now_s

    def _heartbeat_path(self, worker: str) -> Location:
        return self.folder / f"{worker}.json"


def workers_of(cache: Location, but: Collection[str] = ()) -> list[WorkerState]:
    """Living workers of all runs and feature sets `but` these. Writes only a probe of the storage's clock, beside
    heartbeats.
    """
    others = [one for one in matching(cache / "runs", "*.leases") if one.name.removesuffix(".leases") not in but]
    folders = [one for one in others if matching(one, "*.json")]
    return [worker for folder in folders for worker in living_workers(folder, _now_s(folder))]


def _now_s(folder: Location) -> float:
    """By the storage's clock, or by this machine's where this user may only read."""
    try:
        return file_clock_s(folder)
    except (OSError, StillroomError):
        return time.time()


def living_workers(folder: Location, now_s: float) -> list[WorkerState]:
    """Workers of a run whose heartbeat is fresh; `now_s` is by the storage's clock."""
    states = [
        _read_state(path)
        for path, modified_s in modified(folder).items()
        if path.name.endswith(".json") and now_s - modified_s < EXPIRY_S
    ]
    return [one for one in states if one is not None]


def _read_state(path: Location) -> WorkerState | None:
    try:
        return WorkerState.model_validate_json(path.read_bytes())
    except (ValidationError, FileNotFoundError, StillroomError):
        # It is only shown: no reason to end.
        return None


def _epoch_of(path: Location) -> int:
    match = _LEASE.match(path.name)
    assert match is not None
    return int(match["epoch"])
