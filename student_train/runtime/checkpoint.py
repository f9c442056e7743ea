"""Checkpoints that commit whole: what a run needs to go on as if it had never stopped.

    RUN/checkpoints/<stage>-<step>/      DeepSpeed's files of all ranks, and state.json
    RUN/checkpoints/latest.json          names the last whole one; written last, by one rename

DeepSpeed writes into `<tag>.tmp`; when all ranks are done the first one adds state.json, flushes, renames the folder
and then moves the marker. So a kill at any time leaves the marker on a checkpoint that is whole, and what else lies
there is swept by the next save. Dropout needs no saved random state: every step seeds its generators by (seed, stage,
step, rank).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import CorruptError, DataError
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
    """Hash of the held-out selection that it was measured on."""


class HeldoutProgress(_Record):
    """How far the held-out loss has come in a stage, for weights that follow it."""

    selection: str
    """Hash of the held-out selection."""
    start: float
    """When the stage began, or at its first evaluation."""
    now: float

    @property
    def remaining(self) -> float:
        """What is left of the loss, 1 where it has not fallen."""
        return min(1.0, self.now / self.start) if self.start > 0 else 1.0


class CheckpointState(_Record):
    """Where a run stands after `step` optimizer steps of stage number `stage`."""

    stage: int
    stage_name: str
    step: int
    num_steps: int
    num_ranks: int
    zero_stage: int
    stream: dict[str, Any]
    num_loss_tokens: int
    """Learnt from so far, over all stages."""
    train_s: float
    """Seconds of optimizer steps so far, over all stages."""
    best: Best | None = None
    heldout: HeldoutProgress | None = None

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.stage_name}-{self.step:06d}"

    @property
    def stage_is_done(self) -> bool:
        return self.step >= self.num_steps


def latest_state(folder: Path) -> CheckpointState | None:
    """State of the last whole checkpoint below `folder`; None before the first. Raises CorruptError."""
    path = folder / LATEST
    return _read(path) if path.exists() else None


def find_state(folder: Path, which: str) -> CheckpointState:
    """State of the checkpoint `last`, `best` or named by its tag. Raises DataError naming those that there are."""
    latest = latest_state(folder)
    if latest is None:
        raise DataError(f"{folder} holds no checkpoint yet: train first with `student-train run`")
    if which == "last":
        return latest
    tag = which
    if which == "best":
        if latest.best is None:
            raise DataError(f"{folder} has no best checkpoint: the run has not been evaluated (eval in its config)")
        tag = latest.best.tag
    if not (folder / tag / STATE).exists():
        raise DataError(f"{folder} has no checkpoint {tag!r}: there are {', '.join(tags(folder))}, last and best")
    return _read(folder / tag / STATE)


def tags(folder: Path) -> list[str]:
    """Names of the whole checkpoints below `folder`."""
    return sorted(path.parent.name for path in folder.glob(f"*/{STATE}") if path.parent.suffix not in (TEMP, UNIVERSAL))


def save(folder: Path, engine: "Engine", state: CheckpointState, keep_last: int, ranks: "Ranks") -> None:
    """Writes a checkpoint and removes those that are no longer kept; called by all ranks together."""
    temp = folder / f"{state.tag}{TEMP}"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temp)
    ranks.barrier()
    engine.save(folder, temp.name)
    ranks.barrier()
    if ranks.is_first:
        _commit(folder, temp, state)
        _sweep(folder, state, keep_last)
    ranks.barrier()


def load(folder: Path, engine: "Engine", state: CheckpointState, ranks: "Ranks") -> None:
    """Gives the engine back what it had at `state`; `needs_universal` says how the engine must have been made."""
    tag = state.tag
    if needs_universal(state, ranks.num_ranks):
        tag += UNIVERSAL
        if ranks.is_first and not (folder / tag).exists():
            temp = folder / f"{tag}{TEMP}"
            _remove(temp)
            from student_train.runtime.engine import make_universal

            make_universal(folder / state.tag, temp)
            temp.replace(folder / tag)
        ranks.barrier()
    engine.load(folder, tag)


def needs_universal(state: CheckpointState | None, num_ranks: int) -> bool:
    """Whether the state must be made universal first: ZeRO's parts are cut for one number of ranks."""
    return state is not None and state.zero_stage > 0 and state.num_ranks != num_ranks


def _commit(folder: Path, temp: Path, state: CheckpointState) -> None:
    write_text_atomic(temp / STATE, state.model_dump_json(indent=2) + "\n")
    for path in temp.rglob("*"):
        if path.is_file():
            sync_file(path)
    target = folder / state.tag
    _remove(target)
    temp.replace(target)
    sync_folder(folder)
    write_text_atomic(folder / LATEST, state.model_dump_json(indent=2) + "\n")


def _sweep(folder: Path, state: CheckpointState, keep_last: int) -> None:
    whole = sorted((folder / tag / STATE for tag in tags(folder)), key=lambda path: path.stat().st_mtime_ns)
    keep = {path.parent.name for path in whole[-keep_last:]} | {state.tag}
    if state.best is not None:
        keep.add(state.best.tag)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in keep:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a folder so that a half-removed one is not taken for whole."""
    if not path.exists():
        return
    (path / STATE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read(path: Path) -> CheckpointState:
    try:
        return CheckpointState.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not a checkpoint's state: {str(error).splitlines()[0]}") from error
