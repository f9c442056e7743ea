"""One line of metrics.jsonl an optimizer step, and the same numbers for TensorBoard where it is asked for."""

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stillroom.errors import ConfigError


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `step` counts the steps done in the stage, this one included."""

    stage: str
    stage_number: int
    step: int
    epoch: int
    loss: float
    """Mean over the global batch's loss tokens, with all weights in it."""
    parts: dict[str, float]
    """Mean of each loss by name, nats a token, before its weight."""
    weights: dict[str, float]
    """Weight of each loss at this step."""
    temperature: float
    """At which distributions are compared."""
    learning_rate: float
    grad_norm: float | None
    """Norm of the whole gradient before clipping; None where the step was skipped."""
    skipped: bool
    """Whether float16 overflowed, so that nothing was learnt; the loss scale is lower from then on."""
    num_tokens: int
    """Tokens that the model read, over all ranks."""
    num_loss_tokens: int
    tokens_per_s: float
    stall_frac: float
    """Share of the step's time that the slowest rank waited for data."""
    memory_gib: float
    """Largest so far on any rank: allocated GPU memory, or resident memory on a CPU."""
    step_s: float
    time_s: float
    """Seconds of optimizer steps since the run began, over all resumptions."""


class MetricsLog:
    """Appends records; a context manager."""

    def __init__(self, path: Path, tensorboard: Path | None, steps_before: int, steps_done: int) -> None:
        """`tensorboard` is a folder or None; `steps_before` are optimizer steps of earlier stages, `steps_done` those
        of this one that are not taken again.

        Raises ConfigError where TensorBoard is asked for and missing.
        """
        self._steps_before = steps_before
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None if tensorboard is None else _board(tensorboard, steps_before + steps_done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: StepRecord) -> None:
        """Appends one line, visible at once."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        if self._board is not None:
            self._write_board(record)

    def write_eval(self, step: int, values: dict[str, float | int | None]) -> None:
        """Held-out numbers for TensorBoard; they have a file of their own."""
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"heldout/{name}", value, self._steps_before + step)

    def _write_board(self, record: StepRecord) -> None:
        scalars = {
            "train/loss": record.loss,
            **{f"train/{name}": value for name, value in record.parts.items()},
            "train/learning_rate": record.learning_rate,
            "train/temperature": record.temperature,
            "speed/tokens_per_s": record.tokens_per_s,
            "speed/stall_frac": record.stall_frac,
            "memory/max(GiB)": record.memory_gib,
        }
        if record.grad_norm is not None:
            scalars["train/grad_norm"] = record.grad_norm
        for name, value in scalars.items():
            self._board.add_scalar(name, value, self._steps_before + record.step)


def short_name(loss: str) -> str:
    """A loss's name for the progress line; no two losses share one."""
    return {"forward_kl": "kl", "cross_entropy": "ce"}.get(loss, loss)


def require_tensorboard() -> None:
    """Raises ConfigError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard: true needs the package tensorboard: pip install tensorboard, or set it to false"
        )


def _board(folder: Path, last_step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    # What was written of steps after the last checkpoint is taken back.
    return SummaryWriter(str(folder), purge_step=last_step + 1)
