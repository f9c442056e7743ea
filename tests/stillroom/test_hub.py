"""A hub that does not answer is told once."""

import logging

import pytest

from stillroom import models


def test_failed_attempts_are_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "_said", set())
    client = logging.getLogger("huggingface_hub.utils._http")
    models.hush_hub()
    models.hush_hub()
    for attempt in range(1, 6):
        client.warning("'[Errno 111] Connection refused' thrown while requesting HEAD address/config.json")
        client.warning(f"Retrying in 1s [Retry {attempt}/5].")
    client.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    err = capsys.readouterr().err
    assert err.count("does not answer") == 1
