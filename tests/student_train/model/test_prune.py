"""Students cut from teachers by depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from stillroom.errors import ConfigError, DataError
from student_train.config.run import InitConfig, StudentConfig
from student_train.model.prune import init_student, kept_layers, require_cut
from student_train.model.student import use_cpu_where_there_is_no_gpu
from tests.helpers.students import make_student, make_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "pad_token_id": None,
}


def test_layers_are_evenly_spaced() -> None:
    assert kept_layers(30, 4) == [0, 10, 19, 29]
    assert kept_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert kept_layers(6, 2) == [0, 5]
    assert kept_layers(6, 1) == [0]
    for num_student in range(1, 31):
        kept = kept_layers(30, num_student)
        assert len(set(kept)) == num_student
    with pytest.raises(ConfigError, match=r"layers=7 must lie in 1\.\.6"):
        kept_layers(6, 7)
    assert kept_layers(6, [0, 1, 4]) == [0, 1, 4]
    for layers in ([0, 6], [1, 0], [0, 0]):
        with pytest.raises(ConfigError, match=r"ascending numbers in 0\.\.5"):
            kept_layers(6, layers)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_cut_keeps_weights_and_everything_beside_them(
    tmp_path: Path, config_class: type[LlamaConfig | Qwen2Config | Qwen3Config]
) -> None:
    use_cpu_where_there_is_no_gpu()
    teacher = AutoModelForCausalLM.from_config(config_class(**SMALL), dtype=torch.bfloat16)
    teacher.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=1)
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    record = init_student(InitConfig(teacher=str(tmp_path / "teacher"), layers=3), tmp_path / "student")
    assert record["kept_layers"] == [0, 2, 5]
    student: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.dtype == torch.bfloat16
    assert student.config.num_hidden_layers == 3
    layer_types = student.config.to_dict().get("layer_types")
    assert layer_types is None or len(layer_types) == 3
    for new, old in enumerate([0, 2, 5]):
        kept = student.model.layers[new].state_dict()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.model.layers[old].state_dict().items())
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert student.generation_config.temperature == 0.6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    generated = student.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 2


def test_the_same_cut_again_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    teacher = make_student(tmp_path / "teacher", layers=4)
    asked = InitConfig(teacher=str(teacher), layers=2)
    first = init_student(asked, tmp_path / "student")
    before = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    assert init_student(asked, tmp_path / "student") == first
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="already exists"):
        init_student(InitConfig(teacher=str(teacher), layers=3), tmp_path / "student")
    assert json.loads((tmp_path / "student" / "init.json").read_text())["kept_layers"] == [0, 3]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_models_without_such_layers_are_refused(tmp_path: Path) -> None:
    use_cpu_where_there_is_no_gpu()
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="GPT2LMHeadModel cannot be cut"):
        init_student(InitConfig(teacher=str(tmp_path / "gpt2"), layers=1), tmp_path / "student")
    with pytest.raises(DataError):
        init_student(InitConfig(teacher=str(tmp_path / "nothing"), layers=1), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_configuration_that_asks_for_another_cut_than_the_folder_holds_is_refused(tmp_path: Path) -> None:
    teacher = str(make_student(tmp_path / "teacher", layers=3))
    init_student(InitConfig(teacher=teacher, layers=2), tmp_path / "student")

    def student(layers: int | list[int], name: str = "student", of: str = teacher) -> StudentConfig:
        return StudentConfig(model=str(tmp_path / name), init=InitConfig(teacher=of, layers=layers))

    require_cut(student(2))
    require_cut(student([0, 2]))
    require_cut(StudentConfig(model=str(tmp_path / "nowhere")))
    with pytest.raises(
        ConfigError, match=r"layers 3 evenly spaced of .*teacher, but .*student holds layers \[0, 2\] of "
    ):
        require_cut(student(3))
    with pytest.raises(ConfigError, match=r"asks for layers \[0, 1\] of "):
        require_cut(student([0, 1]))
    with pytest.raises(ConfigError, match="asks for layers 2 evenly spaced of other"):
        require_cut(student(2, of="other"))
    with pytest.raises(ConfigError, match=r"nowhere does not exist yet: create it with `student-train init`"):
        require_cut(student(2, "nowhere"))
