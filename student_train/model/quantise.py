"""Linear layers that compute as their quantised export will, while their weights are trained in float.

In: a Hugging Face decoder. Out: the same with rounded forward passes; parameters, names and files stay. Gradients pass
the rounding as if it were not there (straight-through: Bengio et al., arXiv 1308.3432; LLM-QAT, 2305.17888), so the
weights learn to lie where rounding does little harm. Cost: one rounded copy of each weight while its layer runs.

Weights are rounded exactly as compressed-tensors rounds them to the nearest: symmetric, scale = max |w| / 127.5 for
each output channel (7.5 for 4 bits, for each group of inputs), in the weight's own dtype. Activations of w8a8 are
rounded per token with scale = max |x| / 127 in float32, as vLLM's kernels do. Own code rather than torchao's, whose
fake quantisation rounds weights by another rule, so that the export would not be what was trained.

    O outputs, I inputs of a layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError
from student_train.config.stage import QuantiseConfig
from student_train.model.student import routers_of, stacked_experts

BITS = {"w8a8": 8, "w4a16": 4}


class QuantisedLinear(torch.nn.Linear):
    """A linear layer around the Parameters of another, whose forward rounds them, and activations for w8a8."""

    @staticmethod
    def sharing(linear: torch.nn.Linear, config: QuantiseConfig) -> QuantisedLinear:
        """Raises ConfigError if the inputs are not a multiple of the group size."""
        # On the meta device: the weight is replaced at once.
        made = QuantisedLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight = linear.weight
        if linear.bias is not None:
            made.bias = linear.bias
        made.bits, made.rounds_inputs = BITS[config.format], config.format == "w8a8"
        made.group_size = None if config.format == "w8a8" else config.weights_per_scale
        return made.train(linear.training)

    bits: int
    rounds_inputs: bool
    group_size: int | None

    def forward(self, input: Tensor) -> Tensor:
        weight_OI = _StraightThrough.apply(self.weight, self.bits, self.group_size, False)  # type: ignore[no-untyped-call]
        if self.rounds_inputs:
            input = _StraightThrough.apply(input, self.bits, None, True)  # type: ignore[no-untyped-call]
        return torch.nn.functional.linear(input, weight_OI, self.bias)


def quantise_layers(model: Any, config: QuantiseConfig) -> int:
    """Puts QuantisedLinear in the place of every linear layer of the decoder but routers; returns their number.

    The head stays: tied to the embeddings it is not quantised by any export. Raises ConfigError for a model without
    linear layers to quantise, or whose layers do not divide into groups.
    """
    if stacked_experts(model):
        raise ConfigError(
            f"quantise: {type(model).__name__} keeps the weights of its experts in stacked tensors, which no linear "
            "layer holds: only models of plain linear layers can be trained for it"
        )
    decoder, routers = model.get_decoder(), routers_of(model.get_decoder())
    linears = {
        name: module
        for name, module in decoder.named_modules()
        # Not isinstance: a layer of another kind computes something else with its weight.
        if type(module) is torch.nn.Linear and name not in routers
    }
    if not linears:
        raise ConfigError(f"quantise: {type(model).__name__} has no plain torch.nn.Linear layers")
    for name, linear in linears.items():
        if config.format == "w4a16" and linear.in_features % config.weights_per_scale:
            raise ConfigError(
                f"quantise.group_size={config.weights_per_scale} does not divide the {linear.in_features} inputs of "
                f"{name}: choose a divisor of them that the runtime supports (vLLM: 32, 64 or 128)"
            )
        decoder.set_submodule(name, QuantisedLinear.sharing(linear, config))
    return len(linears)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int, group_size: int | None, is_activation: bool) -> Tensor:
        if group_size is None:
            return _rounded(values, bits, is_activation)
        return _rounded(values.unflatten(-1, (-1, group_size)), bits, is_activation).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None, None]:
        return grads[0], None, None, None


def _rounded(values: Tensor, bits: int, is_activation: bool) -> Tensor:
    """Rounded along the last dimension, each row with its own scale."""
    largest = 2 ** (bits - 1)
    if is_activation:
        # A scale in bfloat16 would move every tenth value by a step.
        scale = values.float().abs().amax(dim=-1, keepdim=True) / (largest - 1)
        # Not divided: in bfloat16, where many values lie between two steps, this decides some as the kernels do.
        rounded: Tensor = (values.float() * scale.clamp_min(1e-30).reciprocal()).round() * scale
        return rounded.to(values.dtype)
    # compressed-tensors takes half the range of -128..127.
    half_range = (2 * largest - 1) / 2
    scale = values.abs().amax(dim=-1, keepdim=True) / half_range
    # A row of zeros would be divided by 0.
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    return (values / scale).clamp(-largest, largest - 1).round() * scale
