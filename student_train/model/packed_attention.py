"""Hidden states of a pack in which no token sees another document than its own.

In: a Hugging Face decoder, a pack's ids, positions (from 0 in every document) and the lengths of its documents. Out:
hidden states [L, H], the same as of each document alone. Three ways, the first that works is taken:

BY_ATTENTION  torch's kernel for causal attention runs on one document after another: D l^2 / 2 products for D documents
              of l tokens instead of (D l)^2, and nothing of size [L, L] exists
BY_MASK       transformers makes a mask of [L, L] of positions that restart: for layers that see a window or chunks
ONE_BY_ONE    the decoder runs on every document alone: for models that carry a state from token to token (Qwen3.5,
              Mamba, convolutions) or whose code makes no mask of positions

Which way works is found by trying, as models say nothing of it: two short documents must come out as each alone does.

    L tokens of a pack, D its documents, H hidden, A heads, B those of keys and values, E width of a head
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stillroom.errors import ConfigError, one_line

NAME = "sdpa_by_document"
TRIED = (9, 8)
"""Lengths of the documents that are tried: the second must not see the first."""


class Apart(Enum):
    """How the documents of a pack are kept apart."""

    BY_ATTENTION = "by attention"
    BY_MASK = "by mask"
    ONE_BY_ONE = "one by one"


def keep_apart(causal: Any) -> Apart:
    """Finds the way for a model and prepares it for that; takes a few tokens' forward passes where the model lies.

    Afterwards other code must not call a model that is kept apart BY_ATTENTION before it has switched it back by
    `causal.set_attn_implementation`; it would fail. Raises ConfigError where the decoder cannot be run.
    """
    if causal.config._attn_implementation == NAME:
        return Apart.BY_ATTENTION
    was_training, asked = causal.training, causal.config._attn_implementation
    # Kernels for GPUs alone keep documents apart as masks do; a model is tried where it is loaded, in CPU memory.
    tried = "eager" if asked == "eager" else "sdpa"
    causal.set_attn_implementation(tried)
    causal.eval()
    try:
        alone_LH = _alone(causal)
        if asked == "sdpa" and _sees_all(causal) and _switch(causal) and _agrees(causal, Apart.BY_ATTENTION, alone_LH):
            return Apart.BY_ATTENTION
        causal.set_attn_implementation(tried)
        apart = Apart.BY_MASK if _agrees(causal, Apart.BY_MASK, alone_LH) else Apart.ONE_BY_ONE
        causal.set_attn_implementation(asked)
        return apart
    finally:
        causal.train(was_training)


def hidden_states(
    causal: Any, apart: Apart, input_ids_1L: Tensor, position_ids_1L: Tensor, document_lengths: Sequence[int]
) -> Tensor:
    """The decoder's last hidden states [L, H], in the model's dtype."""
    if apart is Apart.ONE_BY_ONE:
        lengths = list(document_lengths)
        documents = zip(input_ids_1L.split(lengths, dim=1), position_ids_1L.split(lengths, dim=1), strict=True)
        return torch.cat([_decode(causal, ids_1L, positions_1L) for ids_1L, positions_1L in documents])
    if apart is Apart.BY_MASK:
        return _decode(causal, input_ids_1L, position_ids_1L)
    return _decode(causal, input_ids_1L, position_ids_1L, document_lengths=document_lengths)


def _decode(causal: Any, input_ids_1L: Tensor, position_ids_1L: Tensor, **options: Any) -> Tensor:
    out = causal.get_decoder()(
        input_ids=input_ids_1L, position_ids=position_ids_1L, attention_mask=None, use_cache=False, **options
    )
    hidden_1LH: Tensor = out.last_hidden_state
    return hidden_1LH[0]


def _sees_all(causal: Any) -> bool:
    """Whether every layer sees all tokens before it, as far as the configuration says."""
    config = causal.get_decoder().config.to_dict()
    limits = ("sliding_window", "attention_chunk_size", "attention_window_size")
    layer_types = set(config.get("layer_types") or ["full_attention"])
    return layer_types == {"full_attention"} and not any(config.get(name) for name in limits)


def _switch(causal: Any) -> bool:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _by_document)
    causal.set_attn_implementation(NAME)
    # transformers says no to some models by a warning alone.
    return bool(causal.config._attn_implementation == NAME)


def _alone(causal: Any) -> Tensor | None:
    """The tried documents one by one; None where this machine cannot. Raises ConfigError for other decoders."""
    try:
        return _try(causal, Apart.ONE_BY_ONE)
    except RuntimeError:
        return None
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{type(causal).__name__} cannot be trained: its decoder gives no hidden states for ids and positions "
            f"({one_line(error)[:200]})"
        ) from error


def _agrees(causal: Any, apart: Apart, alone_LH: Tensor | None) -> bool:
    """Whether the second of two documents comes out as it does alone, whatever the first one says.

    A model that cannot be run in this way does not agree.
    """
    if alone_LH is None:
        return False
    try:
        tried_LH, again_LH = _try(causal, apart), _try(causal, apart, first_id=TRIED[0])
    except (TypeError, AssertionError, RuntimeError, ValueError):
        return False
    # Rounding may send single tokens to other experts, so most must be as alone; a convolution leaks into few tokens,
    # so none may follow the first document. Without experts these are the same to the last bit.
    is_half = alone_LH.dtype.itemsize == 2
    follows = _difference(tried_LH, again_LH).max() > (0.05 if is_half else 1e-5)
    differs = _difference(tried_LH, alone_LH).median() > (0.1 if is_half else 3e-4)
    return not bool(follows) and not bool(differs)


def _difference(one_LH: Tensor, other_LH: Tensor) -> Tensor:
    """Of the second document's tokens, as a share of their largest value."""
    second = slice(TRIED[0], None)
    return (one_LH - other_LH)[second].abs().amax(dim=1) / other_LH[second].abs().amax(dim=1)


@torch.no_grad()
def _try(causal: Any, apart: Apart, first_id: int = 1) -> Tensor:
    """Hidden states of two documents; the first counts its ids from `first_id`, the second always the same."""
    embeddings = causal.get_input_embeddings().weight
    ids_L = torch.cat([torch.arange(TRIED[0]) + first_id, torch.arange(TRIED[1])]).remainder(len(embeddings))
    positions_L = torch.cat([torch.arange(length) for length in TRIED])
    ids_1L, positions_1L = (one_L.to(embeddings.device).unsqueeze(0) for one_L in (ids_L, positions_L))
    return hidden_states(causal, apart, ids_1L, positions_1L, TRIED)


def _by_document(
    module: torch.nn.Module,
    query_1ALE: Tensor,
    key_1BLE: Tensor,
    value_1BLE: Tensor,
    attention_mask: None,
    *,
    document_lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; returns [1, L, A, E]. Raises AssertionError for what only masks can do."""
    assert attention_mask is None
    assert position_bias is None
    num_groups = query_1ALE.shape[1] // key_1BLE.shape[1]
    if num_groups > 1 and query_1ALE.is_cuda and query_1ALE.dtype == torch.float32:
        # The one kernel for float32 that keeps no [l, l] wants as many keys as queries.
        key_1BLE, value_1BLE = (one.repeat_interleave(num_groups, dim=1) for one in (key_1BLE, value_1BLE))
        num_groups = 1
    lengths = list(document_lengths)
    documents = zip(*(states.split(lengths, dim=2) for states in (query_1ALE, key_1BLE, value_1BLE)), strict=True)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "is_causal": True, "enable_gqa": num_groups > 1}
    attended = [scaled_dot_product_attention(*document, **options) for document in documents]
    return torch.cat(attended, dim=2).transpose(1, 2), None
