"""Runs one unit test on a program inside the sandbox: loaded as text behind sandbox_child, never imported by us.

The program becomes the module `solution`, statement by statement, so that a usage example that fails (it waits for
input, say) costs no definition behind it. What the test needs and this machine lacks ends the process with CANNOT_RUN.
"""

import ast
import importlib.util
import sys
import types
from typing import Any

CANNOT_RUN = 98


def load_solution(prelude: str, program: str) -> types.ModuleType:
    module = types.ModuleType("solution")
    # Tests may import it.
    sys.modules["solution"] = module
    namespace = module.__dict__
    exec(compile(prelude, "prelude.py", "exec"), namespace)
    tree = ast.parse(program)
    flags = 0
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            import __future__

            for alias in node.names:
                # Statements are compiled one by one, so each needs the flags that the file began with.
                flags |= getattr(__future__, alias.name).compiler_flag
    for node in tree.body:
        code = compile(ast.Module([node], []), "program.py", "exec", flags=flags, dont_inherit=True)
        try:
            exec(code, namespace)
        # A program that ends itself must not end the tests.
        except (Exception, SystemExit):  # noqa: BLE001 - of programs that nobody has read
            continue
    return module


def find_entry(module: types.ModuleType, name: str | None) -> Any:
    namespace = module.__dict__
    # LeetCode names its entry `Solution().twoSum`.
    name = name.rpartition(".")[2] if name else name
    if name and callable(namespace.get(name)):
        return namespace[name]
    solution = namespace.get("Solution")
    if solution is not None:
        methods = [one for one in vars(solution) if not one.startswith("_") and callable(getattr(solution, one))]
        if methods:
            # The last one: helpers are usually defined before the method that uses them.
            return getattr(solution(), name if name and name in methods else methods[-1])
    if name:
        raise NameError(name)
    functions = [
        one for one in namespace.values() if isinstance(one, types.FunctionType) and one.__module__ == "solution"
    ]
    return functions[-1]


def run_source(module: types.ModuleType, source: str, run: tuple[str, str] | None, entry: str | None) -> None:
    alias_missing_modules(module, source)
    namespace = {**module.__dict__, "__name__": "tests"}
    if "unittest" in source:
        import unittest

        # The tests are run one by one below; a call that runs them all would end the process.
        setattr(unittest, "main", lambda *arguments, **options: None)  # noqa: B010 - a class in its type stubs
    try:
        exec(compile(source, "tests.py", "exec"), namespace)
    # The test lacks a package on this machine, which says nothing about the program.
    except ModuleNotFoundError:
        sys.exit(CANNOT_RUN)
    if run is None:
        return
    kind, name = run
    if kind == "check":
        namespace[name](find_entry(module, entry))
    elif kind == "function":
        call_test(namespace[name])
    else:
        owner, _, method = name.partition(".")
        run_method(namespace[owner], method, kind)


def run_method(owner: Any, method: str, kind: str) -> None:
    if kind == "case":
        import unittest

        result = unittest.TestResult()
        unittest.TestSuite([owner(method)]).run(result)
        # A test that did not run has shown nothing.
        if result.skipped or not result.testsRun:
            sys.exit(CANNOT_RUN)
        if not result.wasSuccessful():
            raise AssertionError(method)
        return
    instance = owner()
    if hasattr(instance, "setup_method"):
        instance.setup_method()
    call_test(getattr(instance, method))


def call_test(function: Any) -> None:
    """A pytest function; of pytest's marks only parametrize is known, of its fixtures none."""
    import inspect

    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            sys.exit(CANNOT_RUN)
        names = [one.strip() for one in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
        rows = [
            one.values if type(one).__name__ == "ParameterSet" else (one,) if len(names) == 1 else one
            for one in mark.args[1]
        ]
        cases = [{**case, **dict(zip(names, row, strict=True))} for case in cases for row in rows]
    needed = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    for case in cases:
        if not set(needed) <= case.keys():
            sys.exit(CANNOT_RUN)
        function(**case)


def alias_missing_modules(module: types.ModuleType, source: str) -> None:
    """Tests import the solution under many names: one that exists nowhere else is the program."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if not name or name in sys.modules or "." in name or importlib.util.find_spec(name) is not None:
                continue
            attributes = [
                one.attr
                for one in ast.walk(tree)
                if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == name
            ]
            used = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else attributes
            if used and all(one == "*" or one in module.__dict__ for one in used):
                sys.modules[name] = module


def check_call(module: types.ModuleType, entry: str | None, arguments: Any, accepted: list[Any]) -> None:
    function = find_entry(module, entry)
    result = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
    if not any(same_value(result, wanted) for wanted in accepted):
        raise AssertionError(result)


def same_value(result: Any, wanted: Any) -> bool:
    """As JSON would show it: tuples are lists, keys are text; floats within one part in a million."""
    # numpy's arrays and numbers as Python's.
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, tuple):
        result = list(result)
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(result, list)
            and len(result) == len(wanted)
            and all(same_value(a, b) for a, b in zip(result, wanted, strict=True))
        )
    if isinstance(wanted, dict):
        if not isinstance(result, dict) or len(result) != len(wanted):
            return False
        # Keys of JSON are text, those of Python may be numbers.
        keyed = {str(key): value for key, value in result.items()}
        return all(str(key) in keyed and same_value(keyed[str(key)], value) for key, value in wanted.items())
    if isinstance(result, float) or isinstance(wanted, float):
        try:
            return bool(result == wanted or abs(result - wanted) <= max(1e-6 * max(abs(result), abs(wanted)), 1e-9))
        except TypeError:
            return False
    return bool(result == wanted)
