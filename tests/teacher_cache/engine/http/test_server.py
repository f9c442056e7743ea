"""vLLM over HTTP against a server that misbehaves on demand: what comes back, is asked again, or stops a build."""

import json
import os
import random
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.errors import ConfigError, StillroomError
from stillroom.schema.records import Capture
from teacher_cache.config import CaptureConfig, ServerConfig
from teacher_cache.engine.api import Failure, Finished, Outcome, Request
from teacher_cache.engine.http import pool
from teacher_cache.engine.http.pool import MAX_BACKOFF_S, pause_s
from teacher_cache.engine.http.server import ServerEngine
from tests.helpers import fake_server
from tests.helpers.caches import visible_ids
from tests.helpers.fake_builds import make_config, make_requests, make_teacher, run_build
from tests.helpers.fake_server import (
    EOS_ID,
    LOGPROBS_V,
    NUM_TOKENS,
    VOCAB_SIZE,
    Behaviour,
    FakeServer,
    Json,
    Plan,
    tokens_of,
)

K = 8
PLAIN = CaptureConfig(max_support=K, draws=0)
SIGNALS = CaptureConfig(max_support=K, draws=6, temperatures=[0.5, 2.0])
WAYS = pytest.mark.parametrize("has_generate", [True, False], ids=["generate", "completions"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BACKOFF_S", 0.01)
    monkeypatch.setattr(pool, "MAX_BACKOFF_S", 0.05)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(Behaviour()) as one:
        yield one


def make_engine(*servers: FakeServer, capture: CaptureConfig | None = None, **settings: object) -> ServerEngine:
    teacher = make_teacher()
    config = ServerConfig.model_validate(
        {
            "kind": "server",
            "endpoints": [server.url for server in servers],
            "give_up_minutes": 2.0,
            "stall_s": 5.0,
            **settings,
        }
    )
    return ServerEngine(config, teacher.record, teacher.tokenizer, capture or PLAIN)


def impatient(engine: ServerEngine) -> ServerEngine:
    """Gives up after 0.3 s. Only once it is connected, for which a busy machine may need longer."""
    engine._pool._config = engine._pool._config.updated(give_up_minutes=0.005)
    return engine


def answers(engine: ServerEngine, requests: list[Request]) -> dict[str, Outcome]:
    try:
        for request in requests:
            engine.submit(request)
        outcomes: dict[str, Outcome] = {}
        while engine.num_unfinished:
            for outcome in engine.step():
                assert outcome.sample_id not in outcomes
                outcomes[outcome.sample_id] = outcome
        return outcomes
    finally:
        engine.close()


def asks(body: Json, request: Request) -> bool:
    ids = body["prompt"] if "prompt" in body else body["token_ids"]
    return bool(ids[: len(request.prompt_token_ids)] == list(request.prompt_token_ids))


def is_work(body: Json) -> bool:
    """Whether this is a build's request, not one of the handshake."""
    asked = body.get("sampling_params", body)
    return "seed" in asked and "allowed_token_ids" not in asked


@WAYS
def test_a_chain_has_exactly_k_candidates_and_the_rank_of_its_token(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    requests = make_requests(5)
    for request in requests:
        seed = request.seed or 0
        outcome = answers(make_engine(server), [request])[request.sample_id]
        assert isinstance(outcome, Finished)
        assert outcome.finish_reason == "stop"
        assert_fits(outcome.capture, tokens_of(seed))
    ranks = np.array(tokens_of(requests[0].seed or 0)) + 1
    assert (ranks > K + 1).any(), "some tokens lie outside of what was asked for"
    assert (ranks <= K).any()


def assert_fits(capture: Capture, ids: list[int]) -> None:
    """The capture is what the fake server's one distribution says of these tokens."""
    assert capture.token_ids_T.tolist() == ids
    np.testing.assert_array_equal(capture.sampled_rank_T, np.array(ids) + 1)
    np.testing.assert_array_equal(capture.sampled_logprob_T, LOGPROBS_V[ids].astype(np.float32))
    np.testing.assert_array_equal(capture.topk_ids_TK, np.tile(np.arange(K), (len(ids), 1)))
    np.testing.assert_array_equal(capture.topk_logprobs_TK, np.tile(LOGPROBS_V[:K].astype(np.float32), (len(ids), 1)))


@WAYS
def test_every_sampling_parameter_is_spelt_out(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    (request,) = make_requests(1)
    answers(make_engine(server), [request])
    (body,) = [one for one in server.behaviour.seen if is_work(one)]
    asked = body.get("sampling_params", body)
    assert asked["temperature"] == 0.6
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert (asked["seed"], asked["max_tokens"]) == (request.seed, request.max_tokens)
    assert asked["logprobs"] == (K + 1 if has_generate else K)


@WAYS
@pytest.mark.parametrize("trouble", ["500", "503", "429", "cut", "garbage", "close"])
def test_what_breaks_off_is_asked_again_and_comes_once(server: FakeServer, has_generate: bool, trouble: str) -> None:
    server.behaviour.has_generate = has_generate
    requests, told = make_requests(12), set[int]()

    def first_time(body: Json) -> str | None:
        seed = body.get("sampling_params", body).get("seed")
        if not is_work(body) or seed in told or len(told) >= 6:
            return None
        told.add(seed)
        return trouble

    server.behaviour.trouble = first_time
    engine = make_engine(server, max_in_flight=4)
    outcomes = answers(engine, requests)
    assert len(told) == 6
    assert {type(outcome) for outcome in outcomes.values()} == {Finished}
    assert engine.num_tokens == NUM_TOKENS * len(requests), "tokens of broken chains do not count"


def test_a_chain_that_stalls_is_asked_again(server: FakeServer) -> None:
    hung: list[Json] = []

    def once(body: Json) -> str | None:
        if is_work(body) and not hung:
            hung.append(body)
            return "hang"
        return None

    server.behaviour.trouble = once
    outcomes = answers(make_engine(server, stall_s=1.0), make_requests(3))
    assert hung
    assert {type(outcome) for outcome in outcomes.values()} == {Finished}


@WAYS
def test_one_bad_prompt_is_one_failure(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    requests = make_requests(10)
    server.behaviour.trouble = lambda body: "400" if asks(body, requests[3]) else None
    outcomes = answers(make_engine(server), requests)
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert [(one.sample_id, one.reason, one.message) for one in failed] == [
        (requests[3].sample_id, "refused", "status 400 on demand")
    ]
    assert sum(asks(body, requests[3]) for body in server.behaviour.seen) == 1, "a refusal is not asked again"


@pytest.mark.parametrize(
    ("trouble", "reason", "message"),
    [
        ("500", "engine_error", "after 3 attempts"),
        ("abort", "engine_error", "ended the chain with 'abort'"),
        ("nan", "not_finite", "hold NaN"),
    ],
)
@WAYS
def test_a_request_that_always_fails_is_one_failure(
    server: FakeServer, has_generate: bool, trouble: str, reason: str, message: str
) -> None:
    server.behaviour.has_generate = has_generate
    requests = make_requests(6)
    server.behaviour.trouble = lambda body: trouble if asks(body, requests[2]) else None
    outcomes = answers(make_engine(server, max_attempts=3), requests)
    failed = outcomes[requests[2].sample_id]
    assert isinstance(failed, Failure)
    assert failed.reason == reason
    assert message in failed.message
    assert sum(isinstance(outcome, Finished) for outcome in outcomes.values()) == 5


def test_requests_in_flight_are_bounded_and_shared(server: FakeServer) -> None:
    server.behaviour.delay_s = 0.02
    with FakeServer(Behaviour(delay_s=0.02)) as other:
        outcomes = answers(make_engine(server, other, max_in_flight=3), make_requests(60))
        assert len(outcomes) == 60
        for one in (server, other):
            assert one.behaviour.most_at_once <= 3
            assert sum(map(is_work, one.behaviour.seen)) > 10


def wait_for(said: str, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr up to `said`; meanwhile the server answers nothing, so that there is work left."""
    seen, goes_on = "", threading.Event()
    server.behaviour.trouble = lambda body: None if goes_on.wait(60) else "500"
    deadline_s = time.monotonic() + 60
    while said not in seen:
        assert time.monotonic() < deadline_s, seen
        time.sleep(0.01)
        seen += capsys.readouterr().err
    goes_on.set()
    return seen


def test_an_endpoint_that_dies_is_excluded_and_comes_back(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = make_requests(60)
    server.behaviour.delay_s = 0.02
    with FakeServer(Behaviour(delay_s=0.02)) as other:
        engine = make_engine(server, other, max_in_flight=2, stall_s=60.0)
        for request in requests:
            engine.submit(request)
        outcomes: list[Outcome] = []
        while len(outcomes) < 20:
            outcomes += engine.step()
        other.stop()
        said = wait_for("excluded and retried, 1 of 2 endpoints continue", server, capsys)
        num_seen = sum(map(is_work, other.behaviour.seen))
        other.start()
        wait_for(f"{other.url} is connected", server, capsys)
        while engine.num_unfinished:
            outcomes += engine.step()
        engine.close()
        assert sum(map(is_work, other.behaviour.seen)) > num_seen, "it is asked again"
    assert {type(outcome) for outcome in outcomes} == {Finished}
    assert len({outcome.sample_id for outcome in outcomes}) == 60
    assert said.count("excluded and retried") == 1


def test_an_endpoint_that_comes_back_as_another_model_stays_out(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviour.delay_s = 0.02
    with FakeServer(Behaviour(delay_s=0.02)) as other:
        engine = make_engine(server, other, max_in_flight=2, stall_s=60.0)
        for request in make_requests(40):
            engine.submit(request)
        outcomes = engine.step()
        other.stop()
        wait_for("excluded and retried, 1 of 2 endpoints continue", server, capsys)
        num_seen = sum(map(is_work, other.behaviour.seen))
        other.behaviour.tokenizer_shift = 1
        other.start()
        wait_for("tokenises text differently", server, capsys)
        while engine.num_unfinished:
            outcomes += engine.step()
        engine.close()
        assert sum(map(is_work, other.behaviour.seen)) == num_seen
    assert {type(outcome) for outcome in outcomes} == {Finished}


def test_without_endpoints_the_engine_gives_up_in_one_line(server: FakeServer) -> None:
    engine = impatient(make_engine(server))
    server.stop()
    for request in make_requests(5):
        engine.submit(request)
    with pytest.raises(StillroomError, match=r"no endpoint was usable for 0\.005 minutes \(http://127.*run the same"):
        step_for_ever(engine)
    engine.close()


def step_for_ever(engine: ServerEngine) -> None:
    while True:
        assert not any(isinstance(outcome, Failure) for outcome in engine.step())


def test_a_build_whose_servers_vanish_keeps_what_is_finished_and_resumes(tmp_path: Path, server: FakeServer) -> None:
    requests, cache = make_requests(200), tmp_path / "c"
    server.behaviour.delay_s = 0.02

    def stop_in_the_middle() -> None:
        while len(server.behaviour.seen) < 80:
            time.sleep(0.005)
        server.stop()

    threading.Thread(target=stop_in_the_middle, daemon=True).start()
    config = make_config(cache, shard={"max_minutes": 10})
    with pytest.raises(StillroomError, match="no endpoint was usable"):
        run_build(config, requests, lambda: impatient(make_engine(server, max_in_flight=4)))
    num_kept = len(visible_ids(cache))
    assert 0 < num_kept < 200
    server.behaviour.delay_s = 0.0
    server.start()
    result = run_build(config, requests, lambda: make_engine(server))
    assert (result.num_done_before, result.recorded.num_failures) == (num_kept, 0)
    assert visible_ids(cache) == sorted(request.sample_id for request in requests)


def test_a_server_that_is_still_loading_is_waited_for() -> None:
    late = FakeServer(Behaviour())
    late.start()
    late.stop()
    threading.Timer(0.3, late.start).start()
    (request,) = make_requests(1)
    outcomes = answers(make_engine(late, give_up_minutes=1.0), [request])
    assert isinstance(outcomes[request.sample_id], Finished)
    late.stop()


def test_a_silent_endpoint_keeps_no_build_from_starting(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "STRAGGLER_S", 0.2)
    with FakeServer(Behaviour(trouble=lambda body: "silent")) as silent:
        started_s = time.monotonic()
        requests = make_requests(3)
        outcomes = answers(make_engine(silent, server, stall_s=60.0), requests)
        assert time.monotonic() - started_s < 60, "waited for the silent one"
        assert {type(outcome) for outcome in outcomes.values()} == {Finished}
        assert f"{silent.url} has not answered yet: starting without it" in capsys.readouterr().err
        with pytest.raises(StillroomError, match=r"does not finish the checks within engine\.handshake_s=0\.2 s"):
            # Long enough for the checks to run out of time also on a busy machine.
            make_engine(silent, stall_s=30.0, handshake_s=0.2, give_up_minutes=0.05)


def test_a_server_that_never_answers_is_an_error_at_the_start() -> None:
    nobody = FakeServer(Behaviour())
    nobody.start()
    nobody.stop()
    with pytest.raises(StillroomError, match="no endpoint was usable"):
        make_engine(nobody, give_up_minutes=0.01)


def _with(**changes: object) -> Callable[[Behaviour], None]:
    def change(behaviour: Behaviour) -> None:
        for name, value in changes.items():
            setattr(behaviour, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (_with(max_logprobs=K), {}, "max_support=8: start it with --max-logprobs 9"),
        (_with(max_logprobs=K - 1, has_generate=False), {}, "--max-logprobs 8"),
        (_with(vocab_size=401), {}, "has a vocabulary of 401, teacher.model one of 400"),
        (_with(tokenizer_shift=1), {}, "tokenises text differently from teacher.model"),
        (_with(logprobs_mode="processed_logprobs"), {}, "after temperature and truncation.*--logprobs-mode"),
        (_with(logprobs_mode="raw_logits"), {}, "returns logits.*--logprobs-mode"),
        (_with(key="secret"), {}, "rejects the API key: set engine.api_key_env"),
        (_with(key="secret"), {"api_key_env": "WRONG_KEY"}, "rejects the API key: set the right one.*WRONG_KEY"),
        (_with(), {"api_key_env": "NO_SUCH_KEY"}, "names NO_SUCH_KEY, which is not set"),
        (_with(), {"model": "other"}, "serves tiny but not engine.model=other"),
        (_with(), {"capture": SIGNALS}, r"sampler plugin, needed for capture\.draws: pip install.*--max-logprobs 26,"),
        (
            _with(has_generate=False),
            {"capture": CaptureConfig(draws=0, temperatures=[2.0])},
            r"needed for capture\.temperatures: .*VLLM_PLUGINS.*--max-logprobs 12, or set capture: {max_sup",
        ),
        (_with(has_plugin=True), {"capture": SIGNALS}, "max_support=8 and draws=6 with .*plugin: start it .*probs 26 "),
        (
            _with(has_plugin=True, logprobs_mode="processed_logprobs"),
            {"capture": SIGNALS},
            "after temperature and truncation.*--logprobs-mode",
        ),
        (
            _with(has_plugin=True),
            {"capture": CaptureConfig(draws=200)},
            r"draws over HTTP needs a vocabulary of 412 tokens",
        ),
        (_with(), {"max_model_len": 300}, "--max-model-len 300"),
        (_with(max_model_len=None), {}, "is not a vLLM server"),
    ],
)
def test_a_server_that_does_not_fit_is_named_with_its_flag(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Behaviour], None],
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("WRONG_KEY", "wrong")
    change(server.behaviour)
    with pytest.raises(ConfigError, match=message) as caught:
        make_engine(server, **settings)
    assert "\n" not in str(caught.value)


def test_servers_of_different_lengths_need_a_common_one(server: FakeServer) -> None:
    with FakeServer(Behaviour(max_model_len=128)) as short:
        with pytest.raises(ConfigError, match=r"different lengths .*set engine\.max_model_len"):
            make_engine(server, short)
        engine = make_engine(server, short, max_model_len=100)
        assert engine.info.max_model_len == 100
        engine.close()


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "sk-not-for-any-eyes-7f3a"
    monkeypatch.setenv("TEACHER_KEY", key)
    server.behaviour.key = key
    requests = make_requests(20)
    server.behaviour.trouble = lambda body: "400" if asks(body, requests[3]) else None
    engine_block = {"kind": "server", "endpoints": [server.url], "api_key_env": "TEACHER_KEY"}
    config = make_config(tmp_path / "c", engine=engine_block)
    result = run_build(config, requests, lambda: make_engine(server, api_key_env="TEACHER_KEY"))
    assert result.recorded.num_chains == 19
    (manifest,) = (tmp_path / "c" / "runs").glob("*.json")
    engine = json.loads(manifest.read_text())["engine"]
    assert engine["api_key_env"] == "TEACHER_KEY"
    assert engine["served"][server.url] == {"model": "tiny", "path": "/inference/v1/generate"}
    for path in (tmp_path / "c").rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    out, err = capfd.readouterr()
    assert key not in out + err


@WAYS
def test_completions_that_exist_are_scored(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    length = 255 if not has_generate else 256
    chains = [[5, 300, EOS_ID], [7], [9] * (length - 3)]
    requests = [scored(ids) for ids in chains]
    too_long = scored([9] * (length - 2))
    outcomes = answers(make_engine(server), [*requests, too_long])
    for request, ids in zip(requests, chains, strict=True):
        outcome = outcomes[request.sample_id]
        assert isinstance(outcome, Finished)
        assert outcome.finish_reason == "scored"
        assert_fits(outcome.capture, ids)
    failed = outcomes[too_long.sample_id]
    assert isinstance(failed, Failure)
    assert failed.reason == "too_long"


def scored(ids: list[int]) -> Request:
    prompt = make_requests(1)[0].prompt
    return Request(prompt, [3, 4, 5], 0, None, {}, len(ids), f"{len(ids)}-{ids[0]}", ids)


def test_pauses_double_up_to_a_limit_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rng = random.Random(0)
    pauses = [[pause_s(number, rng) for _ in range(50)] for number in range(1, 12)]
    for number, some in enumerate(pauses):
        longest_s = min(MAX_BACKOFF_S, 0.5 * 2**number)
        assert all(longest_s / 2 <= one <= longest_s for one in some)
        assert len(set(some)) == 50


@pytest.mark.timeout(120)
def test_closing_breaks_off_what_is_under_way(server: FakeServer) -> None:
    engine = make_engine(server)
    server.behaviour.delay_s = 600.0
    for request in make_requests(5):
        engine.submit(request)
    engine.step()
    engine.close()
    engine.close()


def test_more_connections_than_the_system_allows_are_refused(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    make_engine(server, max_in_flight=1000).close()
    assert raised == [(1256, 4096)]
    with pytest.raises(ConfigError, match=r"max_in_flight=4000 on 1 endpoints needs 4256 open files.*allows 4096"):
        make_engine(server, max_in_flight=4000)


def test_the_vocabulary_of_the_fake_is_the_teachers() -> None:
    assert make_teacher().record.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("key", ["sk-first\nsk-second", "sk-schlüssel", "sk-\x00"])
def test_a_key_that_no_header_takes_is_refused_unseen(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, "TEACHER_KEY": key})
    with pytest.raises(ConfigError, match="TEACHER_KEY holds a character that HTTP headers do not allow") as caught:
        make_engine(server, api_key_env="TEACHER_KEY")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://h:port", "http://h:99999", "http://h o", "http://[::1", "http://h:0", "http://a\nb", "h:8000"]
)
def test_an_invalid_address_is_refused_when_the_configuration_is_read(address: str) -> None:
    with pytest.raises(ValueError, match="is not a server address"):
        ServerConfig.model_validate({"kind": "server", "endpoints": [address]})


def test_a_server_that_is_stopped_over_its_chains_loses_none(server: FakeServer) -> None:
    requests, aborted = make_requests(8), set[int]()

    def once(body: Json) -> str | None:
        if not is_work(body) or body["sampling_params"]["seed"] in aborted:
            return None
        aborted.add(body["sampling_params"]["seed"])
        return "abort"

    server.behaviour.trouble = once
    engine = make_engine(server)
    outcomes = answers(engine, requests)
    assert len(aborted) == 8
    assert {type(outcome) for outcome in outcomes.values()} == {Finished}
    assert engine.num_tokens == NUM_TOKENS * len(requests)


@WAYS
def test_a_chain_that_ended_by_repetition_is_kept(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    server.behaviour.trouble = lambda body: "repetition" if is_work(body) else None
    (request,) = make_requests(1)
    outcome = answers(make_engine(server), [request])[request.sample_id]
    assert isinstance(outcome, Finished)
    assert (outcome.finish_reason, len(outcome.capture.token_ids_T)) == ("repetition", NUM_TOKENS)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("page", r"answered 200 with application/json instead of a stream: the backend is asleep$"),
        ("cut", r"closed the connection in the middle of an answer, after 10 tokens and \d\.\d s$"),
        ("hang", r"stopped sending, after 10 tokens and \d\.\d s$"),
    ],
)
def test_a_chain_that_broke_off_says_how(server: FakeServer, trouble: str, message: str) -> None:
    server.behaviour.trouble = lambda body: trouble if is_work(body) else None
    (request,) = make_requests(1)
    outcome = answers(make_engine(server, stall_s=0.5, max_attempts=1), [request])[request.sample_id]
    assert isinstance(outcome, Failure)
    assert re.search(message, outcome.message), outcome.message


@pytest.mark.parametrize("choices", [[], [{"prompt_logprobs": [[], [], []]}], [None], "none", [{}, {}]])
def test_another_program_behind_the_address_is_reported_in_one_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, choices: object
) -> None:
    whole = {"choices": choices, "prompt_logprobs": "none"}
    monkeypatch.setattr("tests.helpers.fake_server._generate", lambda body, setup: Plan(whole, [{}]))
    with pytest.raises(ConfigError, match=r"does not answer like vLLM .*: update its vLLM"):
        make_engine(server)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_streams_may_have_comments_and_either_end_of_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    written = fake_server.EVENT
    monkeypatch.setattr(fake_server, "EVENT", (": still here\n\n" + written).replace("\n", end))
    (request,) = make_requests(1)
    assert isinstance(answers(make_engine(server), [request])[request.sample_id], Finished)
