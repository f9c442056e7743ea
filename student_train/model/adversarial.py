"""Disturbed prompts: small shifts of the input embeddings that raise a pack's losses.

In: a pack, the student's losses. Out: the pack with a shift of each prompt token, found by the fast gradient sign
method (arXiv 1412.6572) or several steps of projected gradient (arXiv 1706.06083). The student then learns the
teacher's same targets from the shifted pack. Gradients are taken by the shift alone: weights get none here, so that
DeepSpeed's hooks on theirs see nothing.

A shift is in units of the root mean square of the token's own embedding, so that epsilon means the same for every
model and however chains are packed. Cost: a forward and a backward pass for each step.

    L tokens of a pack, H width of the embeddings
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.schema.records import stable_hash
from student_train.config.stage import AdversarialConfig
from student_train.data.pack import TorchPack

STEP_FRAC = 2.5
"""Size of a step of several, times their number, in epsilons (section 5 of 1706.06083): a sum that can reach any point
of the box and turn back."""


def disturbed_packs(
    config: AdversarialConfig | None, seed: int, stage: int, step: int, num_packs: int
) -> npt.NDArray[np.bool_]:
    """bool [num_packs]: which packs of a global batch are disturbed. On average over steps, `fraction` of them.

    A run of neighbours, so that as few micro-steps as possible hold any, whatever the number of ranks.
    """
    if config is None:
        return np.zeros(num_packs, bool)
    generator = np.random.default_rng(int(stable_hash("adversarial", seed, stage, step)[:16], 16))
    # 0.3 of 4 packs are 1 pack in eight steps of ten, and 2 in the others.
    count = int(num_packs * config.fraction + generator.random())
    first = int(generator.integers(num_packs))
    return np.asarray((np.arange(num_packs) - first) % num_packs < count)


def disturb(
    pack: TorchPack, loss_of: Callable[[TorchPack], Tensor], width: int, config: AdversarialConfig
) -> tuple[TorchPack, Tensor]:
    """The pack with a shift of its tokens without a loss that raises `loss_of`, and its loss before, detached.

    No entry of the shift exceeds epsilon.
    """
    num_tokens = pack.input_ids_1L.shape[1]
    device = pack.input_ids_1L.device
    # The token that a position predicts is the next one. An empty pack predicts one that is not there.
    is_prompt_L1 = torch.ones((num_tokens + 1, 1), device=device)
    is_prompt_L1[pack.predict_positions_N + 1] = 0.0
    is_prompt_L1 = is_prompt_L1[:num_tokens]
    # A single step goes to a corner of the box (FGSM); several need room to turn back.
    size = config.epsilon if config.steps == 1 else STEP_FRAC * config.epsilon / config.steps
    shift_LH = torch.zeros((num_tokens, width), device=device)
    before: Tensor | None = None
    # The same dropout as in the pass that is learned from, which then draws as if nothing had been drawn here.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = _rng_state(device)
        for _ in range(config.steps):
            _set_rng_state(device, state)
            shift_LH.requires_grad_(True)
            loss_sum = loss_of(replace(pack, shift_LH=shift_LH))
            before = loss_sum.detach() if before is None else before
            (gradient_LH,) = torch.autograd.grad(loss_sum, shift_LH)
            step_LH = size * gradient_LH.sign() * is_prompt_L1
            shift_LH = (shift_LH.detach() + step_LH).clamp(-config.epsilon, config.epsilon)
    assert before is not None
    return replace(pack, shift_LH=shift_LH), before


@contextlib.contextmanager
def shifted(causal: Any, shift_LH: Tensor | None) -> Iterator[None]:
    """Adds a shift to the input embeddings of one forward pass over a pack."""
    if shift_LH is None:
        yield
        return
    start = 0

    def add(_module: torch.nn.Module, _inputs: Any, output_1LH: Tensor) -> Tensor:
        # Models that read documents one by one call this once for each, in order.
        nonlocal start
        own_LH = shift_LH[start : start + output_1LH.shape[1]]
        start += output_1LH.shape[1]
        # Detached: the scale is a unit of measure and no path for gradients.
        scale_1L1 = output_1LH.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
        return output_1LH + (own_LH * scale_1L1).to(output_1LH.dtype)

    # Registered for this pass only, and so after ZeRO-3's hooks: the way from the losses to the shift does not lead
    # through those of the embeddings.
    handle = causal.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
