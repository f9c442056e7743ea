"""Reads programs out of answers and unit tests out of references, in the forms that public datasets use.

    Python source with asserts, also many strings of it     runs behind the program (MBPP; `test_list`, `test`)
    def check(candidate): ...                               is called with the solution (HumanEval, LeetCode)
    def test_...(): ... and unittest.TestCase               each is run (pytest, unittest, KodCode)
    {"inputs": [...], "outputs": [...]}                     stdin and stdout of the program (APPS, TACO, code_contests)
    {..., "fn_name": "f"}                                   arguments and result of a function or method of Solution
    [{"input": ..., "output": ..., "testtype": ...}, ...]   stdin or a call each (LiveCodeBench, PrimeIntellect)

A form that is none of these, or asserts nothing, gives no tests: the answer is then undecided, never right.
"""

import ast
import builtins
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENCE = re.compile(r"^[ \t>]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)$")
PYTHON = {"python", "py", "python3", "py3", "python2", "ipython"}
NAME_KEYS = ("fn_name", "func_name", "function_name", "entry_point", "fn", "method_name")
TEST_KEYS = ("test_list", "tests", "test", "test_cases", "unit_tests", "public_test_cases", "assert_case", "test_code")
SETUP_KEYS = ("test_setup_code", "test_imports", "setup", "imports")

CODE_LINE = re.compile(
    r"(?:def |class |import |from \w+ import |@\w|print\(|for .*:|while .*:|if .*:|\w+(?:, *\w+)* *= *\S)"
)

PRELUDE = {
    "typing": "List Dict Set Tuple Optional Union Any Callable Iterable Iterator Deque DefaultDict Counter FrozenSet "
    "Sequence Generator Type Literal NamedTuple TypeVar Generic Mapping",
    "collections": "defaultdict deque Counter OrderedDict namedtuple ChainMap",
    "itertools": "accumulate combinations combinations_with_replacement permutations product chain groupby islice "
    "count cycle repeat zip_longest pairwise starmap takewhile dropwhile",
    "functools": "lru_cache cache reduce partial cmp_to_key wraps cached_property total_ordering",
    "heapq": "heapify heappush heappop heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "math": "ceil floor gcd sqrt inf comb factorial log log2 pi isqrt lcm prod",
    "string": "ascii_lowercase ascii_uppercase ascii_letters digits",
    "dataclasses": "dataclass field",
    "copy": "deepcopy",
}
"""Names that contest sites import before a solution runs, by module."""
MODULES = (
    "math", "collections", "itertools", "functools", "heapq", "bisect", "string", "re", "random",
    "operator", "sys", "os", "copy", "json", "datetime", "time", "typing", "statistics", "decimal",
    "fractions", "queue",
)  # fmt: skip
CLASSES = {
    "ListNode": "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n",
    "TreeNode": "class TreeNode:\n    def __init__(self, val=0, left=None, right=None):\n"
    "        self.val, self.left, self.right = val, left, right\n",
}


@dataclass(frozen=True, slots=True)
class UnitTest:
    """One test: `source` is Python that runs behind the program, then `run` of it is called; or `call` is made; or
    `stdin` is fed to the program and stdout must be `expected`.

    `run` is check, function, method or case and the name; `entry` names the solution where the test needs that.
    """

    source: str | None = None
    run: tuple[str, str] | None = None
    entry: str | None = None
    call: tuple[Any, Any] | None = None
    stdin: str = ""
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """The Python program in an answer; `problem` says why there is none."""

    source: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    language: str
    body: str
    is_closed: bool


def unit_tests_of(reference: str, metadata: Mapping[str, Any] | None = None) -> list[UnitTest]:
    """The tests in a reference; none where it is in no known form. `metadata` may name the function to call."""
    entry = _entry_of(metadata or {})
    try:
        data = json.loads(reference)
    # What is not JSON is taken for Python source.
    except ValueError:
        return _python_tests(reference, entry)
    return _tests_of_data(data, entry)


def program_of(answer: str, tests: Sequence[UnitTest] = (), truncated: bool = False) -> Program:
    """The program that the answer ends with: its last Python block, with the earlier blocks that this one builds on.

    Blocks behind it that only show its use are left out where the tests call a function by name.
    """
    blocks = _blocks(answer)
    # Blocks that say Python, or else those that say nothing and parse, or else any that says nothing.
    python = (
        [one for one in blocks if one.language in PYTHON]
        or [one for one in blocks if not one.language and _is_python(one.body)]
        or [one for one in blocks if not one.language]
    )
    if not python:
        if blocks:
            return Program("", f"no Python program, but {blocks[-1].language or 'text'}")
        bare = _bare_program(answer)
        return Program(bare, "cut off in the program" if truncated else None)
    # Truncated after the closing fence the program is whole, and only prose behind it is missing.
    if truncated and not python[-1].is_closed:
        return Program(python[-1].body, "cut off in the program")
    return Program(_joined([one.body for one in python], _needed_names(tests)))


def prelude_for(source: str, *others: str) -> str:
    """Imports and classes that contest sites provide, for the names that a program uses and does not define."""
    free: set[str] = set()
    bound: set[str] = set()
    for one in (source, *others):
        loaded, defined = _names(one)
        free |= loaded
        bound |= defined
    # A name that any of the sources binds is not ours to provide.
    free -= bound | set(dir(builtins))
    lines = [
        f"from {module} import {name}" for module, names in PRELUDE.items() for name in names.split() if name in free
    ]
    lines += [
        f"import {name}" for name in MODULES if name in free and not any(line.endswith(f" {name}") for line in lines)
    ]
    lines += ["import numpy as np"] if "np" in free else []
    return "\n".join([*lines, *(text for name, text in CLASSES.items() if name in free)])


def same_output(expected: str, output: str) -> bool:
    """Whether two outputs agree word by word; numbers with a fraction within one part in a million."""
    ours, theirs = expected.split(), output.split()
    return len(ours) == len(theirs) and all(a == b or _close(a, b) for a, b in zip(ours, theirs, strict=True))


def _close(expected: str, output: str) -> bool:
    # Whole numbers must agree exactly: 1000001 is not 1000000.
    if not re.search(r"[.eE]", expected + output):
        return False
    try:
        a, b = float(expected), float(output)
    except ValueError:
        return False
    # Absolutely as well: 1e-17 and 0 are the same result.
    return abs(a - b) <= max(1e-6 * max(abs(a), abs(b)), 1e-9)


def _tests_of_data(data: Any, entry: str | None) -> list[UnitTest]:
    if isinstance(data, str):
        return unit_tests_of(data) if data.strip() else []
    if isinstance(data, dict):
        return _tests_of_dict(data, _entry_of(data) or entry)
    if not isinstance(data, list) or not data:
        return []
    if all(isinstance(item, str) for item in data):
        tests = [_python_tests(item, entry) for item in data]
        # Some of the tests would call wrong programs right: an unknown form among them leaves the answer undecided.
        return [test for group in tests for test in group] if all(tests) else []
    if all(isinstance(item, dict) for item in data):
        groups = [_tests_of_dict(item, _entry_of(item) or entry) for item in data]
        return [test for group in groups for test in group] if all(groups) else []
    return []


def _tests_of_dict(data: Mapping[str, Any], entry: str | None) -> list[UnitTest]:
    inputs, outputs = data.get("inputs", data.get("input")), data.get("outputs", data.get("output"))
    if isinstance(data.get("inputs"), list) or (
        isinstance(inputs, list) and isinstance(outputs, list) and not _is_call(data)
    ):
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            return []
        is_call = _is_call(data) or (entry is not None and data.get("testtype") != "stdin")
        return [_pair(given, wanted, entry, is_call) for given, wanted in zip(inputs, outputs, strict=True)]
    if inputs is not None and outputs is not None:
        return [_pair(inputs, outputs, entry, _is_call(data) or (entry is not None and not isinstance(inputs, str)))]
    setup = "\n".join(_lines(data[key]) for key in SETUP_KEYS if data.get(key))
    for key in TEST_KEYS:
        if data.get(key):
            found = _tests_of_data(data[key], entry)
            return [_with_setup(test, setup) for test in found] if setup else found
    return []


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_setup(test: UnitTest, setup: str) -> UnitTest:
    return test if test.source is None else UnitTest(f"{setup}\n{test.source}", test.run, test.entry)


def _is_call(data: Mapping[str, Any]) -> bool:
    kind = str(data.get("testtype", data.get("type", ""))).lower()
    return kind in ("functional", "function_call", "function") or _entry_of(data) is not None


def _pair(given: Any, wanted: Any, entry: str | None, is_call: bool) -> UnitTest:
    if not is_call:
        return UnitTest(stdin=_text(given), expected=_text(wanted))
    arguments = given if isinstance(given, list | dict) else _json_lines(str(given))
    accepted = [wanted]
    # APPS wraps a result in a list of one, LiveCodeBench writes it as JSON.
    accepted += [wanted[0]] if isinstance(wanted, list) and len(wanted) == 1 else []
    if isinstance(wanted, str):
        # The text itself stays accepted: a function may return text that happens to be JSON.
        accepted += [value for value in _json_lines(wanted)[:1] if value != wanted]
    return UnitTest(entry=entry, call=(arguments, accepted))


def _json_lines(text: str) -> list[Any]:
    values = []
    # Not splitlines: JSON strings may hold other line breaks, such as U+2028.
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError:
                try:
                    # Older sets wrote Python literals: True, single quotes, tuples.
                    values.append(ast.literal_eval(line.strip()))
                except (ValueError, SyntaxError):
                    values.append(line)
    return values


def _entry_of(data: Mapping[str, Any]) -> str | None:
    for key in NAME_KEYS:
        if isinstance(data.get(key), str) and data[key]:
            return str(data[key])
    inner = data.get("metadata")
    if isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except ValueError:
            return None
    return _entry_of(inner) if isinstance(inner, Mapping) else None


def _python_tests(source: str, entry: str | None) -> list[UnitTest]:
    """Tests in Python source: what its top level asserts, and what it defines as a test without calling it."""
    source = textwrap.dedent(source.replace("\r\n", "\n"))
    fenced = _blocks(source)
    if fenced and not _is_python(source):
        source = fenced[-1].body
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    # Functions that the tests call themselves run anyway: called by us too, they would run twice or lack arguments.
    called = {
        node.func.id
        for statement in body
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    runs: list[tuple[str, str]] = []
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name not in called:
            if node.name == "check" and len(node.args.args) == 1:
                runs.append(("check", node.name))
            elif node.name.startswith("test"):
                runs.append(("function", node.name))
        if isinstance(node, ast.ClassDef):
            runs += _runs_of_class(node)
    if runs:
        return [UnitTest(source, run, entry) for run in runs]
    return [UnitTest(source, None, entry)] if _asserts_something(body, called) else []


def _runs_of_class(node: ast.ClassDef) -> list[tuple[str, str]]:
    methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test")]
    # By name: bases are not resolved, and `unittest.TestCase` is imported in many ways.
    if any("TestCase" in ast.unparse(base) for base in node.bases):
        return [("case", f"{node.name}.{name}") for name in methods]
    return [("method", f"{node.name}.{name}") for name in methods] if node.name.startswith("Test") else []


def _asserts_something(body: Sequence[ast.stmt], called: set[str]) -> bool:
    """Whether the top level, or a function that it calls, asserts or raises."""
    reached = [
        node
        for node in body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name in called
    ]
    return any(
        isinstance(node, ast.Assert | ast.Raise)
        or (isinstance(node, ast.Call) and re.search(r"assert|check|verify", ast.unparse(node.func), re.IGNORECASE))
        for statement in reached
        for node in ast.walk(statement)
    )


def _blocks(text: str) -> list[_Block]:
    """Fenced blocks: backticks or tildes, indented or not, any attributes, also one that nothing closes."""
    found: list[_Block] = []
    lines: list[str] | None = None
    mark = language = ""
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        match = FENCE.match(line)
        if lines is None:
            if match:
                mark, language, lines = match["mark"], _language(match["info"]), []
        # CommonMark: a fence closes with the same character, at least as many of them, and nothing behind.
        elif match and match["mark"][0] == mark[0] and len(match["mark"]) >= len(mark) and not match["info"].strip():
            found.append(_Block(language, _dedented(lines), True))
            lines = None
        else:
            lines.append(line)
    if lines is not None:
        found.append(_Block(language, _dedented(lines), False))
    return found


def _language(info: str) -> str:
    """python out of `python`, `{.python .numberLines}`, `python title="a.py"`, `{python}`."""
    match = re.match(r"[{\s.]*([A-Za-z0-9+#]*)", info)
    return match[1].lower() if match else ""


def _dedented(lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines)) + "\n"


def _bare_program(answer: str) -> str:
    """An answer without fences: all of it, or its lines that are indented as Markdown code."""
    text = answer.replace("\r\n", "\n")
    if _is_python(text):
        return text
    lines = text.split("\n")
    indented = [line for line in lines if line.startswith(("    ", "\t")) or not line.strip()]
    code = textwrap.dedent("\n".join(indented).strip("\n"))
    if code.strip() and _is_python(code):
        return code
    # Prose before and behind a program: the longest run of lines that is Python and defines or prints something.
    starts = [i for i, line in enumerate(lines) if CODE_LINE.match(line)]
    # Only from the first line that looks like code: every start times every end would be quadratic.
    for start in starts[:1]:
        # The longest first, so that the whole program is found before a part of it.
        for end in range(len(lines), start, -1):
            if _is_python("\n".join(lines[start:end])):
                return "\n".join(lines[start:end])
    return text


def _joined(bodies: Sequence[str], needed: set[str]) -> str:
    """The last program of several blocks, with earlier blocks whose definitions it needs."""
    last = len(bodies) - 1
    if needed:
        defining = [index for index, body in enumerate(bodies) if needed & _names(body)[1]]
        last = defining[-1] if defining else last
    chosen = [last]
    missing = _free(bodies[last])
    # From the nearest block back: of two definitions of a name the later one counts.
    for index in range(last - 1, -1, -1):
        defined = _names(bodies[index])[1]
        if missing & defined and not (_names(bodies[last])[1] & defined):
            if not needed and re.search(r"\binput\(|\bsys\.stdin|\bopen\(0", bodies[index]):
                # A whole program before it: what follows shows its use.
                chosen, missing = [index], _free(bodies[index])
                continue
            chosen.insert(0, index)
            missing = (missing - defined) | _free(bodies[index])
    return "\n".join(bodies[index] for index in chosen)


def _needed_names(tests: Sequence[UnitTest]) -> set[str]:
    """Names that the tests expect the program to define."""
    needed: set[str] = set()
    for test in tests:
        if test.entry:
            needed |= set(re.findall(r"[A-Za-z_]\w*", test.entry))
        if test.call is not None:
            needed.add("Solution")
        if test.source is not None:
            loaded, defined = _names(test.source)
            imported = {
                alias.name
                for node in ast.walk(ast.parse(test.source))
                if isinstance(node, ast.ImportFrom) and node.module == "solution"
                for alias in node.names
            }
            needed |= (loaded - defined - set(dir(builtins))) | imported
    return needed


def _free(source: str) -> set[str]:
    loaded, defined = _names(source)
    return loaded - defined - set(dir(builtins))


def _names(source: str) -> tuple[set[str], set[str]]:
    """Names that a program loads, and names that it binds anywhere."""
    loaded: set[str] = set()
    bound: set[str] = set()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return loaded, bound
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        # `import os.path` binds `os`.
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return loaded, bound


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else str(value)


def _is_python(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
