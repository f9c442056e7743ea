"""What both programs do before a command runs."""

import os

import pytest

from stillroom.program import share_cores

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize("own", [None, *VARIABLES])
def test_threads_sleep_while_they_wait_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "7")
    # So that what is set here is undone as well.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == {None: "PASSIVE", "OMP_WAIT_POLICY": "7"}.get(own)
