"""A language model head that computes the losses itself, in the place of the model's own.

In: a model whose output embeddings are a plain linear layer. Out: the same weights in a `FusedHead`, whose forward
gives logits as before, or losses or metrics where it is given targets. As the loss is the forward of the module that
owns the weight, whatever gathers weights around forwards (ZeRO-3) works, and so do tied embeddings and peft's LoRA on
the head.

    N loss tokens, H hidden, V vocabulary, R LoRA rank, J terms
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.errors import ConfigError
from student_train.losses.divergences import LossMix
from student_train.losses.fused import LossSums, fused_loss_tensors, sums_of
from student_train.losses.head_chunks import HeadInputs
from student_train.losses.targets import SparseTargets
from student_train.losses.token_metrics import TokenMetrics, metrics_tensor

# What Hugging Face models do to logits after the head, by the name of the setting (Gemma, Cohere, Granite, Falcon-H1,
# RecurrentGemma, Muse): the value that means nothing is done.
_LOGIT_SETTINGS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}


class CausalModel(Protocol):
    """What `fuse_head` asks of a model; every Hugging Face causal language model has it."""

    @property
    def config(self) -> Any: ...

    def get_output_embeddings(self) -> torch.nn.Module | None: ...

    def set_output_embeddings(self, new_embeddings: Any) -> None: ...


class FusedHead(torch.nn.Linear):
    """`torch.nn.Linear` [V, H] whose forward can also be the fused loss; state dict and weights are the same."""

    @staticmethod
    def sharing(linear: torch.nn.Linear) -> FusedHead:
        """A head around the very Parameters of `linear`, so that tied embeddings stay tied."""
        has_bias = linear.bias is not None
        head = FusedHead(
            linear.in_features, linear.out_features, bias=has_bias, device="meta", dtype=linear.weight.dtype
        )
        head.weight = linear.weight
        if has_bias:
            head.bias = linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        *,
        targets: SparseTargets | None = None,
        mix: LossMix | None = None,
        lora_hidden_NR: Tensor | None = None,
        lora_weight_VR: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits [..., V] without targets; with targets and mix the tensors of `fused_loss_tensors`; with targets alone
        those of `metrics_tensor`. `head_loss` and `head_metrics` give them names.

        Plain tensors, and targets as keywords, because DeepSpeed's hooks look for tensors in positional inputs and in
        outputs that are tensors or tuples.
        """
        if targets is None:
            return super().forward(input)
        head = HeadInputs(input, self.weight, self.bias, lora_hidden_NR, lora_weight_VR, chunk_tokens)
        return metrics_tensor(head, targets) if mix is None else fused_loss_tensors(head, targets, mix)


def fuse_head(model: CausalModel) -> FusedHead:
    """Put a FusedHead in the place of the model's head and return it; call before peft and DeepSpeed wrap the model.

    Raises:
        ConfigError: no head, a head that is not a plain `torch.nn.Linear` (quantised, say), or a model that scales or
            caps its logits after the head, which the fused losses would not see.
    """
    linear = model.get_output_embeddings()
    if isinstance(linear, FusedHead):
        return linear
    if type(linear) is not torch.nn.Linear:
        raise ConfigError(f"the student's head is a {type(linear).__name__}: losses need a plain torch.nn.Linear head")
    refuse_changed_logits(model.config.to_dict())
    head = FusedHead.sharing(linear)
    model.set_output_embeddings(head)
    return head


def refuse_changed_logits(model_config: Mapping[str, Any]) -> None:
    """Raise ConfigError if a Hugging Face config (as a dict, nested text config included) scales or caps logits."""
    for part in (model_config, model_config.get("text_config") or {}):
        for name, neutral in _LOGIT_SETTINGS.items():
            value = part.get(name)
            if value is not None and value != neutral:
                raise ConfigError(
                    f"the student's config has {name}={value}: losses are fused with a head whose logits are used as "
                    "they are, choose a student that neither scales nor caps them"
                )


def head_loss(
    head: torch.nn.Module, hidden_NH: Tensor, targets: SparseTargets, mix: LossMix, *, chunk_tokens: int | None = None
) -> LossSums:
    """`fused_loss` through the model's output embeddings as they stand: a FusedHead, or peft's LoRA or copy around one.

    Raises:
        ConfigError: the targets lack what the mix needs, or the adapter has no plain low-rank form (DoRA and the like).
    """
    fused, lora_hidden_NR, lora_weight_VR = _without_lora(head, hidden_NH)
    loss_sum, term_sums_J, weight_sum = fused(
        hidden_NH,
        targets=targets,
        mix=mix,
        lora_hidden_NR=lora_hidden_NR,
        lora_weight_VR=lora_weight_VR,
        chunk_tokens=chunk_tokens,
    )
    return sums_of(mix, targets, loss_sum, term_sums_J, weight_sum)


@torch.no_grad()
def head_metrics(
    head: torch.nn.Module, hidden_NH: Tensor, targets: SparseTargets, *, chunk_tokens: int | None = None
) -> TokenMetrics:
    """`sparse_metrics` through the model's output embeddings as they stand, without gradient; see `head_loss`."""
    fused, lora_hidden_NR, lora_weight_VR = _without_lora(head, hidden_NH)
    metrics_8N: Tensor = fused(
        hidden_NH,
        targets=targets,
        lora_hidden_NR=lora_hidden_NR,
        lora_weight_VR=lora_weight_VR,
        chunk_tokens=chunk_tokens,
    )
    return TokenMetrics(*metrics_8N.unbind())


def _without_lora(head: torch.nn.Module, hidden_NH: Tensor) -> tuple[torch.nn.Module, Tensor | None, Tensor | None]:
    """(head below the adapter, A x scaled [N, R], B [V, R]); several active adapters are concatenated along R."""
    if isinstance(head, FusedHead):
        return head, None, None
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(head, LoraLinear):
        return head, None, None
    active = [] if head.disable_adapters or head.merged else [a for a in head.active_adapters if a in head.lora_A]
    if any(adapter in head.lora_variant or head.lora_bias[adapter] for adapter in active):
        raise ConfigError(
            "LoRA on the head must be plain: switch off DoRA, lora_bias and other variants, or leave lm_head out"
        )
    if not active:
        return head.get_base_layer(), None, None
    lora_hidden, lora_weight = [], []
    for adapter in active:
        lora_a, lora_b = head.lora_A[adapter], head.lora_B[adapter]
        assert isinstance(lora_a, torch.nn.Linear)
        assert isinstance(lora_b, torch.nn.Linear)
        dropped_NH = head.lora_dropout[adapter](hidden_NH.to(lora_a.weight.dtype))
        lora_hidden.append(lora_a(dropped_NH) * head.scaling[adapter])
        # Under ZeRO-3 reading `weight` within the engine's forward gathers it and registers it with the outer module.
        lora_weight.append(lora_b.weight)
    return head.get_base_layer(), torch.cat(lora_hidden, dim=1), torch.cat(lora_weight, dim=1)
