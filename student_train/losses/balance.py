"""The balance loss of a mixture of experts, without which training lets a few experts take all tokens.

In: a Hugging Face causal model whose class has such a loss. Out: `RouterBalance`, which gives the model's own loss
(Switch Transformer, arXiv 2101.03961, equations 4 to 6) for the tokens of one pack. Cost: one softmax over E a token
and layer.

transformers computes it only beside logits of the whole text, which a student never has. So the decoder is told to
return its routers' logits, and how many experts a token gets is found by comparison with the model's own loss.

    T tokens of a pack, E experts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError, one_line
from student_train.losses.logit_probe import ready_for_trial, trial_ids

BALANCE = "balance"
"""Its name among the losses of a step."""
TOLERANCE = 1e-4


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """E x sum over experts of (share of tokens sent to it x its mean probability), over all tokens and layers.

    `router_logits` are [T, E] for each layer. Float32 scalar, `top_k` where all experts are used equally.
    """
    logits_TE = torch.cat([one.flatten(0, -2) for one in router_logits])
    probs_TE = logits_TE.float().softmax(dim=-1)
    # Shares are counts and have no gradient: only the probabilities learn.
    chosen_TK = probs_TE.topk(top_k, dim=-1).indices
    num_experts = probs_TE.shape[1]
    share_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts) / len(probs_TE)
    return num_experts * (share_E * probs_TE.mean(dim=0)).sum()


class RouterBalance:
    """Records what the routers of one decoder say while it is open, and computes their loss."""

    def __init__(self, decoder: torch.nn.Module, top_k: int, weight: float) -> None:
        self.weight = weight
        self._top_k = top_k
        self._is_open = False
        self._passes: list[tuple[Tensor, ...]] = []
        # By hooks, because those who call the decoder (whole packs, documents one by one) know of no routers.
        decoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        decoder.register_forward_hook(self._record)

    def open(self) -> None:
        """Begins a pack: the passes of the decoder until `close` are its tokens."""
        self._passes.clear()
        self._is_open = True

    def close(self) -> Tensor:
        """The loss over all tokens since `open`, with gradient."""
        self._is_open = False
        # Documents may have come one by one.
        logits = [layer for one in self._passes for layer in one]
        self._passes.clear()
        return balance_loss(logits, self._top_k)

    def _ask(self, _: torch.nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return (given, {**options, "output_router_logits": True}) if self._is_open else None

    def _record(self, _: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if self._is_open:
            self._passes.append(output.router_logits)


def find_balance(causal: Any, own: float | None, weight: float | None) -> RouterBalance | None:
    """The model's balance loss, times `weight` or, if that is None, its `own`; None without one.

    Raises ConfigError for a weight that the model has no loss for, and for a loss that cannot be computed here.
    """
    name = type(causal).__name__
    used = own if weight is None else weight
    if not used:
        return None
    try:
        top_k = None if own is None else _experts_per_token(causal)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: its balance loss cannot be computed ({one_line(error)[:200]}): set balance_weight: 0 to train "
            "without it"
        ) from error
    if top_k is not None:
        return RouterBalance(causal.get_decoder(), top_k, used)
    if weight is None:
        return None
    raise ConfigError(f"balance_weight={weight:g}: {name} has no balance loss of its own: remove the setting")


@torch.no_grad()
def _experts_per_token(causal: Any) -> int | None:
    """Configurations name it in many ways, so it is the number for which our loss is the model's own.

    The loss grows with the number of experts, so only one can fit. None where the model has routers or a loss of them
    in its configuration only (Llama 4, dense members of a family). Raises ValueError for another formula.
    """
    options = {"input_ids": trial_ids(causal), "use_cache": False, "output_router_logits": True}
    with ready_for_trial(causal):
        given = causal.get_decoder()(**options).get("router_logits")
        own = causal(**options).get("aux_loss") if given else None
    if own is None:
        return None
    for top_k in range(1, given[0].shape[-1] + 1):
        if abs(float(balance_loss(given, top_k) - own)) <= _tolerance(given[0].dtype) * float(own):
            return top_k
    raise ValueError(f"{float(own):.4f} on a few tokens matches no formula known here")


def _tolerance(dtype: torch.dtype) -> float:
    # transformers takes the softmax in the model's dtype.
    return 2e-2 if dtype.itemsize == 2 else TOLERANCE
