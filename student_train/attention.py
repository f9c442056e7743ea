"""Attention inside each document of a pack, one document after another.

In: a Hugging Face decoder and the lengths of a pack's documents. Out: the same numbers as attention under a mask that
keeps documents apart, without the mask: torch's kernel for causal attention runs on every document alone, so a pack of
D documents of l tokens costs D l^2 / 2 products instead of (D l)^2, and nothing of size [L, L] exists.

    L tokens of a pack, D its documents, A heads, B those of keys and values, E width of a head
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAME = "sdpa_by_document"
KEYWORD = "document_lengths"
"""The decoder's forward hands it through to every layer's attention."""


def attend_by_document(causal: Any) -> bool:
    """Switches a model that attends by `sdpa` to this attention and says whether it could.

    From then on its decoder's forward needs `document_lengths`. Models whose layers see a window or chunks, or whose
    code does not hand keywords on to its attention, keep their masks. `causal.set_attn_implementation` switches back.
    """
    if causal.config._attn_implementation == NAME:
        return True
    if causal.config._attn_implementation != "sdpa" or not _is_plain(causal):
        return False
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _by_document)
    causal.set_attn_implementation(NAME)
    return True


def _is_plain(causal: Any) -> bool:
    config = causal.config.to_dict()
    layer_types = set(config.get("layer_types") or ["full_attention"])
    limits = [config.get(name) for name in ("sliding_window", "attention_chunk_size")]
    return causal._supports_attention_backend and layer_types == {"full_attention"} and not any(limits)


def _by_document(
    module: torch.nn.Module,
    query_1ALE: Tensor,
    key_1BLE: Tensor,
    value_1BLE: Tensor,
    attention_mask: None,
    *,
    document_lengths: Sequence[int],
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; returns [1, L, A, E]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None
    lengths = list(document_lengths)
    documents = zip(*(states.split(lengths, dim=2) for states in (query_1ALE, key_1BLE, value_1BLE)), strict=True)
    causally = {**options, "is_causal": True}
    attended = [
        sdpa_attention_forward(module, query, key, value, None, **causally)[0] for query, key, value in documents
    ]
    return torch.cat(attended, dim=1), None
