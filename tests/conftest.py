"""Fixtures that several test files share, and which tests run on the same worker when several run at once."""

import gc
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.environment import set_environment
from tests.helpers.line import Line, run_line
from tests.helpers.vllm_server import TINY_ENVIRON, TINY_FLAGS, serve

# The same examples each time: what is green stays green. `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("explore")
settings.register_profile("repeat", derandomize=True)
settings.load_profile("repeat")

LINE = "line"
LINE_FILES = {
    "tests/end_to_end/test_end_to_end.py",
    "tests/end_to_end/test_hybrid_line.py",
    "tests/repository/test_readme.py",
    "tests/teacher_cache/engine/http/test_server_vllm.py",
    "tests/teacher_cache/engine/vllm/test_capture.py",
    "tests/teacher_cache/engine/vllm/test_engine.py",
    "tests/teacher_cache/engine/test_plugin.py",
    "tests/teacher_cache/engine/test_switches.py",
    "tests/teacher_cache/states/test_vllm_states.py",
    "tests/teacher_cache/building/test_score_vllm.py",
}
"""They share the session fixtures below, which take a minute, or a process that has imported vLLM: all on one worker.
"""
LONGEST = (
    LINE,
    "tests/student_train/runtime/test_checkpoint.py",
    "tests/student_train/test_train.py",
    "tests/teacher_cache/building/test_build.py",
)
"""They start first, so that no worker is left alone with one of them at the end."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Hands whole files to workers, in the order of the collection; the files of the line count as one."""
    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _group_of
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank_of = {group: rank for rank, group in enumerate(LONGEST)}
    items.sort(key=lambda item: rank_of.get(_group_of(item.nodeid), len(rank_of)))


def _group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return LINE if file in LINE_FILES else file


def pytest_collection_finish() -> None:
    # Thousands of modules are imported by now. Each collection of garbage would go through all their objects again,
    # a quarter of a second: a fifth of the time of the trainings, which collect after every stage.
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    # What is frozen is not freed at exit, which duckdb reports as leaks.
    gc.unfreeze()


def pytest_configure() -> None:
    # Nothing that the collection imports is garbage.
    gc.disable()
    set_environment()


@pytest.fixture(autouse=True)
def leave_ctrl_c_alone() -> Iterator[None]:
    """A handler that a test leaves behind would swallow the Ctrl-C of a later one, which then never ends.

    Libraries also replace it in C, where Python does not see it, so it is installed again after every test.
    """
    yield
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert found is signal.default_int_handler


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The whole line, run once a session."""
    return run_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="session")
def vllm_server(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real vLLM server of the line's teacher, with the sampler plugin, started once a session."""
    model, flags = line.folder / "runs/demo/teacher", (*TINY_FLAGS, "--max-logprobs", "68")
    with serve(model, tmp_path_factory.mktemp("server"), *flags, **TINY_ENVIRON) as server:
        yield server.url


@pytest.fixture(scope="session")
def plain_vllm_server(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same without the plugin."""
    model, flags = line.folder / "runs/demo/teacher", (*TINY_FLAGS, "--max-logprobs", "65")
    environ = {**TINY_ENVIRON, "VLLM_PLUGINS": "none"}
    with serve(model, tmp_path_factory.mktemp("plain_server"), *flags, **environ) as server:
        yield server.url
