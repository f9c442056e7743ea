"""What `eval` answers beyond means: groups that add up, calibration, robustness, forgetting, lm-eval, the page."""

import json
import math
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError
from student_train.answers import AskedPrompt, GenerateConfig, answer_and_judge
from student_train.assess import evaluating, harness
from student_train.assess import page as page_module
from student_train.assess.breakdown import doubling_name, doublings
from student_train.assess.calibration import CalibrationSums
from student_train.assess.evaluating import More, evaluate_model
from student_train.assess.forgetting import documents, windows
from student_train.assess.harness import HarnessConfig, require_tasks, run_harness
from student_train.assess.page import eval_sections, read_result, write_eval_page
from student_train.assess.robustness import robustness
from student_train.cli import app
from student_train.commands.result_lines import eval_lines
from student_train.config.run import TrainConfig
from student_train.model.student import load_causal
from student_train.report import write_student_report
from student_train.runtime.run_folder import RunFolder
from tests.helpers.caches import SyntheticCache
from tests.helpers.students import make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS

pytestmark = [
    IGNORE_LIBRARY_WARNINGS,
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.usefixtures("asked_once"),
]


@pytest.fixture(scope="module")
def result(cache: SyntheticCache, student: Path) -> Json:
    """The student on all chains, against itself as the one before its training."""
    more = More(forgetting=str(cache.root), before=str(student))
    return evaluate_model(str(student), [cache.root], "true", pack_tokens=128, more=more)


@pytest.mark.parametrize("by", ["source", "prompt_tokens", "tokens", "position", "part"])
def test_groups_add_up_to_the_whole(result: Json, by: str) -> None:
    rows = result["by"][by]
    num_N = np.array([row["num_tokens"] for row in rows])
    assert num_N.sum() == result["num_tokens"]
    for name in ("cross_entropy", "accuracy", "forward_kl", "js", "top1_agreement", "confidence_minus_accuracy"):
        mean = (num_N * [row[name] for row in rows]).sum() / num_N.sum()
        assert mean == pytest.approx(result[name], rel=1e-4, abs=1e-6), name
    assert all(row["retention"] == pytest.approx(1 - row["js"] / math.log(2)) for row in rows)


def test_groups_hold_the_chains_that_they_name(result: Json, cache: SyntheticCache) -> None:
    lengths = dict.fromkeys(("stories", "sums"), 0)
    for chain in cache.chains:
        lengths[chain.source] += len(chain.token_ids)
    assert {row["group"]: row["num_tokens"] for row in result["by"]["source"]} == lengths
    longer = sum(len(chain.token_ids) for chain in cache.chains if len(chain.token_ids) > 32)
    assert {row["group"]: row["num_tokens"] for row in result["by"]["tokens"]}["33 to 64"] == longer
    late = sum(max(0, len(chain.token_ids) - 32) for chain in cache.chains)
    assert {row["group"]: row["num_tokens"] for row in result["by"]["position"]}["33 to 64"] == late
    assert doublings(np.array([1, 32, 33, 64, 65])).tolist() == [0, 0, 1, 1, 2]
    assert [doubling_name(number) for number in range(3)] == ["1 to 32", "33 to 64", "65 to 128"]


def test_what_did_not_change_was_not_forgotten(result: Json) -> None:
    found = result["forgetting"]
    assert found["kind"] == "cache"
    assert 0 < found["after"]["num_tokens"] < result["num_tokens"]
    assert found["before"] == found["after"]
    assert set(found["change"].values()) == {0.0}


def test_text_is_measured_before_and_after(cache: SyntheticCache, student: Path, tmp_path: Path) -> None:
    """Against the loss that transformers computes itself."""
    path = tmp_path / "second.jsonl"
    texts = ["w5 w6 w7 w8 w9", "w30 w31 w32"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = More(forgetting=str(path), before=str(student))
    found = evaluate_model(str(student), [cache.root], None, max_chains=1, pack_tokens=64, more=more)["forgetting"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    total = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found["after"]["num_tokens"] == 6
    assert found["after"]["cross_entropy"] == pytest.approx(total / 6, rel=1e-5)
    # Each byte of the texts but the first word of each.
    assert found["after"]["num_bytes"] == len(" w6 w7 w8 w9") + len(" w31 w32")
    assert found["change"] == {"cross_entropy": 0.0, "bits_per_byte": 0.0}
    path.write_text('{"words": 1}\n')
    with pytest.raises(DataError, match=r"second\.jsonl: line 1 has no \"text\""):
        evaluate_model(str(student), [cache.root], None, max_chains=1, pack_tokens=64, more=more)
    with pytest.raises(ConfigError, match="neither a cache nor a"):
        evaluate_model(str(student), [cache.root], None, more=replace(more, forgetting=str(tmp_path / "gone.txt")))
    with pytest.raises(ConfigError, match=r"^--where 'split =': it ends too early"):
        evaluate_model(str(student), [cache.root], "split =")


def test_models_of_two_vocabularies_are_compared_by_bytes(cache: SyntheticCache, student: Path, tmp_path: Path) -> None:
    path = tmp_path / "second.txt"
    path.write_text("w5 w6 w7 w8 w9")
    other = make_student(tmp_path / "other", tokenizer=make_tokenizer(first_ordinary="v"))
    more = More(forgetting=str(path), before=str(other))
    found = evaluate_model(str(student), [cache.root], None, max_chains=1, pack_tokens=64, more=more)
    assert set(found["forgetting"]["change"]) == {"bits_per_byte"}
    assert eval_lines(found)[-1].endswith("per byte because their vocabularies differ")
    with pytest.raises(ConfigError, match=r"--before \S+ has another vocabulary .* pass a \.txt or \.jsonl file"):
        evaluate_model(str(student), [cache.root], None, more=replace(more, forgetting=str(cache.root)))


def test_long_texts_are_scored_token_by_token_once() -> None:
    found = windows(["w5 w6 w7 w8 w9", "w5", ""], make_tokenizer(), 3)
    assert [len(piece) for piece in found.pieces] == [3, 3]
    assert found.pieces[0][-1] == found.pieces[1][0]
    assert found.num_bytes == 12


def test_a_text_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    path, texts = tmp_path / "second.jsonl", ["one\u2028two\x85three", "four"]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    assert list(documents(path)) == texts


def test_calibration_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    confidence_N = np.append(rng.random(500), [0.0, 1.0])
    correct_N = (rng.random(502) < confidence_N**2).astype(float)
    sums = CalibrationSums()
    for part in np.array_split(np.arange(502), 7):
        sums.add(confidence_N[part], correct_N[part])
    found = sums.result()
    assert found is not None
    ece = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence_N >= low) & ((confidence_N < low + 0.1) | (low == 0.9))
        ece += abs(confidence_N[inside].mean() - correct_N[inside].mean()) * inside.sum() / 502
    assert found.ece == pytest.approx(ece)
    assert sum(one.num for one in found.bins) == found.num == 502
    assert CalibrationSums().result() is None


def test_the_calibration_of_tokens_counts_them_all(result: Json) -> None:
    assert result["calibration"]["num"] == result["num_tokens"]
    gap = sum(one["num"] * ((one["confidence"] or 0) - (one["accuracy"] or 0)) for one in result["calibration"]["bins"])
    assert gap / result["num_tokens"] == pytest.approx(result["confidence_minus_accuracy"], abs=1e-6)


CONFIG = GenerateConfig(num_prompts=3, max_new_tokens=6, temperature=0.0)


def asked(number: int, text: str, ids: list[int], reference: str) -> AskedPrompt:
    return AskedPrompt(str(number), ids, "exact", reference, {}, None, 0.5, [{"role": "user", "content": text}], "sums")


def test_answers_to_changed_prompts_are_compared_with_the_clean_ones(student: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    texts = ["please w50 w51", "w60 w61", "w70 w71 w72"]

    def render(prompt: AskedPrompt) -> list[int]:
        ids: list[int] = tokenizer(str(prompt.messages[0]["content"]), add_special_tokens=False)["input_ids"]
        return ids

    prompts = [asked(number, text, [], "w7") for number, text in enumerate(texts)]
    clean = answer_and_judge(model, tokenizer, [replace(one, token_ids=render(one)) for one in prompts], CONFIG)
    found = robustness(model, tokenizer, clean, CONFIG, render)
    # The one word with letters to mistype is unknown to this vocabulary either way.
    assert found["typing"].num_prompts == 1
    assert found["typing"].agreement == 1
    assert found["typing"].example is not None
    assert found["typing"].example != texts[0]
    assert found["distractor"].num_prompts == found["distractor"].num_compared == 3
    assert found["options"].num_prompts == 0
    assert (found["options"].agreement, found["options"].p_value) == (None, None)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_confidence_is_the_probability_of_what_was_said(student: Path, temperature: float) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    prompts = [asked(0, "", [5, 6, 7], "w1"), asked(1, "", [9], "w1")]
    for given in answer_and_judge(model, tokenizer, prompts, replace(CONFIG, temperature=temperature)):
        ids = torch.tensor([[*given.prompt.token_ids, *given.ids]])
        with torch.no_grad():
            logprobs_LV = model(ids).logits[0].log_softmax(-1)
        first = len(given.prompt.token_ids)
        chosen_G = logprobs_LV[first - 1 : -1].gather(1, ids[0, first:, None])
        assert given.confidence == pytest.approx(float(chosen_G.mean().exp()), rel=1e-4)


FAKE_LM_EVAL = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if arguments[0].endswith("load_lm_eval.py"):
    sys.exit("ValueError: Tasks not found: gone" if arguments[2] == "gone" else 0)
value = lambda name: arguments[arguments.index(name) + 1]
if value("--tasks") == "broken":
    sys.exit("KeyError: no such task")
folder = pathlib.Path(value("--output_path")) / "model"
folder.mkdir()
results = {{"alias": "sums", "exact_match,last": 0.25, "exact_match_stderr,last": 0.1}}
results |= {{"f1,none": 1, "f1_stderr,none": "N/A", "acc,none": 1, "acc_stderr,none": 0.0}}
whole = {{"results": {{value("--tasks"): results}}, "n-samples": {{"sums": {{"original": 8, "effective": 4}}}}}}
(folder / "results_2026.json").write_text(json.dumps({{**whole, "lm_eval_version": "0.4.13", "asked": arguments}}))
"""


@pytest.fixture
def fake_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose Python writes results without loading anything."""
    python = tmp_path / "python"
    python.write_text(FAKE_LM_EVAL.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(harness, "python_of", lambda name: python)


def approximate(low: float, high: float) -> Json:
    """An interval, to four digits."""
    return {"low": pytest.approx(low, abs=1e-4), "high": pytest.approx(high, abs=1e-4)}


@pytest.mark.usefixtures("fake_lm_eval")
def test_lm_evals_results_are_rows(tmp_path: Path) -> None:
    found = run_harness(tmp_path, HarnessConfig(["sums"], tmp_path, 4), "float32", is_chat=False)
    assert found["tasks"] == {
        "sums": [
            {"metric": "exact_match", "filter": "last", "value": 0.25, "stderr": 0.1, **approximate(0.054, 0.446)},
            {"metric": "f1", "filter": "none", "value": 1, "stderr": None, "low": None, "high": None},
            # All of four right: 0.05 ** (1 / 4) may still be the share of all others.
            {"metric": "acc", "filter": "none", "value": 1, "stderr": 0.0, **approximate(0.4729, 1)},
        ]
    }
    assert (found["num_samples"], found["version"], found["limit"]) == ({"sums": 4}, "0.4.13", 4)
    with pytest.raises(StillroomError, match="lm-eval failed: KeyError: no such task"):
        run_harness(tmp_path, HarnessConfig(["broken"]), "float32", is_chat=True)
    with pytest.raises(ConfigError, match="--lm-eval a b: write task names"):
        HarnessConfig(["a b"])
    with pytest.raises(ConfigError, match="is not a folder"):
        HarnessConfig(["sums"], tmp_path / "gone")
    with pytest.raises(ConfigError, match="--lm-eval gone: ValueError: Tasks not found: gone: check the names"):
        require_tasks(HarnessConfig(["gone"]), "student")


def test_chat_templates_are_used_where_there_is_one() -> None:
    tokenizer = make_tokenizer()
    assert HarnessConfig(["sums"]).uses_chat(tokenizer)
    assert not HarnessConfig(["sums"], chat=False).uses_chat(tokenizer)
    tokenizer.chat_template = None
    assert not HarnessConfig(["sums"]).uses_chat(tokenizer)
    with pytest.raises(ConfigError, match="--lm-eval-chat: the student's tokenizer has no chat template"):
        HarnessConfig(["sums"], chat=True).uses_chat(tokenizer)


@pytest.mark.usefixtures("fake_lm_eval")
def test_a_part_that_fails_leaves_the_others(
    cache: SyntheticCache, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, page = tmp_path / "second.txt", tmp_path / "page.html"
    pages: list[str] = []
    held: list[Any] = []
    path.write_text("w5 w6 w7")
    write, run, load = page_module.write_eval_page, run_harness, load_causal
    models: list[Any] = []

    def load_kept(*given: Any) -> Any:
        models.append(load(*given))
        return models[-1]

    def record(result: Json, out: Path) -> None:
        write(result, out)
        pages.append(out.read_text())

    def run_freed(*given: Any, **named: Any) -> Json:
        held.extend(one for one in models[0].parameters() if not one.is_meta)
        return run(*given, **named)

    monkeypatch.setattr(page_module, "write_eval_page", record)
    monkeypatch.setattr(evaluating, "run_harness", run_freed)
    monkeypatch.setattr(evaluating, "load_causal", load_kept)
    given = ["--model", str(student), "--cache", str(cache.root), "--forgetting", str(path), "--before", str(student)]
    ended = CliRunner().invoke(app, ["eval", *given, "--lm-eval", "broken", "--out", str(page), "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    reason = "lm-eval failed: KeyError: no such task"
    assert found["failed"] == [{"part": "lm_eval", "reason": reason, "exit_code": 1}]
    assert found["pending"] == []
    assert found["forgetting"]["change"] == {"cross_entropy": 0.0, "bits_per_byte": 0.0}
    # After the held-out chains, the second set and lm-eval.
    assert [text.count("not finished when") for text in pages] == [2, 1, 0]
    assert reason in pages[-1]
    assert not held


def test_a_machine_that_cannot_run_lm_eval_says_so_before_evaluating(
    cache: SyntheticCache, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Path:
        raise ConfigError(f"no {name}")

    monkeypatch.setattr(harness, "python_of", missing)
    monkeypatch.setattr(evaluating, "evaluate", None)
    with pytest.raises(ConfigError, match="no lm_eval"):
        evaluate_model(str(student), [cache.root], None, more=More(harness=HarnessConfig(["sums"])))


@pytest.mark.usefixtures("fake_lm_eval")
def test_the_page_and_the_lines_show_the_result(result: Json, tmp_path: Path) -> None:
    answers: Any = {
        "num_prompts": 2,
        "num_correct": 1,
        "num_wrong": 1,
        "num_undecided": 0,
        "accuracy": 0.5,
        "teacher_accuracy": 0.75,
        "truncated_frac": 0.0,
        "mean_tokens": 9.0,
        "tokens_per_s": 3.0,
        "seconds": 6.0,
        "cost": 2.5,
        "cost_per_correct": 2.5,
        "by": {"source": []},
        "calibration": None,
        "robustness": None,
    }
    tasks = run_harness(tmp_path, HarnessConfig(["sums"]), "float32", is_chat=True)
    whole = {**result, "generation": answers, "lm_eval": tasks}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(whole))
    write_eval_page(whole, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for shown in ("Knowledge retention", "stories", "33 to 64", "Confidence against accuracy", "exact_match", "2.50"):
        assert shown in page
    titles = [section.title for section in eval_sections(read_result(path)) if section.pieces]
    assert titles[-2:] == ["Forgetting", "Public tasks"]
    lines = eval_lines(whole)
    assert "cost 2.50, 2.50 per right answer" in lines
    assert any(line.startswith("lm-eval sums: exact_match (last) 0.2500") for line in lines)
    run = RunFolder(tmp_path / "run")
    given = {"run": run.root, "student": {"model": "m"}, "data": {"caches": ["c"]}, "stages": [{"learning_rate": 1}]}
    run.root.mkdir()
    run.open(TrainConfig.model_validate(given), has_learnt=False)
    run.add_eval({"stage": "distill", "stage_number": 0, "step": 0, **result})
    write_student_report([run.root], tmp_path / "report.html", results=[path, path])
    assert f"{result['model']}: Knowledge retention" in (tmp_path / "report.html").read_text()
    path.write_text("[]")
    with pytest.raises(DataError, match="is not a result of `student-train eval --json`"):
        read_result(path)
