"""Recipes that people paste: they parse, and they start what they should."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from teacher_cache.config import EmbeddedConfig
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
def test_the_slurm_array_joins_and_requeues_what_was_interrupted(
    stubs: dict[str, str], status: int, requeued: bool
) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "77", "STATUS": str(status)}
    ended = subprocess.run(["bash", "-c", blocks("bash")[0]], env={**stubs, **task}, check=False)
    assert ended.returncode == status
    build, *rest = Path(stubs["CALLS"]).read_text().splitlines()
    assert build == "teacher-cache build /shared/configs/teacher.yaml --join"
    assert rest == (["scontrol requeue 77_3"] if requeued else [])


def test_the_kubernetes_job_joins() -> None:
    (job,) = [document for document in map(yaml.safe_load, blocks("yaml")) if "kind" in document]
    spec: dict[str, Any] = job["spec"]
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert container["args"] == ["exec teacher-cache build /shared/configs/teacher.yaml --join"]


def test_the_engine_across_nodes_is_configuration() -> None:
    (engine,) = [document["engine"] for document in map(yaml.safe_load, blocks("yaml")) if "engine" in document]
    assert EmbeddedConfig.model_validate({"kind": "embedded", **engine}).distributed_executor_backend == "ray"
