"""Training for a quantised export: the rounding is that of the library which writes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.errors import ConfigError
from student_train.assess.evaluating import evaluate_config
from student_train.config.stage import QuantiseConfig, StageConfig
from student_train.exporting import trained_model
from student_train.model.quantise import QuantisedLinear, quantise_layers
from student_train.runtime.checkpoint import find_state, latest_state
from student_train.runtime.run_folder import RunFolder
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer, losses_of

W8A8, W4A16 = QuantiseConfig(format="w8a8"), QuantiseConfig(format="w4a16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [W8A8, W4A16])
def test_weights_are_rounded_as_the_export_rounds_them(config: QuantiseConfig, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    fake_quantize = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    calculate_qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False, dtype=dtype)
    linear.weight.data[3] = 0
    groups = {"strategy": "group", "group_size": 32} if config.format == "w4a16" else {"strategy": "channel"}
    bits = 4 if config.format == "w4a16" else 8
    asked = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **groups)
    rows = linear.weight.data.unflatten(1, (-1, 32)) if config.format == "w4a16" else linear.weight.data
    low, high = rows.aminmax(dim=-1, keepdim=config.format == "w8a8")
    scale, zero = calculate_qparams(low, high, asked)
    expected = fake_quantize(linear.weight.data, scale, zero, asked)
    eye = torch.eye(64, dtype=dtype)
    made = QuantisedLinear.sharing(linear, config)
    made.rounds_inputs = False
    assert torch.equal(made(eye), expected.T)
    assert made.weight is linear.weight


def test_activations_are_rounded_by_token_and_gradients_pass() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8, bias=False)
    made = QuantisedLinear.sharing(linear, W8A8)
    input_BI = torch.randn(3, 8, requires_grad=True)
    scale_B1 = input_BI.detach().abs().amax(dim=1, keepdim=True) / 127
    rounded_BI = (input_BI.detach() / scale_B1).round() * scale_B1
    weight_scale_O1 = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127.5
    rounded_OI = (linear.weight.detach() / weight_scale_O1).clamp(-128, 127).round() * weight_scale_O1
    output = made(input_BI)
    assert torch.allclose(output, rounded_BI @ rounded_OI.T, atol=1e-6)
    output.sum().backward()
    # As if inputs and weights had been the rounded ones all along.
    assert torch.allclose(linear.weight.grad, rounded_BI.sum(dim=0).expand(8, 8), atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(input_BI.grad, rounded_OI.sum(dim=0).expand(3, 8), atol=1e-6)  # type: ignore[arg-type]


def test_activations_in_bfloat16_are_rounded_with_scales_in_float32() -> None:
    linear = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.eye_(linear.weight)
    input_BI = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    input_BI[5] = 0
    scale_B1 = (input_BI.float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-9)
    rounded_BI = (input_BI.float() * (1 / scale_B1)).round() * scale_B1
    # The ones of the matrix are rounded, too; 127 steps in bfloat16 lie up to half a step aside.
    one = 127 * (torch.ones(1).bfloat16() / 127.5)
    steps_BI = (QuantisedLinear.sharing(linear, W8A8)(input_BI) / one.float() - rounded_BI).abs() / scale_B1
    assert steps_BI.max() < 0.75


def test_what_cannot_be_quantised_so_is_refused(student: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    with pytest.raises(ConfigError, match=r"group_size=48 does not divide the 32 inputs of layers\.0\.self_attn"):
        quantise_layers(model, QuantiseConfig(format="w4a16", group_size=48))
    assert quantise_layers(model, W4A16) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear
    with pytest.raises(ValueError, match="group_size has no effect with format: w8a8"):
        QuantiseConfig(format="w8a8", group_size=32)
    with pytest.raises(ValueError, match="quantise needs trainable: all or body, not lora: adapters are merged"):
        StageConfig(learning_rate=1.0, trainable="lora", quantise=W8A8)


@IGNORE_LIBRARY_WARNINGS
def test_a_stage_that_prunes_and_quantises_resumes_bit_for_bit_and_exports(trainer: Trainer) -> None:
    stages: list[Any] = [
        {"name": "first", "epochs": None, "max_steps": 1},
        {
            "name": "second",
            "epochs": None,
            "max_steps": 3,
            "prune": {"mlp_channels": 32, "kv_groups": 1, "rank_width": "activations", "calibration_tokens": 200},
            "quantise": {"format": "w4a16", "group_size": 16},
        },
    ]
    plain = trainer.reference(*stages, engine={"zero_stage": 0}, eval=None)
    engine = {"zero_stage": 3, "gradient_checkpointing": True}
    config = trainer.config("run", *stages, engine=engine)
    # It is also asked at the end of the first stage.
    trainer.run(config, stop_after=2 + 2)
    stopped = latest_state(RunFolder(config.run).checkpoints)
    assert stopped is not None
    assert stopped.place == (1, 2)
    resumed = trainer.run(config)
    whole = trainer.run(trainer.config("whole", *stages, engine=engine, eval=None))
    assert losses_of(resumed) == losses_of(whole)
    assert losses_of(whole) == pytest.approx(losses_of(plain), rel=2e-4)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    model = trained_model(config, state, merged=True)
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (32, 1)
    # What the run measured is what the rounded weights are, and not what the float ones are.
    measured = RunFolder(config.run).read_evals()[-1]["forward_kl"]
    assert evaluate_config(config, None, "last")["forward_kl"] == pytest.approx(measured, rel=1e-5)
    floats = config.updated(stages=[config.stages[0], config.stages[1].model_copy(update={"quantise": None})])
    assert evaluate_config(floats, None, "last")["forward_kl"] != pytest.approx(measured, rel=1e-5)
