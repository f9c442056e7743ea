"""Served students compared on the same prompts: pairs, failures, and the page."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import ConfigError, StillroomError
from student_train.answers import AskedPrompt, GenerateConfig
from student_train.commands.result_lines import compare_lines
from student_train.compare.comparing import Price, answer_text, compare
from student_train.compare.page import difference_words, interval_words, verdict_words, write_page
from student_train.compare.sides import Reply, Side, open_side, open_sides
from student_train.compare.statistics import DIFFERENCE, holm, mean_interval, sign_test
from tests.helpers.fake_server import Behaviour, FakeServer

CONFIG = GenerateConfig(num_prompts=12, max_new_tokens=8, temperature=0.0)


def _prompt(number: int) -> AskedPrompt:
    message = {"role": "user", "content": f"w{number} w{number + 1}"}
    source = "even" if number % 2 == 0 else "odd"
    return AskedPrompt(str(number), [], "exact", f"{number}", {}, None, 0.5, [message], source)


PROMPTS = [_prompt(number) for number in range(12)]


@pytest.fixture
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    def answer(message: str) -> str:
        # A line break that ends no line of a stream.
        return f"So:\u2028<answer>{message.split()[0][1:]}</answer>"

    def answer_if_even(message: str) -> Any:
        number = int(message.split()[0][1:])
        if number == 11:
            return {"message": {"content": "cut short"}, "finish_reason": "length"}
        return answer(message) if number % 2 == 0 else "<answer>no idea</answer>"

    def trouble(body: Any) -> str | None:
        return "500" if body["messages"][0]["content"].startswith("w3 ") else None

    good = Behaviour(chat=answer, key="secret")
    poor = Behaviour(chat=answer_if_even, trouble=trouble, model="poor")
    with FakeServer(good) as one, FakeServer(poor) as other:
        yield one, other


def test_two_servers_are_compared_pair_by_pair(servers: tuple[FakeServer, FakeServer], tmp_path: Path) -> None:
    good, poor = servers
    sides = [open_side(f"good={good.url}", "secret", 5), open_side(f"poor={poor.url}/v1#poor", None, 5)]
    assert [side.model for side in sides] == ["tiny", "poor"]
    result, answered = compare(sides, PROMPTS, CONFIG, 3, {"good": Price(1.0, 2.0), "poor": Price(hour=3600.0)})
    first, second = result["sides"]
    assert first["accuracy"]["mean"] == 1
    assert first["cost"] == (12 * 7 * 1.0 + 12 * 1 * 2.0) / 1e6
    assert first["cost_per_correct"] == pytest.approx(first["cost"] / 12)
    assert first["first_token_s"]["p50"] <= first["latency_s"]["p50"]
    assert (second["num_failed"], second["num_cut"]) == (1, 1)
    assert second["cost"] == pytest.approx(second["wall_s"])
    assert second["cost_per_correct"] == pytest.approx(second["cost"] / 6)
    assert second["failures"] == {"status 500: status 500 on demand": 1}
    (pair,) = result["pairs"]
    # Prompt 3 failed on one side and is not a pair.
    assert (pair["num_pairs"], pair["wins_a"], pair["wins_b"], pair["ties"]) == (11, 5, 0, 6)
    assert pair["p_value"] == 2 / 2**5
    assert pair["accuracy_difference"]["mean"] == pytest.approx(-5 / 11)
    assert pair["accuracy_difference"]["high"] < 0
    # Five wins to none exclude 0 by the bootstrap, and not by the exact test.
    assert "Too few prompts differ" in verdict_words(pair)
    assert "good is better" in verdict_words({**pair, "p_adjusted": 0.01})
    assert [(one["source"], one["wins_a"]) for one in pair["by_source"]] == [("even", 0), ("odd", 5)]
    assert pair["tokens_difference"]["mean"] > 0
    assert result["answers"][5]["correct"] == {"good": 1.0, "poor": 0.0}
    assert result["answers"][5]["text"] == {"good": "So:\u2028<answer>5</answer>", "poor": "<answer>no idea</answer>"}
    asked = [body["messages"] for body in good.behaviour.seen]
    assert len(asked) == 12
    assert all([*prompt.messages] in asked for prompt in PROMPTS)
    assert {(body["max_tokens"], body["temperature"]) for body in good.behaviour.seen} == {(8, 0.0)}
    write_page(result, answered, PROMPTS, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "wrong: &lt;answer&gt;no idea&lt;/answer&gt;" in page
    assert "failed: status 500" in page
    assert page.count(" (cut at the limit): ") == 1
    lines = compare_lines({**result, "page": "page.html"})
    assert lines[1].startswith("poor ")
    assert "1 failed" in lines[1]


def test_several_sides_are_measured_against_one(servers: tuple[FakeServer, FakeServer], tmp_path: Path) -> None:
    good, poor = servers
    sides = [
        open_side(f"{name}={server.url}", "secret" if server is good else None, 5)
        for name, server in (("poor", poor), ("good", good), ("twin", good))
    ]
    for against, named in ((None, ["poor good", "poor twin"]), ("best", ["good poor", "good twin"])):
        result, answered = compare(sides, PROMPTS, CONFIG, 3, {}, against)
        assert [f"{pair['a']} {pair['b']}" for pair in result["pairs"]] == named
    poor_pair, twin = result["pairs"]
    assert poor_pair["p_adjusted"] == 2 * poor_pair["p_value"]
    # Twelve pairs without a difference leave one of 22 points possible.
    most = 1 - 0.05 ** (1 / 12)
    found = twin["accuracy_difference"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0, -most, most))
    assert "95% interval -22.1% to +22.1%, exact: no prompt differs" in difference_words(twin)
    assert result["sides"][0]["by_source"][1] == {"source": "odd", "num_judged": 5, "accuracy": 0.0}
    write_page(result, answered, PROMPTS, tmp_path / "page.html")
    assert "measured against the most accurate side" in (tmp_path / "page.html").read_text()
    with pytest.raises(ConfigError, match="--against c: choose one of poor, good, twin, best or all"):
        compare(sides, PROMPTS, CONFIG, 1, {}, "c")


@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_folder_answers_beside_a_server(servers: tuple[FakeServer, FakeServer], student: Path) -> None:
    sides = [open_side(str(student), None, 5), open_side(servers[1].url, None, 5)]
    result, answered = compare(sides, PROMPTS[4:6], CONFIG, 1, {})
    assert result["sides"][0]["name"] == student.name
    assert result["sides"][0]["tokens_per_answer"] <= 8
    assert answered[0].replies[0].num_prompt_tokens == 2
    assert result["pairs"][0]["num_pairs"] == 2


@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_folder_refuses_conversations_as_a_server_does(
    servers: tuple[FakeServer, FakeServer], student: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(student, tmp_path / "student")
    template = "{% if messages[0].content.startswith('w4') %}{{ raise_exception('not this one') }}{% endif %}w1"
    for text, told in ((template, "not this one"), (None, "chat_template is not set")):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)
        side = open_side(str(folder), None, 5)
        replies = side.answer(PROMPTS[4:6], CONFIG, 1, print)
        assert told in str(replies[0].error)
        assert (replies[1].error is None) == (text is not None)


def test_what_cannot_be_compared_is_refused(servers: tuple[FakeServer, FakeServer], tmp_path: Path) -> None:
    good, poor = servers
    with pytest.raises(StillroomError, match="/v1/models answers 401: Unauthorized"):
        open_side(good.url, None, 5)
    with pytest.raises(ConfigError, match="neither a folder nor an address"):
        open_side(str(tmp_path / "nothing"), None, 5)
    with pytest.raises(ConfigError, match="holds a password: use --api-key-env"):
        open_side("http://me:secret@host/v1", None, 5)
    side: Side = open_side(f"a={poor.url}", None, 5)
    with pytest.raises(ConfigError, match="got only the side http://nowhere: name at least two"):
        open_sides(["http://nowhere"], None, 5)
    with pytest.raises(ConfigError, match="got the sides a, a: at least two with different names"):
        compare([side, side], PROMPTS, CONFIG, 1, {})
    with pytest.raises(ConfigError, match="--price c: no side has this name: choose one of a, b"):
        compare([side, open_side(f"b={poor.url}", None, 5)], PROMPTS, CONFIG, 1, {"c": Price(1, 1)})
    poor.stop()
    gone = open_side(f"a={poor.url}#poor", None, 5)
    with pytest.raises(StillroomError, match=r"a \(http.*\) answered none of 1 requests: "):
        compare([gone, open_side(f"b={good.url}", "secret", 5)], PROMPTS[:1], CONFIG, 1, {})


def test_reasoning_is_not_part_of_the_answer() -> None:
    prompt = AskedPrompt("1", [], "exact", "1", {}, ("<think>", "</think>"), None)
    assert answer_text(prompt, Reply("<think>5?</think>4")) == "4"
    assert answer_text(prompt, Reply("<think>5?")) is None
    assert answer_text(prompt, Reply("5?", is_cut=True)) is None
    assert answer_text(prompt, Reply("4", reasoning="5?")) == "4"
    assert answer_text(_prompt(1), Reply("<think>5?")) == "<think>5?"


def test_statistics_agree_with_their_definitions() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert 0 < sign_test(2000, 2100) < 1
    values = [1.0] * 60 + [0.0] * 40
    found = mean_interval(values)
    assert found is not None
    # The normal approximation is close at this size.
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)
    assert mean_interval([]) is None
    certain, lone = mean_interval([1.0] * 20, (0, 1)), mean_interval([2.5])
    assert certain is not None
    assert (certain.low, certain.high) == pytest.approx((0.05 ** (1 / 20), 1))
    assert certain.method == "exact"
    assert lone is not None
    assert (lone.low, lone.method, lone.holds_zero) == (None, "unknown", True)
    always = mean_interval([1.0] * 3, DIFFERENCE)
    assert always is not None
    assert interval_words(always.model_dump()).endswith("exact: every prompt differs")
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
