"""Talks to a script of `workers/` in its own process and environment: a JSON request a line, a JSON answer a line."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from stillroom.config import Json
from stillroom.errors import StillroomError
from stillroom.log import format_duration, note, one_line
from stillroom.schema.records import Float32, Int32
from student_train.export.environments import python_of
from student_train.export.formats import RUNTIMES

WORKERS = Path(__file__).parent / "workers"
END_S = 20.0
NOTE_EVERY_S = 10.0


class Worker:
    """A running script, as a context manager. Requests raise StillroomError with what the script answered. Messages
    begin with what it is `doing`.
    """

    def __init__(
        self, script: str, environment: str, threads: int | None = None, temp_folder: str | None = None
    ) -> None:
        """`temp_folder` takes its temporary files, which a process that is killed leaves behind."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed on exit
        # Warnings of foreign tools are theirs; their progress bars would hide ours.
        environ = {**os.environ, "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        # Packages on our path would come before those of their environment.
        environ.pop("PYTHONPATH", None)
        if threads is not None:
            environ["OMP_NUM_THREADS"] = str(threads)
        if temp_folder is not None:
            environ["TMPDIR"] = temp_folder
        answers, their_end = os.pipe()
        self._answers = os.fdopen(answers, encoding="utf-8")
        try:
            self._process = subprocess.Popen(
                [str(python_of(environment)), str(WORKERS / f"{script}.py"), str(their_end)],
                stdin=subprocess.PIPE,
                # Answers have a pipe of their own: some libraries print when they are imported.
                stdout=self._log,
                stderr=self._log,
                pass_fds=(their_end,),
                env=environ,
                text=True,
                encoding="utf-8",
            )
        finally:
            # While this end is open here, reading does not end when the process does.
            os.close(their_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            # After an error nobody waits for a foreign tool to finish by itself.
            self._process.wait(END_S if error is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def ask(self, op: str, doing: str, **fields: Any) -> Any:
        """The answer to one request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
            started_s = time.monotonic()
            while not select.select([self._answers], [], [], NOTE_EVERY_S)[0]:
                note(f"{doing}: {format_duration(time.monotonic() - started_s)} so far")
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        # A line without its end was cut off when the process ended.
        if not line.endswith("\n"):
            raise StillroomError(f"{doing}: its process ended: {self._last_line()}")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise StillroomError(f"{doing} failed: {answer['error']}")
        return answer["ok"]

    def peak_memory_bytes(self) -> int | None:
        """Largest resident memory of the process and of those it started; None where there is no /proc."""
        if not Path("/proc/self/status").exists():
            return None
        return sum(_peak_bytes(pid) for pid in _with_children(self._process.pid))

    def _last_line(self) -> str:
        code = self._process.wait()
        if code < 0:
            # Its last line then says nothing about why.
            name = signal.Signals(-code).name
            return f"killed by {name}" + (": it may need more memory than there is" if name == "SIGKILL" else "")
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return one_line(lines[-1])[:400] if lines else f"exit code {code}"


class RuntimeWorker(Worker):
    """A folder loaded in its runtime, ready for token ids."""

    def __init__(self, runtime: str, folder: Path, threads: int | None, *, is_quick: bool) -> None:
        """`threads` None leaves the number to the runtime; `is_quick` starts soon and runs slower (vLLM)."""
        self.runtime, self.folder = runtime, folder
        super().__init__(RUNTIMES[runtime].script, RUNTIMES[runtime].environment, threads)
        try:
            doing = f"loading the model in {runtime}"
            loaded = self.ask("load", doing, folder=str(folder.absolute()), threads=threads, is_quick=is_quick)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        self.load_s: float = loaded["seconds"]
        self.versions: dict[str, str] = loaded["versions"]

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> "Scores":
        """Predictions after each position."""
        with tempfile.TemporaryDirectory(prefix="student-train-scores-") as temp:
            doing = f"scoring chains in {self.runtime}"
            paths = self.ask("scores", doing, ids=list(ids), positions=list(positions), out=f"{temp}/scores")
            arrays = {name: np.load(path) for name, path in paths.items()}
        found = Scores(arrays.get("logits"), arrays.get("ids"), arrays.get("logprobs"))
        if found.num_rows != len(positions):
            raise StillroomError(f"{self.runtime} gave {found.num_rows} rows for {len(positions)} positions")
        return found

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[float, list[list[int]]]:
        """Seconds and tokens: greedy, not ended by an end of sequence."""
        doing = f"generating in {self.runtime}"
        answer = self.ask("generate", doing, prompts=[list(ids) for ids in prompts], num_new=num_new)
        return answer["seconds"], answer["tokens"]


class Scores:
    """Predictions for N positions: logits [N, V], or the K most likely ids [N, K] with log probabilities (nats)."""

    def __init__(self, logits_NV: Float32 | None, ids_NK: Int32 | None, logprobs_NK: Float32 | None) -> None:
        assert (logits_NV is None) == (ids_NK is not None) == (logprobs_NK is not None)
        self.logits_NV, self.ids_NK, self.logprobs_NK = logits_NV, ids_NK, logprobs_NK

    @property
    def num_rows(self) -> int:
        """N."""
        rows = self.logits_NV if self.logits_NV is not None else self.ids_NK
        assert rows is not None
        return len(rows)

    def rows(self, first: int, stop: int) -> "Scores":
        """Those of positions first..stop-1."""
        if self.logits_NV is not None:
            return Scores(self.logits_NV[first:stop], None, None)
        assert self.ids_NK is not None
        assert self.logprobs_NK is not None
        return Scores(None, self.ids_NK[first:stop], self.logprobs_NK[first:stop])


def _with_children(pid: int) -> list[int]:
    found = [pid]
    # The list grows while it is walked, so children of children are found too.
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            # Threads end while they are listed.
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        # Ended since it was listed.
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
