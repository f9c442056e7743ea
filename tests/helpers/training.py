"""Training inside the test process: one world of one rank for all tests, tiny caches, students and configurations."""

import functools
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cache.catalog import Catalog
from stillroom.config import Json, validate_config
from stillroom.program import StopRequest
from student_train.config.run import TrainConfig
from student_train.data import freezing
from student_train.data.freezing import SelectionRequest
from student_train.runtime.ranks import RANK_VARIABLES, Ranks, joined_ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.loop import train
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.students import VOCAB_SIZE, make_student

IGNORE_LIBRARY_WARNINGS = pytest.mark.filterwarnings("ignore:::torch", "ignore:::deepspeed", "ignore:::peft")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    """60 chains of up to 40 tokens over 300 ids."""
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", num_chains=60, vocab_size=VOCAB_SIZE, max_tokens=40)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 2 layers."""
    return make_student(tmp_path_factory.mktemp("student") / "student")


@dataclass(frozen=True)
class Trainer:
    """Configures and runs trainings of `student` on `cache`, each in a folder of its own below `folder`."""

    folder: Path
    cache: SyntheticCache
    student: Path
    ranks: Ranks
    finished_runs: dict[str, TrainConfig]
    pack_tokens: int = 128

    def config(self, name: str, /, *stages: Json, **blocks: Any) -> TrainConfig:
        """7 steps of 512 tokens in float32 at ZeRO 2, in the folder `name`; stages and blocks override."""
        stage = {"learning_rate": 1e-2, "batch_tokens": 512, "epochs": 2}
        given: Json = {
            "run": str(self.folder / name),
            "student": {"model": str(self.student)},
            "data": {"caches": [str(self.cache.root)], "where": "split = 'train'", "pack_tokens": self.pack_tokens},
            "stages": [{**stage, **one} for one in stages] or [stage],
            "engine": {"precision": "float32"},
            "checkpoint": {"every_steps": 3},
            "eval": {"max_chains": 5},
        }
        for block, value in blocks.items():
            given[block] = {**given[block], **value} if isinstance(value, dict) and block in given else value
        return validate_config(given, TrainConfig, "test")

    def finish(self, config: TrainConfig) -> Json:
        """Trains to the end and returns the summary."""
        return train(config, self.ranks, StopRequest())

    def run(self, config: TrainConfig, stop_after: int | None = None) -> list[Json]:
        """Trains and returns the lines of metrics.jsonl; with `stop_after` it is interrupted after so many steps."""
        if stop_after is None:
            self.finish(config)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(config, self.ranks, StopAfter(stop_after))
        return RunFolder(config.run).read_metrics()

    def finished(self, *stages: Json, **blocks: Any) -> TrainConfig:
        """A run from its start to its end, trained once for all tests that ask for it: they only read its folder."""
        config = self.config(f"finished-{len(self.finished_runs)}", *stages, **blocks)
        key = config.model_copy(update={"run": Path()}).model_dump_json()
        if key not in self.finished_runs:
            self.finish(config)
            self.finished_runs[key] = config
        return self.finished_runs[key]

    def reference(self, *stages: Json, **blocks: Any) -> list[Json]:
        """The lines of metrics.jsonl of such a run."""
        return RunFolder(self.finished(*stages, **blocks).run).read_metrics()


@pytest.fixture(scope="session")
def references() -> dict[str, TrainConfig]:
    """What `Trainer.finished` has trained already, by what was asked for."""
    return {}


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers what was asked of the same shards before from memory: a freeze takes a third of a second."""
    monkeypatch.setattr(freezing, "_query", _query_once)


@pytest.fixture
def trainer(
    tmp_path: Path,
    cache: SyntheticCache,
    student: Path,
    references: dict[str, TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    asked_once: None,
) -> Iterator[Trainer]:
    """In a world of one rank. DeepSpeed reads the variables, other tests must not see them."""
    world = _world()
    for name, value in RANK_VARIABLES.items():
        monkeypatch.setenv(name, value)
    # ZeRO 3 replaces it for good by one that is slower.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    yield Trainer(tmp_path, cache, student, world, references)
    _leave_out_imported()


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


def losses_of(records: list[Json]) -> list[float]:
    """Loss of each step, exactly as it was logged."""
    return [record["loss"] for record in records]


@functools.cache
def _leave_out_imported() -> None:
    """Leaves what the first training has imported out of the collections of garbage after every later stage."""
    gc.collect()
    gc.freeze()


def _query_once(catalog: Catalog, number: int, request: SelectionRequest) -> Any:
    """What `freezing._query` answers, which depends on its arguments and the shards alone."""
    files = [table.path_of(file) for table in (catalog.chains, catalog.verdicts) for file in table.files()]
    stats = [(path, path.stat()) for path in files if isinstance(path, Path)]
    shards = tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)
    key = (number, request.where, request.weight, request.key, len(files), shards)
    if key not in _answers:
        _answers[key] = _query(catalog, number, request)
    return _answers[key]


_query = freezing._query
_answers: dict[Any, Any] = {}


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
