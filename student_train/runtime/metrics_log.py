"""metrics.jsonl: one line an optimizer step, and the same numbers for TensorBoard on request."""

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from stillroom.errors import ConfigError


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `step` counts the steps of the stage, this one included."""

    stage: str
    stage_number: int
    step: int
    epoch: int
    loss: float
    """Weighted mean over the global batch's loss tokens, loss weights included."""
    parts: dict[str, float]
    """Mean of each loss by name, nats per token, before its weight."""
    weights: dict[str, float]
    """Weight of each loss at this step."""
    temperature: float
    """Temperature of the divergences."""
    learning_rate: float
    grad_norm: float | None
    """Norm of the whole gradient before clipping; None for a skipped step."""
    skipped: bool
    """Whether the gradient was not finite and nothing was learnt; float16's loss scale is lower afterwards."""
    num_tokens: int
    """Tokens that the model read, over all ranks."""
    num_loss_tokens: int
    tokens_per_s: float
    stall_frac: float
    """Share of the step's time that the slowest rank waited for data."""
    memory_gib: float
    """Peak so far on any rank: allocated GPU memory, or resident memory on a CPU."""
    step_s: float
    time_s: float
    """Seconds of optimizer steps since the run began, over all resumptions."""
    adversarial_rise: float | None = None
    """How much shifts raised the loss of the packs that they disturbed, nats per token; None where there were none."""

    def notes(self, precision: str) -> dict[str, str]:
        """For the progress line."""
        parts = {short_name(name): f"{value:.4f}" for name, value in self.parts.items()}
        return {
            "loss": f"{self.loss:.4f}",
            **(parts if len(parts) > 1 else {}),
            **({"tau": f"{self.temperature:g}"} if self.temperature != 1.0 else {}),
            **({"rise": f"{self.adversarial_rise:+.4f}"} if self.adversarial_rise is not None else {}),
            "lr": f"{self.learning_rate:.2e}",
            "stall": f"{100 * self.stall_frac:.0f}%",
            "mem": f"{self.memory_gib:.1f} GiB",
            **({"skipped:": why_skipped(precision)} if self.skipped else {}),
        }


class MetricsLog:
    """Appends records; a context manager."""

    def __init__(self, path: Path, tensorboard: Path | None, steps_before: int, steps_done: int) -> None:
        """`tensorboard` is a folder or None. `steps_before` counts the steps of earlier stages, `steps_done` those of
        this stage that a resumed run does not repeat. Raises ConfigError if TensorBoard is missing.
        """
        self._steps_before = steps_before
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None if tensorboard is None else _board(tensorboard, steps_before + steps_done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: StepRecord) -> None:
        """Appends one line, visible at once."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        # Not fsync'd: readers drop a last line that a kill cut short.
        self._file.flush()
        if self._board is not None:
            self._write_board(record)

    def write_eval(self, step: int, values: dict[str, float | int | None]) -> None:
        """Held-out numbers for TensorBoard; eval.json has them too."""
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
        if record.adversarial_rise is not None:
            scalars["train/adversarial_rise"] = record.adversarial_rise
        for name, value in scalars.items():
            self._board.add_scalar(name, value, self._steps_before + record.step)


def why_skipped(precision: str) -> str:
    """Why an optimizer step is skipped: only float16 scales its loss until gradients overflow."""
    return "float16 overflowed" if precision == "float16" else "the gradient was not finite"


def short_name(loss: str) -> str:
    """A loss's name for the progress line; no two losses share one."""
    return {"forward_kl": "kl", "cross_entropy": "ce"}.get(loss, loss)


def require_tensorboard() -> None:
    """Raises ConfigError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard: true needs the package tensorboard: pip install tensorboard, or set it to false"
        )


def _board(folder: Path, last_step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    # Hides what a killed run wrote after its last checkpoint.
    return SummaryWriter(str(folder), purge_step=last_step + 1)
