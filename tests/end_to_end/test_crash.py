"""A small run of the crash benchmark: kills at random moments lose nothing and repeat nothing."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.parametrize(("flags", "kills"), [([], 6), (["--features"], 4)], ids=["build", "features"])
def test_killed_workers_leave_every_row_exactly_once(flags: list[str], kills: int) -> None:
    options = ["--kills", str(kills), "--workers", "2", "--seed", "1", "--json"]
    command = [sys.executable, "-m", "benchmarks.crash", *flags, *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout)
    assert (result["kills"], result["lost"], result["duplicated"], result["verify_ok"]) == (kills, 0, 0, True)
    assert result["rows_found"] == result["rows_expected"] > 0
