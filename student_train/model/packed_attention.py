"""Hidden states of a pack in which no token sees another document than its own.

In: a Hugging Face decoder, a pack's ids, positions (from 0 in every document) and document lengths. Out: hidden states
[L, H], equal to those of each document alone. The first of these that works is used:

BY_ATTENTION  torch's causal attention kernel runs once per document: D l^2 / 2 products for D documents of l tokens
              instead of (D l)^2, and no [L, L] tensor
BY_MASK       transformers builds an [L, L] mask from positions that restart: for sliding windows and chunks
ONE_BY_ONE    the decoder runs on each document alone: for models that carry a state from token to token (Qwen3.5,
              Mamba, convolutions) or ignore positions in their masks

Configurations do not say which works, so `keep_apart` tries: two short documents must come out as each alone does.

    L tokens of a pack, D its documents, H hidden, A query heads, B key-value heads, E head width
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stillroom.errors import ConfigError, one_line

NAME = "sdpa_by_document"
TRIED = (9, 8)
"""Lengths of the two trial documents: the second must not see the first."""


class AttentionSink(Protocol):
    """Takes the queries and keys of a layer, from 0, as they are multiplied."""

    def add_attention(self, layer: int, query_1ALE: Tensor, key_1BLE: Tensor, scaling: float) -> None: ...


class Apart(Enum):
    """How the documents of a pack are separated."""

    BY_ATTENTION = "by attention"
    BY_MASK = "by mask"
    ONE_BY_ONE = "one by one"


def keep_apart(causal: Any) -> Apart:
    """Finds the first way that works by running a few tokens, and prepares the model for it.

    A model separated BY_ATTENTION fails under other callers until `causal.set_attn_implementation` switches it back.
    Raises ConfigError if the decoder cannot be run.
    """
    if causal.config._attn_implementation == NAME:
        return Apart.BY_ATTENTION
    was_training, asked = causal.training, causal.config._attn_implementation
    # Models are tried in CPU memory, where GPU-only kernels do not run; those keep documents apart as masks do.
    tried = "eager" if asked == "eager" else "sdpa"
    causal.set_attn_implementation(tried)
    # With dropout two passes would differ by themselves.
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
    causal: Any,
    apart: Apart,
    input_ids_1L: Tensor,
    position_ids_1L: Tensor,
    document_lengths: Sequence[int],
    sink: AttentionSink | None = None,
) -> Tensor:
    """The decoder's last hidden states [L, H], in the model's dtype. Only BY_ATTENTION fills the sink."""
    if apart is Apart.ONE_BY_ONE:
        lengths = list(document_lengths)
        documents = zip(input_ids_1L.split(lengths, dim=1), position_ids_1L.split(lengths, dim=1), strict=True)
        return torch.cat([_decode(causal, ids_1L, positions_1L) for ids_1L, positions_1L in documents])
    if apart is Apart.BY_MASK:
        return _decode(causal, input_ids_1L, position_ids_1L)
    options = {} if sink is None else {"attention_sink": sink}
    return _decode(causal, input_ids_1L, position_ids_1L, document_lengths=document_lengths, **options)


def _decode(causal: Any, input_ids_1L: Tensor, position_ids_1L: Tensor, **options: Any) -> Tensor:
    # transformers keeps packed documents apart only without mask and cache, and its cache is on even in training.
    out = causal.get_decoder()(
        input_ids=input_ids_1L, position_ids=position_ids_1L, attention_mask=None, use_cache=False, **options
    )
    hidden_1LH: Tensor = out.last_hidden_state
    return hidden_1LH[0]


def _sees_all(causal: Any) -> bool:
    """Whether every layer attends to all earlier tokens, according to the configuration."""
    config = causal.get_decoder().config.to_dict()
    limits = ("sliding_window", "attention_chunk_size", "attention_window_size")
    layer_types = set(config.get("layer_types") or ["full_attention"])
    return layer_types == {"full_attention"} and not any(config.get(name) for name in limits)


def _switch(causal: Any) -> bool:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _by_document)
    causal.set_attn_implementation(NAME)
    # transformers refuses some models with nothing but a warning.
    return bool(causal.config._attn_implementation == NAME)


def _alone(causal: Any) -> Tensor | None:
    """The trial documents one by one; None if this machine cannot run them. Raises ConfigError for other failures."""
    try:
        return _try(causal, Apart.ONE_BY_ONE)
    except RuntimeError:
        return None
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{type(causal).__name__} cannot be trained: its decoder returns no hidden states for ids and positions "
            f"({one_line(error)[:200]})"
        ) from error


def _agrees(causal: Any, apart: Apart, alone_LH: Tensor | None) -> bool:
    """Whether the second document's output is the same as alone, for any first one; False if it cannot run."""
    if alone_LH is None:
        return False
    try:
        tried_LH, again_LH = _try(causal, apart), _try(causal, apart, first_id=TRIED[0])
    except (TypeError, AssertionError, RuntimeError, ValueError):
        return False
    # Rounding may send single tokens to other experts, so only the median must agree with the document alone. A
    # convolution leaks into a few tokens, so no token may depend on the first document.
    is_half = alone_LH.dtype.itemsize == 2
    follows = _difference(tried_LH, again_LH).max()
    differs = _difference(tried_LH, alone_LH).median()
    # Not `>`, for which nan would agree.
    return bool(follows <= (0.05 if is_half else 1e-5)) and bool(differs <= (0.1 if is_half else 3e-4))


def _difference(one_LH: Tensor, other_LH: Tensor) -> Tensor:
    """Relative difference of each token of the second document."""
    second = slice(TRIED[0], None)
    # The embedding of a padding token may be 0, and a recurrent layer leave it so.
    size_L = other_LH[second].abs().amax(dim=1).clamp(min=torch.finfo(other_LH.dtype).tiny)
    return (one_LH - other_LH)[second].abs().amax(dim=1) / size_L


@torch.no_grad()
def _try(causal: Any, apart: Apart, first_id: int = 1) -> Tensor:
    """Hidden states of two documents: the ids of the first start at `first_id`, the second never changes."""
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
    attention_sink: AttentionSink | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; returns [1, L, A, E]. Raises AssertionError if a mask or bias is needed."""
    assert attention_mask is None
    assert position_bias is None
    if attention_sink is not None:
        assert isinstance(module.layer_idx, int)
        # Where a model names no scale, torch's own.
        attention_sink.add_attention(module.layer_idx, query_1ALE, key_1BLE, scaling or query_1ALE.shape[3] ** -0.5)
    num_groups = query_1ALE.shape[1] // key_1BLE.shape[1]
    if num_groups > 1 and query_1ALE.is_cuda and query_1ALE.dtype == torch.float32:
        # The only float32 kernel without an [l, l] tensor needs as many key heads as query heads.
        key_1BLE, value_1BLE = (one.repeat_interleave(num_groups, dim=1) for one in (key_1BLE, value_1BLE))
        num_groups = 1
    lengths = list(document_lengths)
    documents = zip(*(states.split(lengths, dim=2) for states in (query_1ALE, key_1BLE, value_1BLE)), strict=True)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "is_causal": True, "enable_gqa": num_groups > 1}
    attended = [scaled_dot_product_attention(*document, **options) for document in documents]
    return torch.cat(attended, dim=2).transpose(1, 2), None
