"""A run's folder besides its checkpoints: configuration, selections, metrics, evaluations. One process at a time.

RUN/config.yaml                   as resolved when the run began; after a checkpoint, a resumption must mean the same
RUN/changes.json                  what `--from-step` changed since, and from which step on
RUN/<stage>.selection.parquet     what the stage trains on
RUN/heldout.selection.parquet     what the student is evaluated on
RUN/<stage>.negatives.selection.parquet, <stage>.right.selection.parquet
                                  wrong chains of a stage, and held-out right ones that must not become less likely
RUN/<stage>.behaviour-<hash>.npy  what the student gave its own chains when it wrote them
RUN/<stage>.steps-<hash>.npy      which examples its chains are split into, see steps.py
RUN/<stage>.terms-<hash>.npy, .json
                                  which of its tokens say a term of data.terms, and what was found
RUN/start/<stage>/                what the student gave the stage's tokens when the stage began, see start.py
RUN/features.json                 which feature sets it reads, and at which version
RUN/metrics.jsonl                 one line an optimizer step
RUN/eval.json                     every evaluation, in order
RUN/sessions.json                 what each call took, see cost.py
RUN/checkpoints/                  see checkpoint.py
RUN/plan/                         what `student-train plan` retokenised; the run links its files, then removes it
RUN/stages/<stage>/               the model at the end of every stage but the last, a Hugging Face folder
RUN/stages/<stage>.pruned/        the model that a stage with `prune` starts from
"""

import fcntl
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from stillroom.config import Json, plain, read_yaml, validate_config
from stillroom.errors import CacheConflict, ConfigError, CorruptError
from stillroom.log import note
from stillroom.storage.paths import write_text_atomic
from student_train.config.run import TrainConfig, meaning_of
from student_train.data.retokenised import PLAN_FOLDER
from student_train.runtime.checkpoint import CheckpointState, latest_state
from student_train.runtime.cost import cost_of, read_sessions

SHOWN_KEYS = 5
FINISHED = "the run is finished: nothing is left to train"

ADJUSTABLE = ("learning_rate", "lr_schedule", "warmup_frac", "min_lr_frac", "clip_norm")
"""Keys of a stage that a resumption from a chosen step may change: they decide the size of later steps alone."""
FROM_LEARNING = ("checkpoints", "stages", "start", "tensorboard")
"""Folders that optimizer steps write."""

Position = tuple[int, int]
"""(stage number, optimizer steps done in it)."""


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder, and the files that are read and written whole."""

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
    def changes_path(self) -> Path:
        return self.root / "changes.json"

    @property
    def sessions_path(self) -> Path:
        return self.root / "sessions.json"

    @property
    def heldout_path(self) -> Path:
        return self.root / "heldout.selection.parquet"

    @property
    def plan_folder(self) -> Path:
        """For selections of a run that has not begun."""
        return self.root / PLAN_FOLDER

    @property
    def features_path(self) -> Path:
        return self.root / "features.json"

    def selection_path(self, stage_name: str) -> Path:
        """The selection of a stage."""
        return self.root / f"{stage_name}.selection.parquet"

    def negatives_path(self, stage_name: str) -> Path:
        """The wrong chains of a stage."""
        return self.root / f"{stage_name}.negatives.selection.parquet"

    def right_path(self, stage_name: str) -> Path:
        """Held-out right chains of a stage that moves away from wrong ones."""
        return self.root / f"{stage_name}.right.selection.parquet"

    def start_of(self, stage_name: str) -> Path:
        """What the student gave the tokens of a stage when it began."""
        return self.root / "start" / stage_name

    def model_after(self, stage_name: str) -> Path:
        """The model at the end of a stage, from which the next one starts."""
        return self.root / "stages" / stage_name

    def pruned_for(self, stage_name: str) -> Path:
        """The pruned model from which a stage with `prune` starts. Names of stages have no dots."""
        return self.root / "stages" / f"{stage_name}.pruned"

    def lock(self) -> IO[str]:
        """Holds the folder until the returned file is closed. Raises CacheConflict if another process holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        # The kernel releases the lock with the process, so a killed run never blocks its folder.
        file = (self.root / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise CacheConflict(
                f"{self.root} is in use by another process: wait for it, or choose another run folder"
            ) from error
        return file

    def open(self, config: TrainConfig, *, has_learnt: bool, rewound_to: CheckpointState | None = None) -> None:
        """Writes config.yaml. A run that has learnt (has a checkpoint) must mean the same as before, ADJUSTABLE keys
        aside where it resumes at a chosen checkpoint; without one, a changed meaning discards what was frozen. Raises
        ConfigError naming the key that differs.
        """
        if self.config_path.exists():
            if rewound_to is not None:
                self._note_changes(config, rewound_to)
            elif has_learnt:
                self.refuse_other_meaning(config)
            elif meaning_of(self.read_config()) != meaning_of(config):
                self._forget_beginning()
        write_text_atomic(self.config_path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))

    def read_config(self) -> TrainConfig:
        """The configuration the run began with."""
        return validate_config(read_yaml(self.config_path), TrainConfig, str(self.config_path))

    def _note_changes(self, config: TrainConfig, state: CheckpointState) -> None:
        """Raises ConfigError for a change that the checkpoint does not allow."""
        changed = self.refuse_other_meaning(config, adjustable_from=state.stage)
        kept = [one for one in self.read_changes() if (one["stage_number"], one["step"]) <= state.place]
        if changed:
            kept.append({"stage": state.stage_name, "stage_number": state.stage, "step": state.step, "keys": changed})
        write_text_atomic(self.changes_path, json.dumps(kept, indent=2) + "\n")

    def read_changes(self) -> list[Json]:
        """Entries of changes.json in order: keys with their values before and after."""
        return self._read_list(self.changes_path)

    def truncate_evals(self, reached: Position) -> None:
        """Drops evaluations after `reached`, which a resumed run repeats."""
        evals = self.read_evals()
        kept = [one for one in evals if (one["stage_number"], one["step"]) <= reached]
        if len(kept) < len(evals):
            write_text_atomic(self.eval_path, json.dumps(kept, indent=2) + "\n")

    def truncate_metrics(self, reached: Position) -> None:
        """Drops steps after `reached`, which a resumed run repeats."""
        if self.metrics_path.exists():
            kept = [line for line in self.read_metrics() if (line["stage_number"], line["step"]) <= reached]
            write_text_atomic(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def read_metrics(self) -> list[Json]:
        """Lines of metrics.jsonl, without a last line that a kill cut short."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        try:
            # What follows the last newline is empty, or a line that a kill cut short.
            return [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise CorruptError(f"{self.metrics_path} holds a line that is not JSON: {error}") from error

    def read_evals(self) -> list[Json]:
        """Entries of eval.json in order; empty without a file."""
        return self._read_list(self.eval_path)

    def _read_list(self, path: Path) -> list[Json]:
        if not path.exists():
            return []
        try:
            entries: list[Json] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"{path} is not JSON: {error}") from error
        return entries

    def add_eval(self, entry: Json) -> None:
        """Appends one evaluation, replacing an earlier one of the same step."""
        here = (entry["stage_number"], entry["step"])
        # Later entries go too: a run resumed from an earlier checkpoint evaluates those steps again.
        kept = [one for one in self.read_evals() if (one["stage_number"], one["step"]) < here]
        write_text_atomic(self.eval_path, json.dumps([*kept, entry], indent=2) + "\n")

    def has_frozen(self, config: TrainConfig) -> bool:
        """Whether all selections are frozen for this configuration."""
        return (
            self.config_path.exists()
            and meaning_of(self.read_config()) == meaning_of(config)
            and all(self.selection_path(stage.name).exists() for stage in config.stages)
        )

    def _forget_beginning(self) -> None:
        # The selection's own file goes first: it marks the rest as whole.
        numbers = [path for kind in ("behaviour", "steps", "terms") for path in self.root.glob(f"*.{kind}-*")]
        files = [*self.root.glob("*.selection*.parquet"), *numbers]
        facts = (self.features_path, self.metrics_path, self.eval_path, self.changes_path, self.sessions_path)
        for file in (*files, *facts):
            file.unlink(missing_ok=True)
        for folder in (*self.root.glob("*.selection-prepared"), *(self.root / name for name in FROM_LEARNING)):
            shutil.rmtree(folder, ignore_errors=True)
        # Retokenised chains take hours, and each file says what it was made of: they serve as those of a plan.
        for kind in ("text", "projected"):
            for folder in self.root.glob(f"*.selection-{kind}"):
                self.plan_folder.mkdir(exist_ok=True)
                shutil.rmtree(self.plan_folder / folder.name, ignore_errors=True)
                folder.rename(self.plan_folder / folder.name)

    def refuse_other_meaning(self, config: TrainConfig, adjustable_from: int | None = None) -> dict[str, list[Any]]:
        """Raises ConfigError naming keys that decide what is learnt and differ from the run's.

        Returns ADJUSTABLE ones of the stages from `adjustable_from` on that differ, each with both values.
        """
        kept, asked = meaning_of(self.read_config()), meaning_of(config)
        different = [key for key in dict.fromkeys([*kept, *asked]) if kept.get(key) != asked.get(key)]
        is_rewound = adjustable_from is not None
        adjusted = [key for key in different if _is_adjustable(key, adjustable_from or 0)]
        changed = [key for key in different if not (is_rewound and key in adjusted)]
        if changed:
            key, *others = changed
            named = ", ".join(others[:SHOWN_KEYS]) + (", ..." if len(others) > SHOWN_KEYS else "")
            more = f" (other keys that differ: {named})" if others else ""
            hint = ", resume from a checkpoint with --from-step" if changed == adjusted else ""
            raise ConfigError(
                f"{self.root} was started with {key}={_shown(kept, key)}, now it is {_shown(asked, key)}{more}: "
                f"set it back to resume{hint}, or choose another run folder (run: ...)"
            )
        return {key: [kept.get(key), asked.get(key)] for key in adjusted}


def _is_adjustable(key: str, first_stage: int) -> bool:
    block, _, rest = key.partition(".")
    number, _, name = rest.partition(".")
    return block == "stages" and name in ADJUSTABLE and int(number) >= first_stage


def _shown(meaning: dict[str, Any], key: str) -> str:
    return repr(meaning[key]) if key in meaning else "not set"


def summary_if_finished(config: TrainConfig) -> Json | None:
    """The summary of a run that has nothing left to train, before anything slow is imported; otherwise None.

    Raises ConfigError if the run's configuration means something else, CorruptError.
    """
    run = RunFolder(config.run)
    if not is_finished(latest_state(run.checkpoints), config):
        return None
    with run.lock():
        run.open(config, has_learnt=True)
    note(FINISHED)
    return summarise(run, config)


def is_finished(state: CheckpointState | None, config: TrainConfig) -> bool:
    """Whether the state is that of the last step of the last stage."""
    return state is not None and state.stage_is_done and state.stage == len(config.stages) - 1


def summarise(run: RunFolder, config: TrainConfig) -> Json:
    """The result of `student-train run`: counts, speed, losses, and held-out numbers before and after."""
    records, evals, state = run.read_metrics(), run.read_evals(), latest_state(run.checkpoints)
    assert state is not None
    before, after = before_and_after(evals)
    train_s = sum(record["step_s"] for record in records)
    num_tokens = sum(record["num_tokens"] for record in records)
    return {
        "run": str(run.root),
        "checkpoint": state.tag,
        "best_checkpoint": None if state.best is None else state.best.tag,
        "stages": [_stage(records, stage.name) for stage in config.stages],
        "num_steps": len(records),
        "num_skipped_steps": sum(record["skipped"] for record in records),
        "precision": config.engine.precision,
        "num_tokens": num_tokens,
        "num_loss_tokens": sum(record["num_loss_tokens"] for record in records),
        "train_s": train_s,
        "tokens_per_s": num_tokens / train_s if train_s else 0.0,
        "stall_frac": sum(one["stall_frac"] * one["step_s"] for one in records) / train_s if train_s else 0.0,
        "usage": cost_of(read_sessions(run.sessions_path)),
        "memory_gib": max((record["memory_gib"] for record in records), default=0.0),
        "heldout_before": before,
        "heldout_after": after,
    }


def before_and_after(evals: Sequence[Json]) -> tuple[Json | None, Json | None]:
    """The last of a run's evaluations, and the one before its first step where that was on the same chains."""
    if not evals:
        return None, None
    first, last = evals[0], evals[-1]
    is_start = (first["stage_number"], first["step"]) == (0, 0)
    # A run that was resumed with another `eval` has its first evaluation on other chains: no progress can be read off
    # that.
    return (first if is_start and first.get("selection") == last.get("selection") else None), last


def _stage(records: list[Json], name: str) -> Json:
    own = [record for record in records if record["stage"] == name]
    first, last = (own[0], own[-1]) if own else (None, None)
    rises = [rise for record in own if (rise := record.get("adversarial_rise")) is not None]
    return {
        "name": name,
        "num_steps": len(own),
        "first_loss": first and first["loss"],
        "last_loss": last and last["loss"],
        "first_parts": first and first["parts"],
        "last_parts": last and last["parts"],
        "adversarial_rise": sum(rises) / len(rises) if rises else None,
        # Losses compare between steps only at constant weights and temperature.
        "is_comparable": all(
            (one["weights"], one["temperature"]) == (own[0]["weights"], own[0]["temperature"]) for one in own
        ),
    }
