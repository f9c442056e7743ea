"""A small run of the crash benchmark: kills at random moments lose nothing and repeat nothing."""

import json

import pytest

from tests.helpers.programs import Program


@pytest.mark.parametrize(("flags", "kills"), [([], 6), (["--features"], 4)], ids=["build", "features"])
def test_killed_workers_leave_every_row_exactly_once(flags: list[str], kills: int) -> None:
    options = ["--kills", str(kills), "--workers", "2", "--seed", "1", "--json"]
    result = json.loads(Program(["benchmarks.crash", *flags, *options]).wait(expect=0))
    assert (result["kills"], result["lost"], result["duplicated"], result["verify_ok"]) == (kills, 0, 0, True)
    assert result["rows_found"] == result["rows_expected"] > 0
