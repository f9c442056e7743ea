"""What a run's folder forgets when a run that has learnt nothing is asked for something else."""

from pathlib import Path

import pytest

from stillroom.config import validate_config
from stillroom.errors import ConfigError
from student_train.config.run import TrainConfig
from student_train.runtime.run_folder import RunFolder

LEFT_BEHIND = (
    "a.selection.parquet",
    "a.selection.source.parquet",
    "a.selection-text/0.parquet",
    "heldout.selection.parquet",
    "metrics.jsonl",
    "eval.json",
    "checkpoints/a-000002/state.json",
    "stages/a/model.safetensors",
    "tensorboard/events",
)


def make_config(root: Path, learning_rate: float) -> TrainConfig:
    """A run in `root`."""
    given = {
        "run": str(root),
        "student": {"model": "model"},
        "data": {"caches": ["cache"], "pack_tokens": 64},
        "stages": [{"name": "a", "learning_rate": learning_rate, "batch_tokens": 64}],
    }
    return validate_config(given, TrainConfig, "test")


def test_a_run_without_a_checkpoint_restarts_when_it_changes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    run.open(make_config(run.root, 0.1), has_learnt=False)
    for name in LEFT_BEHIND:
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left behind")
    run.open(make_config(run.root, 0.1), has_learnt=False)
    assert all((run.root / name).exists() for name in LEFT_BEHIND)
    assert run.has_frozen(make_config(run.root, 0.1))
    assert not run.has_frozen(make_config(run.root, 0.2))
    with pytest.raises(ConfigError, match=r"was started with stages\.0\.learning_rate=0\.1, now it is 0\.2"):
        run.open(make_config(run.root, 0.2), has_learnt=True)
    run.open(make_config(run.root, 0.2), has_learnt=False)
    assert sorted(path.name for path in run.root.iterdir()) == ["config.yaml", "plan"]
    # Retokenised chains say themselves what they were made of.
    assert (run.root / "plan" / "a.selection-text" / "0.parquet").exists()
    assert run.read_config().stages[0].learning_rate == 0.2
