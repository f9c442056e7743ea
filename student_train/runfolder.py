"""What a run keeps besides its checkpoints: configuration, selections, metrics, evaluations. One process at a time.

RUN/config.yaml                   as resolved when the run began; after a checkpoint, a resumption must mean the same
RUN/<stage>.selection.parquet     what the stage learns from
RUN/heldout.selection.parquet     what the student is judged on
RUN/metrics.jsonl                 one line an optimizer step
RUN/eval.json                     every evaluation, in order
RUN/checkpoints/                  see checkpoint.py
RUN/stages/<stage>/               the model at the end of every stage but the last, a Hugging Face folder
"""

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from shared.config import Json, plain, read_yaml, validate_config
from shared.errors import CacheConflict, ConfigError, CorruptError
from shared.files import write_text_atomic
from student_train.config import TrainConfig, meaning_of

SHOWN_KEYS = 5

FROM_LEARNING = ("checkpoints", "stages", "tensorboard")
"""Folders of a run that hold what its steps left."""

Position = tuple[int, int]
"""(stage number, optimizer steps done in it)."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below one run's folder, and the files that are read and written whole."""

    root: Path

    @property
    def config_path(self) -> Path:
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def eval_path(self) -> Path:
        return self.root / "eval.json"

    @property
    def heldout_path(self) -> Path:
        return self.root / "heldout.selection.parquet"

    def selection_path(self, stage_name: str) -> Path:
        """Where the selection of a stage is kept."""
        return self.root / f"{stage_name}.selection.parquet"

    def model_after(self, stage_name: str) -> Path:
        """Where the model at the end of a stage is kept for the next one."""
        return self.root / "stages" / stage_name

    def lock(self) -> IO[str]:
        """Holds the folder until the returned file is closed. Raises CacheConflict where another process has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = (self.root / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise CacheConflict(
                f"{self.root} is in use by another process: wait for it, or name another run"
            ) from error
        return file

    def open(self, config: TrainConfig, *, has_learnt: bool) -> None:
        """Writes config.yaml. `has_learnt`: whether the run has a checkpoint; without one it may still mean another
        thing, and what was frozen for the old one is forgotten. Raises ConfigError naming the key that differs.
        """
        if self.config_path.exists():
            if has_learnt:
                self.refuse_other_meaning(config)
            elif meaning_of(self.read_config()) != meaning_of(config):
                self._forget_beginning()
        write_text_atomic(self.config_path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))

    def read_config(self) -> TrainConfig:
        """The configuration that the run began with."""
        return validate_config(read_yaml(self.config_path), TrainConfig, str(self.config_path))

    def truncate_metrics(self, reached: Position) -> None:
        """Forgets steps past `reached`, which will be done again after a kill."""
        if self.metrics_path.exists():
            kept = [line for line in self.read_metrics() if (line["stage_number"], line["step"]) <= reached]
            write_text_atomic(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def read_metrics(self) -> list[Json]:
        """Lines of metrics.jsonl; a last line that a kill cut short does not count."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        try:
            return [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise CorruptError(f"{self.metrics_path} holds a line that is not JSON: {error}") from error

    def read_evals(self) -> list[Json]:
        """Entries of eval.json in order; none where there is no file."""
        if not self.eval_path.exists():
            return []
        try:
            entries: list[Json] = json.loads(self.eval_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"{self.eval_path} is not JSON: {error}") from error
        return entries

    def add_eval(self, entry: Json) -> None:
        """Appends one evaluation, in the place of an earlier one of the same step."""
        here = (entry["stage_number"], entry["step"])
        kept = [one for one in self.read_evals() if (one["stage_number"], one["step"]) < here]
        write_text_atomic(self.eval_path, json.dumps([*kept, entry], indent=2) + "\n")

    def has_frozen(self, config: TrainConfig) -> bool:
        """Whether everything that the run reads is frozen, for this configuration."""
        return (
            self.config_path.exists()
            and meaning_of(self.read_config()) == meaning_of(config)
            and all(self.selection_path(stage.name).exists() for stage in config.stages)
        )

    def _forget_beginning(self) -> None:
        # What says that a selection is whole goes first, what it says it of after.
        files = [*self.root.glob("*.selection.parquet"), *self.root.glob("*.selection.source.parquet")]
        for file in (*files, self.metrics_path, self.eval_path):
            file.unlink(missing_ok=True)
        for folder in (*self.root.glob("*.selection-text"), *(self.root / name for name in FROM_LEARNING)):
            shutil.rmtree(folder, ignore_errors=True)

    def refuse_other_meaning(self, config: TrainConfig) -> None:
        """Raises ConfigError naming keys that decide what is learnt and differ from the run's own."""
        kept, asked = meaning_of(self.read_config()), meaning_of(config)
        changed = [key for key in dict.fromkeys([*kept, *asked]) if kept.get(key) != asked.get(key)]
        if changed:
            key, *others = changed
            named = ", ".join(others[:SHOWN_KEYS]) + (", ..." if len(others) > SHOWN_KEYS else "")
            more = f" (other keys that differ: {named})" if others else ""
            raise ConfigError(
                f"{self.root} was begun with {key}={_shown(kept, key)}, now it is {_shown(asked, key)}{more}: "
                "set it back to resume, or name another run folder (run: ...)"
            )


def _shown(meaning: dict[str, Any], key: str) -> str:
    return repr(meaning[key]) if key in meaning else "not set"
