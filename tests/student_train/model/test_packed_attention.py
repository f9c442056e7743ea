"""A pack's hidden states are those of each document alone, for models of every kind, in whatever way they are had."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillroom.errors import ConfigError
from student_train.model.packed_attention import NAME, Apart, hidden_states, keep_apart

LENGTHS = (5, 1, 12, 7)
EYES: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}
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
WINDOW = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
NOT_THERE = object()
RECURRENT = {
    "pad_token_id": 0,
    "layer_types": ["linear_attention"] * 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FALCON = {"alibi": False, "new_decoder_architecture": False, "multi_query": False, "head_dim": NOT_THERE}


def make_model(of: Any, config: Any, **options: Any) -> Any:
    """A tiny model with random weights, in float64."""
    torch.manual_seed(0)
    given = {name: value for name, value in {**SIZES, **options}.items() if value is not NOT_THERE}
    return of._from_config(config(**given), attn_implementation="sdpa").double()


def pack(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """ids, positions, lengths."""
    torch.manual_seed(1)
    positions_1L = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return torch.randint(50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)), positions_1L, lengths


def alone(model: Any) -> Tensor:
    """Hidden states of each document of the pack, computed for itself."""
    return hidden_states(model, Apart.ONE_BY_ONE, *pack())


@pytest.mark.parametrize(
    ("of", "config", "options", "expected"),
    [
        *((of, config, {}, Apart.BY_ATTENTION) for of, config in PLAIN),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 4}, Apart.BY_MASK),
        (
            Qwen2ForCausalLM,
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            Apart.BY_MASK,
        ),
        # Its windows stand in the configuration of its decoder.
        (Gemma3ForConditionalGeneration, Gemma3Config, {"text_config": {**SIZES, **WINDOW}, **EYES}, Apart.BY_MASK),
        # Takes keywords, and hands none on.
        (NemotronForCausalLM, NemotronConfig, {}, Apart.BY_MASK),
        # Makes no mask of positions.
        (FalconForCausalLM, FalconConfig, FALCON, Apart.ONE_BY_ONE),
        # Convolutions carry on what they have seen.
        (
            Lfm2ForCausalLM,
            Lfm2Config,
            {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
            Apart.ONE_BY_ONE,
        ),
        # Recurrent layers alone leave the zero embedding of a padding token zero, which once hid that they carry on.
        (Qwen3_5ForCausalLM, Qwen3_5TextConfig, RECURRENT, Apart.ONE_BY_ONE),
    ],
)
def test_no_token_sees_another_document(of: Any, config: Any, options: Any, expected: Apart) -> None:
    model = make_model(of, config, **options)
    untouched = copy.deepcopy(model)
    assert keep_apart(model) is expected
    assert keep_apart(model) is expected
    assert model.training == untouched.training
    model.eval()
    torch.testing.assert_close(hidden_states(model, expected, *pack()), alone(untouched.eval()))


@pytest.mark.parametrize(("of", "config"), PLAIN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_are_those_under_a_mask(of: Any, config: Any, checkpointing: bool) -> None:
    masked = make_model(of, config)
    by_attention = copy.deepcopy(masked)
    assert keep_apart(by_attention) is Apart.BY_ATTENTION
    assert (masked.config._attn_implementation, by_attention.config._attn_implementation) == ("sdpa", NAME)
    if checkpointing:
        by_attention.train()
        by_attention.gradient_checkpointing_enable({"use_reentrant": False})
    expected_LH = hidden_states(masked, Apart.BY_MASK, *pack())
    actual_LH = hidden_states(by_attention, Apart.BY_ATTENTION, *pack())
    torch.testing.assert_close(actual_LH, expected_LH)
    weight_LH = torch.randn_like(expected_LH)
    for states_LH in (expected_LH, actual_LH):
        (states_LH * weight_LH).sum().backward()
    parameters = dict(masked.get_decoder().named_parameters())
    for name, parameter in by_attention.get_decoder().named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad)


def test_other_attention_is_left_as_it_is() -> None:
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.set_attn_implementation("eager")
    assert keep_apart(model) is Apart.BY_MASK
    assert model.config._attn_implementation == "eager"


def test_a_switched_model_cannot_be_used_by_mistake() -> None:
    model = make_model(LlamaForCausalLM, LlamaConfig)
    assert keep_apart(model) is Apart.BY_ATTENTION
    with pytest.raises(TypeError, match="document_lengths"):
        model(torch.zeros(1, 3, dtype=torch.int64))
    model.set_attn_implementation("sdpa")
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 50)
    assert "attn" not in model.config.to_json_string()


def test_a_decoder_without_hidden_states_is_refused() -> None:
    model = make_model(LlamaForCausalLM, LlamaConfig)
    model.get_decoder().forward = lambda **_: None
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be trained: its decoder returns no hidden states"):
        keep_apart(model)
