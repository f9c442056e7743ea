"""Makes processes die with the one that started them, however it dies.

vLLM's engine core waits for requests forever, holding the GPU's memory, if the program that started it is killed.
Linux can signal a child when its parent thread ends (prctl PR_SET_PDEATHSIG) if the child requests it: programs of ours
call `follow_parent` when they start; children of multiprocessing do so in a fork hook or, spawned, in the first
statement that their interpreter runs, and both pass it on to their own children. Imports only the standard library,
because spawned interpreters run this file.
"""

import ctypes
import multiprocessing.spawn
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1

_state: dict[str, int] = {}


def follow_parent(parent_pid: int) -> None:
    """From now on the kernel kills this process when its parent is gone. Does nothing on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        # The parent was killed before prctl took effect.
        os.kill(os.getpid(), signal.SIGKILL)


def tie_children() -> None:
    """Processes that multiprocessing starts from this thread are killed when it ends. May be called twice.

    Does nothing on systems other than Linux, where a killed program may leave its engine running.
    """
    if not sys.platform.startswith("linux") or _state:
        return
    _state["parent"] = os.getpid()

    def before_fork() -> None:
        # Before the fork: a child whose parent has died already would ask getppid for another process.
        _state["parent"] = os.getpid()

    os.register_at_fork(before=before_fork, after_in_child=lambda: follow_parent(_state["parent"]))
    command_line = multiprocessing.spawn.get_command_line

    def with_prologue(**arguments: Any) -> list[str]:
        # [python, ..., "-c", program, "--multiprocessing-fork"]: prepend our call to the program.
        line = command_line(**arguments)
        program = line.index("-c") + 1
        call = f"__import__('runpy').run_path({__file__!r})['_follow_and_tie']({os.getpid()})"
        line[program] = f"{call}; {line[program]}"
        return line

    multiprocessing.spawn.get_command_line = with_prologue


def _follow_and_tie(parent_pid: int) -> None:
    """What a spawned process runs first."""
    follow_parent(parent_pid)
    tie_children()
