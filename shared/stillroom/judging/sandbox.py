"""Runs unit tests on a program that nobody has read, each test in a process of its own with limits (see sandbox_child).

In: the program and tests, as unit_tests reads them. Out: a bool for each test, None for one that cannot be run here.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stillroom.errors import StillroomError
from stillroom.judging.sandbox_child import NOT_ISOLATED
from stillroom.judging.sandbox_harness import CANNOT_RUN
from stillroom.judging.unit_tests import UnitTest, prelude_for, same_output

CHILD = Path(__file__).with_name("sandbox_child.py")
HARNESS = Path(__file__).with_name("sandbox_harness.py")

CPU_TIMEOUT_S = 10.0
"""Processor time of one test."""
TEST_TIMEOUT_S = 30.0
"""Wall time of one test: longer, so that a busy machine fails no program that is right."""
TOTAL_TIMEOUT_S = 120.0
"""Wall time of all tests of one program."""
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
"""Of any file that the program writes, its output included."""


def run_tests(program: str, tests: Sequence[UnitTest]) -> list[bool | None]:
    """Which tests pass, None for those that cannot be run. Raises StillroomError where code cannot be isolated.

    After a test that ran out of time the others are not run and count as failed, as do those that are left after
    TOTAL_TIMEOUT_S: a program that never ends costs its time once.
    """
    deadline_s = time.monotonic() + TOTAL_TIMEOUT_S
    passed: list[bool | None] = []
    for test in tests:
        left_s = min(TEST_TIMEOUT_S, deadline_s - time.monotonic())
        if left_s <= 0:
            break
        result, is_late = run_test(program, test, left_s)
        if is_late:
            break
        passed.append(result)
    return passed + [False] * (len(tests) - len(passed))


def run_test(program: str, test: UnitTest, timeout_s: float) -> tuple[bool | None, bool]:
    """Whether one test passes, and whether it ran out of time. Raises StillroomError where code cannot be isolated."""
    # A program cannot print what it does not know, so it cannot fake having come to its end.
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="stillroom-code-") as folder:
        place = Path(folder)
        source = _program_with_prelude(program) if test.expected is not None else ""
        (place / "program.py").write_text(source, encoding="utf-8")
        (place / "tests.py").write_text(_test_source(program, test), encoding="utf-8")
        (place / "stdin").write_text(test.stdin, encoding="utf-8")
        code = _run(place, nonce, timeout_s)
        output = (place / "stdout").read_text(encoding="utf-8", errors="replace")
    if code == NOT_ISOLATED:
        raise StillroomError(
            "programs cannot be isolated here: the code judge needs Linux on x86-64 or arm64 with seccomp filters"
        )
    # The kernel's signals at the limit of processor time; SIGKILL is ours at that of wall time.
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return False, True
    if test.expected is None:
        return (None if code == CANNOT_RUN else code == 0 and output.endswith(nonce)), False
    # Programs may well leave with sys.exit(0): their output is what counts.
    return code == 0 and same_output(test.expected, output.removesuffix(nonce)), False


def _program_with_prelude(program: str) -> str:
    """The program behind the imports that contest sites provide; one that begins with `__future__` stays first."""
    prelude = prelude_for(program)
    return f"{prelude}\n{program}" if prelude and "__future__" not in program else program


def _test_source(program: str, test: UnitTest) -> str:
    """What runs behind the program: nothing for stdin and stdout, else the harness, which loads the program itself."""
    if test.expected is not None:
        return ""
    prelude = prelude_for(program, test.source or "")
    load = f"_solution = load_solution({prelude!r}, {program!r})\n"
    if test.call is not None:
        arguments, accepted = test.call
        run = f"check_call(_solution, {test.entry!r}, {arguments!r}, {accepted!r})\n"
    else:
        run = f"run_source(_solution, {test.source or ''!r}, {test.run!r}, {test.entry!r})\n"
    return HARNESS.read_text(encoding="utf-8") + "\n\n" + load + run


def _run(place: Path, nonce: str, timeout_s: float) -> int:
    limits = [str(MEMORY_BYTES), str(round(CPU_TIMEOUT_S)), str(FILE_BYTES)]
    # -I: neither environment variables nor files in the working folder change what is imported.
    command = [sys.executable, "-I", str(CHILD), "program.py", "tests.py", nonce, *limits]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(place), "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    with (place / "stdin").open("rb") as stdin, (place / "stdout").open("wb") as stdout:
        process = subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            if process.poll() is None:
                # The group, which start_new_session made.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def check_isolation() -> None:
    """Raises StillroomError unless programs can be isolated on this machine."""
    run_test("", UnitTest(stdin="", expected=""), TEST_TIMEOUT_S)
