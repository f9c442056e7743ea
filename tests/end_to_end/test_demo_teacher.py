"""The demo's teacher, real weights in a folder that transformers loads without help, and the questions it is asked."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import questions
from benchmarks.demo.smollm2 import ensure_teacher, find_weights
from stillroom.errors import DataError
from stillroom.judging.judges import judge_answer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_teacher(tmp_path_factory.mktemp("demo") / "teacher")


def test_it_answers_a_sum(teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)  # transformers types generate() for a private class
    question = [{"role": "user", "content": "What is 2+3?"}]
    prompt = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    prompt_ids = torch.tensor([tokenizer(prompt).input_ids])
    generated = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=24)
    completion_ids = generated[0, prompt_ids.shape[1] :].tolist()
    assert "5" in tokenizer.decode(completion_ids)
    assert completion_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_its_embeddings_are_tied_and_stored_once_in_float32(teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    with safe_open(teacher / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    model = AutoModelForCausalLM.from_pretrained(teacher)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("2024", ["2", "0", "2", "4"]),
        ("is\n\n42", ["is", "ĊĊ", "4", "2"]),
        ("a <|im_end|>", ["a", "Ġ", "<|im_end|>"]),
    ],
)
def test_its_tokenizer_splits_as_the_model_was_trained(teacher: Path, text: str, pieces: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    token_ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(token_ids) == pieces
    assert tokenizer.decode(token_ids) == text


def test_its_prompt_is_the_published_template(teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_folder_that_exists_is_kept(teacher: Path) -> None:
    before = (teacher / "model.safetensors").stat().st_mtime_ns
    assert ensure_teacher(teacher) == teacher
    assert (teacher / "model.safetensors").stat().st_mtime_ns == before


def test_missing_weights_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make setup"):
        find_weights(tmp_path)


@pytest.mark.parametrize("kind", questions.KINDS)
def test_the_question_files_are_what_the_generator_writes(kind: str) -> None:
    assert (questions.FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8") == questions.rows(kind)
    rows = [json.loads(line) for line in questions.rows(kind).splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) > 40


def test_a_whole_word_is_right_and_a_part_of_one_is_not() -> None:
    question, pattern = questions.opposite(random.Random(1))
    word = pattern.removeprefix(r"(?i)\b").removesuffix(r"\b")
    assert word not in question
    assert judge_answer("regex", f"The opposite is {word.title()}.", pattern, {}).correct
    assert not judge_answer("regex", f"The opposite is {word}ish.", pattern, {}).correct
