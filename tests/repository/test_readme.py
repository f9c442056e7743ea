"""The README's commands do what it says: those that need no GPU are run, in order, where a demo was."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from stillroom.config import StrictModel, load_config, validate_config
from stillroom.rounds.config import RoundsConfig, generate_config, score_config, train_config
from student_train.config.run import TrainConfig
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.states.config import FeaturesConfig
from tests.helpers import ROOT
from tests.helpers.line import TEACHER, Line

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "docs" / "examples"


def commands_of(text: str) -> list[list[str]]:
    """Command lines of the ```bash blocks, which run anywhere; blocks without a language need a GPU or a network."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(row, comments=True) for block in blocks for row in block.splitlines() if row.strip()]


def test_the_commands_run_in_order(line: Line, vllm_server: str) -> None:
    served = {**TEACHER, "cache": "runs/demo/served", "engine": {"kind": "server", "endpoints": [vllm_server]}}
    (line.folder / "benchmarks/demo/served.yaml").write_text(yaml.safe_dump(served))
    commands = commands_of(README)
    assert len(commands) > 10
    assert {command[0] for command in commands} == {"teacher-cache", "student-train"}
    for command in commands:
        # The tiny teacher has two layers to keep, where the demo's has thirty.
        line.program(*("2" if command[:2] == ["student-train", "init"] and word == "6" else word for word in command))
    assert (line.folder / "cache.html").stat().st_size > 5_000
    assert (line.folder / "runs/demo/student-export/model.safetensors").exists()
    for cache in ("served", "scored"):
        assert list((line.folder / "runs/demo" / cache / "chains").rglob("*.parquet"))


def test_every_example_that_it_names_is_there_and_valid() -> None:
    named = set(re.findall(r"docs/examples/[\w.\-]+\.yaml", README))
    assert named == {f"docs/examples/{path.name}" for path in EXAMPLES.glob("*.yaml")}


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("*.yaml"), *(ROOT / "benchmarks/demo").glob("*.yaml")], ids=lambda path: path.name
)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(path, [], model_of(path))
    assert config.model_dump()
    if isinstance(config, RoundsConfig):
        for number in (1, 2):
            validate_config(generate_config(config, number), BuildConfig, "generate")
            validate_config(score_config(config, number), ScoreConfig, "score")
            validate_config(train_config(config, number), TrainConfig, "train")


def model_of(path: Path) -> type[StrictModel]:
    blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "rounds" in blocks:
        return RoundsConfig
    if "student" in blocks:
        return TrainConfig
    if "run" not in blocks:
        return FeaturesConfig
    return ScoreConfig if "completions" in blocks else BuildConfig
