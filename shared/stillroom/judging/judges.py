"""Is an answer right? One function a kind of check; none of them is trusted with time or memory (see judge_process).

reasoning_gym  the task's own checker, from what the prompt's metadata says of the task
math           mathematical equality (math-verify)
exact          the same text, white space at the ends aside
regex          the reference is a regular expression that must be found in the answer
code           the answer's Python program against unit tests, in a sandbox (see sandbox)

`answer` is what the teacher said after its reasoning. Where it marks its result with <answer>...</answer> or
\boxed{...}, that is what is judged; else reasoning_gym and exact accept the whole answer, its last line, what
follows "answer is" or "answer:" there, or the last number there.

reasoning-gym without its noise, and its entries as plain JSON.
"""

import functools
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillroom.config import nearest_name
from stillroom.errors import ConfigError, StillroomError
from stillroom.judging.sandbox import check_isolation, program_of, run_tests


def import_reasoning_gym() -> Any:
    """The package, imported late: it takes seconds. Raises ImportError where it is not installed."""
    with warnings.catch_warnings():
        # cellpylib compares with `is` and a literal: Python says so once, when it first compiles the file.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


def task_names() -> list[str]:
    """Names of all tasks."""
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def jsonable(value: Any) -> Any:
    """The value as plain JSON: text keys, lists, finite numbers; whatever else JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=repr)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


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

MATH_TIMEOUT_S = 5
"""For each of parsing and comparing. math-verify keeps it with SIGALRM, so `math` needs the main thread."""

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"-?\d(?:[\d,]*\d)?(?:\.\d+)?")
PHRASE = re.compile(r"(?:answer|result)\s*(?:is|:|=)\s*(.+)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`score` is 0 to 1. Both are None where nothing can be said: no reference, or the check itself gave up."""

    correct: bool | None
    score: float | None


UNDECIDED = Verdict(None, None)
WRONG = Verdict(False, 0.0)


def check_kind(kind: str) -> None:
    """Raises ConfigError for an unknown kind of judge."""
    if kind not in KINDS:
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
        import math_verify  # noqa: F401
    elif kind == "reasoning_gym":
        import_reasoning_gym()


def judge_answer(kind: str, answer: str | None, reference: str | None, metadata: Mapping[str, Any]) -> Verdict:
    """The verdict on one answer; an answer that is missing (reasoning never ended) is wrong.

    Raises ConfigError for an unknown kind. `math` must be called from the main thread.
    """
    check_kind(kind)
    if kind != "reasoning_gym" and reference is None:
        return UNDECIDED
    if answer is None or not answer.strip():
        return WRONG
    if kind == "reasoning_gym":
        return _judge_reasoning_gym(answer, reference, metadata)
    reference = str(reference)
    if kind == "math":
        return _judge_math(answer, reference)
    if kind == "exact":
        return _certain(any(candidate == reference.strip() for candidate in final_answers(answer)))
    if kind == "regex":
        return _judge_regex(answer, reference)
    return _judge_code(answer, reference)


def final_answers(answer: str) -> list[str]:
    """What may be meant as the result: the last marked text alone, else the whole answer, its last line and phrase."""
    marked = [match[1] for match in TAGGED.finditer(answer)] or _boxed(answer)
    if marked:
        return [marked[-1].strip()]
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    candidates = [answer.strip(), last, _bare(last)]
    phrase = PHRASE.search(last)
    if phrase:
        candidates += [phrase[1].strip(), _bare(phrase[1])]
    numbers = NUMBER.findall(last)
    if numbers:
        candidates += [numbers[-1], numbers[-1].replace(",", "")]
    return list(dict.fromkeys(candidates))


def _judge_reasoning_gym(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> Verdict:
    if not {"task", "seed", "index", "size", "options", "entry"} <= metadata.keys():
        return UNDECIDED
    options = json.dumps(metadata["options"], sort_keys=True)
    dataset = _dataset(str(metadata["task"]), int(metadata["seed"]), int(metadata["size"]), options)
    entry = dataset[int(metadata["index"])]
    if jsonable(entry["metadata"]) != metadata["entry"]:
        # Another version of reasoning-gym made another task: the stored one is the truth, if the checker accepts it in
        # JSON's types (lists for tuples, text keys for numbers), which the right answer tells.
        entry = {"question": "", "answer": reference, "metadata": metadata["entry"]}
        if reference is None or dataset.score_answer(reference, entry) < 1:
            return UNDECIDED
    score = max(float(dataset.score_answer(candidate, entry)) for candidate in final_answers(answer))
    return Verdict(score > 1 - 1e-6, min(max(score, 0.0), 1.0))


def _judge_math(answer: str, reference: str) -> Verdict:
    from math_verify import parse, verify

    # GSM8K writes its answers as "... #### 18".
    gold_text = reference.rpartition("####")[2].strip()
    gold = parse(gold_text, parsing_timeout=MATH_TIMEOUT_S) or parse(f"${gold_text}$", parsing_timeout=MATH_TIMEOUT_S)
    if not gold:
        return UNDECIDED
    tagged = TAGGED.findall(answer)
    given_text = tagged[-1] if tagged else answer
    given = parse(given_text, parsing_timeout=MATH_TIMEOUT_S)
    return _certain(bool(verify(gold, given, timeout_seconds=MATH_TIMEOUT_S)))


def _judge_regex(answer: str, reference: str) -> Verdict:
    try:
        return _certain(re.search(reference, answer) is not None)
    except re.error:
        return UNDECIDED


def _judge_code(answer: str, reference: str) -> Verdict:
    passed = run_tests(program_of(answer), reference)
    if not passed:
        return UNDECIDED
    return Verdict(all(passed), sum(passed) / len(passed))


@functools.lru_cache(maxsize=64)
def _dataset(task: str, seed: int, size: int, options: str) -> Any:
    return import_reasoning_gym().create_dataset(task, seed=seed, size=size, **json.loads(options))


def _certain(correct: bool) -> Verdict:
    return Verdict(correct, float(correct))


def _boxed(text: str) -> list[str]:
    """Contents of \\boxed{...}, braces balanced."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, start = 1, match.end()
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found.append(text[start:place])
                break
    return found


def _bare(text: str) -> str:
    """Without Markdown emphasis, dollar signs, quotes and a full stop around it."""
    return text.strip().strip("*_$`\"' ").rstrip(".").strip("*_$`\"' ")
