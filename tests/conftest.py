"""Fixtures that several test files share."""

import pytest

from tests.line import Line, run_line


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The whole line, run once a session."""
    return run_line(tmp_path_factory.mktemp("line"))
