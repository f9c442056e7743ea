"""Answers of a student to held-out prompts: the tokens it would give alone, split, judged, counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.errors import ConfigError
from student_train.answers import (
    AskedPrompt,
    GenerateConfig,
    answer_of,
    generate,
    generate_and_judge,
    heldout_prompts,
)
from student_train.data.selection import PinnedCache
from tests.helpers.caches import THINK_END_ID, SyntheticCache
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS

pytestmark = [IGNORE_LIBRARY_WARNINGS, pytest.mark.filterwarnings("ignore:::transformers")]

GREEDY = GenerateConfig(num_prompts=4, max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def model(student: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval()
    # Sure enough of itself that rounding decides nothing.
    with torch.no_grad():
        loaded.model.norm.weight.mul_(30)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> Any:
    return AutoTokenizer.from_pretrained(student)


def prompt_of(ids: list[int], reference: str | None = None, reasoning: tuple[str, str] | None = None) -> AskedPrompt:
    return AskedPrompt(str(ids), ids, "exact", reference, {}, reasoning, 0.5)


PROMPTS = [prompt_of([5]), prompt_of([7, 8, 9, 10, 11]), prompt_of([12, 13]), prompt_of([20, 21, 22, 23, 24, 25, 26])]


def greedy_alone(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """Token by token, without cache, padding or batch."""
    for _ in range(num_tokens):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids


def test_a_batch_of_several_lengths_gives_the_tokens_of_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    answers = generate(model, tokenizer, PROMPTS, GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert [*prompt.token_ids, *answer] == greedy_alone(model, list(prompt.token_ids), 12)


def test_nothing_but_what_was_asked_decides_how_answers_are_drawn(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's generation configs sample at 0.7 out of a nucleus, with a penalty, unless every bit is overruled."""
    hot = GenerateConfig(4, 12, 2.0)
    before = [generate(model, tokenizer, PROMPTS, config) for config in (GREEDY, hot)]
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.1, "top_k": 2, "repetition_penalty": 1.5}
    for name, value in own.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert [generate(model, tokenizer, PROMPTS, config) for config in (GREEDY, hot)] == before
    assert model.generation_config.repetition_penalty == 1.5


def test_answers_end_with_their_end_of_sequence(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model, tokenizer, PROMPTS, GREEDY)
    end = whole[1][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    assert generate(model, tokenizer, PROMPTS, GREEDY) == [_cut(answer, end) for answer in whole]
    result, given = generate_and_judge(model, tokenizer, PROMPTS, GREEDY)
    assert [list(one.ids) for one in given] == [_cut(answer, end) for answer in whole]
    assert result.truncated_frac == sum(end not in answer for answer in whole) / 4
    assert result.mean_tokens == sum(len(_cut(answer, end)) for answer in whole) / 4


def test_samples_repeat_with_their_seed(model: Any, tokenizer: Any) -> None:
    hot = GenerateConfig(4, 12, 2.0, seed=3)
    assert generate(model, tokenizer, PROMPTS, hot) == generate(model, tokenizer, PROMPTS, hot)
    assert generate(model, tokenizer, PROMPTS, hot) != generate(model, tokenizer, PROMPTS, GenerateConfig(4, 12, 2.0))


def test_right_wrong_and_undecided_are_counted(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = generate(model, tokenizer, PROMPTS[:1], GREEDY)[0]
    # An answer that is cut at the limit is not right, whatever it says.
    monkeypatch.setattr(model.generation_config, "eos_token_id", first[-1])
    prompts = [
        prompt_of(list(PROMPTS[0].token_ids), answer_of(tokenizer, PROMPTS[0], _cut(first, first[-1]))[1]),
        prompt_of(list(PROMPTS[1].token_ids), "something else"),
        prompt_of(list(PROMPTS[2].token_ids), None),
    ]
    result, _ = generate_and_judge(model, tokenizer, prompts, GREEDY)
    assert (result.num_correct, result.num_wrong, result.num_undecided) == (1, 1, 1)
    assert (result.accuracy, result.teacher_accuracy) == (0.5, 0.5)


def test_what_follows_the_reasoning_is_the_answer(tokenizer: Any) -> None:
    thinking = prompt_of([5], reasoning=("w9", f"w{THINK_END_ID}"))
    assert answer_of(tokenizer, thinking, [9, 30, 31, THINK_END_ID, 40, 41, 1]) == (4, "w40 w41")
    assert answer_of(tokenizer, thinking, [9, 30, 31]) == (None, None)
    assert answer_of(tokenizer, thinking, [30, 31]) == (0, "w30 w31")
    assert answer_of(tokenizer, prompt_of([5]), [30, THINK_END_ID, 31]) == (0, "w30 w31")


def test_prompts_without_a_judge_cannot_be_judged(cache: SyntheticCache) -> None:
    pinned = PinnedCache(root=str(cache.root), weight=1.0, chains_version=_version(cache), verdicts_version=0)
    with pytest.raises(ConfigError, match="no prompt of the chains with \"split = 'heldout'\" names a judge"):
        heldout_prompts([pinned], "split = 'heldout'", 4, None)
    with pytest.raises(ConfigError, match="no chain matches \"split = 'held'\""):
        heldout_prompts([pinned], "split = 'held'", 4, None)
    with pytest.raises(ConfigError, match=r"^--where 'split =': it ends too early, or its brackets do not match$"):
        heldout_prompts([pinned], "split =", 4, None)


def test_answers_that_would_never_end_are_refused(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    # Without the name of an option: `compare` asks too.
    with pytest.raises(ConfigError, match=r"^the model has no eos_token_id in its generation config"):
        generate(model, tokenizer, PROMPTS, GREEDY)


def test_numbers_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="the last at least 0"):
        GenerateConfig(1, 1, -0.5)


def _cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _version(cache: SyntheticCache) -> int:
    return cache.catalog.chains.version
