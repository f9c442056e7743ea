"""Trains students from a cache under DeepSpeed ZeRO, without the teacher.

    import student_train

    student_train.train("student.yaml")
    student_train.evaluate("student.yaml")
    student_train.export("student.yaml", "export")

Each function does what the command of the same name does, in this process, and returns its result as a dictionary.
For a training loop of your own see student_train.data and student_train.losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Nothing heavy is imported before a function is called: `import student_train` is also the first step of `--help`.
if TYPE_CHECKING:
    from student_train.config.run import TrainConfig

__all__ = ["evaluate", "export", "train"]


def train(config: str | Path | TrainConfig, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains on one rank, or resumes the run from its last checkpoint.

    `config` is a YAML file, to which `overrides` such as "stages.0.epochs=2" apply, or a validated configuration.
    Ctrl-C saves a checkpoint and returns; a second one stops at once. Raises what the command reports as an error.
    """
    loaded = _load(config, overrides)
    from stillroom.program import StopRequest
    from student_train.runtime.ranks import joined_ranks
    from student_train.training.loop import train as train_run

    with StopRequest() as stop, joined_ranks() as ranks:
        return train_run(loaded, ranks, stop)


def evaluate(
    config: str | Path | TrainConfig,
    *,
    where: str | None = None,
    checkpoint: str = "last",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Compares a checkpoint with its teacher on chains it was not trained on.

    `where` is a SQL condition over `chains` (default: split = 'heldout'); `checkpoint` is last, best, initial (the
    student before training) or a checkpoint's name.
    """
    from student_train.assess.evaluating import evaluate_config

    return evaluate_config(_load(config, overrides), where, checkpoint)


def export(
    config: str | Path | TrainConfig,
    out: str | Path,
    *,
    checkpoint: str = "last",
    adapter_only: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a checkpoint to the folder `out` in Hugging Face format; `adapter_only` writes a LoRA adapter unmerged."""
    from student_train.exporting import export as export_checkpoint
    from student_train.runtime.checkpoint import find_state
    from student_train.runtime.run_folder import RunFolder

    loaded = _load(config, overrides)
    state = find_state(RunFolder(loaded.run).checkpoints, checkpoint)
    return export_checkpoint(loaded, state, Path(out), adapter_only=adapter_only, tokenizer=None)


def _load(config: str | Path | TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    from stillroom.config import load_config
    from stillroom.errors import ConfigError
    from student_train.config.run import TrainConfig

    if not isinstance(config, TrainConfig):
        return load_config(Path(config), overrides, TrainConfig)
    if overrides:
        raise ConfigError("overrides apply to a YAML file: change the configuration with config.updated(...) instead")
    return config
