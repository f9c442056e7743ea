"""What the two programs' command lines have in common: the version, exit codes, results, and how a program ends.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).

A polite end: the first Ctrl-C or SIGTERM asks for it, the second one stops at once.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from stillroom.errors import StillroomError
from stillroom.log import note

if TYPE_CHECKING:
    from stillroom.config import Json


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


SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = b"\nstopping: what is at hand is finished and saved first (again to stop at once)\n"
STDERR = 2
TOGETHER_S = 1.0
"""Signals so close are one: a scheduler signals all processes of a job, and a launcher among them passes it on."""


class StopRequest:
    """While entered, turns the first signal into `is_set`; the second raises KeyboardInterrupt. Main thread only.

    With `at_once` the first one raises already, until `finish_first` says that there is something to finish; whatever
    else goes wrong on the way out (a library left half imported) is then a KeyboardInterrupt too.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.is_set = False
        self._at_once = at_once
        self._asked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._on_signal) for one in SIGNALS}
            # A program may be started with them blocked, so that none arrives before this can answer it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        if self._at_once and self.is_set and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def finish_first(self) -> None:
        """From here on the first signal lets what is at hand be finished."""
        self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_set, now_s = self.is_set, time.monotonic()
        if was_set and now_s - self._asked_s < TOGETHER_S:
            return
        self.is_set, self._asked_s = True, now_s
        if was_set or self._at_once:
            raise KeyboardInterrupt
        try:
            # Not print: the signal may have come in the middle of one, which Python refuses to enter again.
            os.write(STDERR, ANNOUNCEMENT)
        except OSError:
            # Nobody reads any more: that is no reason not to save.
            return
