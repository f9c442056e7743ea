"""`teacher-cache`: generate a teacher's chains and distributions once, store them, and query them.

Commands import what they need when they run, so that `--help` and `sql` start fast.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.program import FAILED, AsJson, new_program, print_result, run_and_leave, run_program
from teacher_cache.commands.inspect import SqlCommand, files, report, show, sql, stats
from teacher_cache.commands.judge import judge
from teacher_cache.commands.maintain import copy, gc, verify
from teacher_cache.commands.options import Overrides
from teacher_cache.commands.run import augment, build, features, plan, rounds, score

app = new_program(
    "teacher-cache", "Run a teacher once and store its chains with the probability distribution of every token."
)
# In the order in which --help lists them.
FIRST: tuple[Callable[..., None], ...] = (plan, build, augment, score, features, judge, rounds)
LAST: tuple[Callable[..., None], ...] = (files, show, stats, report, verify, copy, gc)
for command in FIRST:
    app.command()(command)


@app.command()
def doctor(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check this configuration's teacher and servers.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check what is installed. Lists what is missing and the command that installs it."""
    from stillroom.doctor import report_lines
    from teacher_cache.config import load_run_config
    from teacher_cache.doctor import diagnose

    if config_path is None and overrides:
        raise ConfigError("--set has no effect without a CONFIG: pass one, or remove --set")
    result = diagnose(None if config_path is None else load_run_config(config_path, overrides or ()))
    print_result(result, report_lines(result), as_json)
    if not result["ok"]:
        raise typer.Exit(FAILED)


app.command(cls=SqlCommand)(sql)
for command in LAST:
    app.command()(command)


def program() -> None:
    """Entry point."""
    run_and_leave(main)


def main() -> None:
    """The program, for callers with something left to do."""
    # torch reads it when it is loaded, which tokenizers do long before the engine starts.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_program(app, "teacher-cache", ("build", "augment", "score", "features", "rounds", "copy"))


if __name__ == "__main__":
    program()
