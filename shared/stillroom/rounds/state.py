"""state.json: which parts of which rounds are done, and who does what now. The two programs know of each other by it.

Only the program whose turn it is writes it, so it needs no lock. A part is added once its command has succeeded; if the
program dies in between, the command runs again and finds nothing left to do.
"""

import json
import socket
import time
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.config import Json, plain, read_yaml, validate_config
from stillroom.errors import ConfigError, CorruptError
from stillroom.rounds.config import RoundsConfig, meaning_of_rounds
from stillroom.storage.paths import write_text_atomic

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
    """A finished part: seconds that its last start took, and numbers from the results of its commands."""

    ended_at: str
    seconds: float
    results: list[Json]


class RunningPart(Part):
    """The part that somebody has begun."""

    host: str
    started_at: str


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

    def of(self, number: int, part: str) -> DonePart | None:
        """A finished part, None while it is not."""
        return next((one for one in self.done if (one.round, one.part) == (number, part)), None)


class RoundsFolder:
    """The files that both programs read."""

    def __init__(self, config: RoundsConfig) -> None:
        self._config = config
        self._state, self._rounds = config.folder / "state.json", config.folder / "rounds.yaml"

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
        """Raises CorruptError where state.json is not a state."""
        try:
            return RoundsState.model_validate_json(self._state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return RoundsState()
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise CorruptError(f"{self._state} is not the state of rounds: {problem}: delete it to run every part "
                               "again, finished ones do nothing") from error  # fmt: skip

    def begin(self, part: Part) -> None:
        """Says that this machine does the part now."""
        running = RunningPart(**part.model_dump(), host=socket.gethostname(), started_at=_now())
        self._write(self.read().model_copy(update={"running": running}))

    def finish(self, part: Part, seconds: float, results: list[Json]) -> None:
        """Says that the part is done."""
        done = DonePart(**part.model_dump(), ended_at=_now(), seconds=round(seconds, 1), results=results)
        self._write(RoundsState(done=[*self.read().done, done]))

    def write_part(self, path: Path, values: Json) -> None:
        """Writes the configuration of one part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def _write(self, state: RoundsState) -> None:
        write_text_atomic(self._state, json.dumps(state.model_dump(mode="json"), indent=2) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
