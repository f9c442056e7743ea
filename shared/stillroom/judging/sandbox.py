"""Unit tests on a program that nobody has read, each test in a process of its own with limits (see sandbox_child).

In: the program, and tests in one of the forms that datasets use. Out: one bool a test.

    Python source                              runs after the program; passes when it raises nothing
    ["assert f(1) == 2", ...]                  each a test of its own (MBPP)
    {"inputs": [...], "outputs": [...]}        stdin and stdout of the program, compared word by word (APPS, TACO)
    {..., "fn_name": "f"}                      arguments and result of a function, or of a method of class Solution
    [{"input": ..., "output": ...}, ...]       stdin and stdout
"""

import ast
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import StillroomError
from stillroom.judging.sandbox_child import NOT_ISOLATED

CHILD = Path(__file__).with_name("sandbox_child.py")
FENCE = re.compile(r"```[ \t]*([A-Za-z0-9+_]*)[ \t]*\n(.*?)```", re.DOTALL)

CPU_TIMEOUT_S = 10.0
"""Processor time of one test."""
TEST_TIMEOUT_S = 30.0
"""Wall time of one test: longer, so that a busy machine fails no program that is right."""
TOTAL_TIMEOUT_S = 120.0
"""Wall time of all tests of one program."""
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
"""Of any file that the program writes, its output included."""


@dataclass(frozen=True, slots=True)
class UnitTest:
    """`source` runs after the program; or `stdin` is fed to it and stdout must be `expected`."""

    source: str | None = None
    stdin: str = ""
    expected: str | None = None


def program_of(answer: str) -> str:
    """The Python program in an answer: its last fenced block (python, if any says so), else all of it."""
    blocks = [(match[1].lower(), match[2]) for match in FENCE.finditer(answer)]
    named = [body for language, body in blocks if language in ("python", "py", "python3")]
    return (named or [body for _, body in blocks] or [answer])[-1]


def unit_tests_of(reference: str) -> list[UnitTest]:
    """The tests in a reference; none where it is neither Python nor one of the JSON forms."""
    try:
        data = json.loads(reference)
    except ValueError:
        return [UnitTest(source=reference)] if _is_python(reference) else []
    if isinstance(data, dict) and isinstance(data.get("inputs"), list) and isinstance(data.get("outputs"), list):
        if len(data["inputs"]) != len(data["outputs"]):
            return []
        pairs = list(zip(data["inputs"], data["outputs"], strict=True))
        if data.get("fn_name"):
            return [UnitTest(source=_call(str(data["fn_name"]), given, wanted)) for given, wanted in pairs]
        return [UnitTest(stdin=_text(given), expected=_text(wanted)) for given, wanted in pairs]
    if isinstance(data, list) and data and all(isinstance(item, str) and _is_python(item) for item in data):
        return [UnitTest(source=item) for item in data]
    if isinstance(data, list) and data and all(isinstance(i, dict) and {"input", "output"} <= i.keys() for i in data):
        return [UnitTest(stdin=_text(item["input"]), expected=_text(item["output"])) for item in data]
    return []


def run_tests(program: str, reference: str) -> list[bool]:
    """Which tests pass; an empty list where the reference holds none. Raises StillroomError where code cannot be
    isolated.

    After a test that ran out of time the others are not run and count as failed, as do those that are left after
    TOTAL_TIMEOUT_S: a program that never ends costs its time once.
    """
    tests = unit_tests_of(reference)
    deadline_s = time.monotonic() + TOTAL_TIMEOUT_S
    passed: list[bool] = []
    for test in tests:
        left_s = min(TEST_TIMEOUT_S, deadline_s - time.monotonic())
        result = run_test(program, test, left_s) if left_s > 0 else None
        if result is None:
            break
        passed.append(result)
    return passed + [False] * (len(tests) - len(passed))


def run_test(program: str, test: UnitTest, timeout_s: float) -> bool | None:
    """Whether one test passes; None where it runs out of time. Raises StillroomError where code cannot be isolated."""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="stillroom-code-") as folder:
        place = Path(folder)
        (place / "program.py").write_text(program, encoding="utf-8")
        (place / "tests.py").write_text(test.source or "", encoding="utf-8")
        (place / "stdin").write_text(test.stdin, encoding="utf-8")
        code = _run(place, nonce, timeout_s)
        output = (place / "stdout").read_text(encoding="utf-8", errors="replace")
    if code == NOT_ISOLATED:
        raise StillroomError(
            "programs cannot be isolated here: the code judge needs Linux on x86-64 or arm64 with seccomp filters"
        )
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return None
    if test.expected is None:
        return code == 0 and output.endswith(nonce)
    # Programs may well leave with sys.exit(0): their output is what counts.
    return code == 0 and output.removesuffix(nonce).split() == test.expected.split()


def _run(place: Path, nonce: str, timeout_s: float) -> int:
    limits = [str(MEMORY_BYTES), str(round(CPU_TIMEOUT_S)), str(FILE_BYTES)]
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
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _call(name: str, given: Any, wanted: Any) -> str:
    """Source that calls a function with a dataset's arguments; tuples and lists count as equal, as JSON has only
    lists.
    """
    arguments = given if isinstance(given, list) else [json.loads(line) for line in str(given).splitlines() if line]
    call = f"(Solution().{name} if 'Solution' in globals() else {name})"
    # APPS wraps a result in a list of one.
    accepted = [wanted, wanted[0]] if isinstance(wanted, list) and len(wanted) == 1 else [wanted]
    return (
        "import json as _json\n"
        f"_result = {call}(*_json.loads({json.dumps(arguments)!r}))\n"
        f"assert _json.loads(_json.dumps(_result)) in _json.loads({json.dumps(accepted)!r})\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)


def _is_python(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError):
        return False


def check_isolation() -> None:
    """Raises StillroomError unless programs can be isolated on this machine."""
    run_tests("", json.dumps(["pass"]))
