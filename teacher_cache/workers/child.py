"""One worker of a fleet: a command of ours in a child process, watched through small messages and stopped by SIGINT.

Runs on the node that does the work. In: a job, which travels to every node. Out: reports, each with what is new since
the last one. The child's own process handling, signals and logs stay as they are when it is started by hand.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO

from stillroom.config import Json
from stillroom.errors import ConfigError, StillroomError, one_line
from stillroom.program import PARENT_VARIABLE, REPORT_VARIABLE
from stillroom.storage.paths import create_file, location

TAIL_LINES = 20
MAX_NOTES = 100
DRAIN_S = 2.0
"""How long the last lines of a child may take after its end."""


@dataclass(frozen=True)
class Job:
    """What every worker of a fleet does: `python ARGUMENTS`, in `folder` where the node has it.

    Arguments whose places `files` has become paths of files with that text, so that nodes need no common folder for the
    configuration. `environ` is for variables that a node does not set. `name` is unique to the fleet.
    """

    name: str
    arguments: tuple[str, ...]
    cache: str
    files: Mapping[int, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    folder: str = field(default_factory=os.getcwd)
    version: str = field(default_factory=lambda: version("stillroom"))


@dataclass(frozen=True)
class Report:
    """A worker as of now. `notes` are new; the rest is the latest. `is_first` is true on one node of a shared cache."""

    host: str
    pid: int
    is_first: bool
    exit_code: int | None
    progress: Json | None
    notes: list[str]
    result: Json | None
    tail: list[str]


def refused(error: Exception) -> Report:
    """The report of a worker that could not start its child."""
    code = error.exit_code if isinstance(error, StillroomError) else StillroomError.exit_code
    return Report(socket.gethostname(), os.getpid(), False, code, None, [one_line(error)], None, [])


class Child:
    """The job's process, from the start on."""

    def __init__(self, job: Job) -> None:
        """Raises ConfigError if this node has another version, OSError if the cache cannot be written."""
        here = version("stillroom")
        if here != job.version:
            raise ConfigError(
                f"{socket.gethostname()} has stillroom {here}, the command runs {job.version}: install the same version"
            )
        # Of nodes that see the same cache one creates this file. A second one that does has a cache of its own.
        self._mark = location(job.cache) / "runs" / f"{job.name}.fleet"
        self._is_first = create_file(self._mark, socket.gethostname().encode())
        self._progress: Json | None = None
        self._result: Json | None = None
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._was_stopped = False
        reading, writing = os.pipe()
        with contextlib.ExitStack() as files:
            # The child alone may hold the writing end, or reading would not end with it.
            files.callback(os.close, writing)
            texts = {place: files.enter_context(_file_of(text)) for place, text in job.files.items()}
            named = [f"/dev/fd/{texts[place]}" if place in texts else one for place, one in enumerate(job.arguments)]
            self._process = subprocess.Popen(
                [sys.executable, *named],
                env={**job.environ, **os.environ, PARENT_VARIABLE: str(os.getpid()), REPORT_VARIABLE: str(writing)},
                cwd=job.folder if Path(job.folder).is_dir() else tempfile.gettempdir(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[writing, *texts.values()],
                # Ctrl-C in the terminal of a local fleet reaches it through `stop` only, once.
                start_new_session=True,
            )
        assert self._process.stdout is not None
        said = os.fdopen(reading, "rb")
        self._threads = [_reader(self._process.stdout, self._on_output), _reader(said, self._on_said)]

    def report(self) -> Report:
        """What is new, and the exit code once everything that the child said is in a report."""
        code = self._process.poll()
        if code is not None:
            for thread in self._threads:
                thread.join(DRAIN_S)
        # By their number and not until there are none: the reading thread may add more meanwhile.
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        host, pid = socket.gethostname(), self._process.pid
        return Report(host, pid, self._is_first, code, self._progress, notes, self._result, list(self._tail))

    def stop(self) -> None:
        """Has it save and end, by one SIGINT however often this is called: a second one would not save."""
        if not self._was_stopped:
            self._was_stopped = True
            self._process.send_signal(signal.SIGINT)

    def remove_mark(self) -> None:
        """Removes the file by which nodes know that they see the same cache, at the fleet's end."""
        self._mark.unlink(missing_ok=True)

    def _on_output(self, line: bytes) -> None:
        # The log of the process that watches keeps all of it.
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        self._tail.append(line.decode("utf-8", "replace").rstrip())

    def _on_said(self, line: bytes) -> None:
        said = json.loads(line)
        self._progress = said.get("progress", self._progress)
        self._result = said.get("result", self._result)
        if "note" in said:
            self._notes.append(said["note"])


@contextlib.contextmanager
def _file_of(text: str) -> Iterator[int]:
    """The descriptor of a file without a name, which no crash leaves behind."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        # Flushes, too.
        file.seek(0)
        yield file.fileno()


def _reader(stream: IO[bytes], on_line: Callable[[bytes], None]) -> threading.Thread:
    def read() -> None:
        with stream:
            for line in stream:
                on_line(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread
