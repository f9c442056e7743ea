"""Caches into one: every visible row once, bytes checked, what may not be mixed refused, kills harmless."""

import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard
from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema import FORMAT_VERSION
from stillroom.sql.session import open_session
from teacher_cache.cli import app
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.judging.chains import judge_cache
from teacher_cache.maintenance.copy import copy_caches
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.verify import verify_cache
from tests.helpers.caches import damage, make_cache, visible_ids
from tests.helpers.fake_builds import (
    VOCAB_SIZE,
    K,
    killed_before_commit,
    make_config,
    make_engine,
    make_requests,
    run_build,
)
from tests.helpers.programs import Program


def codecs(root: Path) -> set[str]:
    table = Catalog(root).chains
    return {open_shard(table.path_of(file))[1].codec for file in table.files()}


def chains(root: Path) -> list[dict[str, object]]:
    with open_session(Catalog(root)) as session:
        rows: list[dict[str, object]] = session.arrow("SELECT * FROM chains ORDER BY sample_id").to_pylist()
    return rows


def test_a_copy_shows_the_same(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "a", num_chains=40, num_runs=2, num_workers=2).root
    report = copy_caches([source], tmp_path / "b")
    assert (report.num_chains, report.num_known, report.num_shards) == (40, 0, len(Catalog(source).chains.files()))
    assert report.num_verdicts > 0
    assert chains(tmp_path / "b") == chains(source)
    checked = verify_cache(tmp_path / "b")
    assert checked.ok
    assert (checked.orphans, Catalog(tmp_path / "b").runs()) == ([], Catalog(source).runs())
    again = copy_caches([source], tmp_path / "b")
    assert (again.num_chains, again.num_known, again.num_verdicts, again.size_bytes) == (0, 40, 0, 0)


def test_overlapping_caches_merge_and_a_build_resumes_in_the_result(tmp_path: Path) -> None:
    requests = make_requests(90)
    run_build(make_config(tmp_path / "a"), requests[:50])
    bad = {requests[70].sample_id}
    refusing = lambda: make_engine(refuse=lambda one: "no" if one.sample_id in bad else None)  # noqa: E731
    run_build(make_config(tmp_path / "b"), requests[30:80], refusing)
    report = copy_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (report.num_chains, report.num_known, report.num_failures) == (79, 20, 1)
    assert visible_ids(tmp_path / "c") == sorted(one.sample_id for one in requests[:80] if one.sample_id not in bad)
    assert verify_cache(tmp_path / "c").ok
    result = run_build(make_config(tmp_path / "c"), requests)
    assert (result.num_adopted, result.recorded.num_chains) == (0, 10)
    assert copy_caches([tmp_path / "a"], tmp_path / "c").num_known == 50


def test_verdicts_on_other_tokens_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sample that both have, the destination keeps its own chain, whose answer may be another one."""
    monkeypatch.setattr(JudgeProcess, "prepare", lambda *_: None)
    monkeypatch.setattr(JudgeProcess, "judge", lambda *_: Verdict(True, 1.0))
    requests = make_requests(20)
    run_build(make_config(tmp_path / "a"), requests[:12])
    run_build(make_config(tmp_path / "b"), requests[8:], lambda: FakeEngine(VOCAB_SIZE, K, mean_tokens=20))
    sources = [tmp_path / "a", tmp_path / "b"]
    for source in sources:
        judge_cache(source, kind="exact")
    report = copy_caches(sources, tmp_path / "c")
    assert (report.num_chains, report.num_verdicts) == (20, 20)
    assert copy_caches(sources, tmp_path / "c").num_verdicts == 0
    assert verify_cache(tmp_path / "c").ok


def test_only_what_the_source_shows_is_copied(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "a", num_chains=48, num_runs=2).root
    name = next(iter(Catalog(source).runs().values())).name
    gc_cache(source, dry_run=False, grace_s=0.0, drop_runs=[name])
    copy_caches([source], tmp_path / "b")
    assert visible_ids(tmp_path / "b") == visible_ids(source)
    assert len(list((tmp_path / "b" / "chains").glob("*/*.parquet"))) == len(Catalog(source).chains.files())


def test_a_damaged_source_is_named_and_nothing_of_it_is_visible(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "a", num_chains=30).root
    table = Catalog(source).chains
    bad = table.path_of(table.files()[1])
    damage(bad)
    for _ in range(2):
        with pytest.raises(CorruptError, match=bad.name):
            copy_caches([source], tmp_path / "b")
    assert len(visible_ids(tmp_path / "b")) == table.files()[0].num_rows
    assert verify_cache(tmp_path / "b").ok
    assert not list((tmp_path / "b").rglob("*.tmp"))
    sorted((source / "chains" / "_delta_log").glob("*.json"))[-1].unlink()
    with pytest.raises(CorruptError, match="a copy would lack chains"):
        copy_caches([source], tmp_path / "b")


def test_a_file_is_refused_as_destination(tmp_path: Path) -> None:
    make_cache(tmp_path / "a", 3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is a file"):
        copy_caches([tmp_path / "a"], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_may_not_be_mixed_is_refused(tmp_path: Path) -> None:
    one, other = (make_cache(tmp_path / name, num_chains=8).root for name in "ab")
    manifest = next((other / "runs").glob("*.json"))
    manifest.write_text(manifest.read_text().replace('"temperature":', '"temperature": 0.9, "warmth":'))
    with pytest.raises(ConfigError, match="differ in sampling"):
        copy_caches([one, other], tmp_path / "c")
    version = f'"format_version": {FORMAT_VERSION}'
    manifest.write_text(manifest.read_text().replace(version, '"format_version": 99'))
    with pytest.raises(DataError, match="upgrade it"):
        copy_caches([other], tmp_path / "c")
    manifest.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        copy_caches([other], tmp_path / "c")
    for dest in (one, one / "inner", tmp_path):
        with pytest.raises(ConfigError, match="contain each other"):
            copy_caches([one], dest)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"holds other files \(thesis.tex\)"):
        copy_caches([one], tmp_path / "full")


def test_copying_resumes_after_a_crash_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_cache(tmp_path / "a", num_chains=30).root
    with killed_before_commit(monkeypatch):
        copy_caches([source], tmp_path / "b")
    assert copy_caches([source], tmp_path / "b").num_verdicts > 0
    assert chains(tmp_path / "b") == chains(source)


def test_killed_copies_resume(tmp_path: Path) -> None:
    """SIGKILL at five moments, SIGINT at one; then the same command ends with everything once."""
    source = make_cache(tmp_path / "a", num_chains=80, rows_per_group=2, groups_per_shard=1).root
    command = ["teacher-cache", "copy", str(source), str(tmp_path / "b")]
    for number, how in enumerate([signal.SIGKILL] * 5 + [signal.SIGINT]):
        process = Program(command)
        wanted = 4 * number + 2
        while process.poll() is None and len(list((tmp_path / "b" / "chains").glob("*/*.parquet"))) < wanted:
            time.sleep(0.01)
        process.send_signal(how)
        code, _, errors = process.communicate()
        assert code == (130 if how == signal.SIGINT else -how)
    assert "Resume with: teacher-cache copy" in errors
    ended = CliRunner().invoke(app, command[1:])
    assert ended.exit_code == 0
    assert chains(tmp_path / "b") == chains(source)
    checked = verify_cache(tmp_path / "b")
    assert (checked.problems, checked.orphans) == ([], [])


def test_exact_distributions_are_rounded_on_the_way(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "f32", 12, "topk-f32", draws=2, temperatures=(2.0,)).root
    answered = CliRunner().invoke(app, ["copy", str(source), str(tmp_path / "u8"), "--round"], catch_exceptions=False)
    assert answered.exit_code == 0, answered.output
    assert verify_cache(tmp_path / "u8").problems == []
    assert codecs(tmp_path / "u8") == {"topk-u8"}
    ids = "SELECT sample_id, position, rank, token_id, drawn FROM topk ORDER BY ALL"
    with open_session(Catalog(source)) as exact, open_session(Catalog(tmp_path / "u8")) as rounded:
        assert rounded.arrow(ids).equals(exact.arrow(ids))
        assert chains(tmp_path / "u8") == chains(source)
