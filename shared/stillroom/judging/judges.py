r"""Is an answer right? One function a kind of check; none of them is trusted with time or memory (see process).

math           the whole answer means what the whole reference means (answers.judge_math)
exact          the same text to a person (answers.judge_exact)
regex          the reference is a regular expression that must be found in the answer
code           the answer's Python program passes unit tests in a sandbox (code_judge, sandbox)
reasoning_gym  the task's own checker, from what the prompt's metadata says of the task (gym_tasks)

`answer` is what the teacher said after its reasoning; where it marks its result, that is judged (see marked).
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from stillroom.errors import ConfigError, StillroomError
from stillroom.judging.answers import Verdict, decided, judge_exact, judge_math, reference_problem, shown, undecided
from stillroom.judging.code_judge import judge_code
from stillroom.judging.gym_tasks import import_reasoning_gym, judge_reasoning_gym
from stillroom.judging.sandbox import check_isolation

KINDS = ("reasoning_gym", "math", "exact", "regex", "code")

NEEDS = {
    "reasoning_gym": "what reasoning-gym says of its task",
    "math": "a reference",
    "exact": "a reference",
    "regex": "a regular expression as reference",
    "code": "unit tests as reference",
}
"""What a kind judges by; a prompt without it is undecided."""

PACKAGES = {"reasoning_gym": ("reasoning_gym", "reasoning-gym"), "math": ("math_verify", "math-verify")}
"""Module and distribution that a kind needs."""


def check_kind(kind: str) -> None:
    """Raises ConfigError for an unknown kind of judge."""
    if kind == "llm":
        raise ConfigError("judge llm needs a language model: pass its configuration with --llm FILE")
    if kind not in KINDS:
        # With pydantic, three quarters of the time in which the process of the judges starts.
        from stillroom.config import nearest_name

        raise ConfigError(f"judge {kind!r} is unknown{nearest_name(kind, KINDS)}")


def require_judge(kind: str) -> None:
    """Raises StillroomError, without loading anything, where a package is missing or code cannot be isolated."""
    if kind in PACKAGES:
        module, package = PACKAGES[kind]
        if importlib.util.find_spec(module) is None:
            raise StillroomError(f"judge {kind} needs the package {package}: pip install {package}")
    if kind == "code":
        check_isolation()


def import_judge(kind: str) -> None:
    """Loads what a kind needs, which takes seconds. Raises StillroomError as `require_judge` does."""
    require_judge(kind)
    if kind == "math":
        import latex2sympy2_extended  # noqa: F401
        import math_verify  # noqa: F401
    elif kind == "reasoning_gym":
        import_reasoning_gym()


def judge_answer(
    kind: str, answer: str | None, reference: str | None, metadata: Mapping[str, Any], truncated: bool = False
) -> Verdict:
    """The verdict on one answer; a missing answer (the reasoning never ended) is wrong.

    `truncated` says that generation stopped at its length limit: then only a complete mark counts as an answer.
    Raises ConfigError for an unknown kind. `math` must be called from the main thread, where math-verify keeps time.
    """
    check_kind(kind)
    # First: without a reference not even a missing answer can be called wrong.
    if kind != "reasoning_gym" and (problem := reference_problem(reference, kind)) is not None:
        return undecided(problem)
    if answer is None or not answer.strip():
        return decided(False, "no answer")
    if kind == "reasoning_gym":
        return judge_reasoning_gym(answer, reference, metadata, truncated)
    assert reference is not None
    if kind == "math":
        return judge_math(answer, reference, truncated)
    if kind == "exact":
        return judge_exact(answer, reference, truncated)
    if kind == "regex":
        return _judge_regex(answer, reference)
    return judge_code(answer, reference, metadata, truncated)


def _judge_regex(answer: str, reference: str) -> Verdict:
    try:
        match = re.search(reference, answer)
    except re.error as error:
        return undecided(f"the reference is not a regular expression: {error}")
    return decided(match is not None, "regex", shown(match[0] if match else "", reference))
