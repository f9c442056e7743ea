"""Every sample once: resumption, failures, signals, kills, two workers at once."""

import dataclasses
import errno
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog, check_hash
from stillroom.cache.reader import open_cache
from stillroom.errors import CacheConflict, DataError, StillroomError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema.records import Capture
from stillroom.storage.paths import relative_name
from teacher_cache.building.build import Build
from teacher_cache.engine.api import Finished, Outcome, Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.judging.chains import judge_cache
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.writer.commit import read_sample_ids
from teacher_cache.writer.recorder import MetricsLog, Recorder
from tests.helpers.caches import on_disk, visible_ids
from tests.helpers.fake_builds import (
    EOS_ID,
    killed_before_commit,
    make_config,
    make_engine,
    make_requests,
    make_teacher,
    run_build,
)
from tests.helpers.programs import Program


def test_a_build_writes_every_request_once_and_a_second_one_starts_no_engine(tmp_path: Path) -> None:
    requests = make_requests(60)
    result = run_build(make_config(tmp_path / "c"), requests)
    assert visible_ids(tmp_path / "c") == sorted(request.sample_id for request in requests)
    assert result.recorded.num_chains == result.recorded.num_committed == 60
    assert result.recorded.num_shards > 1, "the size limit closes shards"
    again = run_build(make_config(tmp_path / "c"), requests, lambda: pytest.fail("nothing is left to generate"))
    assert again.num_done_before == 60
    more = run_build(make_config(tmp_path / "c"), make_requests(70))
    assert more.recorded.num_chains == 10


def test_rows_are_what_the_engine_gave(tmp_path: Path) -> None:
    requests = make_requests(20)
    run_build(
        make_config(tmp_path / "c", capture={"max_support": 8, "codec": "topk-f32", "nucleus": None, "draws": 0}),
        requests,
    )
    engine, captures = make_engine(), {}
    for request in requests:
        engine.submit(request)
    while engine.num_unfinished:
        for outcome in engine.step():
            assert isinstance(outcome, Finished)
            captures[outcome.request.sample_id] = outcome.capture
    catalog = Catalog(tmp_path / "c")
    rows = [row for file in catalog.chains.files() for row in pq.read_table(catalog.chains.path_of(file)).to_pylist()]
    assert len(rows) == 20
    for row in rows:
        _assert_same(row, captures[row["sample_id"]])
        assert row["finish_reason"] == ("stop" if row["token_ids"][-1] == EOS_ID else "length")
        assert row["num_tokens"] == len(row["token_ids"]) == len(row["topk_n"])
        assert json.loads(row["metadata"])["number"] == int(row["messages"][0]["content"].split()[1])
    manifest = catalog.runs()[rows[0]["run_id"]]
    assert manifest.kind == "generate"
    assert catalog.vocab_path(manifest.teacher.tokenizer_fingerprint).exists()


def test_a_chain_that_ended_by_repetition_counts_as_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeEngine._outcome

    def looping(engine: FakeEngine, request: Request) -> Outcome:
        outcome = made(engine, request)
        assert isinstance(outcome, Finished)
        return dataclasses.replace(outcome, finish_reason="repetition")

    monkeypatch.setattr(FakeEngine, "_outcome", looping)
    run_build(make_config(tmp_path / "c"), make_requests(3))
    with open_cache(tmp_path / "c") as cache:
        found = cache.sql("SELECT sample_id, finish_reason, truncated FROM chains").arrow().to_pylist()
        assert [(row["finish_reason"], row["truncated"]) for row in found] == [("repetition", True)] * 3
        assert cache.sample(found[0]["sample_id"]).chain["truncated"] is True


def _assert_same(row: dict[str, list[float]], capture: Capture) -> None:
    assert row["token_ids"] == capture.token_ids_T.tolist()
    assert row["sampled_rank"] == capture.sampled_rank_T.tolist()
    assert row["sampled_logprob"] == capture.sampled_logprob_T.tolist()
    assert row["topk_ids"] == capture.topk_ids_TK.ravel().tolist()
    assert row["topk_logprobs"] == capture.topk_logprobs_TK.ravel().tolist()


def test_one_bad_prompt_is_one_failure_and_is_retried_only_when_asked(tmp_path: Path) -> None:
    config, requests = make_config(tmp_path / "c"), make_requests(30)
    bad = {requests[7].sample_id, requests[8].sample_id}
    refusing = lambda: make_engine(refuse=lambda request: "no" if request.sample_id in bad else None)  # noqa: E731
    result = run_build(config, requests, refusing)
    assert (result.recorded.num_chains, result.recorded.num_failures) == (28, 2)
    assert set(visible_ids(tmp_path / "c", "failures")) == bad
    assert run_build(config, requests).num_done_before == 30
    retried = run_build(config, requests, retry_failures=True)
    assert retried.recorded.num_chains == 2
    assert len(visible_ids(tmp_path / "c")) == 30


def test_failures_in_a_row_stop_the_build_and_keep_what_was_finished(tmp_path: Path) -> None:
    config, requests = make_config(tmp_path / "c", failures={"max_consecutive": 5}), make_requests(300)
    good = {request.sample_id for request in requests[:10]}
    refusing = lambda: make_engine(refuse=lambda request: None if request.sample_id in good else "broken")  # noqa: E731
    with pytest.raises(StillroomError, match=r"prompts in a row failed, the last with: broken"):
        run_build(config, requests, refusing)
    assert set(visible_ids(tmp_path / "c")) == good
    assert 5 <= len(visible_ids(tmp_path / "c", "failures")) < 20


class DyingEngine(FakeEngine):
    """Dies at its third step."""

    steps = 0

    def step(self) -> list[Outcome]:
        self.steps += 1
        if self.steps == 3:
            raise StillroomError("the engine died")
        return super().step()


def test_a_dead_engine_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    requests = make_requests(50)
    with pytest.raises(StillroomError, match="the engine died"):
        run_build(make_config(tmp_path / "c"), requests, lambda: DyingEngine(400, 8, mean_tokens=40))
    assert len(visible_ids(tmp_path / "c")) == 16


def test_a_writer_that_fails_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("teacher_cache.writer.commit.publish", full)
    with pytest.raises(StillroomError, match=r"cannot be written: .*No space left on device"):
        run_build(make_config(tmp_path / "c"), make_requests(200))
    monkeypatch.undo()
    assert not list((tmp_path / "c").rglob("*.tmp"))
    assert run_build(make_config(tmp_path / "c"), make_requests(200)).recorded.num_chains == 200


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be opened for writing"):
        run_build(make_config(tmp_path / "file" / "c"), make_requests(1))


def test_a_second_process_as_the_same_worker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.writer.commit.OWN_LOCK_WAIT_S", 0.0)
    build = Build(make_config(tmp_path / "c"), make_teacher(), "w0")
    with pytest.raises(CacheConflict, match="another process builds as this worker"):
        Build(make_config(tmp_path / "c"), make_teacher(), "w0")
    build.close()
    Build(make_config(tmp_path / "c"), make_teacher(), "w0").close()


def test_the_same_request_twice_is_one_row(tmp_path: Path) -> None:
    requests = make_requests(5)
    run_build(make_config(tmp_path / "c"), [*requests, *requests])
    assert len(visible_ids(tmp_path / "c")) == 5


def test_the_last_line_of_progress_counts_every_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Recorder._record

    def record_slowly(recorder: Recorder, outcome: Finished) -> None:
        time.sleep(0.02)
        record(recorder, outcome)

    monkeypatch.setattr(Recorder, "_record", record_slowly)
    run_build(make_config(tmp_path / "c"), make_requests(10))
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("build")]
    assert shown[-1].startswith("build  10/10 chains  100%"), shown


def test_a_clock_set_back_delays_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    config = make_config(tmp_path / "c", shard={"max_minutes": 0.001, "row_group_tokens": 100})
    result = run_build(config, make_requests(40), lambda: make_engine(step_s=0.1))
    assert result.recorded.num_shards > 1
    assert len(visible_ids(tmp_path / "c")) == 40


def worker(cache: Path, share: str, num_prompts: int, step_s: float) -> Program:
    return Program(["tests.helpers.fake_builds", str(cache), share, str(num_prompts), str(step_s)])


@pytest.fixture
def processes() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for process in started:
        process.kill()


def _wait_for_shards(cache: Path, at_least: int) -> None:
    for _ in range(1200):
        if len(list((cache / "chains").glob("*/*.parquet"))) >= at_least:
            return
        time.sleep(0.05)
    raise AssertionError(f"{cache} has no {at_least} shards after a minute")


def test_sigterm_makes_visible_what_is_finished(tmp_path: Path, processes: list[Program]) -> None:
    process = worker(tmp_path / "c", "0/1", 4000, 0.05)
    processes.append(process)
    _wait_for_shards(tmp_path / "c", 2)
    process.send_signal(signal.SIGTERM)
    process.wait(expect=130)
    catalog = Catalog(tmp_path / "c")
    there = {relative_name(path, catalog.chains.folder) for path in catalog.chains.folder.glob("*/*.parquet")}
    assert there == {file.path for file in catalog.chains.files()}
    assert not list(catalog.chains.folder.rglob("*.tmp"))
    assert 0 < len(visible_ids(tmp_path / "c")) < 4000


def test_two_workers_at_once_with_overlapping_shares_repeat_nothing(tmp_path: Path, processes: list[Program]) -> None:
    """Rows that both make are dropped by whoever commits later. Kills at random moments are test_crash's business."""
    cache, num_prompts = tmp_path / "c", 200
    processes.extend(worker(cache, share, num_prompts, 0.02) for share in ("0/2", "0/1"))
    for process in processes:
        process.wait(expect=0)
    assert visible_ids(cache) == sorted(request.sample_id for request in make_requests(num_prompts))
    catalog = Catalog(cache)
    for file in catalog.chains.files():
        check_hash(catalog.chains.path_of(file))


def test_the_number_of_workers_may_change_between_runs_and_during_one(tmp_path: Path, processes: list[Program]) -> None:
    """One of three is killed, one of two starts beside another of three; then four finish, and nobody is left over."""
    cache, num_prompts = tmp_path / "c", 240
    # Three seconds for its share: it is killed in the middle, however late this process notices two shards.
    first = worker(cache, "0/3", num_prompts, 0.3)
    processes.append(first)
    _wait_for_shards(cache, 2)
    first.kill()
    num_before = len(visible_ids(cache))
    assert 0 < num_before < num_prompts // 3
    processes.extend(worker(cache, share, num_prompts, 0.01) for share in ("1/3", "0/2"))
    for process in processes[1:]:
        process.wait(expect=0)
    requests = make_requests(num_prompts)
    config = make_config(cache, shard={"row_group_tokens": 200, "max_mb": 0.01})
    results = [run_build(config, requests[index::4], worker=f"w{index}of4") for index in range(4)]
    assert sum(result.num_total for result in results) == num_prompts
    assert visible_ids(cache) == sorted(request.sample_id for request in requests)
    assert verify_cache(cache).ok


def judged_requests(num_prompts: int) -> list[Request]:
    made = []
    for request in make_requests(num_prompts):
        prompt = dataclasses.replace(request.prompt, metadata={**request.prompt.metadata, "judge": "exact"})
        made.append(dataclasses.replace(request, prompt=prompt))
    return made


def test_resuming_with_entropies_of_another_kind_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def engine_of(sampler: str) -> FakeEngine:
        engine = make_engine()
        engine.info = dataclasses.replace(engine.info, settings={"sampler": sampler})
        return engine

    config = make_config(tmp_path / "c")
    run_build(config, make_requests(5), lambda: engine_of("plugin"))
    run_build(config, make_requests(10), lambda: engine_of("plugin"))
    assert "was started with" not in capsys.readouterr().err
    run_build(config, make_requests(15), lambda: engine_of("vllm"))
    told = "was started with exact entropies and continues with entropies of the stored support"
    assert told in capsys.readouterr().err


def test_a_judge_that_fails_costs_no_finished_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error ends the build, the chains and verdicts before it are visible."""
    judged: list[str] = []

    def judge(*_: object) -> Verdict:
        judged.append("")
        if len(judged) == 8:
            raise StillroomError("the judge does not start")
        return Verdict(True, 1.0)

    monkeypatch.setattr(JudgeProcess, "judge", judge)
    with pytest.raises(StillroomError, match="the judge does not start"):
        run_build(make_config(tmp_path / "c"), judged_requests(40))
    assert 8 <= len(visible_ids(tmp_path / "c")) <= 40
    assert sum(file.num_rows for file in Catalog(tmp_path / "c").verdicts.files()) >= 7


def test_every_judged_chain_has_its_verdict_at_the_end(tmp_path: Path) -> None:
    result = run_build(make_config(tmp_path / "c"), judged_requests(40))
    assert result.recorded.num_unjudged == 0
    table = Catalog(tmp_path / "c").verdicts
    assert sorted(one for file in table.files() for one in read_sample_ids(table.path_of(file))) == sorted(
        visible_ids(tmp_path / "c")
    )


def test_adopted_chains_get_the_verdicts_that_died_with_their_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, requests = make_config(tmp_path / "c"), judged_requests(20)
    with killed_before_commit(monkeypatch):
        run_build(config, requests)
    assert run_build(config, requests).num_adopted > 0
    table = Catalog(tmp_path / "c").verdicts
    assert {one for file in table.files() for one in read_sample_ids(table.path_of(file))} == set(
        visible_ids(tmp_path / "c")
    )


def test_no_verdict_on_a_chain_that_another_worker_had_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The visible chain is the other's, and its answer may differ from the one that was judged here."""
    monkeypatch.setattr(JudgeProcess, "judge", lambda *_: Verdict(True, 1.0))
    config, requests = make_config(tmp_path / "c"), judged_requests(20)

    def overtaken() -> FakeEngine:
        run_build(config, requests[:15], worker="w1")
        return make_engine()

    run_build(config, requests, overtaken)
    judged = Counter[str]()
    for file in Catalog(tmp_path / "c").verdicts.files():
        judged[file.path.rpartition("/")[2][:2]] += file.num_rows
    assert judged == {"w1": 15, "w0": 5}


def test_a_judge_that_hangs_holds_no_chain_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All chains are visible while the first check is still running; who interrupts then waits for no check."""
    started, cache = threading.Event(), tmp_path / "c"

    def hang(judge: JudgeProcess, *_: object) -> Verdict:
        started.set()
        killed.wait(60)
        return Verdict(None, None)

    killed = threading.Event()
    monkeypatch.setattr(JudgeProcess, "judge", hang)
    monkeypatch.setattr(JudgeProcess, "kill", lambda _: killed.set())
    monkeypatch.setattr("teacher_cache.writer.recorder.WAKE_S", 0.05)

    class InterruptedEngine(FakeEngine):
        """Answers everything, waits until all is visible, and is then interrupted."""

        def step(self) -> list[Outcome]:
            if self._queue:
                return super().step()
            assert started.wait(60)
            for _ in range(1200):
                if len(visible_ids(cache)) == 40:
                    break
                time.sleep(0.05)
            seen.append(len(visible_ids(cache)))
            os.kill(os.getpid(), signal.SIGTERM)
            return []

        @property
        def num_unfinished(self) -> int:
            return max(1 - len(seen), len(self._queue))

    seen: list[int] = []
    engine = InterruptedEngine(400, 8, mean_tokens=40)
    config = make_config(cache, shard={"row_group_tokens": 200, "max_mb": 50, "max_minutes": 0.001})
    result = run_build(config, judged_requests(40), lambda: engine)
    assert (seen, result.stopped, result.recorded.num_unjudged) == ([40], "interrupted", 40)
    monkeypatch.undo()
    assert judge_cache(cache).by_judge["exact"].num_chains == 40


def test_a_metrics_file_that_cannot_be_written_ends_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        name = "metrics.jsonl"

        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(log: MetricsLog, path: Path) -> None:
        start(log, path)
        log._stream.close()
        log._stream = Full()  # type: ignore[assignment]

    start = MetricsLog.__init__
    monkeypatch.setattr(MetricsLog, "__init__", opened)
    assert run_build(make_config(tmp_path / "c"), make_requests(20)).recorded.num_committed == 20


def test_a_finished_build_writes_a_lost_manifest_and_vocabulary_again(tmp_path: Path) -> None:
    cache, requests = tmp_path / "cache", make_requests(6)
    result = run_build(make_config(cache), requests)
    catalog = Catalog(cache)
    before = catalog.runs()[result.run_id]
    vocab = on_disk(catalog.vocab_paths()[0])
    vocab.unlink()
    (cache / "runs" / f"{result.run_id}.json").unlink()
    assert run_build(make_config(cache), requests).recorded.num_chains == 0
    assert vocab.exists()
    after = catalog.runs()[result.run_id]
    for key in ("teacher", "sampling", "capture", "reasoning", "prompts", "kind", "name"):
        assert getattr(after, key) == getattr(before, key), key
    assert verify_cache(cache).ok
