"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers.line import Line, run_line
from tests.helpers.vllm_server import serve

# The same examples each time: what is green stays green. `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("explore")
settings.register_profile("repeat", derandomize=True)
settings.load_profile("repeat")


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The whole line, run once a session."""
    return run_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="session")
def vllm_server(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real vLLM server of the line's teacher, with the sampler plugin, started once a session."""
    folder = tmp_path_factory.mktemp("server")
    with serve(line.folder / "runs/demo/teacher", folder, "--enable-scale-out", "--max-logprobs", "68") as server:
        yield server.url


@pytest.fixture(scope="session")
def plain_vllm_server(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same without the plugin."""
    folder, flags = tmp_path_factory.mktemp("plain_server"), ("--enable-scale-out", "--max-logprobs", "65")
    with serve(line.folder / "runs/demo/teacher", folder, *flags, plugins="none") as server:
        yield server.url


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them, and all below them, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
