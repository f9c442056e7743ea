"""Makes child processes die with this one, however it dies.

vLLM's engine core waits for requests forever, holding the GPU's memory, if the program that started it is killed.
Linux can signal a child when its parent thread ends (prctl PR_SET_PDEATHSIG) if the child requests it: forked children
do so in a fork hook, spawned ones in the first statement that their interpreter runs, and both pass it on to their own
children. Imports only the standard library, because spawned interpreters run this file.
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
    """Processes that multiprocessing starts from this thread are killed when it ends. May be called twice.

    Does nothing on systems other than Linux, where a killed program may leave its engine running.
    """
    if not sys.platform.startswith("linux") or _state:
        return
    _state["parent"] = os.getpid()

    def before_fork() -> None:
        _state["parent"] = os.getpid()

    os.register_at_fork(before=before_fork, after_in_child=lambda: _follow(_state["parent"]))
    command_line = multiprocessing.spawn.get_command_line

    def with_prologue(**arguments: Any) -> list[str]:
        # [python, ..., "-c", program, "--multiprocessing-fork"]: prepend our call to the program.
        line = command_line(**arguments)
        program = line.index("-c") + 1
        call = f"__import__('runpy').run_path({__file__!r})['follow_parent']({os.getpid()})"
        line[program] = f"{call}; {line[program]}"
        return line

    multiprocessing.spawn.get_command_line = with_prologue


def follow_parent(parent: int) -> None:
    """Called in a spawned process: makes it and its own children die with `parent`."""
    _follow(parent)
    die_with_parent()


def _follow(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # The parent was killed before prctl took effect.
        os.kill(os.getpid(), signal.SIGKILL)
