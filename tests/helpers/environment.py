"""What the processes that tests start inherit: this checkout's packages, and one thread each."""

import os
import signal
from pathlib import Path

from tests.helpers import ROOT


def set_environment() -> None:
    """For this process, before torch is imported, and all that it starts."""
    # Two threads on each of two workers would be slower, and give other last bits than one.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The environment's own installation may point to another checkout.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "shared")])
    # A shell that starts the tests in the background lets them, and all below them, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def python_path(*folders: Path) -> dict[str, str]:
    """The inherited PYTHONPATH with more folders."""
    return {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *map(str, folders)])}
