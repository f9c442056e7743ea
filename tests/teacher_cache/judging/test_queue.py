"""Answers to judges: bounded, in order of nobody's waiting, and whatever is not judged is counted."""

import threading
from collections.abc import Iterator

import pytest

from stillroom.errors import StillroomError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema.records import Message, Prompt
from teacher_cache.judging.queue import JudgeQueue


def prompt(kind: str | None = "exact", reference: str = "5") -> Prompt:
    metadata = {} if kind is None else {"judge": kind}
    return Prompt("id", (Message("user", "2+3?"),), "s", "train", reference=reference, metadata=metadata)


@pytest.fixture
def judges() -> Iterator[JudgeQueue]:
    made = JudgeQueue(2, max_waiting=3)
    yield made
    made.close()


def test_a_prompt_names_its_own_judge(judges: JudgeQueue) -> None:
    judges.put("a", prompt(), "5")
    judges.put("b", prompt(), None)
    judges.put("c", prompt(None), "5")
    judges.wait()
    found = {one.sample_id: (one.judge, one.verdict) for one in judges.finished()}
    assert found == {
        "a": ("exact", Verdict(True, 1.0, "whole, text", "5 | 5")),
        "b": ("exact", Verdict(False, 0.0, "no answer")),
    }
    assert (judges.finished(), judges.num_left) == ([], 0)


def test_what_does_not_fit_is_left_and_counted(judges: JudgeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def wait(*_: object) -> Verdict:
        assert go_on.wait(60)
        return Verdict(True, 1.0)

    monkeypatch.setattr(JudgeProcess, "judge", wait)
    for number in range(5):
        judges.put(str(number), prompt(), "5")
    assert judges.num_left == 2
    assert judges.finished() == []
    go_on.set()
    judges.wait()
    assert {one.sample_id for one in judges.finished()} == {"0", "1", "2"}


def test_a_program_that_hangs_is_not_waited_for_in_a_hurry(judges: JudgeQueue) -> None:
    hanging = prompt("code", '[{"input": "", "output": "5"}]')
    judges.put("a", hanging, "```python\nwhile True: pass\n```")
    judges.hurry()
    judges.put("b", prompt(), "5")
    judges.wait()
    assert (judges.finished(), judges.num_left) == ([], 2)


def test_an_error_comes_after_the_verdicts_before_it(judges: JudgeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(_: JudgeProcess, kind: str, answer: str | None, *rest: object) -> Verdict:
        if answer == "bad":
            raise StillroomError("the judge does not start")
        return Verdict(True, 1.0)

    monkeypatch.setattr(JudgeProcess, "judge", judge)
    for answer in ("good", "bad", "good"):
        judges.put(answer, prompt(), answer)
    judges.wait()
    assert [one.sample_id for one in judges.finished()] == ["good"]
    with pytest.raises(StillroomError, match="does not start"):
        judges.finished()
    assert [one.sample_id for one in judges.finished()] == ["good"]


def test_verdicts_that_nobody_fetched_yet_take_no_place(judges: JudgeQueue) -> None:
    """A shard may stay open for ten minutes: a judge that keeps up must not be told that the queue is full."""
    for start in range(0, 9, 3):
        for number in range(start, start + 3):
            judges.put(str(number), prompt(), "5")
        judges.wait()
    assert judges.num_left == 0
    assert [one.sample_id for one in judges.finished()] == [str(number) for number in range(9)]
