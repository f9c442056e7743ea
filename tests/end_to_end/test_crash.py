"""A small run of the crash benchmark: kills at random moments lose nothing and repeat nothing."""

import json
import subprocess
import sys

from tests.helpers import ROOT


def test_killed_builders_leave_every_row_exactly_once() -> None:
    command = [sys.executable, "-m", "benchmarks.crash", "--kills", "10", "--workers", "2", "--seed", "1", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout)
    assert (result["kills"], result["lost"], result["duplicated"], result["verify_ok"]) == (10, 0, 0, True)
    assert result["rows_found"] == result["rows_expected"] > 0
