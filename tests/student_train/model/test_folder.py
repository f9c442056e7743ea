"""Folders of students: what older tools read in them, and folders that are not whole or not clean."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from stillroom.errors import ConfigError, DataError
from student_train.config.run import StudentConfig
from student_train.config.stage import LoraConfig
from student_train.export.bench import contestant
from student_train.export.writing import Check, export_folder
from student_train.model.folder import atomic_folder, save_model
from student_train.model.shape import model_shape
from student_train.model.student import add_lora, load_causal
from tests.helpers.students import make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS
from tools import transformers4

pytestmark = IGNORE_LIBRARY_WARNINGS

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "pad_token_id": None}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default"}
GEMMA3 = {"full_attention": {**PLAIN, "rope_theta": 1e6}, "sliding_attention": {**PLAIN, "rope_theta": 500.0}}
GEMMA3_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("qwen3", {"rope_parameters": {**PLAIN, "rope_theta": 777.0}}, {"rope_theta": 777.0}),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e3}}, {"rope_theta": 5e3, "rope_scaling": LLAMA3}),
        (
            "phi",
            {"rope_parameters": {**PLAIN, "rope_theta": 77.0, "partial_rotary_factor": 0.25}},
            {"rope_theta": 77.0, "partial_rotary_factor": 0.25},
        ),
        (
            "gemma3_text",
            {"rope_parameters": GEMMA3, **GEMMA3_LAYERS},
            {"rope_theta": 1e6, "rope_local_base_freq": 500.0},
        ),
    ],
)
def test_transformers_4_finds_its_own_names(
    tmp_path: Path, family: str, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    """With real logits where `python -m tools.transformers4` has made its environment."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings})).eval()
    save_model(model, make_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["w2"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_1L = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(again(ids_1L).logits, model(ids_1L).logits, rtol=0, atol=0)
    python = transformers4.existing()
    if python is not None and family == "gemma3_text":
        assert transformers4.difference(python, str(tmp_path)) <= transformers4.TOLERANCE


def test_generation_settings_that_transformers_refuses_to_save_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_student(tmp_path / "student")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 1, "do_sample": False, "temperature": 0.6}))
    model = load_causal(str(folder), StudentConfig(model=str(folder)), None)
    save_model(model, None, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["temperature"]) == (1, 0.6)
    assert "generation_config.json is copied unchanged, although transformers rejects it" in capsys.readouterr().err
    assert model.generation_config.temperature == 0.6


def test_weights_cut_short_are_one_line(tmp_path: Path) -> None:
    folder = make_student(tmp_path / "student")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors is missing, damaged or cut short: copy it again"):
        model_shape(StudentConfig(model=str(folder)))
    with pytest.raises(DataError, match=r"model\.safetensors is missing, damaged or cut short: copy it again"):
        load_causal(str(folder), StudentConfig(model=str(folder)), None)
    with pytest.raises(DataError, match=r"model\.safetensors is missing, damaged or cut short: copy it again"):
        contestant(str(folder))
    with pytest.raises(DataError, match=r"model\.safetensors is missing, damaged or cut short: copy it again"):
        export_folder(folder, [], None, tmp_path / "out", "onnx", Check())
    with pytest.raises(DataError, match=r"/none is not a folder: use a Hugging Face model folder or a hub id$"):
        load_causal(f"{folder}/none", StudentConfig(model=str(folder)), None)
    with pytest.raises(DataError, match=r"has no config\.json: use a Hugging Face model folder$"):
        load_causal(str(tmp_path), StudentConfig(model=str(tmp_path)), None)


def test_a_folder_without_settings_to_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^nowhere is neither a folder nor a hub id that can be reached: "):
        load_causal("nowhere", StudentConfig(model="nowhere"), None)
    with pytest.raises(DataError, match=r"^--model: nowhere is not a folder: use a Hugging Face model folder$"):
        export_folder(Path("nowhere"), [], None, tmp_path / "out", "onnx", Check())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"^--model: .*config\.json is not JSON: "):
        export_folder(tmp_path, [], None, tmp_path / "out", "onnx", Check())
    with pytest.raises(DataError, match=r"config\.json is not JSON: "):
        contestant(str(tmp_path))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is there")
def test_an_attention_that_is_not_installed_is_named(tmp_path: Path) -> None:
    student = StudentConfig(model=str(make_student(tmp_path / "student")), attention="flash_attention_2")
    with pytest.raises(ConfigError, match=r"^student\.attention: flash_attention_2 needs the package flash-attn"):
        load_causal(student.model, student, None)


def test_a_head_of_its_own_is_not_called_tied(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_student(tmp_path / "student"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2.0)
    save_model(model, None, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


def test_the_adapter_of_a_head_is_saved_alone(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_student(tmp_path / "student"))
    save_model(add_lora(model, LoraConfig(r=2, targets=["lm_head"])), None, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 300 * 32


def test_lora_on_experts() -> None:
    def student() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(**{**SMALL, "num_local_experts": 4})
        model: Any = MixtralForCausalLM(config)
        for layer in model.model.layers:
            # As in models whose router is a linear layer.
            layer.mlp.router = torch.nn.Linear(32, 4, bias=False)
        return model

    def adapted(lora: LoraConfig) -> set[str]:
        names = [name for name, one in add_lora(student(), lora).named_parameters() if one.requires_grad]
        return {name.split(".lora_")[0].rpartition(".layers.0.")[2] for name in names if ".layers.0." in name}

    assert adapted(LoraConfig()) == {f"self_attn.{one}_proj" for one in "qkvo"}
    assert adapted(LoraConfig(targets=["router"])) == {"mlp.router"}
    assert adapted(LoraConfig(targets=["experts.down_proj"])) == {"mlp.experts"}
    with pytest.raises(ConfigError, match=r"lora cannot adapt this student: .*dropout"):
        adapted(LoraConfig(targets=["experts.down_proj"], dropout=0.1))
    with pytest.raises(ConfigError, match=r"lora.targets=\['nothing'\]: Target modules"):
        adapted(LoraConfig(targets=["nothing"]))


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(DataError, match=r"^/proc/ex cannot be written \("), atomic_folder(Path("/proc/ex")):
        pass
