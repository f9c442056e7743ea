"""state.json: which parts of which rounds are done, and who does what now. The two programs know of each other by it.

Only the program whose turn it is writes it, and each program holds a lock on its side. A part is added once its command
has succeeded; if the program dies in between, the command runs again and finds nothing left to do.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.config import Json, plain, read_yaml, validate_config
from stillroom.errors import CacheConflict, ConfigError, CorruptError
from stillroom.log import warn
from stillroom.rounds.config import RoundsConfig, meaning_of_rounds
from stillroom.storage.paths import write_text_atomic

NUM_STALE_READS = 5
LOCK_WAIT_S = 2.0
"""A side that waits looks whether the other one runs, and holds its lock for that moment."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
TEACHER_CACHE, STUDENT_TRAIN = "teacher-cache", "student-train"
PARTS = {
    "generate": TEACHER_CACHE,
    "score": TEACHER_CACHE,
    "judge": TEACHER_CACHE,
    "train": STUDENT_TRAIN,
    "answers": STUDENT_TRAIN,
    "export": STUDENT_TRAIN,
}
"""Parts of a round in their order, and the program that does each."""


class Part(BaseModel):
    """One part of one round, from 1."""

    model_config = ConfigDict(frozen=True)

    round: int
    part: str
    by: str

    @property
    def title(self) -> str:
        """For people."""
        return f"round {self.round}, {self.part}"


class DonePart(Part):
    """A finished part: the seconds it took, and numbers from the results of its commands."""

    ended_at: str
    seconds: float
    results: list[Json]


class RunningPart(Part):
    """The part that somebody has begun; `stopped` says how it ended undone, `seconds` what earlier starts took."""

    host: str
    started_at: str
    stopped: str | None = None
    seconds: float = 0.0


class RoundsState(BaseModel):
    """What has happened so far."""

    model_config = ConfigDict(frozen=True)

    running: RunningPart | None = None
    done: list[DonePart] = []

    def next_part(self, num_rounds: int) -> Part | None:
        """The first part that is not done; None at the end."""
        done = {(one.round, one.part) for one in self.done}
        for number in range(1, num_rounds + 1):
            for part, by in PARTS.items():
                if (number, part) not in done:
                    return Part(round=number, part=part, by=by)
        return None

    def is_left_for(self, programs: Collection[str], num_rounds: int) -> bool:
        """Whether a part of these programs is not done."""
        done = {(one.round, one.part) for one in self.done}
        own = [part for part, by in PARTS.items() if by in programs]
        return any((number, part) not in done for number in range(1, num_rounds + 1) for part in own)

    def of(self, number: int, part: str) -> DonePart | None:
        """A finished part, None while it is not."""
        return next((one for one in self.done if (one.round, one.part) == (number, part)), None)


class RoundsFolder:
    """The files that both programs read."""

    def __init__(self, config: RoundsConfig) -> None:
        self._config = config
        self._state, self._rounds = config.folder / "state.json", config.folder / "rounds.yaml"
        self._known: tuple[bytes | None, RoundsState] = None, RoundsState()

    @contextlib.contextmanager
    def held(self, programs: Collection[str]) -> Iterator[None]:
        """Holds the side of each program. Raises CacheConflict where another process does its parts."""
        self._config.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # In one order for all, so that two who want both never hold one each.
            for program in sorted(programs):
                # Not emptied on opening: it names the process that holds it.
                file = stack.enter_context(self._lock_path(program).open("a+", encoding="utf-8"))
                try:
                    _lock(file)
                except BlockingIOError as error:
                    file.seek(0)
                    raise CacheConflict(
                        f"{self._config.folder}: `{program} rounds` runs already ({file.read().strip()}): wait for it, "
                        "or stop it first"
                    ) from error
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    warn(f"{self._config.folder} cannot be locked ({error.strerror}): start each side only once")
                # Under the lock only: before, it would erase the name of the process that holds it.
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            yield

    def is_held(self, program: str) -> bool:
        """Whether somebody does the parts of `program`; also where the file system cannot tell."""
        try:
            with self._lock_path(program).open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    def open(self) -> None:
        """Writes rounds.yaml. Raises ConfigError naming a key that decides what is learnt and differs from the first
        start's.
        """
        config = self._config
        if self._rounds.exists():
            kept = meaning_of_rounds(validate_config(read_yaml(self._rounds), RoundsConfig, str(self._rounds)))
            asked = meaning_of_rounds(config)
            for key in dict.fromkeys([*kept, *asked]):
                if kept.get(key) != asked.get(key):
                    raise ConfigError(
                        f"{config.folder} was started with {key}={kept.get(key)!r}, now it is {asked.get(key)!r}: set "
                        "it back, or choose another folder"
                    )
            return
        config.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._rounds, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))

    def read(self) -> RoundsState:
        """Cheap where nothing has changed: a side that waits asks every second. Raises CorruptError where state.json is
        not a state.
        """
        try:
            # Opened, not only looked at: over NFS that asks the server, where a file's age may be half a minute old.
            text = self._bytes()
            if text != self._known[0]:
                self._known = text, RoundsState.model_validate_json(text)
        except FileNotFoundError:
            self._known = None, RoundsState()
        except ValidationError as error:
            problem = error.errors()[0]
            where = "".join(f"{one}: " for one in problem["loc"])
            raise CorruptError(
                f"{self._state} is not the state of rounds: {where}{' '.join(problem['msg'].split())}: delete it to "
                "run every part again, finished ones do nothing"
            ) from error
        return self._known[1]

    def _bytes(self) -> bytes:
        for _ in range(NUM_STALE_READS):
            try:
                return self._state.read_bytes()
            except OSError as error:
                # NFS: the other machine has replaced the file between opening and reading.
                if error.errno != errno.ESTALE:
                    raise
        return self._state.read_bytes()

    def begin(self, part: Part) -> None:
        """Says that this machine does the part now."""
        state = self.read()
        running = RunningPart(
            **part.model_dump(), host=socket.gethostname(), started_at=_now(), seconds=_seconds_before(state, part)
        )
        self._write(state.model_copy(update={"running": running}))

    def stop(self, seconds: float, how: str) -> None:
        """Says that the part that was begun has ended, undone."""
        state = self.read()
        if state.running is not None:
            stopped = {"stopped": how, "seconds": round(state.running.seconds + seconds, 1)}
            self._write(state.model_copy(update={"running": state.running.model_copy(update=stopped)}))

    def finish(self, part: Part, seconds: float, results: list[Json]) -> None:
        """Says that the part is done; `seconds` are those of its last start."""
        state = self.read()
        all_s = round(_seconds_before(state, part) + seconds, 1)
        done = DonePart(**part.model_dump(), ended_at=_now(), seconds=all_s, results=results)
        self._write(RoundsState(done=[*state.done, done]))

    def write_part(self, path: Path, values: Json) -> None:
        """Writes the configuration of one part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def _lock_path(self, program: str) -> Path:
        return self._config.folder / f".{program}.lock"

    def _write(self, state: RoundsState) -> None:
        write_text_atomic(self._state, json.dumps(state.model_dump(mode="json"), indent=2) + "\n")


def _seconds_before(state: RoundsState, part: Part) -> float:
    """What earlier starts of the part took, those that were killed left out."""
    running = state.running
    return 0.0 if running is None or (running.round, running.part) != (part.round, part.part) else running.seconds


def _lock(file: IO[str]) -> None:
    """Raises BlockingIOError where another process holds it beyond LOCK_WAIT_S, OSError without locks."""
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(0.1)
        else:
            return


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
