"""How a worker answers: one JSON request a line on stdin, one JSON answer a line on the pipe that its argument names.

The scripts of this folder run in environments that lack the project, so they import nothing of it. `serve` calls the
handler that a request names and answers `{"ok": ...}`, or `{"error": "one line"}` and continues. Arrays travel as
.npy files whose paths the request names.
"""

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Handler = Callable[..., Any]


class Runtime(Protocol):
    """A model that a runtime has loaded. Generation is greedy and ignores the end of sequence."""

    def scores(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, Array]:
        """What the model predicts after each position, N rows: `logits` [N, V], or the K most likely tokens in order
        as `ids` [N, K] and `logprobs` [N, K] in nats.
        """

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        """`num_new` tokens for each prompt; prompts are equally long."""


def serve(handlers: dict[str, Handler]) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            answer = {"ok": handlers[request.pop("op")](**request)}
        except Exception as error:  # noqa: BLE001  whatever a library raises is the answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Python's own end would visit every object of torch, for seconds that an export or a comparison waits.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def serve_runtime(open_runtime: Callable[[Path, int | None, bool], Runtime], versions: Mapping[str, str]) -> None:
    """Serves `load`, `scores` and `generate` of a runtime, which `open_runtime` makes from a folder, a number of
    threads (None: its own choice) and whether it should start quickly rather than run fast.
    """
    loaded: list[Runtime] = []

    def load(folder: str, threads: int | None, is_quick: bool) -> dict[str, Any]:
        started_s = time.perf_counter()
        loaded.append(open_runtime(Path(folder), threads, is_quick))
        return {"seconds": time.perf_counter() - started_s, "versions": dict(versions)}

    def scores(ids: Sequence[int], positions: Sequence[int], out: str) -> dict[str, str]:
        found = loaded[0].scores(ids, positions)
        paths = {name: f"{out}.{name}.npy" for name in found}
        for name, array in found.items():
            np.save(paths[name], array)
        return paths

    def generate(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, Any]:
        started_s = time.perf_counter()
        tokens = loaded[0].generate(prompts, num_new)
        return {"seconds": time.perf_counter() - started_s, "tokens": tokens}

    serve({"load": load, "scores": scores, "generate": generate})
