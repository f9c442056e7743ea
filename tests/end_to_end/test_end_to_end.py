"""Real vLLM to real DeepSpeed on a tiny teacher: each distribution meets its token, from the engine to the loss."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_signals
from stillroom.schema.records import Signals
from stillroom.sql.session import open_session
from tests.helpers.line import NUM_CHAINS, Line
from tests.helpers.programs import run_with_vllm

pytestmark = pytest.mark.filterwarnings("ignore:::torch", "ignore:::deepspeed", "ignore:::transformers")


NUM_GREEDY = 16
GENERATE_BY_VLLM = """
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
engine = LLM({folder!r}, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=50_000_000)
prompts = [{{"prompt_token_ids": ids}} for ids in {prompts}]
outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens={num_greedy}), use_tqdm=False)
print([list(output.outputs[0].token_ids) for output in outputs])
"""


@dataclasses.dataclass
class Chain:
    """One chain of the cache with its signals, and what the teacher itself says of it: log probabilities [T, V]."""

    row: dict[str, Any]
    signals: Signals
    dense_TV: torch.Tensor


@pytest.fixture(scope="module")
def chains(line: Line) -> list[Chain]:
    """All chains, each scored by transformers in float64 as a dense reference."""
    model = AutoModelForCausalLM.from_pretrained(line.folder / "runs/demo/teacher", dtype=torch.float64)
    catalog = Catalog(line.folder / "runs/demo/cache")
    found = []
    columns = ["sample_id", "prompt_token_ids", "token_ids", "split", "finish_reason", "reasoning_end", "text"]
    for file in catalog.chains.files():
        shard, header = open_shard(catalog.chains.path_of(file))
        for group in range(shard.num_row_groups):
            table, signals, offsets = read_signals(shard, header, group, columns, file.path)
            for index, row in enumerate(table.to_pylist()):
                ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
                with torch.no_grad():
                    logits_LV = model(ids).logits[0]
                first = len(row["prompt_token_ids"]) - 1
                dense_TV = logits_LV[first : first + len(row["token_ids"])].log_softmax(-1)
                found.append(Chain(row, signals.slice(int(offsets[index]), int(offsets[index + 1])), dense_TV))
    return found


def test_the_build_is_whole_and_a_second_one_adds_nothing(line: Line) -> None:
    assert line.results["plan"]["num_left"] == NUM_CHAINS
    assert line.results["build"]["num_chains"] == NUM_CHAINS
    assert line.results["build"]["num_failures"] == 0
    assert line.results["again"]["num_new_chains"] == 0
    assert line.results["again"]["num_chains"] == NUM_CHAINS
    assert line.results["verify"]["ok"]
    assert line.results["verify"]["num_chains"] == NUM_CHAINS


def test_cached_log_probabilities_are_the_teachers_own(chains: list[Chain]) -> None:
    assert len(chains) == NUM_CHAINS
    for chain in chains:
        ids_T = torch.tensor(chain.row["token_ids"])
        own_T = chain.dense_TV.gather(1, ids_T[:, None])[:, 0]
        np.testing.assert_allclose(chain.signals.sampled_logprob_T, own_T, atol=1e-3)
        rank_T = (chain.dense_TV > own_T[:, None] + 1e-5).sum(1) + 1
        assert (torch.tensor(chain.signals.sampled_rank_T) - rank_T).abs().max() <= 1


def test_cached_candidates_are_the_teachers_top_k_at_their_token(chains: list[Chain]) -> None:
    for chain in chains:
        ids_TK, logprobs_TK = chain.signals.dense(64)
        own_TK = chain.dense_TV.gather(1, torch.tensor(ids_TK).long())
        np.testing.assert_allclose(logprobs_TK, own_TK, atol=1e-3)
        best_TK = chain.dense_TV.topk(64).values
        np.testing.assert_allclose(logprobs_TK, best_TK, atol=1e-3)
        tail_T = 1 - own_TK.exp().sum(1)
        np.testing.assert_allclose(np.exp(chain.signals.tail_logmass_T), tail_T, atol=1e-5)


def test_chains_end_as_they_say(line: Line, chains: list[Chain]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(line.folder / "runs/demo/teacher")
    end_id = tokenizer.convert_tokens_to_ids("</think>")
    for chain in chains:
        ids = chain.row["token_ids"]
        assert (ids[-1] == tokenizer.eos_token_id) == (chain.row["finish_reason"] == "stop")
        assert len(ids) == 24 or chain.row["finish_reason"] == "stop"
        if end_id in ids:
            assert chain.row["reasoning_end"] == ids.index(end_id) + 1
        assert chain.row["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_trainers_first_numbers_equal_a_dense_computation(line: Line, chains: list[Chain]) -> None:
    """Held-out metrics before training against dense float64 sums over the same chains, student by transformers."""
    student = AutoModelForCausalLM.from_pretrained(line.folder / "runs/demo/student", dtype=torch.float64)
    cross_entropy, kl, num_tokens = 0.0, 0.0, 0
    for chain in chains:
        if chain.row["split"] != "heldout":
            continue
        ids = torch.tensor([chain.row["prompt_token_ids"] + chain.row["token_ids"]])
        with torch.no_grad():
            logits_LV = student(ids).logits[0]
        first, length = len(chain.row["prompt_token_ids"]) - 1, len(chain.row["token_ids"])
        q_TV = logits_LV[first : first + length].log_softmax(-1)
        cross_entropy -= float(q_TV.gather(1, ids[0, first + 1 :, None]).sum())
        top_TK, index_TK = chain.dense_TV.topk(64)
        inside = (top_TK.exp() * (top_TK - q_TV.gather(1, index_TK))).sum()
        p_tail_T = 1 - top_TK.exp().sum(1)
        q_tail_T = 1 - q_TV.gather(1, index_TK).exp().sum(1)
        kl += float(inside + (p_tail_T * (p_tail_T / q_tail_T).log()).sum())
        num_tokens += length
    before = line.results["train"]["heldout_before"]
    assert before["num_tokens"] == num_tokens
    assert before["cross_entropy"] == pytest.approx(cross_entropy / num_tokens, rel=1e-4)
    assert before["forward_kl"] == pytest.approx(kl / num_tokens, rel=1e-4)


def test_the_interrupted_run_resumed_where_it_stopped(line: Line) -> None:
    records = [json.loads(text) for text in (line.folder / "runs/demo/run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) == line.results["train"]["num_steps"]


def test_the_student_learns(line: Line) -> None:
    trained = line.results["train"]
    assert trained["heldout_after"]["forward_kl"] < 0.9 * trained["heldout_before"]["forward_kl"]
    assert line.results["answers"]["forward_kl"] == pytest.approx(trained["heldout_after"]["forward_kl"], rel=1e-5)


def test_the_students_answers_are_judged_beside_the_teachers(line: Line) -> None:
    answers = line.results["answers"]["generation"]
    assert answers["num_prompts"] == 5
    assert answers["num_correct"] + answers["num_wrong"] == 5
    assert answers["accuracy"] == answers["num_correct"] / 5
    assert 0 <= answers["teacher_accuracy"] <= 1
    assert 0 < answers["mean_tokens"] <= 8
    assert answers["cost"] == pytest.approx(answers["seconds"] / 1800)
    assert sum(row["num_prompts"] for row in answers["by"]["source"]) == 5
    noisy = answers["robustness"]["typing"]
    assert 0 < noisy["num_prompts"] <= 5
    assert noisy["example"]
    page = (line.folder / "answers.html").read_text()
    assert "Changed prompts" in page
    assert "an irrelevant sentence" in page


def test_the_export_opens_in_transformers_and_is_the_trained_student(line: Line, chains: list[Chain]) -> None:
    folder = line.folder / "runs/demo/export"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoTokenizer.from_pretrained(line.folder / "runs/demo/teacher")
    assert tokenizer.get_vocab() == teacher.get_vocab()
    assert tokenizer.chat_template == teacher.chat_template
    evaluated = json.loads(
        line.program("student-train", "eval", "--model", str(folder), "--cache", "runs/demo/cache", "--json")
    )
    assert evaluated["forward_kl"] == pytest.approx(line.results["answers"]["forward_kl"], rel=1e-4)
    assert model.config.num_hidden_layers == 1


def test_a_teacher_is_its_own_perfect_student(line: Line) -> None:
    """Self-distillation is a matter of configuration: its starting point has nothing to learn."""
    command = ["student-train", "eval", "--model", "runs/demo/teacher", "--cache", "runs/demo/cache", "--json"]
    result = json.loads(line.program(*command))
    assert abs(result["forward_kl"]) < 1e-4
    assert result["top1_agreement"] > 0.99


def test_the_export_says_in_vllm_what_it_says_in_transformers(line: Line) -> None:
    """Greedy continuations of the real engine, with the folder's own template, against transformers'."""
    folder = line.folder / "runs/demo/export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    questions = ["What is 2+3?", "hello", "How many letters are in world?"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    script = GENERATE_BY_VLLM.format(folder=str(folder), prompts=prompts, num_greedy=NUM_GREEDY)
    answers = json.loads(run_with_vllm(["tests.helpers.vllm_script", script]).splitlines()[-1])
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_GREEDY, do_sample=False)[0, len(prompt) :]
        assert answer == expected.tolist()
        assert len(answer) > 1


def test_sql_counts_what_was_built(line: Line, chains: list[Chain]) -> None:
    with open_session(Catalog(line.folder / "runs/demo/cache")) as session:
        (counts,) = session.arrow(
            "SELECT count(*) AS chains, sum(num_tokens)::BIGINT AS tokens, count(correct) AS judged FROM chains"
        ).to_pylist()
        (tokens,) = session.arrow("SELECT count(*) AS n FROM tokens").column("n").to_pylist()
    assert counts == {
        "chains": NUM_CHAINS,
        "tokens": sum(len(chain.row["token_ids"]) for chain in chains),
        "judged": NUM_CHAINS,
    }
    assert tokens == counts["tokens"]


def test_the_answer_to_a_question_goes_to_stdout_alone(line: Line) -> None:
    query = "SELECT count(*) AS n FROM chains"
    assert line.program("teacher-cache", "sql", "runs/demo/cache", query, "--format", "csv").split() == [
        '"n"',
        str(NUM_CHAINS),
    ]


def test_the_folder_holds_what_the_format_says(line: Line) -> None:
    cache = line.folder / "runs/demo/cache"
    (manifest,) = (cache / "runs").glob("*.json")
    assert json.loads(manifest.read_text())["software"]["vllm"]
    assert {path.name for path in cache.iterdir()} == {
        *("chains", "verdicts", "failures", "runs", "vocab", "receipts"),
    }
    left = [path for path in cache.rglob("*") if path.name.endswith(".tmp")]
    assert left == []
    assert Path(cache / "chains" / manifest.stem).is_dir()
