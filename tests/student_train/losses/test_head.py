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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stillroom.errors import ConfigError
from student_train.losses.divergences import CrossEntropy
from student_train.losses.fused_head import FusedHead, fuse_head, fused_loss, head_loss, head_metrics
from student_train.losses.head_chunks import HeadInputs, LogitMap
from student_train.losses.metrics import TokenMetrics, metrics_tensor
from student_train.losses.mix import DEFAULT_MIX, LossMix
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


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ARCHITECTURES: list[tuple[str, dict[str, Any], LogitMap]] = [
    ("llama", {}, LogitMap()),
    # Its decoder knows no such setting: nothing is capped.
    ("llama", {"final_logit_softcapping": 30.0}, LogitMap()),
    ("gemma2", {"final_logit_softcapping": 7.0}, LogitMap(cap=7.0)),
    ("cohere", {"logit_scale": 0.0625}, LogitMap(scale=0.0625)),
    ("granite", {"logits_scaling": 6.0}, LogitMap(scale=1 / 6)),
    ("minicpm3", {"dim_model_base": 12, "num_key_value_heads": 2, **MLA}, LogitMap(hidden_scale=12 / 32)),
]


@pytest.mark.parametrize(("family", "settings", "expected"), ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_see_the_logits_that_the_model_makes(
    family: str, settings: dict[str, Any], expected: LogitMap, dtype: torch.dtype
) -> None:
    """Loss and every gradient against cross-entropy on the model's own logits, scaled and capped heads included."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **settings, "tie_word_embeddings": False})
    dense: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        # Large enough that a cap of 7 bends them.
        dense.get_output_embeddings().weight.mul_(20.0)
    fused = copy.deepcopy(dense)
    head = fuse_head(fused)
    assert head.logit_map == expected
    if dtype != torch.float32:
        return
    ids_1T = torch.arange(3, N + 4).unsqueeze(0)
    logits_NV = dense(ids_1T).logits[0, :-1]
    dense_sum = torch.nn.functional.cross_entropy(logits_NV, ids_1T[0, 1:], reduction="sum")
    hidden_NH = fused.get_decoder()(ids_1T).last_hidden_state[0, :-1]
    targets, mix = SparseTargets.text_alone(ids_1T[0, 1:]), LossMix((CrossEntropy(),))
    fused_sum = head_loss(head, hidden_NH, targets, mix, chunk_tokens=3).loss_sum
    torch.testing.assert_close(fused_sum, dense_sum)
    dense_sum.backward()
    fused_sum.backward()
    grads = grads_of(fused)
    assert grads.keys() == grads_of(dense).keys()
    for name, grad in grads_of(dense).items():
        torch.testing.assert_close(grads[name], grad, rtol=2e-4, atol=1e-4)


def test_a_model_that_changes_its_logits_in_another_way_is_refused() -> None:
    class Squaring(LlamaForCausalLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out = super().forward(*arguments, **options)
            out.logits = out.logits * out.logits.abs()
            return out

    class Transforming(LlamaForCausalLM):
        def get_decoder(self) -> Any:
            return self.model.layers[0].mlp.__class__(self.config)

    for kind, why in ((Squaring, "by more than a factor or a soft cap"), (Transforming, "a few tokens cannot be run")):
        with pytest.raises(ConfigError, match=f"{kind.__name__} cannot be trained: .*{why}"):
            fuse_head(kind(tiny_model(tied=False).config))


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
