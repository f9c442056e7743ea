"""Runs on several hosts: what names them, and two on this machine, one of them reached by an ssh that is a shell."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

from stillroom.errors import ConfigError, DataError
from student_train.runtime.hosts import FIRST_PORT, Host, read_hosts, run_on_hosts, slurm_meeting
from student_train.runtime.launching import _start
from student_train.runtime.peers import Meeting, Peers, meet
from tests.helpers.programs import Program
from tests.helpers.rank_program import MESSAGE

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
shift
exec env -i PATH="$PATH" TMPDIR="$TMPDIR" HOME="$HOME" bash -c "$*"
"""
"""It takes as few variables along as the real one."""
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_damage_that_a_rank_of_another_host_meets_ends_the_run_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh, hosts = tmp_path / "ssh", tmp_path / "hosts"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    hosts.write_text("# two names of this machine\nme@localhost slots=1\n127.0.0.1  slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, _, said = Program(["tests.helpers.rank_program", "damage", str(hosts)]).communicate()
    assert code == 3, said
    assert "rank 0 is there" in said
    assert "rank 1 of 2, on " in said
    assert f"  student-train: {MESSAGE}" in said


def test_this_machine_alone_needs_no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no such name")))
    hosts, ranks = tmp_path / "hosts", tmp_path / "rank-"
    program = ["-c", f"import os; open({str(ranks)!r} + os.environ['RANK'], 'x')"]
    for name in ("localhost", socket.gethostname()):
        hosts.write_text(f"{name} slots=2\n")
        assert run_on_hosts(hosts, program) == 0
        for rank in (0, 1):
            Path(f"{ranks}{rank}").unlink()
    (tmp_path / "ssh").touch(0o755)
    hosts.write_text("localhost slots=2\ngpu-7.invalid slots=2\n")
    with pytest.raises(DataError, match=r"gpu-7\.invalid cannot reach localhost, the first host: write the name"):
        run_on_hosts(hosts, program)


def test_hosts_meet_at_the_first_one_without_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh, hosts, said = tmp_path / "ssh", tmp_path / "hosts", tmp_path / "said"
    ssh.write_text(f'#!/bin/bash\necho "$*" >> {said}\n')
    ssh.chmod(0o755)
    hosts.write_text("me@gpu-1 slots=8\nme@gpu-2 slots=8\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run_on_hosts(hosts, ["-c", "pass"]) == 0
    lines = said.read_text().splitlines()
    assert len(lines) == 2
    assert all(" me@gpu-" in line and '"first_host": "gpu-1"' in line for line in lines)


def test_a_first_host_that_another_cannot_resolve_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("Name or service not known")))
    with pytest.raises(ConfigError, match="cannot resolve gpu-1, the first of --hosts"):
        meet(Meeting("run", "gpu-1", 29400, 2, 1, 8))


def test_ranks_know_how_many_machines_they_are_on(tmp_path: Path) -> None:
    peers = cast("Peers", SimpleNamespace(first_rank=1, num_ranks=4, num_hosts=3, address="gpu-1"))
    command = [sys.executable, "-c", "import os; print(os.environ['GROUP_WORLD_SIZE'])"]
    assert _start(0, 1, command, 1, tmp_path, peers).wait() == 0
    assert (tmp_path / "rank-1.log").read_text().split() == ["3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "line 2: 'b' is not HOST slots=N"),
        ("a slots=0", "line 1: 'a slots=0' is not"),
        ("a slots=2\n\na slots=1", "line 3: a is listed twice"),
        ("-oProxyCommand=x slots=1", "is an option, not a host"),
        ("# none", "lists no host"),
    ],
)
def test_a_file_of_hosts_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_hosts(path)
    path.write_text("gpu-1 slots=8 # the first\n\ngpu-2  slots=4\n")
    assert read_hosts(path) == [Host("gpu-1", 8), Host("gpu-2", 4)]


def test_a_task_of_srun_knows_its_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert slurm_meeting(STEP, None) == Meeting("77.1", "gpu07", FIRST_PORT + 771, 3, 1, 8)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[[ $* == "show hostnames gpu[07-08,12]" ]] && printf "first\\nsecond\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm_meeting(STEP, 2) == Meeting("77.1", "first", FIRST_PORT + 771, 3, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"SLURM_STEP_NUM_TASKS": "24"}, "24 tasks on 3 nodes: use --ntasks-per-node 1"), (None, "must run under srun")],
)
def test_other_tasks_are_refused(change: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm_meeting({} if change is None else {**STEP, **change}, None)
