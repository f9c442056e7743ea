"""Training inside the test process: one world of one rank for all tests, tiny caches, students and configurations."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config import TrainConfig
from student_train.runtime.ranks import RANK_VARIABLES, Ranks, joined_ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training import train
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.students import VOCAB_SIZE, make_student

IGNORE_LIBRARY_WARNINGS = pytest.mark.filterwarnings("ignore:::torch", "ignore:::deepspeed", "ignore:::peft")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """The world of one; DeepSpeed reads the variables, other tests must not see them."""
    world = _world()
    for name, value in RANK_VARIABLES.items():
        monkeypatch.setenv(name, value)
    return world


@functools.cache
def _world() -> Ranks:
    # DeepSpeed keeps the process group of its first start: it cannot be left and joined again.
    joined = joined_ranks()
    world = joined.__enter__()
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    _keep.append(joined)
    return world


_keep: list[Any] = []


class StopAfter(StopRequest):
    """Asks for an end once `num_steps` steps were begun."""

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps
        super().__init__()

    @property
    def is_set(self) -> bool:
        """Counts how often it was asked: once a step."""
        self._left -= 1
        return self._left <= 0

    @is_set.setter
    def is_set(self, value: bool) -> None:
        pass


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    """60 chains of up to 40 tokens over 300 ids."""
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", num_chains=60, vocab_size=VOCAB_SIZE, max_tokens=40)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 2 layers."""
    return make_student(tmp_path_factory.mktemp("student") / "student")


def make_config(run: Path, cache: SyntheticCache, folder: Path, /, *stages: Json, **blocks: Any) -> TrainConfig:
    """A run of 7 steps of 4 packs in float32 at ZeRO 2; stages and blocks override."""
    stage = {"learning_rate": 1e-2, "batch_tokens": 512, "epochs": 2}
    given: Json = {
        "run": str(run),
        "student": {"model": str(folder)},
        "data": {"caches": [str(cache.root)], "where": "split = 'train'", "pack_tokens": 128},
        "stages": [{**stage, **one} for one in stages] or [stage],
        "engine": {"precision": "float32"},
        "checkpoint": {"every_steps": 3},
        "eval": {"max_chains": 5},
    }
    for name, block in blocks.items():
        given[name] = {**given[name], **block} if isinstance(block, dict) and name in given else block
    return validate_config(given, TrainConfig, "test")


def train_run(config: TrainConfig, ranks: Ranks, stop_after: int | None = None) -> list[Json]:
    """Trains and returns the lines of metrics.jsonl; with `stop_after` it is interrupted after so many steps."""
    if stop_after is None:
        train(config, ranks, StopRequest())
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, ranks, StopAfter(stop_after))
    return RunFolder(config.run).read_metrics()


def losses_of(records: list[Json]) -> list[float]:
    """Loss of each step, exactly as it was logged."""
    return [record["loss"] for record in records]
