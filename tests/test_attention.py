"""Attention document by document gives what a mask gives, and what each document gives alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from student_train.attention import KEYWORD, NAME, attend_by_document

LENGTHS = (5, 1, 12, 7)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
PLAIN = [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config), (Qwen3ForCausalLM, Qwen3Config)]


def make_model(of: Any, config: Any, **options: Any) -> Any:
    """A tiny model with random weights, in float64."""
    torch.manual_seed(0)
    return of._from_config(config(**SIZES, **options), attn_implementation="sdpa").double()


def hidden(model: Any, ids_1L: Tensor, lengths: tuple[int, ...], **options: Any) -> Tensor:
    """Hidden states [L, H] of a pack of documents."""
    positions_1L = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    decoder = model.get_decoder()
    out = decoder(input_ids=ids_1L, position_ids=positions_1L, attention_mask=None, use_cache=False, **options)
    states_LH: Tensor = out.last_hidden_state[0]
    return states_LH


@pytest.mark.parametrize(("of", "config"), PLAIN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_are_those_under_a_mask(of: Any, config: Any, checkpointing: bool) -> None:
    masked = make_model(of, config)
    by_document = copy.deepcopy(masked)
    assert attend_by_document(by_document)
    assert attend_by_document(by_document)
    assert (masked.config._attn_implementation, by_document.config._attn_implementation) == ("sdpa", NAME)
    if checkpointing:
        by_document.train()
        by_document.gradient_checkpointing_enable({"use_reentrant": False})
    ids_1L = torch.randint(50, (1, sum(LENGTHS)))
    expected_LH = hidden(masked, ids_1L, LENGTHS)
    actual_LH = hidden(by_document, ids_1L, LENGTHS, **{KEYWORD: LENGTHS})
    torch.testing.assert_close(actual_LH, expected_LH)
    weight_LH = torch.randn_like(expected_LH)
    for states_LH in (expected_LH, actual_LH):
        (states_LH * weight_LH).sum().backward()
    parameters = dict(masked.get_decoder().named_parameters())
    for name, parameter in by_document.get_decoder().named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad)
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    alone = [
        hidden(masked, ids_1L[:, start : start + length], (length,))
        for start, length in zip(starts, LENGTHS, strict=True)
    ]
    torch.testing.assert_close(actual_LH, torch.cat(alone))


@pytest.mark.parametrize(
    ("of", "config", "options"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
        (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_a_model_that_sees_a_window_keeps_its_mask(of: Any, config: Any, options: Any) -> None:
    model = make_model(of, config, **options)
    assert not attend_by_document(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_is_left_as_it_is() -> None:
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.set_attn_implementation("eager")
    assert not attend_by_document(model)


def test_without_the_documents_nothing_is_computed() -> None:
    model = make_model(LlamaForCausalLM, LlamaConfig)
    assert attend_by_document(model)
    with pytest.raises(TypeError, match="document_lengths"):
        hidden(model, torch.zeros(1, 3, dtype=torch.int64), (3,))
    model.set_attn_implementation("sdpa")
    assert hidden(model, torch.zeros(1, 3, dtype=torch.int64), (3,)).shape == (3, 32)
    assert "attn" not in str(model.config.to_json_string())
