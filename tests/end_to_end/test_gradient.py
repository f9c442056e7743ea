"""The gradient that a student gets from stored targets, against full distillation on real models."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gradient import AVERAGED, COMPARED, DENSE_LOSS, NUM_REDRAWS, Target, compare
from stillroom.schema.tables import CODECS
from student_train.losses.divergences import Divergence, ForwardKL
from tests.helpers.students import VOCAB_SIZE, make_student

CHAINS = [([5, 6, 7, 8 + number], list(range(20 + number, 60 + number))) for number in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A teacher sure enough that eight of 300 ids have most of its mass, and a student cut short of it."""
    folder = tmp_path_factory.mktemp("models")
    teacher = AutoModelForCausalLM.from_pretrained(make_student(folder / "teacher", tied=False)).eval()
    student = AutoModelForCausalLM.from_pretrained(make_student(folder / "student", layers=1)).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(25.0)
    return teacher, student


def rows(models: tuple[Any, Any], targets: list[Target], dense: Divergence = DENSE_LOSS) -> dict[str, dict[str, float]]:
    found = compare(*models, CHAINS, targets, dense)
    return {row["targets"]: row for row in found["rows"]}


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_that_holds_everything_gives_the_dense_gradient(models: tuple[Any, Any], codec: str) -> None:
    whole = Target("whole", codec, VOCAB_SIZE, None, ForwardKL(tail="bucket"))
    row = rows(models, [whole])["whole"]
    # Eight-bit codes turn the gradient by less than a degree; float32 not at all.
    assert row["angle_deg"] < (0.05 if codec == "topk-f32" else 1.0)
    assert row["length"] == pytest.approx(1.0, abs=1e-4 if codec == "topk-f32" else 0.01)


@pytest.mark.parametrize("codec", CODECS)
def test_drawn_tails_turn_the_gradient_less_than_truncation_and_average_out(
    models: tuple[Any, Any], codec: str
) -> None:
    tail = Target("tail bucket 8", codec, 8, None, ForwardKL(tail="bucket"))
    renormalised = Target("renormalised 8", codec, 8, None, ForwardKL(tail="renormalise"))
    hybrids = [
        Target("hybrid 8+8" + f", draws {seed + 1}" * (seed > 0), codec, 8, None, ForwardKL(), 8, seed)
        for seed in range(NUM_REDRAWS)
    ]
    found = rows(models, [tail, renormalised, *hybrids])
    angles = {name: row["angle_deg"] for name, row in found.items()}
    assert angles[AVERAGED] < angles["tail bucket 8"]
    assert angles[AVERAGED] < angles["renormalised 8"]
    # Independent errors of four draws halve; a bias would stay.
    assert angles[AVERAGED] < 0.7 * angles["hybrid 8+8"]
    assert found[AVERAGED]["length"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("loss", [kind() for kind in COMPARED.values()], ids=list(COMPARED))
def test_draws_turn_the_gradient_of_every_loss_that_uses_them_towards_the_dense_one(
    models: tuple[Any, Any], loss: Divergence
) -> None:
    alone, drawn = Target("alone", "topk-u8", 8, None, loss), Target("drawn", "topk-u8", 8, None, loss, 64)
    found = rows(models, [alone, drawn], loss)
    assert found["drawn"]["angle_deg"] < 0.9 * found["alone"]["angle_deg"]
