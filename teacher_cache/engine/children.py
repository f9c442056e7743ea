"""Child processes that die with this one, however it dies.

vLLM's engine core waits for its next request for ever when the program that started it is killed, with the GPU's
memory in its hands. Linux can send a child a signal when its parent thread ends (prctl PR_SET_PDEATHSIG), if the child
asks for it: forked children ask through a fork hook, spawned ones through the first statement that their interpreter
runs. Grandchildren inherit the manner. Imports nothing but the standard library: spawned interpreters run this file.
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
    _state["parent"] = os.getpid()

    def before_fork() -> None:
        _state["parent"] = os.getpid()

    os.register_at_fork(before=before_fork, after_in_child=lambda: _follow(_state["parent"]))
    command_line = multiprocessing.spawn.get_command_line

    def with_prologue(**arguments: Any) -> list[str]:
        # [python, ..., "-c", program, "--multiprocessing-fork"]: the interpreter follows us before it does its work.
        line = command_line(**arguments)
        program = line.index("-c") + 1
        call = f"__import__('runpy').run_path({__file__!r})['follow_parent']({os.getpid()})"
        line[program] = f"{call}; {line[program]}"
        return line

    multiprocessing.spawn.get_command_line = with_prologue


def follow_parent(parent: int) -> None:
    """Called in a spawned process: dies with `parent`, and so will its own children."""
    _follow(parent)
    die_with_parent()


def _follow(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # The parent was killed before the request above.
        os.kill(os.getpid(), signal.SIGKILL)
