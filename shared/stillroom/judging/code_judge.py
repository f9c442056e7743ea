"""The code judge: the program in an answer against the unit tests in a reference."""

from collections.abc import Mapping
from typing import Any

from stillroom.judging.answers import Verdict, undecided
from stillroom.judging.sandbox import run_tests
from stillroom.judging.unit_tests import program_of, unit_tests_of


def judge_code(answer: str, reference: str, metadata: Mapping[str, Any], truncated: bool = False) -> Verdict:
    """Right if every test passes; undecided where one cannot be run and none fails, or there is no Python to run."""
    tests = unit_tests_of(reference, metadata)
    if not tests:
        return undecided("the reference holds no unit tests that can be run")
    program = program_of(answer, tests, truncated)
    if program.problem is not None and not program.source:
        return undecided(program.problem)
    if program.problem is not None:
        return Verdict(False, 0.0, program.problem)
    passed = run_tests(program.source, tests)
    num_passed = sum(one is True for one in passed)
    compared = f"{num_passed} of {len(passed)} tests passed"
    if False not in passed and None in passed:
        return undecided("tests cannot be run here", compared)
    return Verdict(False not in passed, num_passed / len(passed), "unit tests", compared)
