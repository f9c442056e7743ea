"""Recipes that people paste: they parse, and they say --worker as the command reads it."""

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from teacher_cache.config import EmbeddedConfig
from teacher_cache.prompts.prompts import parse_worker
from tests.helpers import ROOT

RECIPES = ROOT / "docs" / "recipes" / "cluster.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    found = [text for kind, text in BLOCK.findall(RECIPES.read_text(encoding="utf-8")) if kind == language]
    assert found
    return found


@pytest.mark.parametrize("script", blocks("bash"))
def test_shell_scripts_parse(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """srun runs its command; teacher-cache and scontrol note how they were called, the former ends with STATUS."""
    for name, body in {
        "srun": 'exec "$@"',
        "teacher-cache": 'echo "teacher-cache $*" >> "$CALLS"; exit "$STATUS"',
        "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (130, True), (2, False)])
def test_the_slurm_array_asks_for_each_share_and_requeues_what_was_interrupted(
    stubs: dict[str, str], status: int, requeued: bool
) -> None:
    script = blocks("bash")[0]
    array = re.search(r"--array=(\d+)-(\d+)$", script, re.MULTILINE)
    assert array is not None
    shares = []
    for index in range(int(array[1]), int(array[2]) + 1):
        Path(stubs["CALLS"]).write_text("")
        task = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "77", "STATUS": str(status)}
        ended = subprocess.run(["bash", "-c", script], env={**stubs, **task}, check=False)
        assert ended.returncode == status
        build, *rest = Path(stubs["CALLS"]).read_text().splitlines()
        assert rest == ([f"scontrol requeue 77_{index}"] if requeued else [])
        shares.append(parse_worker(build.split("--worker ")[1]))
    assert {share.count for share in shares} == {len(shares)}
    assert [share.index for share in shares] == list(range(len(shares)))


def test_the_kubernetes_job_has_an_index_for_each_share() -> None:
    (job,) = [document for document in map(yaml.safe_load, blocks("yaml")) if "kind" in document]
    spec: dict[str, Any] = job["spec"]
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    for index in range(spec["completions"]):
        line = ["sh", "-c", container["args"][0].replace("exec teacher-cache", "echo")]
        said = subprocess.run(
            line, env={"JOB_COMPLETION_INDEX": str(index)}, text=True, capture_output=True, check=True
        )
        share = parse_worker(said.stdout.split("--worker ")[1].strip())
        assert (share.index, share.count) == (index, spec["completions"])


def test_ray_recipes_are_python_and_configuration() -> None:
    for program in blocks("python"):
        ast.parse(program)
    (engine,) = [document["engine"] for document in map(yaml.safe_load, blocks("yaml")) if "engine" in document]
    assert EmbeddedConfig.model_validate({"kind": "embedded", **engine}).distributed_executor_backend == "ray"
