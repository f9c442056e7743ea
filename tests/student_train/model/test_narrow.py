"""Students cut by width: what leaves a tensor leaves the function alone where it had no part in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.errors import ConfigError
from student_train.config.run import InitConfig
from student_train.config.stage import PruneConfig
from student_train.model.importance import init_calibration, least_needed_layers
from student_train.model.narrow import layout_of, planned_sizes
from student_train.model.prune import init_student, keep_layers, prune
from student_train.model.student import load_causal, use_cpu_where_there_is_no_gpu
from tests.helpers.students import make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS, Trainer

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: list[tuple[str, Any]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {}),
    ("smollm3", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
]
IDS = torch.tensor([[3, 9, 27, 81, 243, 250, 7]])


def _model(family: str, **more: Any) -> Any:
    use_cpu_where_there_is_no_gpu()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **more}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter *= 4
    return model.eval()


def _zero(model: Any, *, mlp: list[int], group: int | None, hidden: list[int]) -> None:
    """Takes channels out of the function: MLP channels, a KV group, and hidden channels that are then always 0."""
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[mlp] = 0
                if projection.bias is not None:
                    projection.bias[mlp] = 0
            layer.mlp.down_proj.weight[:, mlp] = 0
            if group is not None:
                rows, queries = slice(8 * group, 8 * group + 8), slice(16 * group, 16 * group + 16)
                layer.self_attn.q_proj.weight[queries] = 0
                layer.self_attn.k_proj.weight[rows] = 0
                layer.self_attn.v_proj.weight[rows] = 0
                layer.self_attn.o_proj.weight[:, queries] = 0
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2 and name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter[hidden] = 0
                elif parameter.dim() == 2:
                    parameter[:, hidden] = 0
                elif name.endswith(("o_proj.bias", "down_proj.bias")):
                    parameter[hidden] = 0
        model.get_input_embeddings().weight[:, hidden] = 0
        model.get_output_embeddings().weight[:, hidden] = 0


@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_cutting_what_has_no_part_leaves_the_logits(tmp_path: Path, family: str, more: Any) -> None:
    model = _model(family, **more)
    mlp, hidden = list(range(1, 64, 2)), list(range(0, 48, 3))
    _zero(model, mlp=mlp, group=1, hidden=hidden)
    with torch.no_grad():
        expected = model(IDS).logits
    # 4 heads of 8 are the 32 hidden channels that remain, so that vLLM opens Qwen2 as well.
    record = prune(model, PruneConfig(mlp_channels=32, kv_groups=2, hidden_size=32), None)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    cut: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert record["num_parameters"] == sum(one.numel() for one in cut.parameters())
    assert cut.config.head_dim == 8
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads) == (4, 2)
    assert cut.model.layers[0].mlp.down_proj.weight.shape == (32, 32)
    with torch.no_grad():
        assert torch.allclose(cut(IDS).logits, expected, atol=2e-4 * float(expected.abs().max()))
        assert cut.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 7


def test_cutting_nothing_changes_no_bit(tmp_path: Path) -> None:
    teacher = make_student(tmp_path / "teacher")
    before = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    asked = InitConfig(teacher=str(teacher), layers=2, mlp_channels=64, kv_groups=2, hidden_size=32)
    init_student(asked, tmp_path / "student")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_sizes_follow_from_a_share_of_parameters() -> None:
    with torch.device("meta"):
        big = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama",
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    layout, sizes = layout_of(big)
    total = layout.num_parameters(sizes)
    for along in (None, ["layers"], ["mlp_channels", "hidden_size"], ["layers", "mlp_channels", "hidden_size"]):
        planned = planned_sizes(layout, sizes, PruneConfig(parameters=0.5, along=along))
        assert 0.45 * total < layout.num_parameters(planned) <= 0.5 * total
        assert planned.mlp_channels % 32 == planned.hidden_size % 8 == 0
        assert layout.problem(planned) is None
    with pytest.raises(ConfigError, match=r"parameters=0\.1 cannot be reached along layers: .* parameters remain"):
        planned_sizes(layout, sizes, PruneConfig(parameters=0.1, along=["layers"]))
    with pytest.raises(ConfigError, match="mlp_channels=1537 must be at most 1536"):
        planned_sizes(layout, sizes, PruneConfig(mlp_channels=1537))
    with pytest.raises(ConfigError, match="hidden_size 575 must be a multiple of the 9 attention heads"):
        planned_sizes(layout, sizes, PruneConfig(hidden_size=575))


@pytest.mark.parametrize(
    ("family", "more", "asked", "message"),
    [
        ("phi3", {"pad_token_id": 0}, {"mlp_channels": 8}, "model_type phi3.* cannot be cut by width: supported are"),
        ("qwen2", {}, {"kv_groups": 2}, "vLLM reads the size of a qwen2 head as hidden_size / heads"),
        ("llama", {}, {"layers": 2, "rank_layers": "importance"}, "runs cached chains: pass a CONFIG"),
    ],
)
def test_what_would_not_open_again_is_refused(family: str, more: Any, asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(_model(family, **more), PruneConfig(**asked), None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "cuts nothing: set one of layers"),
        ({"layers": 2, "along": ["layers"]}, "along has no effect without parameters"),
        ({"layers": 2, "parameters": 0.5}, "layers is set, and parameters cuts it too"),
        ({"layers": [0], "rank_layers": "importance"}, "importance has no effect"),
        ({"layers": 2, "rank_width": "activations"}, "where only layers are cut"),
    ],
)
def test_settings_without_effect_are_refused(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**asked)


@IGNORE_LIBRARY_WARNINGS
def test_chains_of_the_cache_rank_layers_and_channels(trainer: Trainer, tmp_path: Path) -> None:
    teacher = make_student(tmp_path / "teacher", layers=4, tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for layer in model.model.layers:
            # Group 0 passes on nothing, though its other weights are the largest.
            layer.self_attn.o_proj.weight[:, :16] = 0
            layer.self_attn.q_proj.weight[:16] *= 50
    model.save_pretrained(teacher)
    init = {"teacher": str(teacher), "layers": 3, "kv_groups": 1, "mlp_channels": 32, "calibration_tokens": 300}
    ranked = {"rank_layers": "importance", "rank_width": "activations"}
    config = trainer.config("run", student={"model": str(tmp_path / "cut"), "init": {**init, **ranked}})
    assert config.student.init is not None
    calibration = init_calibration(config, config.student.init)
    assert 300 <= calibration.num_tokens < 300 + 128
    by_kept = {}
    for kept in ([1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]):
        cut: Any = load_causal(str(teacher), config.student, None)
        keep_layers(cut, kept)
        # Nothing to leave out: the KL of the model as it is.
        by_kept[least_needed_layers(cut, calibration, 3)[1][0]] = kept
    record = init_student(config.student.init, tmp_path / "cut", lambda: calibration)
    assert record["kl_by_removal"][1] == pytest.approx(min(by_kept), rel=1e-5)
    assert record["kept_layers"] == by_kept[min(by_kept)]
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for new, old in enumerate(record["kept_layers"]):
        kept_rows = model.model.layers[old].self_attn.q_proj.weight[16:]
        assert torch.equal(cut.model.layers[new].self_attn.q_proj.weight, kept_rows)
    # The same request reads no chain again, and a run of it trains.
    assert init_student(config.student.init, tmp_path / "cut") == record
    trainer.finish(config.updated(stages=[config.stages[0].model_copy(update={"epochs": None, "max_steps": 1})]))
