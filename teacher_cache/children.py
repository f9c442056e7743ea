"""Child processes that die with this one, however it dies.

vLLM's engine core waits for its next request for ever when the program that started it is killed: with the GPU's
memory in its hands. Linux can send a child a signal when its parent thread ends (prctl PR_SET_PDEATHSIG), if the
child asks for it: forked children through a fork hook, spawned ones through the first statement that their
interpreter runs.
"""

import ctypes
import multiprocessing.spawn
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1

_state: dict[str, int] = {}


def die_with_parent() -> None:
    """From now on, processes that multiprocessing starts from this thread are killed when it ends. Linux only.

    May be called twice. Elsewhere than on Linux it does nothing, and a killed program may leave its engine behind.
    """
    if not sys.platform.startswith("linux") or _state:
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def before_fork() -> None:
        _state["parent"] = os.getpid()

    def after_fork() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _state["parent"]:
            # The parent was killed between the fork and the request above.
            os.kill(os.getpid(), signal.SIGKILL)

    _state["parent"] = os.getpid()
    os.register_at_fork(before=before_fork, after_in_child=after_fork)
    command_line = multiprocessing.spawn.get_command_line

    def with_prologue(**arguments: Any) -> list[str]:
        # [..., "-c", program, "--multiprocessing-fork"]: spawned interpreters run the program below first.
        line = command_line(**arguments)
        place = line.index("-c") + 1 if "-c" in line else None
        if place is not None:
            line[place] = _PROLOGUE.format(option=PR_SET_PDEATHSIG, parent=os.getpid()) + line[place]
        return line

    multiprocessing.spawn.get_command_line = with_prologue


_PROLOGUE = (
    "import ctypes, os, signal; ctypes.CDLL(None).prctl({option}, signal.SIGKILL); "
    "os.getppid() == {parent} or os.kill(os.getpid(), signal.SIGKILL); "
)
