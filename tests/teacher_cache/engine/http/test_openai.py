"""A teacher behind an OpenAI-compatible API: its text and log probabilities as chains, and answers that do not fit."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError, StillroomError
from teacher_cache.building.commands import build_cache
from teacher_cache.building.result import result_json, result_lines
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.doctor import diagnose
from teacher_cache.engine.http.pool import MAX_BACKOFF_S, pause_s
from teacher_cache.inspect.stats import cache_stats, stats_text
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.plan import plan_build, plan_lines
from teacher_cache.prompts.prompts import WHOLE
from tests.helpers.fake_server import Behaviour, FakeServer
from tests.helpers.tiny_tokenizer import byte_level, save

K = 3
ANSWER = "The answer is 你好"
"""Some of its tokens are parts of a character."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(byte_level(), tmp_path_factory.mktemp("api") / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return folder


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(Behaviour(chat=lambda message: ANSWER)) as one:
        yield one


def config_of(model: Path, server: FakeServer, cache: Path, capture: dict[str, Any], **engine: Any) -> BuildConfig:
    rows = cache.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"question {number}"}) + "\n" for number in range(4)))
    source = {"kind": "jsonl", "name": "rows", "path": str(rows), "prompt_field": "q"}
    data = {
        "cache": str(cache),
        "run": "api",
        "teacher": {"model": str(model)},
        "prompts": {"sources": [source]},
        "sampling": {"max_tokens": 100, "temperature": 0.6},
        "capture": {"draws": 0, **capture},
        "engine": {"kind": "openai", "endpoint": server.url, "model": "big", **engine},
    }
    return validate_config(data, BuildConfig, "test")


def with_logprobs(model: Path, text: str = ANSWER, k: int = K) -> dict[str, Any]:
    """A choice whose tokens are those of the tokenizer: each at -0.1, before the tokens 40, 41, ... at -3, -4, ..."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    data, entries = text.encode(), []
    place = 0
    for token in tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]):
        # A character of a byte-level piece stands for a byte.
        piece = [*data[place : place + len(token)]]
        place += len(token)
        tops = [{"token": "?", "bytes": piece, "logprob": -0.1}]
        tops += [{"token": chr(64 + n), "bytes": None, "logprob": -2.0 - n} for n in range(1, k)]
        entries.append({"token": "?", "bytes": piece, "logprob": -0.1, "top_logprobs": tops})
    return {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": entries}}


def with_parts_of_characters(model: Path) -> dict[str, Any]:
    """As vLLM's API writes the byte tokens of a character."""
    choice = with_logprobs(model)
    choice["logprobs"]["content"][-1]["bytes"] = [*"\ufffd".encode()]
    return choice


def rows_of(cache: Path) -> list[dict[str, Any]]:
    table = Catalog(cache).chains
    return [row for file in table.files() for row in pq.read_table(table.path_of(file)).to_pylist()]


def test_top_log_probabilities_become_targets_by_their_bytes(model: Path, server: FakeServer, tmp_path: Path) -> None:
    server.behaviour.chat = lambda message: with_logprobs(model) | {"model": "vendor/big-2026-10-01"}
    capture = {"max_support": K, "codec": "topk-f32", "nucleus": None}
    config = config_of(model, server, tmp_path / "c", capture, price={"input": 1e6, "output": 2e6})
    plan = plan_build(config)
    assert any("at engine.price" in line for line in plan_lines(plan))
    assert build_cache(config, WHOLE, retry_failures=False).recorded.num_chains == 4
    rows = rows_of(tmp_path / "c")
    prompt_tokens, row = sum(one["num_prompt_tokens"] for one in rows), rows[0]
    assert plan.cost_left == prompt_tokens + 2 * 4 * config.sampling.max_tokens
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert row["token_ids"] == [*ids, tokenizer.eos_token_id]
    assert row["text"] == ANSWER
    assert row["topk_ids"][:K] == [ids[0], *tokenizer.convert_tokens_to_ids(["A", "B"])]
    assert row["topk_logprobs"][:K] == pytest.approx([-0.1, -3.0, -4.0])
    assert row["sampled_logprob"] == pytest.approx([*[-0.1] * len(ids), 0.0])
    assert row["finish_reason"] == "stop"
    assert verify_cache(tmp_path / "c").problems == []
    stats = cache_stats(Catalog(tmp_path / "c"))
    assert stats.api_cost == prompt_tokens + 2 * 4 * (len(ids) + 1)
    assert "of APIs at engine.price" in stats_text(stats)
    body = next(one for one in server.behaviour.seen if "question" in one["messages"][0]["content"])
    assert (body["logprobs"], body["top_logprobs"], body["top_p"], body["max_tokens"]) == (True, K, 0.95, 100)
    assert "top_k" not in body


def test_text_alone_keeps_the_reasoning_and_says_that_it_holds_no_distributions(
    model: Path, server: FakeServer, tmp_path: Path
) -> None:
    message = {"content": "The answer is 5.", "reasoning_content": "2 and 3 make 5."}
    server.behaviour.chat = lambda _: {"message": message, "finish_reason": "stop"}
    parameters = {"max_completion_tokens": 50, "max_tokens": None}
    config = config_of(model, server, tmp_path / "c", {}, signals="none", parameters=parameters)
    assert build_cache(config, WHOLE, retry_failures=False).recorded.num_chains == 4
    row = rows_of(tmp_path / "c")[0]
    assert (row["reasoning"], row["answer"]) == ("2 and 3 make 5.", "The answer is 5.")
    assert row["topk_ids"] == row["token_ids"]
    (run,) = Catalog(tmp_path / "c").runs().values()
    assert run.engine["signals"] == "none"
    assert verify_cache(tmp_path / "c").problems == []
    body = server.behaviour.seen[-1]
    assert "logprobs" not in body
    assert "max_tokens" not in body
    assert body["max_completion_tokens"] == 50


def test_a_chain_that_was_cut_in_its_reasoning_has_not_ended_it(
    model: Path, server: FakeServer, tmp_path: Path
) -> None:
    message = {"content": None, "reasoning_content": "2 and 3 make"}
    server.behaviour.chat = lambda _: {"message": message, "finish_reason": "length"}
    build_cache(config_of(model, server, tmp_path / "c", {}, signals="none"), WHOLE, retry_failures=False)
    row = rows_of(tmp_path / "c")[0]
    assert (row["reasoning"], row["answer"], row["reasoning_end"]) == ("2 and 3 make", None, None)


@pytest.mark.parametrize("signals", ["none", "top_logprobs"])
def test_a_stop_string_is_not_the_end_of_a_turn(model: Path, server: FakeServer, tmp_path: Path, signals: str) -> None:
    end_id = AutoTokenizer.from_pretrained(model).eos_token_id
    reasons: dict[str, dict[str, Any]] = {
        "0": {},
        "1": {"stop_reason": "5."},
        "2": {"stop_reason": None},
        "3": {"stop_reason": end_id},
    }
    server.behaviour.chat = lambda message: with_logprobs(model) | reasons.get(message[-1], {})
    config = config_of(model, server, tmp_path / "c", {"max_support": K}, signals=signals, parameters={"stop": ["5."]})
    build_cache(config, WHOLE, retry_failures=False)
    ended = {row["messages"][0]["content"][-1]: row["token_ids"][-1] == end_id for row in rows_of(tmp_path / "c")}
    assert ended == {"0": False, "1": False, "2": True, "3": True}


def test_other_parameters_or_signals_are_other_chains(model: Path, server: FakeServer, tmp_path: Path) -> None:
    for effort in ("low", "high"):
        config = config_of(model, server, tmp_path / "c", {}, signals="none", parameters={"reasoning_effort": effort})
        assert build_cache(config, WHOLE, retry_failures=False).recorded.num_chains == 4
    assert cache_stats(Catalog(tmp_path / "c")).mean_entropy is None
    server.behaviour.chat = lambda message: with_logprobs(model)
    config = config_of(model, server, tmp_path / "c", {"max_support": K}, parameters={"reasoning_effort": "high"})
    assert build_cache(config, WHOLE, retry_failures=False).recorded.num_chains == 4
    runs = cache_stats(Catalog(tmp_path / "c")).by_run
    assert [counts.mean_entropy is None for counts in runs.values()].count(True) == 2
    # Four tokens with K candidates, and the certain end of the turn.
    assert cache_stats(Catalog(tmp_path / "c")).mean_support == pytest.approx((4 * K + 1) / 5)


Chat = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        (lambda model: ANSWER, "gives no log probabilities: set engine.signals: none"),
        (lambda model: with_logprobs(model, k=2), "gives 2 top log probabilities, 3 were requested"),
        (lambda model: with_logprobs(model) | {"model": "small"}, "answers as model 'small', not as engine.model=big"),
        (
            lambda model: {"message": {"content": ""}, "finish_reason": "content_filter"},
            "ended the answer with 'content_f",
        ),
        (lambda model: {"text": "?"}, "does not answer like an OpenAI-compatible API (KeyError: 'message')"),
        (
            lambda model: with_logprobs(model) | {"message": {"content": ANSWER, "reasoning": "hm"}},
            "gives no log probabilities for its reasoning",
        ),
        (with_parts_of_characters, "gives parts of characters without their bytes"),
    ],
)
def test_an_api_that_does_not_fit_is_refused_at_the_start(
    model: Path, server: FakeServer, tmp_path: Path, chat: Chat, problem: str
) -> None:
    server.behaviour.chat = lambda message: chat(model)
    with pytest.raises(ConfigError) as caught:
        build_cache(config_of(model, server, tmp_path / "c", {"max_support": K}), WHOLE, retry_failures=False)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_that_the_tokenizer_lacks_fails_its_chain_alone(
    model: Path, server: FakeServer, tmp_path: Path
) -> None:
    def chat(message: str) -> Any:
        choice = with_logprobs(model)
        if message == "question 2":
            choice["logprobs"]["content"][0]["bytes"] = [*b"answerless"]
        return choice

    server.behaviour.chat = chat
    config = config_of(model, server, tmp_path / "c", {"max_support": K})
    result = build_cache(config, WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (3, 1)
    (failure,) = pq.read_table(tmp_path / "c" / "failures").to_pylist()
    printed = result_json(config, result)
    assert (printed["failures"], printed["failure_example"]) == ({"engine_error": 1}, failure["message"])
    assert result_lines(printed, "c")[-1] == (
        f"failed  1 in this cache: engine_error 1 ({failure['message'][:200]}); --retry-failures asks again"
    )
    assert "the token b'answerless', which the tokenizer of teacher.model lacks" in failure["message"]


def test_malformed_answers_fail_alone(model: Path, server: FakeServer, tmp_path: Path) -> None:
    """Tokens of a part of the text, NaN, usage that is not a mapping, a rejected prompt."""

    def chat(message: str) -> Any:
        choice = with_logprobs(model)
        entries = choice["logprobs"]["content"]
        if message == "question 0":
            del entries[2:]
        if message == "question 1":
            entries[1]["top_logprobs"][0]["logprob"] = float("nan")
        return choice | {"usage": [1, 2]}

    server.behaviour.chat = chat
    server.behaviour.trouble = lambda body: "403" if body["messages"][0]["content"] == "question 2" else None
    assert build(config_of(model, server, tmp_path / "c", {"max_support": K})) == (1, 3)
    assert sorted(messages_of_failures(tmp_path / "c")) == [
        "answers 403: status 403 on demand",
        "gives log probabilities for a part of its answer only: set engine.signals: none",
        "gives the log probability nan",
    ]


@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (404, "The model `big` does not exist.", "set engine.model (big) to a name that this API serves"),
        (404, "Not Found", "set engine.endpoint to the API's base address, such as http://host:8000/v1"),
        (308, "moved", "set engine.endpoint to that address without /chat/completions"),
    ],
)
def test_a_wrong_address_or_model_is_told_apart(
    model: Path, server: FakeServer, tmp_path: Path, status: int, message: str, remedy: str
) -> None:
    server.behaviour.chat = lambda _: {"status": status, "error": {"message": message}}
    with pytest.raises(ConfigError) as caught:
        build(config_of(model, server, tmp_path / "c", {}, signals="none"))
    assert remedy in str(caught.value)
    assert ".:" not in str(caught.value)


def test_busy_and_broken_answers_are_tried_again(
    model: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("teacher_cache.engine.http.openai.pause_s", lambda *_: 0.01)
    seen: dict[str, int] = {}

    def trouble(body: dict[str, Any]) -> str | None:
        message = body["messages"][0]["content"]
        seen[message] = seen.get(message, 0) + 1
        if message == "question 1":
            return "500"
        return "429" if seen[message] <= 3 and message == "question 0" else None

    server.behaviour.trouble = trouble
    config = config_of(model, server, tmp_path / "c", {}, signals="none", max_attempts=2)
    result = build_cache(config, WHOLE, retry_failures=False)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (3, 1)
    assert seen["question 0"] == 4
    assert seen["question 1"] in (2, 4), "twice as often if nothing else was answered in between"
    assert capsys.readouterr().err.count("overloaded, sending requests more slowly") == 1
    server.behaviour.trouble = lambda body: "401"
    with pytest.raises(ConfigError, match="rejects the API key"):
        build_cache(config, WHOLE, retry_failures=True)
    server.behaviour.trouble = lambda body: "500"
    with pytest.raises(StillroomError, match="2 times in a row"):
        build_cache(config, WHOLE, retry_failures=True)
    nowhere = config.updated(engine=config.engine.updated(endpoint="http://127.0.0.1:1/v1", max_attempts=1))
    with pytest.raises(StillroomError, match=r"does a server run there\?\), 1 times"):
        build_cache(nowhere, WHOLE, retry_failures=True)


def test_pauses_stay_bounded_however_long_an_api_is_busy() -> None:
    assert 0 < pause_s(5000, random.Random(0)) <= MAX_BACKOFF_S


@pytest.mark.parametrize(
    ("capture", "engine", "problem"),
    [
        ({"max_support": 64}, {}, "at most 20 candidates"),
        ({"draws": 8}, {"signals": "none"}, "neither draws nor log-partitions"),
        ({}, {"parameters": {"logprobs": 5}}, "logprobs is set by teacher-cache"),
        ({}, {"endpoint": "ftp://x"}, "is not a server address"),
        ({}, {"parameters": {"temperature": 1}}, "temperature is set by sampling.temperature"),
        ({}, {"parameters": {"seed": 5}}, "seed is set by sampling.seed"),
        ({}, {"parameters": {"max_tokens": 9}}, "max_tokens is set by sampling.max_tokens"),
        ({}, {"parameters": {"temperature": None}}, "samples at 1 and not at 0.6"),
        ({}, {"parameters": {"top_p": None}}, "removes top_p, so the API samples at 1 and not at 0.95"),
    ],
)
def test_settings_that_no_api_can_serve_are_refused(
    model: Path, server: FakeServer, tmp_path: Path, capture: dict[str, Any], engine: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(model, server, tmp_path / "c", capture, **engine)


def test_an_api_cannot_score() -> None:
    config = {
        "cache": "c",
        "run": "r",
        "teacher": {"model": "m"},
        "capture": {"draws": 0},
        "completions": {"sources": [{"kind": "cache", "name": "a", "path": "b"}]},
        "engine": {"kind": "openai", "endpoint": "http://host", "model": "big"},
    }
    with pytest.raises(ConfigError, match="do not score texts"):
        validate_config(config, ScoreConfig, "test")


def build(config: BuildConfig) -> tuple[int, int]:
    """Chains and failures."""
    recorded = build_cache(config, WHOLE, retry_failures=False).recorded
    return recorded.num_chains, recorded.num_failures


def messages_of_failures(cache: Path) -> list[str]:
    return [one["message"] for one in pq.read_table(cache / "failures").to_pylist()]


def test_answers_of_gateways(model: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors with status 200, errors in a choice, filtered answers, reasoning in parts."""
    monkeypatch.setattr("teacher_cache.engine.http.openai.pause_s", lambda *_: 0.01)
    seen: list[str] = []
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "5"}]

    def chat(message: str) -> Any:
        seen.append(message)
        is_first = seen.count(message) == 1
        choice = {"message": {"content": thinking}, "finish_reason": "end_turn"}
        if message == "question 0" and is_first:
            return {"error": {"message": "slow down", "code": 429}}
        if message == "question 1" and is_first:
            return {"message": {"content": "1 is"}, "finish_reason": "error", "error": {"code": 502, "message": "gone"}}
        return choice | ({"finish_reason": "content_filter"} if message == "question 2" else {})

    server.behaviour.chat = chat
    assert build(config_of(model, server, tmp_path / "c", {}, signals="none")) == (3, 1)
    assert {(row["reasoning"], row["answer"]) for row in rows_of(tmp_path / "c")} == {("hm", "5")}
    assert messages_of_failures(tmp_path / "c") == ["ended the answer with 'content_filter'"]
    server.behaviour.chat = lambda message: {"error": {"message": "no credit", "code": "insufficient_quota"}}
    with pytest.raises(StillroomError, match="no credit: add credit there"):
        build(config_of(model, server, tmp_path / "d", {}, signals="none"))


def test_the_first_question_is_asked_as_builds_ask(model: Path, server: FakeServer, tmp_path: Path) -> None:
    server.behaviour.trouble = lambda body: "400" if body["temperature"] != 1 or "top_p" in body else None
    config = config_of(model, server, tmp_path / "c", {}, signals="none")
    with pytest.raises(ConfigError, match="rejects a request that builds need: status 400 on demand"):
        build(config)
    (check,) = [one for one in diagnose(config)["checks"] if one["name"] == "api"]
    assert (check["state"], "status 400 on demand" in check["value"]) == ("missing", True)
    only_one = config.updated(sampling=config.sampling.updated(temperature=1.0, top_p=1.0))
    assert build(only_one) == (4, 0)


@pytest.mark.parametrize("token", ["\ufffd", ""])
def test_candidates_without_their_bytes_are_left_out(
    model: Path, server: FakeServer, tmp_path: Path, token: str
) -> None:
    """Parts of characters, and special tokens, which vLLM's API writes as nothing, also the one that ends a turn."""
    choice = with_logprobs(model, "The answer")
    entries = choice["logprobs"]["content"]
    for entry in entries:
        entry["top_logprobs"][1] = {"token": token, "bytes": None, "logprob": -2.5}
    if not token:
        end = {"token": token, "bytes": [], "logprob": -0.25}
        entries.append({**end, "top_logprobs": [end, *entries[-1]["top_logprobs"][1:]]})
    server.behaviour.chat = lambda message: json.loads(json.dumps(choice))
    assert build(config_of(model, server, tmp_path / "c", {"max_support": K, "codec": "topk-f32"})) == (4, 0)
    row = rows_of(tmp_path / "c")[0]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    assert row["topk_ids"][:2] == [row["token_ids"][0], *tokenizer.convert_tokens_to_ids(["B"])]
    assert row["topk_logprobs"][:3] == pytest.approx([-0.1, -4.0, -100.0])
    assert row["token_ids"][-1] == tokenizer.eos_token_id
    assert row["sampled_logprob"][-1] == pytest.approx(0.0 if token else -0.25)
    assert verify_cache(tmp_path / "c").problems == []


def test_costs_are_those_of_the_tokens_that_the_api_counted(model: Path, server: FakeServer, tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 1000}
    server.behaviour.chat = lambda message: {"message": {"content": ANSWER}, "finish_reason": "stop", "usage": usage}
    config = config_of(model, server, tmp_path / "c", {}, signals="none", price={"input": 1e6, "output": 2e6})
    assert build(config) == (4, 0)
    assert cache_stats(Catalog(tmp_path / "c")).api_cost == 4 * (10 + 2 * 1000)
    plan = plan_build(config.updated(sampling=config.sampling.updated(samples=2)))
    assert plan.cost_left == pytest.approx(
        sum(row["num_prompt_tokens"] for row in rows_of(tmp_path / "c")) + 2 * 4 * 1000
    )


def test_an_outage_is_not_the_fault_of_the_chains(
    model: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.engine.http.openai.pause_s", lambda *_: 0.01)
    num_seen = 0

    def trouble(body: dict[str, Any]) -> str | None:
        nonlocal num_seen
        num_seen += 1
        return "502" if 1 < num_seen < 40 else None

    server.behaviour.trouble = trouble
    config = config_of(model, server, tmp_path / "c", {}, signals="none", max_attempts=2)
    assert build(config) == (4, 0)
    server.behaviour.trouble = lambda body: "502" if "question" in body["messages"][0]["content"] else None
    impatient = config_of(model, server, tmp_path / "d", {}, signals="none", max_attempts=2, give_up_minutes=0.001)
    assert build(impatient) == (0, 4), "the API answers, but not these"

    def dies(body: dict[str, Any]) -> str | None:
        return None if len(server.behaviour.seen) == first else "502"

    first = len(server.behaviour.seen) + 1
    server.behaviour.trouble = dies
    config = config_of(model, server, tmp_path / "e", {}, signals="none", max_attempts=2, give_up_minutes=0.001)
    with pytest.raises(StillroomError, match="run the same command again to resume"):
        build(config)
    assert not (tmp_path / "e" / "failures").exists() or messages_of_failures(tmp_path / "e") == []


def test_an_interrupted_first_question_leaves_nothing_running(model: Path, server: FakeServer, tmp_path: Path) -> None:
    released = threading.Event()
    server.behaviour.chat = lambda message: str(released.wait(20))

    def interrupt() -> None:
        while not server.behaviour.seen:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        build(config_of(model, server, tmp_path / "c", {}, signals="none"))
    released.set()
    assert not [one for one in threading.enumerate() if one.name == "api engine"]
