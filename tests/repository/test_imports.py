"""Imports run one way, and every heavy library lives behind one file."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.import_graph import PACKAGES, Import, eager_closure, imports_in, imports_of

MAY_IMPORT = {
    "shared": {"stillroom"},
    "teacher_cache": {"stillroom", "teacher_cache"},
    "student_train": {"stillroom", "student_train"},
}
OUTSIDE_THE_PACKAGES = {"benchmarks", "schemas", "shared", "tests", "tools"}

HOMES = {
    "vllm": {
        *(
            f"teacher_cache/engine/vllm/{name}.py"
            for name in ("arguments", "arrays", "capture", "cpu", "engine", "process", "values")
        ),
        *("teacher_cache/states/vllm.py", "teacher_cache/states/vllm_connector.py"),
        # The sampler's plugin, which vLLM loads.
        *(
            "teacher_cache/engine/plugin/register.py",
            "teacher_cache/engine/plugin/hooks_v1.py",
            "teacher_cache/engine/plugin/hooks_v2.py",
        ),
    },
    "deepspeed": {"student_train/runtime/engine.py"},
    "deltalake": {"shared/stillroom/cache/catalog.py"},
    "duckdb": {f"shared/stillroom/sql/{name}.py" for name in ("session", "statements", "user_files")},
    "peft": {
        *("student_train/model/student.py", "student_train/losses/fused_head.py", "student_train/exporting.py"),
        # The one route of a teacher's adapter without vLLM; optional there.
        "teacher_cache/states/transformers.py",
    },
    "ray": {"teacher_cache/workers/on_ray.py"},
    "httpx2": {"teacher_cache/engine/http/client.py", "student_train/compare/sides.py"},
}
OTHER_ENVIRONMENTS = "student_train/export/workers/"
"""The exception: scripts that run foreign tools, vLLM among them, most of them in environments that lack the project.
They may import any library and nothing of ours.
"""
INSIDE_VLLM = HOMES["vllm"] | {
    "teacher_cache/engine/plugin/batch.py",
    "teacher_cache/engine/plugin/signals.py",
}
"""Imported where vllm is, and therefore torch."""
ALWAYS_LAZY = {"deepspeed", "deltalake", "duckdb", "peft", "ray"}

NEVER_IN = {
    "shared": {"torch", "vllm", "deepspeed", "peft"},
    "teacher_cache": {"deepspeed"},
    "student_train": {"vllm"},
}

IMPORT_NAMES = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml", "python-stdnum": "stdnum"}

CLIS = ("teacher_cache.cli", "student_train.cli")
SLOW_TO_IMPORT = {
    *("torch", "transformers", "vllm", "deepspeed", "peft", "datasets", "reasoning_gym", "math_verify", "tensorboard"),
    *("duckdb", "deltalake", "matplotlib", "httpx2", "ray"),
}


def broken_rules(imports: list[Import]) -> list[str]:
    """One line for every import that breaks a rule."""
    return [f"{item.file}:{item.line}: {rule}" for item in imports if (rule := _broken_rule(item))]


def _broken_rule(item: Import) -> str | None:
    home = item.file.partition("/")[0]
    is_foreign = item.file.startswith(OTHER_ENVIRONMENTS)
    if item.package in {*PACKAGES, *OUTSIDE_THE_PACKAGES} and (is_foreign or item.package not in MAY_IMPORT[home]):
        return f"{OTHER_ENVIRONMENTS if is_foreign else home} imports {item.package}"
    if is_foreign:
        return None
    if item.package in NEVER_IN[home]:
        return f"{home} imports {item.package}"
    if item.file not in HOMES.get(item.package, {item.file}):
        return f"{item.package} lives behind {' and '.join(sorted(HOMES[item.package]))}"
    if item.package in ALWAYS_LAZY and item.is_eager:
        return f"{item.package} is imported at module level"
    return None


def of_the_project() -> list[Import]:
    return [item for item in imports_of(ROOT) if not item.file.startswith(OTHER_ENVIRONMENTS)]


def test_the_project_keeps_its_import_rules() -> None:
    imports = imports_of(ROOT)
    foreign = {item.package for item in imports if item.file.startswith(OTHER_ENVIRONMENTS)}
    assert foreign >= {"protocol", "openvino", "llmcompressor", "vllm"}
    assert {item.file.partition("/")[0] for item in imports} == set(MAY_IMPORT)
    assert broken_rules(imports) == []


@pytest.mark.parametrize("library", HOMES)
def test_each_home_is_really_used(library: str) -> None:
    used_in = {item.file for item in of_the_project() if item.package == library}
    assert used_in, f"no file imports {library}: does the rule still name the right files?"


@pytest.mark.parametrize("cli", CLIS)
def test_a_program_starts_without_slow_libraries(cli: str) -> None:
    reached = eager_closure(ROOT, cli)
    assert "typer" in reached
    assert {name: " → ".join(chain) for name, chain in reached.items() if name in SLOW_TO_IMPORT} == {}


def test_what_only_starts_ranks_loads_no_torch() -> None:
    """It takes seconds and a gigabyte, on a machine that may have no GPU."""
    reached = eager_closure(ROOT, "student_train.runtime.hosts")
    assert SLOW_TO_IMPORT & set(reached) == set()


def test_what_both_sides_share_loads_no_framework() -> None:
    for file in sorted((ROOT / "shared" / "stillroom").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / "shared").with_suffix("").parts).removesuffix(".__init__")
        assert not {"torch", "transformers", "vllm", "deepspeed", "peft"} & set(eager_closure(ROOT, module)), module


def test_every_library_is_declared() -> None:
    """What is imported eagerly outside the files that a heavy library lives behind is in the base install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = declared(project["dependencies"])
    extras = {name: declared(lines) for name, lines in project["optional-dependencies"].items()}
    everything = base.union(*extras.values())
    imports = [item for item in of_the_project() if item.package not in {*PACKAGES, *sys.stdlib_module_names}]
    assert {item.package for item in imports} - everything == set()
    apart = INSIDE_VLLM | HOMES["httpx2"]
    eager = [item for item in imports if item.is_eager and item.file not in apart]
    assert {item.package for item in eager if not item.file.startswith("student_train/")} - base == set()
    assert {item.package for item in eager if item.file.startswith("student_train/")} - base - extras[
        "student"
    ] == set()


def declared(requirements: list[str]) -> set[str]:
    """Import names of the distributions in requirement lines."""
    names = [re.split(r"[\[<>=!~; ]", line)[0] for line in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("shared/stillroom/a.py", "import shared.stillroom.files", "shared imports shared"),
        ("shared/a.py", "from teacher_cache.config import X", "shared imports teacher_cache"),
        ("teacher_cache/a.py", "def f():\n    from student_train import losses", "teacher_cache imports student_train"),
        ("student_train/a.py", "from teacher_cache import shard", "student_train imports teacher_cache"),
        ("student_train/a.py", "import tests.helpers.caches", "student_train imports tests"),
        (f"{OTHER_ENVIRONMENTS}a.py", "import student_train.config", f"{OTHER_ENVIRONMENTS} imports student_train"),
        ("shared/a.py", "def f():\n    import torch.nn as nn", "shared imports torch"),
        ("student_train/a.py", "import importlib\nimportlib.import_module('vllm')", "student_train imports vllm"),
        ("teacher_cache/build.py", "def f():\n    import vllm", "vllm lives behind"),
        ("student_train/training/loop.py", "def f():\n    from deepspeed import x", "deepspeed lives behind"),
        ("shared/a.py", "def f():\n    import duckdb", "duckdb lives behind shared/stillroom/sql/session.py"),
        ("shared/stillroom/cache/catalog.py", "import deltalake", "deltalake is imported at module level"),
        (
            "shared/stillroom/sql/session.py",
            "try:\n    import duckdb\nexcept ImportError:\n    pass",
            "duckdb is imported at module level",
        ),
        ("shared/stillroom/sql/session.py", "class A:\n    import duckdb", "duckdb is imported at module level"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, source: str, rule: str) -> None:
    path = write(tmp_path, file, source)
    assert any(rule in line for line in broken_rules(imports_in(tmp_path, path)))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("shared/stillroom/sql/session.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import duckdb"),
        ("shared/stillroom/sql/session.py", "def f():\n    import duckdb"),
        ("teacher_cache/engine/vllm/engine.py", "def f():\n    import vllm"),
        (
            "student_train/a.py",
            "import torch\nfrom stillroom.storage.paths import sha256_of\nfrom student_train import pack",
        ),
        ("student_train/sub/a.py", "from ..pack import plan"),
        (f"{OTHER_ENVIRONMENTS}a.py", "import vllm"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    assert broken_rules(imports_in(tmp_path, write(tmp_path, file, source))) == []


def test_a_slow_library_behind_two_modules_is_found(tmp_path: Path) -> None:
    write(tmp_path, "teacher_cache/__init__.py", "")
    write(tmp_path, "teacher_cache/cli.py", "from teacher_cache import build")
    write(tmp_path, "teacher_cache/build.py", "from stillroom.deep import f")
    write(tmp_path, "shared/stillroom/__init__.py", "import torch")
    write(tmp_path, "shared/stillroom/deep.py", "def f():\n    import transformers")
    reached = eager_closure(tmp_path, "teacher_cache.cli")
    assert set(reached) == {"torch"}
    assert reached["torch"] == ["teacher_cache.cli", "teacher_cache.build", "stillroom", "torch"]


def write(root: Path, file: str, source: str) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path
