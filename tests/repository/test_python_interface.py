"""The people's interface: what docs/python.md shows runs as it stands, and importing it is cheap."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import stillroom
import student_train
import student_train.data
import student_train.losses
from student_train.config.run import StudentConfig, TrainConfig
from student_train.data import to_torch
from student_train.losses import CrossEntropy, LossMix
from student_train.losses.fused_head import fuse_head
from student_train.model.student import Student, load_causal
from tests.helpers import ROOT
from tests.helpers.caches import make_cache
from tests.helpers.students import VOCAB_SIZE, make_student

PAGE = ROOT / "docs" / "python.md"
IMPORT_MS = 50.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and a student where the demo leaves them."""
    folder = tmp_path_factory.mktemp("place")
    make_cache(folder / "runs/demo/cache", 40, "topk-u8", vocab_size=VOCAB_SIZE, draws=2)
    make_student(folder / "runs/demo/student")
    return folder


def test_the_page_runs_as_it_stands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), names)
    names["cache"].close()
    assert names["frame"]["chains"].sum() == 40
    assert names["ids_TK"].shape == (names["sample"].chain["num_tokens"], 4)
    assert names["losses"][-1] < names["losses"][0]


def test_the_loop_of_the_page_computes_what_the_trainer_computes(place: Path) -> None:
    selection = student_train.data.freeze_selection(place / "same.parquet", place / "runs/demo/cache")
    spec = student_train.data.PlanSpec(pack_tokens=256)
    with student_train.data.PackStream(selection, spec, packs_per_step=1, num_epochs=1) as stream:
        batch = to_torch(next(stream), "cpu")
    assert len(batch.document_lengths) > 2
    mix = LossMix((CrossEntropy(),))
    model: Any = AutoModelForCausalLM.from_pretrained(place / "runs/demo/student", dtype=torch.float32)
    hidden_LH = model.get_decoder()(
        input_ids=batch.input_ids_1L, position_ids=batch.position_ids_1L, use_cache=False
    ).last_hidden_state[0]
    sums = student_train.losses.fused_loss(
        hidden_LH[batch.predict_positions_N], model.lm_head.weight, batch.targets, mix
    )
    folder = str(place / "runs/demo/student")
    own = load_causal(folder, StudentConfig(model=folder), None)
    fuse_head(own)
    torch.testing.assert_close(sums.loss_sum, Student(own)(batch, mix)[0])


def test_a_frozen_selection_is_loaded_again_and_refuses_other_arguments(place: Path) -> None:
    cache = str(place / "runs/demo/cache")
    first = student_train.data.freeze_selection(place / "kept.parquet", cache, where="num_tokens > 5")
    again = student_train.data.freeze_selection(place / "kept.parquet", [cache], where="num_tokens > 5")
    assert again.header == first.header
    with pytest.raises(stillroom.ConfigError, match="was frozen with where"):
        student_train.data.freeze_selection(place / "kept.parquet", cache)


def test_overrides_need_a_file() -> None:
    incomplete: Any = TrainConfig.model_construct
    config = incomplete()
    with pytest.raises(stillroom.ConfigError, match=r"config\.updated"):
        student_train.train(config, overrides=["seed=1"])
    with pytest.raises(stillroom.ConfigError, match=r"nowhere\.yaml does not exist"):
        student_train.evaluate("nowhere.yaml")


@pytest.mark.parametrize("module", [stillroom, student_train, student_train.data, student_train.losses])
def test_everything_promised_is_there(module: Any) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.nothing_of_this_name  # noqa: B018 - the access is the test


def test_the_version_is_the_one_that_is_installed() -> None:
    assert f'version = "{stillroom.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("package", ["stillroom", "teacher_cache", "student_train"])
def test_importing_is_cheap(package: str) -> None:
    script = (
        f"import time; started_s = time.process_time(); import sys, {package}\n"
        "print(1000 * (time.process_time() - started_s))\n"
        "assert not {'pydantic', 'pyarrow', 'numpy', 'torch', 'duckdb'} & sys.modules.keys(), sys.modules.keys()"
    )
    # The least of three: a busy machine can only add.
    spent_ms = [
        float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(spent_ms) < IMPORT_MS
