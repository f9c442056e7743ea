"""What the commands of `student-train` share: arguments, and a configuration with its overrides."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.errors import ConfigError

if TYPE_CHECKING:
    from student_train.config.run import TrainConfig

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration file.")]
OptionalConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML configuration file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. stages.0.epochs=2. Repeatable."),
]
WhichCheckpoint = Annotated[str, typer.Option(help="last, best, or a checkpoint's name.")]


def load_train_config(path: Path, overrides: list[str] | None) -> "TrainConfig":
    """Raises ConfigError."""
    from stillroom.config import load_config
    from student_train.config.run import TrainConfig

    return load_config(path, overrides or [], TrainConfig)


def refuse_unused(options: Mapping[str, object], why: str) -> None:
    """Raises ConfigError for options that are given (not None) where they have no effect."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        have = "has" if len(given) == 1 else "have"
        raise ConfigError(f"{' and '.join(given)} {have} no effect {why}")
