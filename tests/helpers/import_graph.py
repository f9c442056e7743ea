"""Who imports whom, read from the source without running it.

An import is *eager* when it runs as soon as its module is imported, *lazy* when it stands in a function, and absent
when it stands under `if TYPE_CHECKING`. `importlib.import_module("name")` and `__import__("name")` count as imports.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = {"stillroom": "shared/stillroom", "teacher_cache": "teacher_cache", "student_train": "student_train"}


@dataclass(frozen=True)
class Import:
    """One name that a file imports, whole (`vllm.v1.outputs`, and for `from a import b` both `a` and `a.b`)."""

    file: str
    line: int
    name: str
    is_eager: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def imports_of(root: Path) -> list[Import]:
    """All imports in the project's packages under `root`."""
    files = [file for folder in PACKAGES.values() for file in sorted((root / folder).rglob("*.py"))]
    return [found for file in files for found in imports_in(root, file)]


@cache
def imports_in(root: Path, file: Path) -> list[Import]:
    """All imports of one file, relative ones resolved."""
    relative = file.relative_to(root)
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(relative))
    return [
        Import(relative.as_posix(), node.lineno, name, is_eager)
        for node, is_eager in _statements(tree, is_eager=True)
        for name in _names(node, relative.parent.parts)
    ]


def eager_closure(root: Path, module: str) -> dict[str, list[str]]:
    """Packages from outside the project that `import module` loads, each with the chain of modules that leads there.

    Raises FileNotFoundError where the project has no such module.
    """
    if _file_of(root, module) is None:
        raise FileNotFoundError(f"{module} is not a module under {root}")
    reached: dict[str, list[str]] = {}
    chains = {module: [module]}
    queue = [module]
    while queue:
        current = queue.pop()
        file = _file_of(root, current)
        found = imports_in(root, file) if file else []
        for name in _with_parents([item.name for item in found if item.is_eager] + [current]):
            if name in chains:
                continue
            chains[name] = [*chains[current], name]
            if name.partition(".")[0] in PACKAGES:
                queue.append(name)
            else:
                reached.setdefault(name.partition(".")[0], chains[name])
    return reached


def _statements(node: ast.AST, is_eager: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield child, is_eager
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []), is_eager)
            continue
        is_body = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _statements(child, is_eager and not is_body)


def _names(node: ast.stmt | ast.expr, folder: tuple[str, ...]) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = ".".join([*folder[: len(folder) - level + 1], *([module] if module else [])]) if level else module
            return [str(base), *(f"{base}.{alias.name}" for alias in names)]
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            is_import = ast.unparse(func).split(".")[-1] in ("import_module", "__import__")
            return [name] if is_import else []
    return []


def _with_parents(names: list[str]) -> list[str]:
    """`a.b.c` loads `a` and `a.b` too."""
    return [".".join(parts[: end + 1]) for parts in (name.split(".") for name in names) for end in range(len(parts))]


def _file_of(root: Path, module: str) -> Path | None:
    first, *rest = module.split(".")
    stem = root.joinpath(PACKAGES.get(first, first), *rest)
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)
