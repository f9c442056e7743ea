"""Disturbed prompts: the shift is the sign of a dense gradient, stays within epsilon and raises the loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from student_train.config.stage import AdversarialConfig, StageConfig
from student_train.data.pack import PackedPiece, TorchPack, build_pack, empty_pack, to_torch
from student_train.losses.fused_head import LossSums, fuse_head
from student_train.model.adversarial import disturb, disturbed_packs
from student_train.model.packed_attention import Apart
from student_train.model.student import Student
from student_train.schedule import mix_at
from tests.student_train.data.test_pack import block_of

CHAINS = [([11, 12, 13], [21, 22]), ([31, 32], [41, 42, 43])]
MIX = mix_at(StageConfig(learning_rate=1.0, losses={"cross_entropy": 1}), 0, 1)


def pack_of_chains() -> TorchPack:
    block = block_of(CHAINS, with_signals=False)
    pieces = [PackedPiece(0, block, 0, 0, 3, 5, 1.0), PackedPiece(1, block, 1, 0, 2, 5, 1.0)]
    return to_torch(build_pack(pieces), "cpu")


def dense_signs(folder: Path) -> Tensor:
    """Signs of the gradient by the embeddings, [L, H], from each chain alone through the model as it is."""
    model, signs = AutoModelForCausalLM.from_pretrained(folder), []
    for prompt, completion in CHAINS:
        embeddings_1LH = model.get_input_embeddings()(torch.tensor([[*prompt, *completion]])).detach()
        embeddings_1LH.requires_grad_(True)
        logits_NV = model(inputs_embeds=embeddings_1LH).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits_NV, torch.tensor(completion), reduction="sum")
        (gradient_1LH,) = torch.autograd.grad(loss, embeddings_1LH)
        gradient_1LH[:, len(prompt) :] = 0.0
        signs.append(gradient_1LH[0].sign())
    return torch.cat(signs)


@pytest.mark.parametrize("apart", [Apart.BY_ATTENTION, Apart.ONE_BY_ONE])
def test_a_shift_follows_the_gradient_and_raises_the_loss(student: Path, apart: Apart) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    fuse_head(model)
    made = Student(model)
    if apart is Apart.ONE_BY_ONE:
        model.set_attn_implementation("sdpa")
    made.apart = apart

    def loss_of(pack: TorchPack) -> Tensor:
        return LossSums(*made(pack, MIX)).loss_sum

    pack = pack_of_chains()
    width, epsilon = made.embedding_width, 0.1
    fast, before = disturb(pack, loss_of, width, AdversarialConfig(epsilon=epsilon))
    several, again = disturb(pack, loss_of, width, AdversarialConfig(epsilon=epsilon, steps=4))
    assert fast.shift_LH is not None
    assert several.shift_LH is not None
    assert float(before) == float(again) == float(loss_of(pack).detach())
    torch.testing.assert_close(fast.shift_LH, epsilon * dense_signs(student))
    assert float(several.shift_LH.abs().max()) == pytest.approx(epsilon)
    assert not several.shift_LH[pack.predict_positions_N + 1].any()
    with torch.no_grad():
        losses = [float(loss_of(one)) for one in (pack, fast, several)]
        signs_LH = torch.randint(0, 2, fast.shift_LH.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        random = float(loss_of(replace(pack, shift_LH=epsilon * signs_LH * (fast.shift_LH != 0))))
    assert losses[2] >= losses[1] - 1e-5
    assert losses[1] - losses[0] > 5 * abs(random - losses[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    nothing, _ = disturb(to_torch(empty_pack(with_signals=False), "cpu"), loss_of, width, AdversarialConfig(epsilon=1))
    assert torch.isfinite(loss_of(nothing)).all()


def test_packs_are_chosen_by_seed_and_step_in_their_share() -> None:
    config = AdversarialConfig(epsilon=0.1, fraction=0.3)
    chosen = [disturbed_packs(config, 0, 0, step, 4) for step in range(400)]
    assert np.mean(chosen) == pytest.approx(0.3, abs=0.02)
    assert np.ptp(np.mean(chosen, axis=0)) < 0.15
    assert all((disturbed_packs(config, 0, 0, step, 4) == one).all() for step, one in enumerate(chosen))
    assert any((disturbed_packs(config, 1, 0, step, 4) != one).any() for step, one in enumerate(chosen))
    assert disturbed_packs(AdversarialConfig(epsilon=0.1, fraction=1), 0, 0, 0, 3).all()
    assert not disturbed_packs(None, 0, 0, 0, 3).any()
