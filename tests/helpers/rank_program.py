"""Two ranks for test_ranks.py: they join each other, then the second one fails in the way that is asked for.

python -m tests.helpers.rank_program damage | kill | exception | wait | well [HOSTS]
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from stillroom.errors import CorruptError, StillroomError
from stillroom.program import StopRequest
from tests.helpers.programs import ForkedPython

MESSAGE = "shard 7 is not what was written"


def main() -> None:
    if "RANK" not in os.environ:
        from student_train.runtime import launching
        from student_train.runtime.hosts import be_agent, given_meeting, run_on_hosts

        command = [sys.executable, "-m", "tests.helpers.rank_program", sys.argv[1]]
        if (meeting := given_meeting()) is not None:
            # It has imported torch to meet the others.
            vars(launching)["subprocess"] = SimpleNamespace(Popen=ForkedPython)
            sys.exit(be_agent(meeting, command, by_ssh=True))
        sys.exit(run_on_hosts(Path(sys.argv[2]), command[1:]) if sys.argv[2:] else launching.launch(2, command))
    try:
        be_rank(sys.argv[1])
    except StillroomError as failure:
        print(f"student-train: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def be_rank(manner: str) -> None:
    with StopRequest(at_once=True) as stop:
        from student_train.runtime.ranks import joined_ranks

        with joined_ranks() as ranks:
            print(f"rank {ranks.rank} is there", file=sys.stderr)
            if ranks.rank == 1 and manner != "well":
                fail(manner, stop)
            # The others wait for it here, and lose it.
            ranks.sum([1.0])


def fail(manner: str, stop: StopRequest) -> None:
    if manner == "damage":
        raise CorruptError(MESSAGE)
    if manner == "exception":
        raise ZeroDivisionError(MESSAGE)
    if manner == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    # Python swallows an interrupt that falls into a destructor; a step of training would look at the request.
    while not stop.is_set:
        time.sleep(0.1)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
