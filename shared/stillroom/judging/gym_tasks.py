"""reasoning-gym: its tasks as plain JSON, made alike in every process, and its checkers, each answer in many dresses.

Some kinds draw from the order of sets (isomorphic_strings, polynomial_multiplication, ransom_note): the same seed gives
other tasks in every Python process unless the hash seed is fixed. So tasks are made, and judged, in processes that
start with HASH_SEED.

Two checkers cannot say no: game_of_life_halting accepts any text, puzzle24 any four numbers in range. They have rules
of their own here.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from stillroom.judging.answers import Verdict, decided, shown, undecided
from stillroom.judging.marked import fenced_blocks, find_answer, plain

# reasoning-gym 0.1.25 draws some tasks in the order of a set (ransom_note, ...), which string hashes decide.
HASH_SEED = "0"
REFUSED = re.compile(r"__|\b(?:eval|exec|open|compile|getattr|setattr|vars|globals|breakpoint|input)\s*\(")
"""Several checkers pass the answer to sympy.parse_expr, which evaluates it as Python: they never see such text."""

PLOTTING = (
    *("matplotlib", "matplotlib.animation", "matplotlib.collections", "matplotlib.pyplot"),
    *("mpl_toolkits", "mpl_toolkits.mplot3d"),
)

SAID = re.compile(r"(?:answer|result|solution)\b[^\n]{0,20}?(?:\bis\b|:)[\s*]*([^\s*].*)", re.IGNORECASE | re.DOTALL)


def import_reasoning_gym() -> Any:
    """The package, imported late: it takes seconds. Raises ImportError where it is not installed."""
    with _without_matplotlib(), warnings.catch_warnings():
        # cellpylib compares with `is` and a literal: Python says so once, when it first compiles the file.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


@contextlib.contextmanager
def _without_matplotlib() -> Iterator[None]:
    """cellpylib imports it at once, for its plots, which nothing here draws: as long as all other imports together."""
    stubs = {} if "matplotlib" in sys.modules else {name: ModuleType(name) for name in PLOTTING}
    for stub in stubs.values():
        vars(stub)["Axes3D"] = object
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def task_names() -> list[str]:
    """Names of all tasks."""
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def jsonable(value: Any) -> Any:
    """The value as plain JSON: text keys, lists, finite numbers; everything else as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=repr)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def child_environment() -> dict[str, str]:
    """Environment of processes that make or judge tasks: our packages importable, the hash seed fixed."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": HASH_SEED}


def make_entries(task: str, seed: int, size: int, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries (question, answer, metadata) of a task as plain JSON, made one by one in a process of their own.

    Raises ImportError where reasoning-gym is not installed, LookupError with the known names for an unknown task,
    ValueError for options that the task refuses.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "stillroom.judging.gym_tasks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            stdin.write(json.dumps({"task": task, "seed": seed, "size": size, "options": dict(options)}))
        num_made = 0
        for line in process.stdout:
            reply = json.loads(line)
            if "problem" in reply:
                raise {"import": ImportError, "name": LookupError}.get(reply["problem"], ValueError)(*reply["details"])
            yield reply
            num_made += 1
        if num_made < size:
            raise ValueError(f"the process that generates tasks ended after {num_made} of {size}")
    finally:
        # A caller that stops early would leave it blocked on a full pipe.
        process.kill()
        process.wait()
        process.stdout.close()


def judge_reasoning_gym(
    answer: str, reference: str | None, metadata: Mapping[str, Any], truncated: bool = False
) -> Verdict:
    """The best score that the task's checker gives to what may be meant as the answer."""
    if not {"task", "seed", "index", "size", "options", "entry"} <= metadata.keys():
        return undecided("the prompt names no reasoning-gym task")
    task = str(metadata["task"])
    candidates = _candidates(answer, truncated)
    if not candidates:
        return decided(False, "cut off before an answer was marked")
    own = _OWN_RULES.get(task)
    if own is not None:
        correct = any(own(candidate, reference, metadata["entry"]) for candidate in candidates)
        return decided(correct, f"own rule for {task}", shown(candidates[0], reference or ""))
    options = json.dumps(metadata["options"], sort_keys=True)
    # With the size, on which entries of some tasks depend (acre).
    dataset = _dataset(task, int(metadata["seed"]), int(metadata["size"]), options)
    entry = dataset[int(metadata["index"])]
    if jsonable(entry["metadata"]) != metadata["entry"]:
        # Another version of reasoning-gym made another task: the stored one is the truth, if the checker accepts it in
        # JSON's types (lists for tuples, text keys for numbers), which the right answer tells.
        entry = {"question": "", "answer": reference, "metadata": metadata["entry"]}
        if reference is None or (_score(dataset, reference, entry, reference) or 0.0) < 1:
            return undecided("this version of reasoning-gym makes another task of the same seed")
    scores = [(_score(dataset, candidate, entry, reference), candidate) for candidate in candidates]
    known = [(score, candidate) for score, candidate in scores if score is not None]
    if not known:
        return decided(False, f"{task} could not read the answer", shown(candidates[0], reference or ""))
    score, best = max(known, key=lambda one: one[0])
    return Verdict(score > 1 - 1e-6, min(max(score, 0.0), 1.0), f"checker of {task}", shown(best, reference or ""))


def _score(dataset: Any, candidate: str, entry: Mapping[str, Any], reference: str | None) -> float | None:
    """None where the checker raises: prose is not a number, but the next candidate may be."""
    if candidate != reference and REFUSED.search(candidate):
        return None
    try:
        return float(dataset.score_answer(candidate, entry))
    except Exception:  # noqa: BLE001 - checkers of many authors
        return None


def _candidates(answer: str, truncated: bool) -> list[str]:
    """What may be meant as the result: a marked text alone, else the whole answer, its fences, blocks and phrases."""
    found = find_answer(answer, truncated)
    marks = {one.mark for one in found.candidates[:1]}
    texts = [one.text for one in found.candidates]
    if marks & {"line", "phrase"} and (said := SAID.findall(answer)):
        # Sentences end with their line, grids do not.
        texts.insert(0, said[-1])
    if not marks & {"tag", "box", "line"} and not truncated:
        blocks = re.split(r"\n\s*\n", answer.strip())
        # A grid behind a sentence: the last block, or the lines behind one that ends with a colon.
        texts = [answer, *fenced_blocks(answer)[::-1], blocks[-1], *re.findall(r":\s*\n((?:.*\n?)+)\Z", answer), *texts]
    dressed = [variant for text in texts for variant in (text, *fenced_blocks(text), *_undressed(text))]
    return [text for text in dict.fromkeys(dressed) if text.strip()]


def _undressed(text: str) -> tuple[str, ...]:
    r"""Without emphasis and a full stop, without \text; underscores at the ends may be part of a grid or name."""
    bare = text.strip().strip('*`"$ \n')
    return (
        text.strip(),
        bare,
        bare.removesuffix("."),
        bare.removesuffix(".").strip('*`"$ \n'),
        plain(text),
        _untexted(text),
    )


def _untexted(text: str) -> str:
    return plain(re.sub(r"\\(?:text|mathrm|texttt)\{([^{}]*)\}", r"\1", plain(text).strip("$")))


def _same_as_reference(candidate: str, reference: str | None, entry: Mapping[str, Any]) -> bool:
    return reference is not None and candidate.strip().casefold() == reference.strip().casefold()


def _makes_24(candidate: str, reference: str | None, entry: Mapping[str, Any]) -> bool:
    """Whether the numbers of the puzzle, each once, make 24."""
    from fractions import Fraction

    text = candidate.partition("=")[0].replace("×", "*").replace("÷", "/").replace("−", "-").replace(r"\times", "*")
    if not re.fullmatch(r"[\d+\-*/() ]{1,80}", text):
        return False
    if sorted(map(int, re.findall(r"\d+", text))) != sorted(map(int, entry["numbers"])):
        return False
    try:
        import ast

        return bool(_value(ast.parse(text.strip(), mode="eval").body) == Fraction(24))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def _value(node: Any) -> Any:
    import ast
    from fractions import Fraction

    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not a sum, difference, product or quotient")
    left, right = _value(node.left), _value(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError("not a sum, difference, product or quotient")


# reasoning-gym 0.1.25 accepts any text for the first, and 6*4*1*1 whatever the numbers for the second.
_OWN_RULES = {"game_of_life_halting": _same_as_reference, "puzzle24": _makes_24}


@functools.lru_cache(maxsize=64)
def _dataset(task: str, seed: int, size: int, options: str) -> Any:
    return import_reasoning_gym().create_dataset(task, seed=seed, size=size, **json.loads(options))


def _make(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        names = task_names()
    except ImportError as error:
        yield {"problem": "import", "details": [str(error)]}
        return
    if request["task"] not in names:
        yield {"problem": "name", "details": names}
        return
    try:
        dataset = import_reasoning_gym().create_dataset(
            request["task"], seed=request["seed"], size=request["size"], **request["options"]
        )
    except (TypeError, ValueError, AssertionError) as error:
        yield {"problem": "options", "details": [str(error)]}
        return
    for index in range(request["size"]):
        entry = dataset[index]
        answer = entry["answer"]
        yield {
            "question": str(entry["question"]),
            "answer": None if answer is None else str(answer),
            "metadata": jsonable(entry["metadata"]),
        }


def _main() -> None:
    # What a task prints must not be taken for an entry.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for entry in _make(json.loads(sys.stdin.read())):
        replies.write(json.dumps(entry) + "\n")
        replies.flush()


if __name__ == "__main__":
    _main()
