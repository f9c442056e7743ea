"""Programs start from any folder: here one with packages `shared` and `schemas` of its own, which raise if imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.config import Json, plain
from student_train.runtime.ranks import RANK_VARIABLES
from student_train.runtime.run_folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.training import (
    IGNORE_LIBRARY_WARNINGS,
    Trainer,
    asked_once,
    cache,
    losses_of,
    references,
    student,
    trainer,
)
from tests.helpers.vocabularies import make_text_cache, student_folder, teacher_tokenizer

__all__ = ["asked_once", "cache", "references", "student", "trainer"]

HELP_OF_EVERY_COMMAND = """
import sys
from importlib import import_module
from typer.main import get_command
app = import_module(f"{sys.argv[1]}.cli").app
for name in sorted(get_command(app).commands):
    try:
        app([name, "--help"], prog_name=sys.argv[1])
    except SystemExit as end:
        assert not end.code, name
"""
JUDGE = """
from stillroom.judging.process import JudgeProcess
with JudgeProcess() as judge:
    judge.prepare(["exact"])
    print(judge.judge("exact", "4", "4", {}).correct)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose own packages must not be imported."""
    for name in ("shared", "schemas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise AssertionError('imported {name}')\n")
    return tmp_path


@pytest.mark.parametrize("program", ["teacher_cache", "student_train"])
def test_every_command_shows_its_help(folder: Path, program: str) -> None:
    helps = run(folder, "-c", HELP_OF_EVERY_COMMAND, program)
    assert helps.count("Usage: ") >= 7


def test_the_judge_process_judges(folder: Path) -> None:
    assert run(folder, "-c", JUDGE) == "True\n"


@IGNORE_LIBRARY_WARNINGS
def test_torchrun_gives_the_losses_of_one_rank_and_our_ranks_find_the_run_finished(
    folder: Path, trainer: Trainer
) -> None:
    """On distributions that are projected first, which the second rank waits for."""
    teacher_cache = make_text_cache(folder / "cache", teacher_tokenizer(folder / "teacher"), num_chains=48)
    stage: Json = {"max_steps": 2, "losses": {"forward_kl": 0.8, "chunk_likelihood": 0.1, "cross_entropy": 0.1}}
    data: Json = {"kind": "projected", "caches": [str(teacher_cache.root)]}
    blocks: Json = {"eval": None, "student": {"model": str(student_folder(folder, "pieces"))}, "data": data}
    whole = losses_of(trainer.reference(stage, **blocks))
    config = trainer.config("run", stage, **blocks)
    path = folder / "config.json"
    path.write_text(json.dumps(plain(config)))
    command = ("-m", "student_train.cli", "run", str(path), "--json")
    trained = run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)
    assert losses_of(RunFolder(config.run).read_metrics()) == pytest.approx(whole, rel=1e-4)
    assert json.loads(run(folder, *command, "--nproc", "2")) == json.loads(trained)


def run(folder: Path, *arguments: str) -> str:
    """stdout of Python in the folder."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environ = {**inherited, "PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
