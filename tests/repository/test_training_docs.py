"""docs/training.md: its pieces of configuration are valid and its table holds every loss."""

import re

import pytest
import yaml

from stillroom.config import validate_config
from student_train.config.run import TrainConfig
from student_train.losses.names import LOSSES
from student_train.schedule import check_mixes
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
BASE = {
    "run": "runs/demo/run",
    "student": {"model": "runs/demo/student"},
    "data": {"caches": ["runs/demo/cache"]},
    "stages": [{"learning_rate": 1e-5}],
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1].strip(" -"))
def test_every_piece_of_configuration_is_valid(block: str) -> None:
    config = validate_config({**BASE, **yaml.safe_load(block)}, TrainConfig, str(PAGE))
    for stage in config.stages:
        check_mixes(stage, 100)


def test_the_table_holds_every_loss() -> None:
    named = set(re.findall(r"^\| (`.*?`) \|", TEXT, flags=re.MULTILINE))
    losses = {name for cell in named for name in re.findall(r"`([a-z_]+)`", cell)}
    assert losses == set(LOSSES)
