"""ZeRO 1 and 2 in float32 on one rank of a CPU, without what they do for many.

In: DeepSpeed's ZeRO optimizer and the AdamW inside it. Out: the same weights, moments and saved state. With one rank
nothing is sharded, yet DeepSpeed copies every gradient into a bucket, divides it by 1, copies it out, flattens all of
them, and keeps float32 weights twice. Here autograd keeps the gradients where they are, and AdamW updates DeepSpeed's
flat weights and moments through a view for each parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

CLIP_EPS = 1e-6
"""As in DeepSpeed: a norm just above the limit is clipped a little more."""


class OneRank:
    """Gradients and steps of one rank; all saved state stays in DeepSpeed's objects."""

    def __init__(self, zero: Any, adam: torch.optim.AdamW, clip_norm: float | None) -> None:
        """Takes over `zero`, DeepSpeed's optimizer, whose own `backward` and `step` must no longer be called."""
        self._zero, self._adam, self._clip_norm = zero, adam, clip_norm
        for hook in zero._grad_acc_hooks:
            hook.remove()
        for index, merged in enumerate(zero.single_partition_of_fp32_groups):
            # The model's weights move into AdamW's, and not the other way: DeepSpeed holds views of the latter.
            zero.bit16_groups_flat[index] = merged.data
            zero.parallel_partitioned_bit16_groups[index] = [merged.data]
            zero._update_model_bit16_weights(index)
        # Its views of the model's former memory would keep that alive.
        zero._link_all_hp_params()

    @torch.no_grad()
    def step(self, divisor: float) -> Tensor:
        """Divides the accumulated gradients by `divisor`, clips and applies them; returns their norm before clipping.

        Not applied if the norm is not finite.
        """
        grads = [[_grad(one) for one in group] for group in self._zero.bit16_groups]
        norm = torch.nn.utils.get_total_norm([one for group in grads for one in group]) / divisor
        if norm.isfinite():
            excess = 1.0 if self._clip_norm is None else max(1.0, (float(norm) + CLIP_EPS) / self._clip_norm)
            for index, of_group in enumerate(grads):
                self._update(index, of_group, torch.tensor(divisor * excess))
        self._zero.zero_grad()
        return norm

    def _update(self, index: int, grads: list[Tensor], divisor: Tensor) -> None:
        group, parameters = self._adam.param_groups[index], self._zero.bit16_groups[index]
        flat, offsets = group["params"][0], self._zero.round_robin_bit16_offsets[index]
        state = self._adam.state[flat]
        if not state:
            # As AdamW creates it.
            state |= {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }

        def views(whole: Tensor) -> list[Tensor]:
            # Made for each step: loading a checkpoint replaces the moments.
            return [
                whole.narrow(0, offset, one.numel()).view(one.shape)
                for offset, one in zip(offsets, parameters, strict=True)
            ]

        adamw(
            views(flat.data),
            grads,
            views(state["exp_avg"]),
            views(state["exp_avg_sq"]),
            [],
            # One each: AdamW counts every one of them up.
            [state["step"].clone() for _ in parameters],
            fused=True,
            grad_scale=divisor,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        state["step"] += 1
        self._zero._lazy_init_hp_params_optimizer_state()


def _grad(parameter: Tensor) -> Tensor:
    # A weight that no pack of the step used; its moments decay all the same.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
