"""Checkpoints: what a run needs to resume as if it had never stopped. Each becomes visible whole.

    RUN/checkpoints/<stage>-<step>/      DeepSpeed's files of all ranks, and state.json
    RUN/checkpoints/latest.json          the state of the last whole one; written last, by one rename

DeepSpeed writes into `<tag>.tmp`; when all ranks are done, the first one adds state.json, flushes, renames the folder
and then moves the marker. A kill at any time leaves the marker on a whole checkpoint, and the next save sweeps the
rest. Dropout needs no saved random state: every step seeds its generators by (seed, stage, step, rank).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import CorruptError, DataError, first_line
from stillroom.storage.paths import sync_file, sync_folder, write_text_atomic

if TYPE_CHECKING:
    from student_train.runtime.engine import Engine
    from student_train.runtime.ranks import Ranks

LATEST = "latest.json"
STATE = "state.json"
TEMP = ".tmp"
UNIVERSAL = ".universal"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Best(_Record):
    """The checkpoint with the lowest held-out loss so far."""

    tag: str
    loss: float
    selection: str
    """Hash of the held-out selection it was measured on."""


class HeldoutProgress(_Record):
    """How far the held-out loss has fallen in a stage, for elastic weights."""

    selection: str
    """Hash of the held-out selection."""
    start: float
    """Loss when the stage began, or at its first evaluation."""
    now: float

    @property
    def remaining(self) -> float:
        """Ratio of the loss now to the loss at the start, at most 1."""
        return min(1.0, self.now / self.start) if self.start > 0 else 1.0


class CheckpointState(_Record):
    """State of a run after `step` optimizer steps of stage number `stage`."""

    stage: int
    stage_name: str
    step: int
    num_steps: int
    num_ranks: int
    zero_stage: int
    stream: dict[str, Any]
    num_loss_tokens: int
    """Loss tokens so far, over all stages."""
    train_s: float
    """Seconds of optimizer steps so far, over all stages."""
    num_skipped: int = 0
    """Steps of this stage whose gradient was not finite."""
    best: Best | None = None
    heldout: HeldoutProgress | None = None

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.stage_name}-{self.step:06d}"

    @property
    def place(self) -> tuple[int, int]:
        """(stage number, steps done in it)."""
        return self.stage, self.step

    @property
    def stage_is_done(self) -> bool:
        return self.step >= self.num_steps


def latest_state(folder: Path) -> CheckpointState | None:
    """State of the last whole checkpoint below `folder`; None before the first. Raises CorruptError."""
    path = folder / LATEST
    return _read(path) if path.exists() else None


def find_state(folder: Path, which: str) -> CheckpointState:
    """State of the checkpoint `last`, `best` or named by its tag. Raises DataError with the tags that exist."""
    latest = latest_state(folder)
    if latest is None:
        raise DataError(f"{folder} has no checkpoint yet: train first with `student-train run`")
    if which == "last":
        return latest
    tag = which
    if which == "best":
        if latest.best is None:
            raise DataError(f"{folder} has no best checkpoint: the run was not evaluated (set eval in its config)")
        tag = latest.best.tag
    if not (folder / tag / STATE).exists():
        raise DataError(f"{folder} has no checkpoint {tag!r}: choose last, best, {', '.join(tags(folder))}")
    return _read(folder / tag / STATE)


def states_of_last_stage(folder: Path) -> list[CheckpointState]:
    """Whole checkpoints of the stage that the last one belongs to, by step."""
    latest = latest_state(folder)
    if latest is None:
        return []
    states = [_read(folder / tag / STATE) for tag in tags(folder)]
    own = [state for state in states if state.stage == latest.stage and state.step <= latest.step]
    return sorted(own, key=lambda state: state.step)


def find_step(folder: Path, step: int) -> CheckpointState:
    """The checkpoint after `step` steps of the last stage. Raises DataError with the steps that there are."""
    states = states_of_last_stage(folder)
    for state in states:
        if state.step == step:
            return state
    if not states:
        raise DataError(f"--from-step: {folder} has no checkpoint yet: leave it out")
    known = ", ".join(str(state.step) for state in states)
    raise DataError(f"--from-step {step}: stage {states[0].stage_name} has checkpoints of steps {known}")


def rewind(folder: Path, state: CheckpointState) -> None:
    """Makes `state` the last checkpoint and removes later ones."""
    later = [one for one in states_of_last_stage(folder) if one.step > state.step]
    best = state.best
    if best is not None and not (folder / best.tag / STATE).exists():
        state = state.model_copy(update={"best": None})
    # The marker moves first: a kill during removal leaves surplus checkpoints, never a marker on a missing one.
    write_text_atomic(folder / LATEST, state.model_dump_json(indent=2) + "\n")
    for one in later:
        _remove(folder / one.tag)


def tags(folder: Path) -> list[str]:
    """Names of the whole checkpoints below `folder`."""
    return sorted(path.parent.name for path in folder.glob(f"*/{STATE}") if path.parent.suffix not in (TEMP, UNIVERSAL))


def save(folder: Path, engine: "Engine", state: CheckpointState, keep_last: int, ranks: "Ranks") -> None:
    """Writes a checkpoint and removes outdated ones; called by all ranks together."""
    temp = folder / f"{state.tag}{TEMP}"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temp)
        # Made of an earlier checkpoint of this step, before a rewind: `load` would take it for this one's.
        _remove(folder / f"{state.tag}{UNIVERSAL}")
    ranks.barrier()
    # All ranks wait above until a killed save's files are removed, and below until every rank has written its own.
    engine.save(folder, temp.name)
    ranks.barrier()
    if ranks.is_first:
        _commit(folder, temp, state)
        _sweep(folder, state, keep_last)
    ranks.barrier()


def load(folder: Path, engine: "Engine", state: CheckpointState, ranks: "Ranks") -> None:
    """Restores the engine at `state`; an engine that `needs_universal` must have been created as such."""
    tag = state.tag
    if needs_universal(state, ranks.num_ranks):
        tag += UNIVERSAL
        if ranks.is_first and not (folder / tag).exists():
            temp = folder / f"{tag}{TEMP}"
            _remove(temp)
            from student_train.runtime.engine import make_universal

            # Converted under a temporary name: a kill must not leave half a state under the name of a whole one.
            make_universal(folder / state.tag, temp)
            temp.replace(folder / tag)
        ranks.barrier()
    engine.load(folder, tag)


def needs_universal(state: CheckpointState | None, num_ranks: int) -> bool:
    """Whether the state must be converted first: ZeRO's shards are cut for one number of ranks."""
    return state is not None and state.zero_stage > 0 and state.num_ranks != num_ranks


def _commit(folder: Path, temp: Path, state: CheckpointState) -> None:
    write_text_atomic(temp / STATE, state.model_dump_json(indent=2) + "\n")
    for path in temp.rglob("*"):
        if path.is_file():
            sync_file(path)
    target = folder / state.tag
    # A kill between this rename and the marker leaves the folder of this step, which the resumed run saves again.
    _remove(target)
    temp.replace(target)
    # Before the marker moves: it must not name a folder whose rename a power cut can undo.
    sync_folder(folder)
    write_text_atomic(folder / LATEST, state.model_dump_json(indent=2) + "\n")


def _sweep(folder: Path, state: CheckpointState, keep_last: int) -> None:
    # By time: names of stages need not sort in the order of stages.
    whole = sorted((folder / tag / STATE for tag in tags(folder)), key=lambda path: path.stat().st_mtime_ns)
    keep = {path.parent.name for path in whole[-keep_last:]} | {state.tag}
    if state.best is not None:
        keep.add(state.best.tag)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in keep:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes state.json first, so that a half-removed checkpoint is not taken for whole."""
    if not path.exists():
        return
    (path / STATE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read(path: Path) -> CheckpointState:
    try:
        return CheckpointState.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not a checkpoint's state: {first_line(error)}") from error
