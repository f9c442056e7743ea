"""What the command lines of both programs share: version, results, exit codes, and a clean stop.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed). The first Ctrl-C or SIGTERM requests a
stop, the second one stops immediately.
"""

import atexit
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

import typer

from stillroom.children import follow_parent
from stillroom.errors import StillroomError, one_line
from stillroom.log import note, report, report_to

if TYPE_CHECKING:
    from stillroom.config import Json

FAILED, DAMAGED, INTERRUPTED = 1, 3, 130
STDOUT = 1
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = b"\nStopping: finishing and saving. Press Ctrl-C again to stop immediately.\n"
STDERR = 2
PARENT_VARIABLE = "STILLROOM_PARENT"
"""In programs that another one of ours has started: its process id."""
REPORT_VARIABLE = "STILLROOM_REPORT"
"""In programs that another one of ours watches: a file descriptor for progress, notes and the result."""
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": free some space and run the same command again"),
    errno.EROFS: ": use a folder that you can write to",
    **dict.fromkeys((errno.EACCES, errno.EPERM), ": check your rights there, or use another folder"),
}
"""What to do about an error of the system."""
TOGETHER_S = 1.0
"""Signals this close count once: a scheduler signals all processes of a job, and a launcher among them forwards it."""


def new_program(name: str, text: str) -> typer.Typer:
    """A program without commands yet, with `--version` and shell completion."""
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
        show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        if show_version:
            print(version("stillroom"))
            raise typer.Exit

    return app


def obey_parent() -> None:
    """What a program does first where another one of ours has started it: end with that one, and report to it."""
    # pop: programs that this one starts have another parent.
    if (parent := os.environ.pop(PARENT_VARIABLE, None)) is not None:
        follow_parent(int(parent))
    if (descriptor := os.environ.pop(REPORT_VARIABLE, None)) is not None:
        report_to(int(descriptor))


def print_result(result: "Json", lines: list[str], as_json: bool) -> None:
    """A command's result on stdout: one JSON object for programs, or lines for people."""
    # To the program that started this one, which must not parse what is printed for people.
    report(result=result)
    print(json.dumps(result) if as_json else "\n".join(lines), flush=True)


def run_program(app: typer.Typer, name: str, resumable: Sequence[str]) -> None:
    """Runs a command: one line for a mistake or what the system refuses, the right exit code; for an interrupted one
    of the `resumable` how to resume it.
    """
    obey_parent()
    try:
        app(prog_name=name)
    except StillroomError as error:
        note(f"{name}: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        # A full disk, or a file that may not be written: the system says it best.
        where, remedy = f"{error.filename}: " if error.filename else "", REMEDIES.get(error.errno or 0, "")
        note(f"{name}: {where}{error.strerror or one_line(error)}{remedy}")
        sys.exit(FAILED)
    except SystemExit as end:
        _leave_quietly(end)
        if end.code == INTERRUPTED:
            is_resumable = sys.argv[1:2] and sys.argv[1] in resumable
            note("Interrupted." + (f" Resume with: {shlex.join([name, *sys.argv[1:]])}" if is_resumable else ""))
        raise


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Runs a program whose process ends with it, and leaves without taking its libraries apart.

    Python's own end visits every object of torch and vLLM: 5 CPU seconds, and most of a minute on a busy machine.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    # Python's own order: wait for threads and what their pools still hold, then temporary folders, processes, logs.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # A stream is None where its descriptor was closed: `>&-`.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or 128 + signal.SIGPIPE
        except OSError as error:
            code = code or FAILED
            # A full disk: the result is lost.
            with contextlib.suppress(OSError):
                note(f"{stream.name} cannot be written: {error.strerror}")
    os._exit(code)


class StopRequest:
    """While entered, the first signal sets `is_set` and the second raises KeyboardInterrupt. Main thread only.

    With `at_once` the first one raises too, until `finish_first` is called because there is something to save. Other
    errors on the way out (from a half-imported library) then also become KeyboardInterrupt.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.is_set = False
        self._at_once = at_once
        self._asked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._on_signal) for one in SIGNALS}
            # A launcher may start programs with signals blocked, so that none arrives before this handler exists.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for one, handler in self._before.items():
            # Restored, so that a stop request ends with its block and an outer one is in charge again.
            signal.signal(one, handler)
        self._before = {}
        if self._at_once and self.is_set and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def finish_first(self) -> None:
        """From now on the first signal lets current work finish."""
        self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_set, now_s = self.is_set, time.monotonic()
        # A scheduler signals every process of a job and the launcher forwards its own, so a rank gets the same signal
        # twice within milliseconds. As a second request it would lose the steps since the last checkpoint.
        if was_set and now_s - self._asked_s < TOGETHER_S:
            return
        self.is_set, self._asked_s = True, now_s
        if was_set or self._at_once:
            raise KeyboardInterrupt
        try:
            # Not print: the signal may interrupt one, and Python's buffered writer is not reentrant.
            os.write(STDERR, ANNOUNCEMENT)
        except OSError:
            # stderr is closed, which must not prevent saving.
            return


def _leave_quietly(end: SystemExit) -> None:
    """Ends silently, as other programs do, if `end` was caused by a broken pipe: `stats CACHE | head`."""
    if isinstance(end.__context__, BrokenPipeError):
        # Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        sys.exit(128 + signal.SIGPIPE)
