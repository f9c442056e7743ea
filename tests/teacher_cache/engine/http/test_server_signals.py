"""What only the sampler sees, over HTTP: as the plugin computes it, by both ways, never mixed with something else."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stillroom.errors import ConfigError, StillroomError
from stillroom.schema.records import Capture
from teacher_cache.engine.api import Failure, Finished, Outcome, seed_of_draws
from teacher_cache.engine.http import pool
from teacher_cache.engine.http.server import ServerEngine
from teacher_cache.engine.plugin.signals import signal_rows
from teacher_cache.engine.row_layout import Layout, capture_of_rows
from tests.helpers.fake_builds import make_requests
from tests.helpers.fake_server import EOS_ID, LOGPROBS_V, Behaviour, FakeServer, Json, tokens_of
from tests.teacher_cache.engine.http.test_server import (
    PLAIN,
    SIGNALS,
    WAYS,
    K,
    answers,
    impatient,
    is_work,
    make_engine,
    scored,
    wait_for,
)

LAYOUT = Layout(K, SIGNALS.draws, tuple(SIGNALS.temperatures))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BACKOFF_S", 0.01)
    monkeypatch.setattr(pool, "MAX_BACKOFF_S", 0.05)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(Behaviour(has_plugin=True, max_logprobs=30)) as one:
        yield one


def embedded_capture(ids: list[int], num_prompt_tokens: int, seed: int) -> Capture:
    """What the embedded engine reads out of the plugin's rows for these tokens."""
    logits = torch.tensor(LOGPROBS_V, dtype=torch.float32).repeat(len(ids), 1)
    places = torch.arange(num_prompt_tokens, num_prompt_tokens + len(ids))
    rows = signal_rows(logits, torch.tensor(ids), LAYOUT, torch.full_like(places, seed), places)
    arrays = rows.ids.numpy(), rows.logprobs.numpy(), rows.ranks.int().numpy()
    return capture_of_rows(*arrays, ids, K, LAYOUT)


def assert_same(one: Outcome, expected: Capture) -> None:
    assert isinstance(one, Finished)
    for field in dataclasses.fields(Capture):
        np.testing.assert_array_equal(getattr(one.capture, field.name), getattr(expected, field.name))


@WAYS
def test_generated_chains_have_the_signals_of_the_embedded_engine(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    requests = make_requests(6)
    engine = make_engine(server, capture=SIGNALS)
    assert (engine.info.entropy, engine.info.settings["sampler"]) == ("exact", "plugin")
    outcomes = answers(engine, requests)
    for request in requests:
        ids = tokens_of(request.seed or 0)
        expected = embedded_capture(ids, len(request.prompt_token_ids), request.seed or 0)
        assert_same(outcomes[request.sample_id], expected)
        assert any(one > K for one in ids), "some tokens lie outside of the top"
    assert sum(map(is_work, server.behaviour.seen)) == 6, "ranks come along: no second question"


@WAYS
def test_scored_chains_have_the_signals_of_the_embedded_engine(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    chains = [[5, 300, EOS_ID], [7], [9] * 253]
    requests = [scored(ids) for ids in chains]
    outcomes = answers(make_engine(server, capture=SIGNALS), requests)
    for request, ids in zip(requests, chains, strict=True):
        outcome = outcomes[request.sample_id]
        assert_same(outcome, embedded_capture(ids, 3, seed_of_draws(request)))
        assert isinstance(outcome, Finished)
        assert outcome.finish_reason == "scored"


@WAYS
def test_a_capture_without_draws_takes_exact_entropies_where_they_are(server: FakeServer, has_generate: bool) -> None:
    server.behaviour.has_generate = has_generate
    (request,) = make_requests(1)
    for has_plugin, entropy in ((True, "exact"), (False, "support")):
        server.behaviour.has_plugin = has_plugin
        engine = make_engine(server, capture=PLAIN)
        assert engine.info.entropy == entropy
        outcome = answers(engine, [request])[request.sample_id]
        assert isinstance(outcome, Finished)
        if outcome.capture.entropy_T is None:
            assert not has_plugin
        else:
            probs_V = np.exp(LOGPROBS_V)
            np.testing.assert_allclose(outcome.capture.entropy_T, -(probs_V * LOGPROBS_V).sum(), rtol=1e-5)
        assert outcome.capture.draw_ids_TM is None


@WAYS
def test_a_plugin_whose_numbers_are_not_finite_is_one_failure(server: FakeServer, has_generate: bool) -> None:
    """As for other teachers: NaN in the logits is reported, not stored."""
    server.behaviour.has_generate = has_generate
    requests = make_requests(3)
    server.behaviour.nan_seeds = {requests[1].seed or 0}
    outcomes = answers(make_engine(server, capture=SIGNALS), requests)
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert [(one.sample_id, one.reason) for one in failed] == [(requests[1].sample_id, "not_finite")]


def test_endpoints_of_two_kinds_are_refused(server: FakeServer) -> None:
    with FakeServer(Behaviour(max_logprobs=30)) as other:
        with pytest.raises(
            ConfigError, match=f"{server.url} has .*plugin and {other.url} does not.*or list only one kind"
        ):
            make_engine(server, other, capture=PLAIN)
        with pytest.raises(ConfigError, match=f"{other.url} answers without stillroom's sampler plugin"):
            make_engine(server, other, capture=SIGNALS)


@pytest.mark.parametrize("has_plugin", [True, False])
def test_an_endpoint_that_comes_back_as_the_other_kind_is_not_mixed_in(
    server: FakeServer, capsys: pytest.CaptureFixture[str], has_plugin: bool
) -> None:
    """With the plugin where there was none it is asked as before; without it, it stays out."""
    first = FakeServer(Behaviour(has_plugin=has_plugin, max_logprobs=30, delay_s=0.02))
    other = FakeServer(Behaviour(has_plugin=has_plugin, max_logprobs=30, delay_s=0.02))
    with first, other:
        engine = make_engine(first, other, capture=PLAIN, max_in_flight=2, stall_s=60.0)
        for request in make_requests(40):
            engine.submit(request)
        outcomes = engine.step()
        other.stop()
        wait_for("excluded and retried, 1 of 2 endpoints continue", first, capsys)
        other.behaviour.has_plugin = not has_plugin
        num_seen = sum(map(is_work, other.behaviour.seen))
        other.start()
        lacking = "needed for exact entropies, which this build started with"
        wait_for(lacking if has_plugin else f"{other.url} is connected", first, capsys)
        while engine.num_unfinished:
            outcomes += engine.step()
        engine.close()
    assert (sum(map(is_work, other.behaviour.seen)) == num_seen) == has_plugin
    for outcome in outcomes:
        assert isinstance(outcome, Finished)
        assert (outcome.capture.entropy_T is not None) == has_plugin


def test_workers_without_the_plugin_are_reported(server: FakeServer) -> None:
    server.behaviour.plugin_places = range(3)
    with pytest.raises(ConfigError, match="has workers with stillroom's sampler plugin and others without"):
        make_engine(server, capture=SIGNALS)


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_busy_endpoint_costs_a_chain_no_attempt(
    server: FakeServer, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    requests, waited = make_requests(8), dict[int, int]()

    def busy(body: Json) -> str | None:
        if not is_work(body):
            return None
        seed = body["sampling_params"]["seed"]
        waited[seed] = waited.get(seed, 0) + 1
        return status if waited[seed] <= 9 else None

    server.behaviour.trouble = busy
    outcomes = answers(make_engine(server, max_attempts=2, give_up_minutes=1.0, max_in_flight=4), requests)
    assert {type(outcome) for outcome in outcomes.values()} == {Finished}
    said = capsys.readouterr().err
    assert f"answers {status}" in said
    assert said.count("overloaded, sending requests more slowly") == 1, "said once, not each time"


def test_an_endpoint_that_is_busy_for_ever_is_given_up(server: FakeServer) -> None:
    server.behaviour.trouble = lambda body: "429" if is_work(body) else None
    engine = impatient(make_engine(server))
    for request in make_requests(5):
        engine.submit(request)
    with pytest.raises(StillroomError, match=r"no endpoint was usable for 0\.005 minutes .*answers 429"):
        outlast(engine)
    engine.close()


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_key_that_is_taken_back_stops_the_build(server: FakeServer, status: str) -> None:
    requests = make_requests(40)
    server.behaviour.delay_s = 0.01
    engine = make_engine(server, max_in_flight=2, give_up_minutes=1.0)
    finished: list[Outcome] = []
    for request in requests:
        engine.submit(request)
    while len(finished) < 5:
        finished += engine.step()
    server.behaviour.trouble = lambda body: status
    with pytest.raises(ConfigError, match=r"rejects the API key: set engine.api_key_env") as caught:
        outlast(engine)
    assert "\n" not in str(caught.value)
    engine.close()


def test_a_misfit_is_asked_after_growing_pauses(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that came back with shorter chains does not get a handshake every half second."""
    monkeypatch.setattr(pool, "MAX_BACKOFF_S", 60.0)
    with FakeServer(Behaviour(delay_s=0.02)) as other:
        server.behaviour.has_plugin, server.behaviour.delay_s = False, 0.02
        engine = make_engine(server, other, max_in_flight=2, stall_s=60.0)
        for request in make_requests(110):
            engine.submit(request)
        outcomes = engine.step()
        other.stop()
        while len(outcomes) < 20:
            outcomes += engine.step()
        other.behaviour.max_model_len = 128
        other.behaviour.seen.clear()
        other.start()
        wait_for("came back with max_model_len 128", server, capsys)
        while engine.num_unfinished:
            outcomes += engine.step()
        engine.close()
    # Pauses of 10 ms that double: three or four, and not thirteen.
    assert sum("stop_token_ids" in body for body in other.behaviour.seen) <= 8
    assert not any(map(is_work, other.behaviour.seen))


def outlast(engine: ServerEngine) -> None:
    """Steps until it raises, or for a minute."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        engine.step()
