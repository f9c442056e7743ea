"""Both programs complete what is typed in a shell, say their version, and name a package that is missing."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.programs import PROGRAMS, Program


def run(program: str, *arguments: str, **environ: str) -> str:
    return Program([program, *arguments], environ={**os.environ, **environ}).wait(expect=0)


@pytest.mark.parametrize(
    ("program", "typed", "offered"),
    [
        ("teacher-cache", "teacher-cache ver", ["verify"]),
        ("teacher-cache", "teacher-cache sql --exp", ["--export-views"]),
        ("student-train", "student-train ex", ["export"]),
        ("student-train", "student-train run --np", ["--nproc"]),
    ],
)
def test_bash_is_offered_what_fits(program: str, typed: str, offered: list[str]) -> None:
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    number = str(len(typed.split()) - 1)
    said = run(program, **{variable: "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": number})
    assert said.split() == offered


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_shown(program: str, shell: str) -> None:
    said = run(program, "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_{program.upper().replace('-', '_')}_COMPLETE=complete_{shell}" in said


def test_a_package_that_is_missing_is_one_line() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom student_train.cli import main\n"
    script += "sys.argv = ['student-train', 'eval', '--model', 'm', '--cache', 'c']; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr == "student-train: this needs the package torch: pip install 'stillroom[student]'\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_is_that_of_the_installed_package(program: str) -> None:
    script = (
        f"import stillroom.program, {PROGRAMS[program]} as cli\n"
        "stillroom.program.version = '{} 1.2.3'.format\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", script, "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "stillroom 1.2.3\n"
