"""A language model's second opinion: who is asked, what is kept, and what stops the command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

import teacher_cache.judging.llm
from stillroom.cache.catalog import Catalog
from stillroom.config import validate_config
from stillroom.errors import ConfigError, StillroomError
from stillroom.schema.records import Capture, Prompt
from stillroom.sql.session import open_session
from teacher_cache.cli import main
from teacher_cache.engine.api import Finished, Outcome, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.judging.chains import JudgeReport, ask_about_cache, judge_cache
from teacher_cache.judging.config import LlmJudgeConfig
from teacher_cache.judging.llm import llm_judge_name
from teacher_cache.judging.queue import judge_of, require_judges
from teacher_cache.maintenance.verify import verify_cache
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.fake_builds import make_config, make_requests, run_build
from tests.helpers.fake_server import Behaviour, FakeServer
from tests.helpers.tiny_tokenizer import byte_level, save

NUM = 24


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.engine.http.pool.BACKOFF_S", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> SyntheticCache:
    return make_cache(tmp_path / "cache", num_chains=NUM, judged=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(Behaviour(chat=lambda message: "VERDICT: CORRECT")) as one:
        yield one


def make_judge(server: FakeServer | None, **changes: Any) -> LlmJudgeConfig:
    endpoint = {} if server is None else {"endpoint": server.url, "max_in_flight": 4, "max_attempts": 3}
    return validate_config({"model": "judge-7b", **endpoint, **changes}, LlmJudgeConfig, "judge.yaml")


def only(report: JudgeReport) -> Any:
    (summary,) = report.by_judge.values()
    return summary


def rows(root: Path) -> list[dict[str, Any]]:
    with open_session(Catalog(root)) as session:
        found = session.arrow("SELECT sample_id, judge, correct, rule, compared FROM chains ORDER BY sample_id")
    return list(found.to_pylist())


def test_the_undecided_are_asked_once_and_the_judge_is_recorded(cache: SyntheticCache, server: FakeServer) -> None:
    judge_cache(cache.root, kind="exact", where="split = 'heldout'")
    decided = {row["sample_id"] for row in rows(cache.root) if row["correct"] is not None}
    config = make_judge(server)
    summary = only(ask_about_cache(cache.root, config))
    num_answered = len(server.behaviour.seen)
    assert 0 < len(decided) < NUM
    assert summary.num_chains == NUM - len(decided) == num_answered + summary.num_wrong
    assert (summary.num_correct, summary.num_undecided) == (num_answered, 0)
    body = server.behaviour.seen[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0.0, 4096)
    asked = [row for row in rows(cache.root) if row["judge"] == llm_judge_name(config)]
    assert {row["sample_id"] for row in asked} == {chain.sample_id for chain in cache.chains} - decided
    assert {row["rule"] for row in asked} <= {"judge-7b", "no answer"}
    assert ask_about_cache(cache.root, config).by_judge == {}
    assert len(server.behaviour.seen) == num_answered
    table = Catalog(cache.root).verdicts
    records = [
        json.loads(metadata[b"stillroom-judge"])
        for file in table.files()
        if b"stillroom-judge" in (metadata := pq.read_metadata(table.path_of(file)).metadata)
    ]
    assert {(one["judge"], one["model"]) for one in records} == {(llm_judge_name(config), "judge-7b")}
    assert all("{reference}" in one["prompt"] and one["parameters"]["temperature"] == 0.0 for one in records)
    assert not list(verify_cache(cache.root).problems)
    again = only(ask_about_cache(cache.root, config, where="split = 'heldout'", again=True))
    assert again.num_chains == len(decided)


def test_another_prompt_or_model_is_another_judge(server: FakeServer) -> None:
    names = [
        llm_judge_name(make_judge(server, **changes))
        for changes in ({}, {"model": "other"}, {"prompt": "Is {answer} right?"}, {"parameters": {"max_tokens": 9}})
    ]
    assert len(set(names)) == 4
    assert llm_judge_name(make_judge(server, endpoint="http://elsewhere", timeout_s=5)) == names[0]


def test_undecided_replies_are_kept_and_counted(cache: SyntheticCache, server: FakeServer) -> None:
    server.behaviour.chat = lambda message: {"message": {"content": None}, "finish_reason": "length"}
    summary = only(ask_about_cache(cache.root, make_judge(server)))
    assert summary.undecided_rules == {"the reply was cut (length)": summary.num_undecided}
    assert summary.num_undecided == len(server.behaviour.seen) > 0
    assert ask_about_cache(cache.root, make_judge(server)).by_judge == {}


def test_refused_questions_are_asked_again_next_time(cache: SyntheticCache, server: FakeServer) -> None:
    refused: set[str] = set()

    def every_third(body: dict[str, Any]) -> str | None:
        message = body["messages"][0]["content"]
        if len(server.behaviour.seen) % 3 == 0 and len(refused) < 4:
            refused.add(message)
        return "400" if message in refused else None

    server.behaviour.trouble = every_third
    first = only(ask_about_cache(cache.root, make_judge(server)))
    assert first.undecided_rules == {"refused: status 400 on demand": 4}
    server.behaviour.trouble = lambda body: None
    assert only(ask_about_cache(cache.root, make_judge(server))).num_chains == 4


def test_refusals_that_overtake_replies_stop_nothing(cache: SyntheticCache, server: FakeServer) -> None:
    server.behaviour.trouble = lambda body: "400" if len(server.behaviour.seen) <= 6 else None
    summary = only(ask_about_cache(cache.root, make_judge(server, max_in_flight=NUM)))
    assert summary.undecided_rules == {"refused: status 400 on demand": 6}


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        ("400", ConfigError, r"/v1 rejects every request \(refused: status 400.*check `parameters`"),
        ("401", ConfigError, "rejects the API key: set api_key_env to the variable"),
        ("404", ConfigError, r"/v1/chat/completions answers 404.*set endpoint to the API's base address"),
        ("503", StillroomError, r"answers 503.*, 3 times in a row: verdicts so far are kept"),
    ],
)
def test_an_endpoint_that_cannot_be_used_stops_the_command(
    cache: SyntheticCache, server: FakeServer, status: str, kind: type[Exception], message: str
) -> None:
    server.behaviour.trouble = lambda body: status
    with pytest.raises(kind, match=message):
        ask_about_cache(cache.root, make_judge(server))
    assert not [row for row in rows(cache.root) if row["correct"]]


def test_what_was_judged_before_an_endpoint_failed_is_kept(cache: SyntheticCache, server: FakeServer) -> None:
    server.behaviour.trouble = lambda body: None if len(server.behaviour.seen) <= 6 else "503"
    with pytest.raises(StillroomError, match="3 times in a row"):
        ask_about_cache(cache.root, make_judge(server))
    assert sum(row["correct"] is True for row in rows(cache.root)) == 6


def test_chains_wait_for_their_own_judge_first(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(3)
    for request, kind in zip(requests, ("code", "llm", None), strict=True):
        request.prompt.metadata["judge"] = kind  # type: ignore[index]
    with monkeypatch.context() as patched:
        patched.setattr("teacher_cache.judging.queue.JudgeQueue.put", lambda *_: None)
        run_build(make_config(tmp_path / "c"), requests)
    report = ask_about_cache(tmp_path / "c", make_judge(server))
    assert (report.num_not_judged, only(report).num_chains) == (1, 2)
    own = judge_cache(tmp_path / "c")
    assert (list(own.by_judge), own.num_without_judge) == (["code"], 2)
    report = ask_about_cache(tmp_path / "c", make_judge(server))
    assert (report.num_not_judged, only(report).num_chains) == (0, 1)


def test_a_build_leaves_llm_to_its_command() -> None:
    asks = Prompt("p", (), "s", "train", "5", {"judge": "llm"})
    require_judges([asks])
    assert judge_of(asks) is None
    with pytest.raises(ConfigError, match=r"judge llm needs a language model: .* --llm FILE"):
        judge_cache(Path("c"), kind="llm")


class Judge(FakeEngine):
    """An engine whose model writes one text."""

    reply: ClassVar[list[int]] = byte_level().encode("hm\nVERDICT: INCORRECT<|im_end|>").ids

    def step(self) -> list[Outcome]:
        return [self._said(self._queue.popleft()) for _ in range(len(self._queue))]

    def _said(self, request: Request) -> Outcome:
        ids_T = np.array(self.reply, np.int32)
        zeros_T, zeros_T1 = np.zeros(len(ids_T), np.float32), np.zeros((len(ids_T), 1), np.float32)
        capture = Capture(ids_T, zeros_T, zeros_T.astype(np.int32), zeros_T1.astype(np.int32), zeros_T1)
        return Finished(request, capture, "stop")


def test_a_model_in_this_process_is_asked_too(
    tmp_path: Path, cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(byte_level(), tmp_path / "judge")
    engines: list[Judge] = []

    def start(config: LlmJudgeConfig) -> Judge:
        engines.append(Judge(400, 8))
        return engines[-1]

    monkeypatch.setattr(teacher_cache.judging.llm, "start_engine", start)
    config = make_judge(None, model=str(folder))
    summary = only(ask_about_cache(cache.root, config))
    assert (summary.num_chains, summary.num_wrong) == (NUM, NUM)
    assert ask_about_cache(cache.root, config).by_judge == {}
    assert len(engines) == 1, "no model is loaded for nothing"


def test_pairs_show_how_often_the_model_agrees(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behaviour.chat = lambda message: "VERDICT: CORRECT" if "two plus three" in message else "VERDICT: INCORRECT"
    pairs = [
        {"id": "a", "question": "two plus three", "reference": "5", "answer": "five", "right": True},
        {"id": "b", "question": "two plus two", "reference": "5", "answer": "four", "right": False},
        {"id": "c", "reference": "n/a", "answer": "four"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    judge = tmp_path / "judge.yaml"
    judge.write_text(f"model: judge-7b\nendpoint: {server.url}\n")
    monkeypatch.setattr(
        "sys.argv", ["teacher-cache", "judge", "--llm", str(judge), "--pairs", str(tmp_path / "p.jsonl")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["id"], one["correct"]) for one in found] == [("a", True), ("b", False), ("c", None)]
    assert "of 1 right answers 1 judged right (100.0%); of 1 wrong answers 1 not judged right" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Is it right?"}, r"prompt.*has no \{answer\}"),
        ({"endpoint": "gpu-1:8000"}, "is not a server address"),
        ({"endpoint": "http://me:pw@gpu-1"}, "password"),
        ({"parameters": {"messages": []}}, "parameters.messages is set by the judge itself"),
        ({"engine": {"max_model_len": 5}}, "engine has no effect with an endpoint"),
        ({"endpoint": None, "timeout_s": 5}, "timeout_s has no effect without endpoint"),
        ({"endpoint": None, "parameters": {"max_completion_tokens": 5}}, "no effect without endpoint"),
        ({"endpoint": None, "parameters": {"temperature": 0}}, "parameters.max_tokens is needed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"model": "m", "endpoint": "http://gpu-1:8000", **changes}
    with pytest.raises(ConfigError, match=message):
        validate_config(given, LlmJudgeConfig, "judge.yaml")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://gpu-1:8000/", "http://gpu-1:8000/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://host/v1beta/openai/chat/completions", "https://host/v1beta/openai"),
    ],
)
def test_the_address_is_the_apis_base(given: str, address: str) -> None:
    assert validate_config({"model": "m", "endpoint": given}, LlmJudgeConfig, "x").endpoint == address
