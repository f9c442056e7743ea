"""Losses below the head against plain definitions: whole matrices, one document at a time."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses import features
from student_train.losses.below import AttentionKL, HiddenCosine, HiddenMSE, HiddenRelations
from student_train.losses.divergences import FeatureLoss
from student_train.losses.features import FeatureTargets, LayerAttention, attention_nats, hidden_values

COUNTS = (3, 0, 1, 5)
LENGTHS = (6, 2, 3, 9)


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_PD = torch.randn(sum(COUNTS), 6, generator=generator, dtype=torch.float64) + 3.0
    teacher_PD = torch.randn(sum(COUNTS), 6, generator=generator, dtype=torch.float64) - 2.0
    return student_PD.requires_grad_(), teacher_PD


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK_NUMBERS", 11)


@pytest.mark.parametrize("loss", [HiddenMSE(), HiddenCosine(), HiddenRelations()], ids=lambda loss: loss.name)
def test_states_against_definition(states: tuple[Tensor, Tensor], loss: FeatureLoss) -> None:
    student_PD, teacher_PD = states
    found_P = hidden_values(loss, student_PD, teacher_PD, COUNTS)
    expected_P = torch.cat(
        [_defined(loss, *document) for document in zip(student_PD.split(COUNTS), teacher_PD.split(COUNTS), strict=True)]
    )
    torch.testing.assert_close(found_P, expected_P, rtol=1e-9, atol=1e-12)
    weights_P = torch.linspace(0.5, 2.0, len(found_P), dtype=torch.float64)
    grads = [torch.autograd.grad((weights_P * one).sum(), student_PD)[0] for one in (found_P, expected_P)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


def _defined(loss: FeatureLoss, student_lD: Tensor, teacher_lD: Tensor) -> Tensor:
    match loss:
        case HiddenMSE():
            return (student_lD - teacher_lD).square().sum(dim=1) / teacher_lD.square().sum(dim=1)
        case HiddenCosine():
            norms_l = student_lD.square().sum(dim=1).sqrt() * teacher_lD.square().sum(dim=1).sqrt()
            return 1 - (student_lD * teacher_lD).sum(dim=1) / norms_l
    values = []
    for i in range(len(student_lD)):
        others = [j for j in range(len(student_lD)) if j != i]
        sides = []
        for one in (teacher_lD, student_lD):
            centred = one - one.mean(dim=0)
            unit = centred / centred.norm(dim=1, keepdim=True)
            sides.append((8.0 * unit[others] @ unit[i]).softmax(dim=0))
        values.append((sides[0] * (sides[0] / sides[1]).log()).sum() if others else 0.0 * student_lD[i].sum())
    return torch.stack(values) if values else student_lD.new_zeros(0)


def test_states_without_direction_keep_gradients_small() -> None:
    student_PD = torch.ones(3, 4, requires_grad=True)
    teachers = {"zeros": torch.zeros(3, 4), "any": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    for name, loss in (("zeros", HiddenMSE()), ("zeros", HiddenCosine()), ("any", HiddenRelations())):
        value_P = hidden_values(loss, student_PD, teachers[name], [3])
        (grad_PD,) = torch.autograd.grad(value_P.sum(), student_PD)
        assert value_P.max() < 10, loss.name
        assert grad_PD.abs().max() < 1e5, loss.name


def test_attention_against_definition() -> None:
    """Two teacher heads of three, a student of four heads in two groups; the third query lists every key it sees."""
    generator = torch.Generator().manual_seed(0)
    query_1ALE = torch.randn(1, 4, sum(LENGTHS), 5, generator=generator, dtype=torch.float64).requires_grad_()
    key_1BLE = torch.randn(1, 2, sum(LENGTHS), 5, generator=generator, dtype=torch.float64).requires_grad_()
    positions = [2, 4, 5, 8, 11, 13, 14, 16, 19]
    starts = [0, 0, 0, 8, 11, 11, 11, 11, 11]
    num_keys, heads = 3, (0, 2)
    keys, weights, rest = [], [], []
    for position, start in zip(positions, starts, strict=True):
        seen = position - start + 1
        probs_AS = torch.randn(2, seen, generator=generator, dtype=torch.float64).mul(2).softmax(dim=1)
        top = probs_AS.topk(min(num_keys, seen), dim=1)
        short = num_keys - top.values.shape[1]
        keys.append(torch.nn.functional.pad(top.indices, (0, short)))
        weights.append(torch.nn.functional.pad(top.values, (0, short)))
        rest.append((1 - top.values.sum(dim=1)).clamp(min=0.0) if seen > num_keys else torch.zeros(2).double())
    stored = LayerAttention(heads, torch.stack(keys), torch.stack(weights), torch.stack(rest))
    ones_P = torch.ones(len(positions))
    targets = FeatureTargets(torch.tensor(positions), ones_P, ones_P, COUNTS, {}, {7: stored}, num_heads=3)
    found_P = attention_nats((query_1ALE, key_1BLE, 5**-0.5), targets, 7, LENGTHS)

    expected = []
    for row, (position, start) in enumerate(zip(positions, starts, strict=True)):
        total = torch.zeros((), dtype=torch.float64)
        for number, head in enumerate((0, 2)):
            mine = head * 4 // 3
            own = slice(start, position + 1)
            score_S = key_1BLE[0, mine // 2, own] @ query_1ALE[0, mine, position] / math.sqrt(5)
            q_S = score_S.softmax(dim=0)
            listed = {int(k): float(w) for k, w in zip(keys[row][number], weights[row][number], strict=True) if w > 0}
            for key, weight in listed.items():
                total = total + weight * (math.log(weight) - q_S[key].log())
            left = [key for key in range(len(q_S)) if key not in listed]
            if left:
                p_rest = float(rest[row][number])
                total = total + p_rest * (math.log(p_rest) - q_S[left].sum().log())
        expected.append(total / 2)
    expected_P = torch.stack(expected)
    torch.testing.assert_close(found_P.double(), expected_P, rtol=1e-5, atol=1e-6)
    inputs = (query_1ALE, key_1BLE)
    for one, other in zip(*(torch.autograd.grad(v.sum(), inputs) for v in (found_P, expected_P)), strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert AttentionKL.name == "attention_kl"
