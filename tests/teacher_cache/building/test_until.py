"""`sampling.until`: no chain too many, none too few, whatever interrupts the build."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import teacher_cache.plan
import teacher_cache.writer.recorder
from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, StillroomError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema.records import Message, Prompt, prompt_id_of, stable_hash
from stillroom.sql.session import Session
from teacher_cache.building.build import Build
from teacher_cache.building.result import BuildResult
from teacher_cache.building.run_manifest import run_id_of
from teacher_cache.building.until import JoinedPrompts, require_judged
from teacher_cache.config import BuildConfig
from teacher_cache.engine.api import Engine, Failure, Outcome, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.plan import plan_build, plan_lines
from teacher_cache.prompts.prompts import LoadedPrompts, parse_worker
from teacher_cache.workers.joining import JoinedWork
from teacher_cache.workers.leases import new_worker_name
from tests.helpers.caches import visible_ids
from tests.helpers.fake_builds import EOS_ID, IMPATIENCE, VOCAB_SIZE, K, fall_silent, make_config, make_teacher

RIGHT, MOST, NUM_PROMPTS = 2, 6, 24
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def is_right(answer: str | None) -> bool | None:
    number = int(stable_hash(answer)[:8], 16) % 6
    return None if number == 5 else number < 2


@pytest.fixture(scope="module", autouse=True)
def _every_third_answer_is_right() -> Iterator[None]:
    def judge(_: JudgeProcess, kind: str, answer: str | None, *_rest: object) -> Verdict:
        assert kind == "exact"
        correct = is_right(answer)
        return Verdict(correct, float(correct is True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JudgeProcess, "judge", judge)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """A cache that was built without interruption."""
    path = tmp_path_factory.mktemp("whole") / "c"
    return path, build(config_of(path), prompts())


def config_of(cache: Path, **until: int) -> BuildConfig:
    sampling = {"max_tokens": 60, "until": {"right": RIGHT, "samples": MOST, **until}}
    return make_config(cache, sampling=sampling, shard={"row_group_tokens": 500, "max_mb": 0.02})


def prompts(count: int = NUM_PROMPTS, judge: str | None = "exact") -> list[Prompt]:
    made = []
    for number in range(count):
        messages = (Message("user", f"question {number}"),)
        metadata = {} if judge is None else {"judge": judge}
        made.append(Prompt(prompt_id_of(messages), messages, "fake", "train", reference="5", metadata=metadata))
    return made


class DyingEngine(FakeEngine):
    """Dies after some steps."""

    def __init__(self, num_steps: int, refuse: Callable[[Request], str | None] | None = None) -> None:
        super().__init__(VOCAB_SIZE, K, mean_tokens=40, eos_id=EOS_ID, refuse=refuse)
        self._steps_left = num_steps

    def step(self) -> list[Outcome]:
        self._steps_left -= self.num_unfinished > 0
        if self._steps_left < 0:
            raise StillroomError("the engine died")
        return super().step()


class NarrowEngine(DyingEngine):
    """Takes few chains at a time, so that none gets all parts."""

    def has_room(self) -> bool:
        return self.num_unfinished < 6

    def step(self) -> list[Outcome]:
        time.sleep(0.03)
        return super().step()


def _dies(*_: object) -> None:
    raise StillroomError("the worker died")


def build(
    config: BuildConfig,
    asked: list[Prompt],
    start_engine: Callable[[], Engine] = lambda: DyingEngine(10**6),
    worker: str = "0/1",
) -> BuildResult:
    teacher = make_teacher()
    teacher.tokenizer.chat_template = TEMPLATE
    job = Build(config, teacher, f"w{worker[0]}")
    try:
        until = job.until(asked, parse_worker(worker), retry_failures=False)
        return job.run(until.requests(), until.num_total, start_engine, until=until)
    finally:
        job.close()


def join(config: BuildConfig, asked: list[Prompt], start_engine: Callable[[], Engine]) -> BuildResult:
    teacher = make_teacher()
    teacher.tokenizer.chat_template = TEMPLATE
    job = Build(config, teacher, new_worker_name())
    try:
        malformed = [Failure("bad", "", "fake", 0, "malformed", "line 1 is not JSON")]
        prompts = JoinedPrompts(config, job.catalog, asked, malformed, teacher)
        return job.join_prompts(prompts, start_engine, retry_failures=False)
    finally:
        job.close()


def right_by_prompt(cache: Path) -> dict[str, list[bool]]:
    """Verdicts of each prompt's chains by sample index, which have no gaps."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    with Session({"main": Catalog(cache)}) as session:
        rows = session.arrow("SELECT prompt_id, sample_index, correct FROM chains ORDER BY ALL").to_pylist()
    for row in rows:
        assert row["sample_index"] == len(found[row["prompt_id"]])
        found[row["prompt_id"]].append(row["correct"] is True)
    return found


def test_each_prompt_gets_chains_until_enough_are_right(tmp_path: Path, whole: tuple[Path, BuildResult]) -> None:
    found = right_by_prompt(whole[0])
    assert len(found) == NUM_PROMPTS
    for right in found.values():
        assert sum(right[:-1]) < RIGHT, "the last chain was needed"
        assert sum(right) == RIGHT or len(right) == MOST
    num_chains = sum(map(len, found.values()))
    assert RIGHT * NUM_PROMPTS < num_chains < MOST * NUM_PROMPTS
    assert (whole[1].num_total, whole[1].recorded.num_chains) == (num_chains, num_chains)
    shutil.copytree(whole[0], tmp_path / "c")
    build(config_of(tmp_path / "c", samples=MOST + 1), prompts())
    more = right_by_prompt(tmp_path / "c")
    assert [len(more[one]) - len(right) for one, right in found.items()] == [sum(r) < RIGHT for r in found.values()]


@pytest.mark.parametrize(("num_steps", "saves_verdicts"), [(1, True), (5, False)])
def test_an_interrupted_build_ends_with_the_same_chains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Path, BuildResult],
    num_steps: int,
    saves_verdicts: bool,
) -> None:
    config = config_of(tmp_path / "c")
    with monkeypatch.context() as patch:
        if not saves_verdicts:
            patch.setattr(teacher_cache.writer.recorder, "commit_verdicts", lambda *_: None)
        with pytest.raises(StillroomError, match="the engine died"):
            build(config, prompts(), lambda: DyingEngine(num_steps), "0/2")
    assert 0 < len(visible_ids(tmp_path / "c")) < len(visible_ids(whole[0])) / 2
    for worker in ("0/2", "1/2"):
        build(config, prompts(), worker=worker)
    assert visible_ids(tmp_path / "c") == visible_ids(whole[0])


@pytest.mark.parametrize("death", ["while it generates", "before the commit"])
def test_workers_join_and_take_over_from_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, BuildResult], death: str
) -> None:
    """A dead one leaves chains without verdicts, or a file that nobody has registered."""
    for name, value in {**IMPATIENCE, "teacher_cache.building.until.PART_PROMPTS": 4}.items():
        monkeypatch.setattr(name, value)
    config = config_of(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(JoinedWork, "__exit__", fall_silent)
        if death == "while it generates":
            patch.setattr(teacher_cache.writer.recorder, "commit_verdicts", lambda *_: None)
        else:
            patch.setattr("stillroom.cache.catalog.Table.commit", _dies)
        with pytest.raises(StillroomError, match="died"):
            join(config, prompts(), lambda: NarrowEngine(12))
    assert list((tmp_path / "c").glob("runs/*.leases/*.lease"))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: join(config, prompts(), lambda: NarrowEngine(10**6)), range(2)))
    ids = visible_ids(tmp_path / "c")
    assert ids == visible_ids(whole[0])
    assert [one.num_total for one in results] == [len(ids) + 1] * 2
    assert min(one.recorded.num_chains for one in results) > 0
    assert sum(file.num_rows for file in Catalog(tmp_path / "c").failures.files()) == 1
    assert list((tmp_path / "c").glob("runs/*.leases/*")) == []
    again = join(config, prompts(), lambda: pytest.fail("nothing is left to generate"))
    assert again.num_total == again.num_done_before == len(ids) + 1


def test_a_worker_taken_for_dead_that_lives_adds_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers differ, as those of a GPU may. It dies after all, before it saves a verdict."""
    config = config_of(tmp_path / "c")

    class Slow(NarrowEngine):
        def submit(self, request: Request) -> None:
            super().submit(replace(request, seed=(request.seed or 0) + 1))

    class Overtaken(DyingEngine):
        def step(self) -> list[Outcome]:
            while rivals:
                with monkeypatch.context() as patch:
                    patch.setattr(teacher_cache.writer.recorder, "commit_verdicts", lambda *_: None)
                    with pytest.raises(StillroomError, match="died"):
                        build(config, prompts(10), rivals.pop)
            return super().step()

    rivals = [Slow(4)]
    join(config, prompts(10), lambda: Overtaken(10**6))
    assert "some prompts still lack chains, as two workers wrote the same ones" in capsys.readouterr().err
    join(config, prompts(10), lambda: DyingEngine(10**6))
    ids = visible_ids(tmp_path / "c")
    assert len(ids) == len(set(ids))
    with Session({"main": Catalog(tmp_path / "c")}) as session:
        rows = session.arrow("SELECT answer, correct FROM chains").to_pylist()
    assert [row["correct"] for row in rows] == [is_right(row["answer"]) for row in rows]
    assert all(sum(right) >= RIGHT or len(right) == MOST for right in right_by_prompt(tmp_path / "c").values())


def test_a_worker_that_only_judges_starts_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, BuildResult]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.writer.recorder, "commit_verdicts", lambda *_: None)
        join(config_of(tmp_path / "c"), prompts(), lambda: DyingEngine(10**6))
    join(config_of(tmp_path / "c"), prompts(), lambda: pytest.fail("nothing is left to generate"))
    assert right_by_prompt(tmp_path / "c") == right_by_prompt(whole[0])


def test_a_failed_sample_is_not_a_right_one(tmp_path: Path) -> None:
    def refuse(request: Request) -> str | None:
        return "not this one" if request.prompt.messages[0].content.endswith("7") else None

    result = build(config_of(tmp_path / "c"), prompts(10), lambda: DyingEngine(10**6, refuse))
    assert result.recorded.num_failures == MOST
    again = build(config_of(tmp_path / "c"), prompts(10), lambda: pytest.fail("nothing is left to generate"))
    assert again.num_done_before == result.num_total


def test_prompts_without_a_judge_get_their_samples_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unjudged = prompts(3, judge=None)
    assert build(config_of(tmp_path / "c"), unjudged).recorded.num_chains == 3
    require_judged([*unjudged, *[Prompt("x", (), "fake", "train", metadata={"judge": "math"})]])
    assert "3 prompts without a judge" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="needs answers that a build can judge"):
        require_judged(unjudged)


def test_a_plan_gives_the_most_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, BuildResult]
) -> None:
    def load(*_: object) -> LoadedPrompts:
        return LoadedPrompts(prompts(), [], [], [])

    teacher = make_teacher()
    teacher.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(teacher_cache.plan, "load_prompts", load)
    monkeypatch.setattr(teacher_cache.plan, "identify_teacher", lambda *_: teacher)
    planned = plan_build(config_of(tmp_path / "c"))
    assert (planned.num_chains, planned.num_left) == (MOST * NUM_PROMPTS, MOST * NUM_PROMPTS)
    assert any("upper bounds" in line for line in plan_lines(planned))
    planned = plan_build(config_of(whole[0]))
    assert (planned.num_left, planned.num_done) == (0, len(visible_ids(whole[0])))


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"until": {"right": 3, "samples": 2}}, "right=3 exceeds samples=2"),
        ({"samples": 4, "until": {"right": 1, "samples": 4}}, "until has no effect"),
        ({"temperature": 0, "until": {"right": 1, "samples": 4}}, "sampling.until at temperature 0"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, sampling: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_config(tmp_path, sampling=sampling)


def test_runs_keep_their_ids(tmp_path: Path) -> None:
    teacher = make_teacher().record
    plain = make_config(tmp_path, sampling={"max_tokens": 60})
    assert "until" not in plain.sampling.model_dump()
    assert run_id_of(plain, teacher) == run_id_of(config_of(tmp_path), teacher)
