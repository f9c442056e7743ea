"""What the two programs' command lines have in common: the version, exit codes, results, and how a program ends.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import StillroomError
from shared.log import note

if TYPE_CHECKING:
    from shared.config import Json

FAILED, DAMAGED, INTERRUPTED = 1, 3, 130
STDOUT = 1

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def new_program(name: str, text: str) -> typer.Typer:
    """A program whose commands are still to come; it knows `--version` and shell completion."""
    app = typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def _main(
        show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    ) -> None:
        if show_version:
            print(version("stillroom"))
            raise typer.Exit

    return app


def print_result(result: "Json", lines: list[str], as_json: bool) -> None:
    """A command's result on stdout: one JSON object for programs, or lines for people."""
    print(json.dumps(result) if as_json else "\n".join(lines), flush=True)


def run_program(app: typer.Typer, name: str, resumable: Sequence[str]) -> None:
    """Runs a command: one line for a user's mistake, and the right exit code; `resumable` commands say how to go on."""
    try:
        app(prog_name=name)
    except StillroomError as error:
        note(f"{name}: {error}")
        sys.exit(error.exit_code)
    except SystemExit as end:
        _leave_quietly(end)
        if end.code == INTERRUPTED and sys.argv[1:2] and sys.argv[1] in resumable:
            note(f"interrupted; this goes on: {shlex.join([name, *sys.argv[1:]])}")
        raise


def _leave_quietly(end: SystemExit) -> None:
    """Ends the program as a broken pipe ends any other, without a word, if `end` came of one: `stats CACHE | head`."""
    if isinstance(end.__context__, BrokenPipeError):
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        sys.exit(128 + signal.SIGPIPE)
