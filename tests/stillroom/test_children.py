"""A killed program takes its processes with it, whichever way they were started."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys, time
from stillroom.children import tie_children

def grandchild():
    print(os.getpid(), flush=True)
    time.sleep(600)

def child(method):
    print(os.getpid(), flush=True)
    multiprocessing.get_context(method).Process(target=grandchild).start()
    time.sleep(600)

if __name__ == "__main__":
    tie_children()
    tie_children()
    multiprocessing.get_context(sys.argv[1]).Process(target=child, args=[sys.argv[1]]).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_and_their_children_die_with_a_killed_parent(tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, method], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()), int(parent.stdout.readline())]
        assert all(_is_running(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        if not any(_is_running(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"of {pids} some survived their parent")


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
