"""The head that is put into real Hugging Face models, alone, tied and under peft.

N loss tokens, H hidden, V vocabulary, K support
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stillroom.errors import ConfigError
from student_train.losses.divergences import DEFAULT_MIX, CrossEntropy, LossMix
from student_train.losses.fused_head import (
    FusedHead,
    fuse_head,
    fused_loss,
    head_loss,
    head_metrics,
    refuse_changed_logits,
)
from student_train.losses.head_chunks import HeadInputs
from student_train.losses.metrics import TokenMetrics, metrics_tensor
from student_train.losses.targets import SparseTargets

N, H, V, K = 7, 16, 41, 3


def tiny_model(*, tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=H,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def some_targets() -> SparseTargets:
    generator = torch.Generator().manual_seed(1)
    dense_NV = torch.log_softmax(2.0 * torch.randn(N, V, generator=generator), dim=1)
    logprobs_NK, ids_NK = dense_NV.topk(K, dim=1)
    return SparseTargets(ids_NK, logprobs_NK, torch.log1p(-logprobs_NK.exp().sum(dim=1)), ids_NK[:, 1])


def some_hidden() -> Tensor:
    return torch.randn(N, H, generator=torch.Generator().manual_seed(2)).requires_grad_()


def grads_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_model_is_the_same_model(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tied=tied)
    ids_1T = torch.arange(9).unsqueeze(0)
    before_1TV = model(ids_1T).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = fuse_head(model)
    assert model.get_output_embeddings() is head
    assert fuse_head(model) is head
    assert (head.weight is model.get_input_embeddings().weight) == tied
    model.tie_weights()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(model(ids_1T).logits, before_1TV, rtol=0, atol=0)
    assert state.keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids_1T).logits, before_1TV, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_losses_train_the_whole_model_like_a_dense_loss(tied: bool) -> None:
    """Gradients of every parameter, embeddings included, against plain cross-entropy on logits."""
    ids_1T = torch.arange(N + 1).unsqueeze(0)
    dense, fused = tiny_model(tied=tied), tiny_model(tied=tied)
    logits_NV = dense(ids_1T).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits_NV, ids_1T[0, 1:], reduction="sum").backward()
    head = fuse_head(fused)
    hidden_NH = fused.model(ids_1T).last_hidden_state[0, :-1]
    mix = LossMix((CrossEntropy(),))
    head_loss(head, hidden_NH, SparseTargets.text_alone(ids_1T[0, 1:]), mix).loss_sum.backward()
    expected = grads_of(dense)
    assert expected.keys() == grads_of(fused).keys()
    for name, grad in grads_of(fused).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_biases_are_carried() -> None:
    linear = torch.nn.Linear(H, V)
    head = FusedHead.sharing(linear)
    assert head.bias is linear.bias
    hidden_NH = some_hidden()
    torch.testing.assert_close(head(hidden_NH), linear(hidden_NH), rtol=0, atol=0)
    with_bias = head_loss(head, hidden_NH, some_targets(), DEFAULT_MIX).loss_sum
    direct = fused_loss(hidden_NH, linear.weight, some_targets(), DEFAULT_MIX, bias_V=linear.bias).loss_sum
    assert with_bias.item() == direct.item()


def peft_model(**lora: Any) -> Any:
    model = tiny_model(tied=False)
    fuse_head(model)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **lora))


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_the_head_equals_the_merged_head(rslora: bool) -> None:
    wrapped = peft_model(target_modules=["lm_head"], use_rslora=rslora)
    layer = wrapped.get_output_embeddings()
    assert type(layer.get_base_layer()) is FusedHead
    hidden_NH, targets = some_hidden(), some_targets()
    sums = head_loss(layer, hidden_NH, targets, DEFAULT_MIX, chunk_tokens=3)
    sums.loss_sum.backward()
    assert layer.get_base_layer().weight.grad is None
    assert hidden_NH.grad is not None

    a_RH, b_VR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged_VH = layer.get_base_layer().weight + layer.scaling["default"] * b_VR @ a_RH
    again_NH = some_hidden()
    merged = fused_loss(again_NH, merged_VH, targets, DEFAULT_MIX)
    expected = torch.autograd.grad(merged.loss_sum, (again_NH, a_RH, b_VR))
    torch.testing.assert_close(sums.loss_sum, merged.loss_sum)
    torch.testing.assert_close((hidden_NH.grad, a_RH.grad, b_VR.grad), expected, rtol=1e-4, atol=1e-5)
    expected = TokenMetrics(*metrics_tensor(HeadInputs(hidden_NH, merged_VH), targets))
    torch.testing.assert_close(head_metrics(layer, hidden_NH, targets), expected)


def test_several_adapters_add_up_and_switched_off_ones_do_not() -> None:
    wrapped = peft_model(target_modules=["lm_head"])
    wrapped.add_adapter("second", LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["lm_head"]))
    layer = wrapped.get_output_embeddings()
    hidden_NH, targets = some_hidden(), some_targets()
    base_VH = layer.get_base_layer().weight

    def loss() -> float:
        return head_loss(layer, hidden_NH, targets, DEFAULT_MIX).loss_sum.item()

    def loss_of(weight_VH: Tensor) -> float:
        return fused_loss(hidden_NH, weight_VH, targets, DEFAULT_MIX).loss_sum.item()

    wrapped.base_model.set_adapter(["default", "second"])
    both_VH = base_VH + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert loss() == pytest.approx(loss_of(both_VH), rel=1e-5)
    with wrapped.disable_adapter():
        assert loss() == pytest.approx(loss_of(base_VH), rel=1e-6)
    layer.merge()
    assert loss() == pytest.approx(loss_of(both_VH), rel=1e-5)


def test_lora_dropout_is_part_of_the_loss_in_training_alone() -> None:
    layer = peft_model(target_modules=["lm_head"], lora_dropout=0.5).get_output_embeddings()
    hidden_NH, targets = some_hidden(), some_targets()

    def loss() -> float:
        return head_loss(layer, hidden_NH, targets, DEFAULT_MIX).loss_sum.item()

    layer.train()
    torch.manual_seed(0)
    first = loss()
    assert first != loss()
    torch.manual_seed(0)
    assert loss() == first
    layer.eval()
    assert loss() == loss()


def test_a_full_copy_of_the_head_by_peft() -> None:
    wrapped = peft_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    layer = wrapped.get_output_embeddings()
    hidden_NH, targets = some_hidden(), some_targets()
    head_loss(layer, hidden_NH, targets, DEFAULT_MIX).loss_sum.backward()
    copied = layer.modules_to_save["default"]
    assert type(copied) is FusedHead
    assert copied.weight.grad is not None
    assert layer.original_module.weight.grad is None


def test_adapters_without_a_plain_low_rank_form_are_refused() -> None:
    kinds: list[dict[str, Any]] = [{"use_dora": True}, {"lora_bias": True}]
    for kind in kinds:
        model = tiny_model(tied=False)
        linear = model.get_output_embeddings()
        biased = torch.nn.Linear(H, V)
        biased.weight = linear.weight
        model.set_output_embeddings(biased)
        fuse_head(model)
        wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], **kind))
        with pytest.raises(ConfigError, match="LoRA on the head must be plain"):
            head_loss(wrapped.get_output_embeddings(), some_hidden(), some_targets(), DEFAULT_MIX)


def test_heads_that_change_logits_are_refused() -> None:
    for settings in (
        {"final_logit_softcapping": 30.0},
        {"logit_scale": 0.0625},
        {"text_config": {"logits_scaling": 8.0}},
    ):
        with pytest.raises(ConfigError, match="neither scales nor caps"):
            refuse_changed_logits(settings)
    refuse_changed_logits({"final_logit_softcapping": None, "logits_scaling": 1.0, "text_config": None})
    model = tiny_model(tied=False)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0"):
        fuse_head(model)


def test_heads_of_other_kinds_are_refused() -> None:
    class Quantised(torch.nn.Linear):
        pass

    model = tiny_model(tied=False)
    model.set_output_embeddings(Quantised(H, V))
    with pytest.raises(ConfigError, match="head is a Quantised"):
        fuse_head(model)


def test_a_deep_copy_of_a_tied_model_stays_tied() -> None:
    model = tiny_model(tied=True)
    fuse_head(model)
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert type(twin.get_output_embeddings()) is FusedHead
