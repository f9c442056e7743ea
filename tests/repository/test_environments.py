"""Each side works where the other side's packages are not installed, and SQL where only the base is.

A child process runs with packages hidden from its import system and from importlib.metadata: to it they look exactly
like packages that are not installed. Set-up installs everything, so nothing else would notice a stray import.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.caches import make_cache
from tests.repository.test_imports import INSIDE_VLLM

TEACHER_ONLY = {"vllm", "teacher_cache"}
STUDENT_ONLY = {"deepspeed", "peft", "tensorboard", "student_train"}
NOT_IN_BASE = {
    *("vllm", "deepspeed", "peft", "tensorboard", "torch", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("datasets", "reasoning_gym", "math_verify", "gguf", "huggingface_hub", "pandas", "polars", "sympy"),
}

HIDE = """
import sys
from importlib.machinery import PathFinder

hidden = set(sys.argv[1].split(","))
del sys.argv[1]

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **options):
        found = PathFinder.find_distributions(*arguments, **options)
        return (item for item in found if item.metadata["Name"].replace("-", "_") not in hidden)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_without(hidden: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + code, ",".join(sorted(hidden)), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run_cli(hidden: set[str], package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"from {package}.cli import main\nsys.argv[0] = '{package.replace('_', '-')}'\nmain()"
    return run_without(hidden, code, *arguments)


def modules_of(package: str) -> list[str]:
    # Workers are scripts for environments of their own, which nothing imports.
    files = [file for file in sorted((ROOT / package).rglob("*.py")) if file.parent.name != "workers"]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def import_all(hidden: set[str], modules: list[str]) -> None:
    code = f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\nprint('imported')"
    finished = run_without(hidden, code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "imported"


def test_hidden_packages_look_as_if_not_installed() -> None:
    finished = run_without({"torch", "yaml"}, "import yaml")
    assert finished.returncode == 1
    assert "No module named 'yaml'" in finished.stderr
    look_up = (
        "import importlib.util, importlib.metadata as m\nprint(importlib.util.find_spec('torch'))\nm.version('torch')"
    )
    finished = run_without({"torch", "yaml"}, look_up)
    assert finished.stdout == "None\n"
    assert "PackageNotFoundError" in finished.stderr


@pytest.mark.parametrize(
    ("package", "command"), [("teacher_cache", "build"), ("teacher_cache", "sql"), ("student_train", "run")]
)
def test_help_needs_the_base_only(package: str, command: str) -> None:
    other_side = {"teacher_cache", "student_train"} - {package}
    finished = run_cli({*NOT_IN_BASE, *other_side}, package, "--help")
    assert finished.returncode == 0, finished.stderr
    assert command in finished.stdout
    finished = run_cli({*NOT_IN_BASE, *other_side}, package, command, "--help")
    assert finished.returncode == 0, finished.stderr


def test_sql_needs_the_base_only(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=7)
    query = "select count(*) as num_chains from chains"
    finished = run_cli({*NOT_IN_BASE, "student_train"}, "teacher_cache", "sql", str(cache.root), query)
    assert finished.returncode == 0, finished.stderr
    assert "7" in finished.stdout


def test_the_student_side_loads_without_the_teacher_side() -> None:
    import_all(TEACHER_ONLY, modules_of("student_train"))


def test_the_teacher_side_loads_without_the_student_side() -> None:
    # Those inside vLLM take it seven seconds to load; test_imports keeps the student's packages out of them.
    inside = {file.removesuffix(".py").replace("/", ".") for file in INSIDE_VLLM}
    import_all(STUDENT_ONLY, [name for name in modules_of("teacher_cache") if name not in inside])


def test_what_both_share_loads_with_the_base_only() -> None:
    import_all(NOT_IN_BASE, [*modules_of("schemas"), *modules_of("shared")])
