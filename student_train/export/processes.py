"""Programs that run for minutes in environments of their own: what they print is kept, and that they run is noted."""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stillroom.log import format_duration, note, one_line

NOTE_EVERY_S = 10.0
MAX_SHOWN = 400


class Ended(NamedTuple):
    """A program's exit code, and the lines that it printed."""

    code: int
    lines: list[str]

    def why(self) -> str:
        """Its last line, which of a traceback is the error."""
        return one_line(self.lines[-1])[:MAX_SHOWN] if self.lines else f"exit code {self.code}"


def run_noting(command: Sequence[str], environ: Mapping[str, str], doing: str) -> Ended:
    """Runs `command` to its end, and notes every NOTE_EVERY_S what it is `doing`; killed if this process is stopped."""
    started_s = time.monotonic()
    with (
        # A pipe would fill up: nobody reads it meanwhile.
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ) as process,
    ):
        try:
            while process.poll() is None:
                try:
                    process.wait(NOTE_EVERY_S)
                except subprocess.TimeoutExpired:
                    note(f"{doing}, {format_duration(time.monotonic() - started_s)} so far")
        except BaseException:
            process.kill()
            # Popen's own exit does not wait after a KeyboardInterrupt.
            process.wait()
            raise
        log.seek(0)
        return Ended(process.returncode, [line for line in log.read().splitlines() if line.strip()])
