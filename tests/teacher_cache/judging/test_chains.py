"""Judging a cache again: verdicts are added beside the shards, the latest one counts."""

import datetime
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import teacher_cache.judging.chains
import teacher_cache.judging.queue
import teacher_cache.writer.commit
import teacher_cache.writer.verdicts
from stillroom.cache.catalog import Catalog, Table
from stillroom.errors import CacheConflict, ConfigError, StillroomError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema.tables import VERDICT_SCHEMA
from stillroom.sql.session import open_session
from teacher_cache.judging.chains import judge_cache
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.writer.commit import lock_path, worker_lock
from teacher_cache.writer.verdicts import JudgedSample, commit_verdict_file, commit_verdicts, verdict_temp
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.fake_builds import make_config, make_requests, run_build


@pytest.fixture
def cache(tmp_path: Path) -> SyntheticCache:
    return make_cache(tmp_path / "cache", num_chains=24, judged=False)


def verdicts(root: Path) -> dict[tuple[str, str], bool | None]:
    with open_session(Catalog(root)) as session:
        rows = session.arrow("SELECT sample_id, judge, correct FROM verdicts").to_pylist()
    return {(row["sample_id"], row["judge"]): row["correct"] for row in rows}


def test_a_judge_decides_every_chain_once(cache: SyntheticCache) -> None:
    shards = cache.catalog.chains.version
    report = judge_cache(cache.root, kind="regex")
    assert report.by_judge["regex"].num_chains == 24
    assert report.by_judge["regex"].num_wrong + report.by_judge["regex"].num_correct == 24
    answers = {chain.sample_id: chain.text[len(chain.text) // 2 :] for chain in cache.chains}
    assert verdicts(cache.root) == {(sample_id, "regex"): "42" in text for sample_id, text in answers.items()}
    assert judge_cache(cache.root, kind="regex").by_judge == {}
    assert judge_cache(cache.root, kind="regex", again=True).by_judge["regex"].num_chains == 24
    assert len(verdicts(cache.root)) == 24
    assert cache.catalog.chains.version == shards


def test_where_chooses_chains(cache: SyntheticCache) -> None:
    report = judge_cache(cache.root, kind="exact", where="split = 'heldout' -- held out", num_processes=2)
    expected = {chain.sample_id for chain in cache.chains if chain.split == "heldout"}
    assert {sample_id for sample_id, _ in verdicts(cache.root)} == expected
    assert report.by_judge["exact"].num_chains == len(expected)


@pytest.mark.parametrize("kind", [None, "exact"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("splat = 1", "--where 'splat = 1': there is no column splat: the nearest are [a-z_, ]+$"),
        ("source =", "--where 'source =': it ends too early, or its brackets do not match$"),
        ("source = = 1", "--where 'source = = 1': syntax error at or near \"=\"$"),
        ("latest_judge = 'exact'", "there is no column latest_judge"),
        ("cast(source as int) = 1", "--where 'cast[^']*': Could not convert string [^(]*$"),
        (" ", "--where is empty: leave it out"),
    ],
)
def test_a_wrong_condition_is_reported_in_its_own_words(
    cache: SyntheticCache, kind: str | None, where: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        judge_cache(cache.root, kind=kind, where=where)
    assert "LINE" not in str(caught.value)
    assert "json_extract" not in str(caught.value)


def latest(root: Path) -> list[tuple[str, str | None, bool | None]]:
    with open_session(Catalog(root)) as session:
        rows = session.arrow("SELECT sample_id, judge, correct FROM chains ORDER BY sample_id").to_pylist()
    return [(row["sample_id"], row["judge"], row["correct"]) for row in rows]


def test_an_undecided_verdict_replaces_no_decided_one(cache: SyntheticCache) -> None:
    judge_cache(cache.root, kind="regex", where="split <> 'heldout'")
    before, num_heldout = latest(cache.root), sum(chain.split == "heldout" for chain in cache.chains)
    assert 0 < num_heldout < 24
    # References are numbers, which hold no unit test.
    report = judge_cache(cache.root, kind="code")
    found = report.by_judge["code"]
    assert (found.num_chains, found.num_undecided, found.num_kept) == (24, 24, 24 - num_heldout)
    (warning,) = report.warnings()
    assert "none of 24 chains has what judge code needs (unit tests as reference)" in warning
    assert "earlier verdicts are kept" in warning
    after = latest(cache.root)
    assert [(one, correct) for one, _, correct in after] == [(one, correct) for one, _, correct in before]
    assert [judge for _, judge, correct in after if correct is None] == ["code"] * num_heldout
    assert judge_cache(cache.root, kind="regex").by_judge["regex"].num_chains == num_heldout
    assert judge_cache(cache.root, kind="regex").warnings() == []


def test_the_same_judge_keeps_its_decision_too(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_cache(cache.root, kind="exact")
    before = latest(cache.root)
    monkeypatch.setattr(JudgeProcess, "judge", lambda *_: Verdict(None, None))
    assert judge_cache(cache.root, kind="exact", again=True).by_judge["exact"].num_kept == 24
    assert latest(cache.root) == before


def test_another_judges_verdict_is_replaced_on_request(cache: SyntheticCache) -> None:
    judge_cache(cache.root, kind="regex")
    first = latest(cache.root)
    judge_cache(cache.root, kind="exact")
    assert {judge for _, judge, _ in latest(cache.root)} == {"exact"}
    assert judge_cache(cache.root, kind="regex").by_judge["regex"].num_chains == 24
    assert latest(cache.root) == first
    assert judge_cache(cache.root, kind="regex").by_judge == {}


def test_own_judges_restore_what_an_undecided_verdict_hid(tmp_path: Path) -> None:
    root = tmp_path / "c"
    named = [replace(one, prompt=replace(one.prompt, metadata={"judge": "exact"})) for one in make_requests(6)]
    run_build(make_config(root), named)
    judge_cache(root)
    before = latest(root)
    assert all(correct is not None for _, _, correct in before)
    hidden = [JudgedSample(sample_id, "code", Verdict(None, None)) for sample_id, _, _ in before]
    commit_verdicts(Catalog(root).verdicts, hidden, "judge", "j0")
    assert judge_cache(root).by_judge["exact"].num_chains == 6
    assert latest(root) == before
    judge_cache(root, kind="regex")
    assert judge_cache(root).by_judge == {}, "what was asked for by name stays"


def test_chains_that_name_no_judge_are_counted(cache: SyntheticCache) -> None:
    report = judge_cache(cache.root)
    assert (report.by_judge, report.num_without_judge) == ({}, 24)
    with pytest.raises(ConfigError, match="judge 'maths' is unknown"):
        judge_cache(cache.root, kind="maths")


def test_what_was_judged_before_an_interruption_is_kept(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = teacher_cache.judging.chains._judged

    def interrupted(*args: Any) -> Iterator[tuple[JudgedSample, bool]]:
        for number, sample in enumerate(judged(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(teacher_cache.judging.chains, "_judged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge_cache(cache.root, kind="exact")
    assert len(verdicts(cache.root)) == 5
    monkeypatch.undo()
    assert judge_cache(cache.root, kind="exact").by_judge["exact"].num_chains == 19


def test_ctrl_c_does_not_wait_for_a_check(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(JudgeProcess):
        """Meets Ctrl-C in the middle of a check that takes until it is killed."""

        was_killed = threading.Event()
        ended: ClassVar[list[bool]] = []

        def judge(self, *_: object) -> Verdict:
            # By then the main thread waits.
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
            self.ended.append(self.was_killed.wait(5.0))
            return Verdict(None, None)

        def kill(self) -> None:
            self.was_killed.set()

    monkeypatch.setattr(teacher_cache.judging.queue, "JudgeProcess", Hanging)
    with pytest.raises(KeyboardInterrupt):
        judge_cache(cache.root, kind="exact")
    assert Hanging.ended == [True]
    assert verdicts(cache.root) == {}


def test_the_latest_verdict_counts(cache: SyntheticCache) -> None:
    table = Catalog(cache.root).verdicts
    sample_id = cache.chains[0].sample_id
    for correct in (False, True):
        commit_verdicts(table, [JudgedSample(sample_id, "exact", Verdict(correct, float(correct)))], "run", "w0")
    assert verdicts(cache.root) == {(sample_id, "exact"): True}
    assert [file.path.split("-")[1] for file in Catalog(cache.root).verdicts.files()] == ["000000", "000001"]
    commit_verdicts(table, [], "run", "w0")
    assert not list(table.folder.rglob("*.tmp"))


def test_two_judges_commit_at_once(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Catalog(cache.root).verdicts, Catalog(cache.root).verdicts
    sample_ids = [chain.sample_id for chain in cache.chains[:2]]
    refresh, commit = one.refresh, one.commit
    attempts = 0

    def commit_late(*args: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            commit_verdicts(other, [JudgedSample(sample_ids[1], "exact", Verdict(False, 0.0))], "judge", "j0")
        commit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(one, "commit", commit_late)
    commit_verdicts(one, [JudgedSample(sample_ids[0], "exact", Verdict(True, 1.0))], "judge", "j0")
    assert attempts == 2
    assert verdicts(cache.root) == {(sample_ids[0], "exact"): True, (sample_ids[1], "exact"): False}
    refresh()

    def conflict(*args: object) -> None:
        raise CacheConflict("always")

    monkeypatch.setattr(one, "commit", conflict)
    monkeypatch.setattr(teacher_cache.writer.commit, "MAX_ATTEMPTS", 3)
    with pytest.raises(CacheConflict, match="try again"):
        commit_verdicts(one, [JudgedSample(sample_ids[0], "exact", Verdict(True, 1.0))], "judge", "j0")


def test_the_latest_verdict_counts_though_the_clock_was_set_back(cache: SyntheticCache) -> None:
    future = datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC)
    sample_id = cache.chains[0].sample_id
    old = [JudgedSample(sample_id, "regex", Verdict(None, None))]
    commit_verdicts(Catalog(cache.root).verdicts, old, "run", "w0", after=future)
    assert judge_cache(cache.root, kind="regex", again=True).by_judge["regex"].num_chains == 24
    expected = "42" in cache.chains[0].text[len(cache.chains[0].text) // 2 :]
    assert verdicts(cache.root)[sample_id, "regex"] is expected


def test_gc_keeps_the_files_of_a_running_judge(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, kept = Table.commit, list[str]()

    def swept_first(table: Table, *arguments: Any) -> None:
        monkeypatch.undo()
        kept.extend(item.why for item in gc_cache(cache.root, dry_run=False, grace_s=0.0).kept)
        commit(table, *arguments)

    monkeypatch.setattr(Table, "commit", swept_first)
    with worker_lock(lock_path(cache.root, "judge", "j0"), 0.0):
        assert judge_cache(cache.root, kind="exact").by_judge["exact"].num_chains == 24
    assert kept == ["its worker is running"]
    assert len(verdicts(cache.root)) == 24
    (file,) = cache.root.glob("verdicts/judge/*.parquet")
    assert file.name.startswith("j1-"), "two judges at once have two names"


def test_a_cache_that_takes_no_verdicts_is_one_line(cache: SyntheticCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(teacher_cache.writer.verdicts, "worker_lock", refused)
    with pytest.raises(StillroomError, match=r"cannot be written: .*Permission denied: fix that and judge again"):
        judge_cache(cache.root, kind="exact")
    assert judge_cache(cache.root).num_without_judge == 24


def test_verdict_files_without_rules_are_read_beside_new_ones(cache: SyntheticCache) -> None:
    """Earlier versions wrote neither `rule` nor `compared`."""
    earlier = pa.schema([field for field in VERDICT_SCHEMA if field.name not in ("rule", "compared")])
    root, (first, second) = cache.root, [chain.sample_id for chain in cache.chains[:2]]
    shutil.rmtree(root / "verdicts")
    table = Table.create(root / "verdicts", earlier)
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    row = {"sample_id": first, "judge": "exact", "correct": True, "score": 1.0, "judged_at": day}
    temp = verdict_temp(table, "w0")
    pq.write_table(pa.Table.from_pylist([row], schema=earlier), temp)
    commit_verdict_file(table, temp, 1, "judge", "w0")
    query = "SELECT sample_id, correct, rule, compared FROM chains WHERE judge IS NOT NULL ORDER BY rule NULLS FIRST"
    with open_session(Catalog(root)) as session:
        assert session.arrow(query).to_pylist() == [
            {"sample_id": first, "correct": True, "rule": None, "compared": None}
        ]
    verdict = Verdict(False, 0.0, "box, value", "4 | 5")
    commit_verdicts(Catalog(root).verdicts, [JudgedSample(second, "math", verdict)], "judge", "w1")
    with open_session(Catalog(root)) as session:
        assert session.arrow(query).to_pylist()[1] == {
            "sample_id": second,
            "correct": False,
            "rule": "box, value",
            "compared": "4 | 5",
        }
    assert verify_cache(root).ok
