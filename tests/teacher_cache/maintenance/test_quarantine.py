"""A damaged shard leaves the table with a note, its sound rows stay, the next build makes the others again."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from stillroom.cache.catalog import Catalog, Table
from stillroom.errors import CacheConflict
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import SHARD_METADATA_KEY
from teacher_cache.building.build import Build
from teacher_cache.cli import app
from teacher_cache.judging.chains import judge_cache
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.quarantine import quarantine_damaged
from teacher_cache.maintenance.replacing import REPAIR_WORKER
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.writer.commit import read_sample_ids
from tests.helpers.caches import damage, on_disk, visible_ids
from tests.helpers.fake_builds import (
    killed_before_commit,
    make_config,
    make_engine,
    make_requests,
    make_teacher,
    run_build,
)
from tests.teacher_cache.maintenance.test_verify import register

NUM_ROWS = 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run_build(make_config(tmp_path / "c"), make_requests(NUM_ROWS))
    return tmp_path / "c"


def largest(root: Path) -> Path:
    """A shard of several row groups."""
    table = Catalog(root).chains
    path = max((table.path_of(file) for file in table.files()), key=lambda one: one.stat().st_size)
    assert pq.ParquetFile(path).num_row_groups > 2
    return on_disk(path)


def damage_group(path: Path, index: int, column_path: str = "topk_codes.list.element") -> list[str]:
    """Flips a byte in the middle of one row group's column; the ids of its rows."""
    file = pq.ParquetFile(path)
    group = file.metadata.row_group(index)
    ids: list[str] = file.read_row_group(index, columns=["sample_id"]).column(0).to_pylist()
    names = [group.column(place).path_in_schema for place in range(group.num_columns)]
    column = group.column(names.index(column_path))
    size = path.stat().st_size
    damage(path, (column.data_page_offset + column.total_compressed_size // 2) / size)
    return ids


def run(root: Path, *options: str) -> tuple[int, dict[str, object]]:
    ended = CliRunner().invoke(app, ["verify", str(root), "--json", *options])
    return ended.exit_code, json.loads(ended.stdout)


def test_one_bad_row_group_costs_its_rows_alone(root: Path) -> None:
    path = largest(root)
    pinned = Catalog(root).chains.version
    lost = damage_group(path, 1)
    assert run(root)[0] == 3
    code, result = run(root, "--quarantine")
    assert (code, result["ok"], result["problems"]) == (0, True, [])
    assert result["quarantined"][0]["file"] == f"chains/{path.relative_to(root / 'chains')}"  # type: ignore[index]
    assert visible_ids(root) == sorted({one.sample_id for one in make_requests(NUM_ROWS)} - set(lost))
    assert verify_cache(root).ok
    assert path.exists()
    assert path in {Catalog(root, pinned).chains.path_of(file) for file in Catalog(root, pinned).chains.files()}
    note = json.loads((root / "quarantine" / "chains" / path.parent.name / f"{path.name}.json").read_text())
    assert "row group 1" in " ".join(note["problems"])
    assert (note["num_rows"] - note["num_kept"], note["last_version"]) == (len(lost), pinned)
    result2 = run_build(make_config(root), make_requests(NUM_ROWS))
    assert (result2.num_adopted, result2.recorded.num_chains) == (0, len(lost))
    assert visible_ids(root) == sorted(one.sample_id for one in make_requests(NUM_ROWS))
    report = gc_cache(root, dry_run=False, grace_s=0.0, delete_removed=True)
    assert not path.exists()
    assert report.unreadable["chains"][0][1] == pinned
    assert verify_cache(root).ok


def test_rows_that_are_kept_are_the_same_bytes(root: Path) -> None:
    path = largest(root)
    before = pq.read_table(path).to_pylist()
    lost = set(damage_group(path, 0))
    run(root, "--quarantine")
    (repaired,) = (root / "chains").glob(f"*/{REPAIR_WORKER}-*.parquet")
    assert pq.read_table(repaired).to_pylist() == [row for row in before if row["sample_id"] not in lost]


@pytest.mark.parametrize("how", ["footer", "cut", "gone"])
def test_a_shard_whose_footer_cannot_be_trusted_goes_whole(root: Path, how: str) -> None:
    path = largest(root)
    num_rows = pq.read_metadata(path).num_rows
    if how == "footer":
        # A byte of the header's JSON: everything still decodes, only the hash knows.
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"nucleus":0.999', b'"nucleus":0.998'))
        assert path.read_bytes() != content
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.unlink()
    code, result = run(root, "--quarantine")
    assert (code, result["ok"]) == (0, True)
    assert len(visible_ids(root)) == NUM_ROWS - num_rows
    assert run_build(make_config(root), make_requests(NUM_ROWS)).recorded.num_chains == num_rows
    assert verify_cache(root).ok


def test_of_a_shard_whose_header_is_not_its_runs_nothing_is_kept(root: Path) -> None:
    damage_group(largest(root), 1)
    manifest = next((root / "runs").glob("*.json"))
    manifest.write_text(manifest.read_text().replace('"nucleus": 0.999', '"nucleus": 0.99'))
    (taken,) = quarantine_damaged(Catalog(root), verify_cache(root))
    assert taken.num_kept == 0


def test_rows_that_are_visible_twice_stay_once(root: Path) -> None:
    path = largest(root)
    content = pq.read_table(path)
    register(Catalog(root).chains, content, "w9")
    assert len(visible_ids(root)) > NUM_ROWS
    run(root, "--quarantine")
    assert visible_ids(root) == sorted(one.sample_id for one in make_requests(NUM_ROWS))


def test_only_damage_is_quarantined(root: Path) -> None:
    """A shard of a newer program, and a run whose manifest is gone."""
    content = pq.read_table(largest(root))
    header = json.loads(content.schema.metadata[SHARD_METADATA_KEY]) | {"format_version": FORMAT_VERSION + 1}
    metadata = {SHARD_METADATA_KEY: json.dumps(header)}
    register(Catalog(root).chains, content.replace_schema_metadata(metadata), "w9")
    next(path for path in (root / "runs").glob("*.json")).unlink()
    num_before = len(Catalog(root).chains.files())
    code, result = run(root, "--quarantine")
    assert (code, result["ok"], result["quarantined"]) == (3, False, [])
    assert len(Catalog(root).chains.files()) == num_before


def test_damaged_verdicts_and_failures_are_quarantined(root: Path) -> None:
    requests = make_requests(NUM_ROWS + 5)
    bad = {one.sample_id for one in requests[NUM_ROWS:]}
    run_build(
        make_config(root), requests, lambda: make_engine(refuse=lambda one: "no" if one.sample_id in bad else None)
    )
    table = Catalog(root).failures
    damage(table.path_of(table.files()[0]))
    assert run(root, "--quarantine")[0] == 0
    assert Catalog(root).failures.files() == []
    assert run_build(make_config(root), requests).recorded.num_chains == 5


def test_verdicts_that_are_gone_are_called_verdicts(root: Path) -> None:
    judge_cache(root, kind="exact")
    table = Catalog(root).verdicts
    (file,) = table.files()
    damage(table.path_of(file))
    ended = CliRunner().invoke(app, ["verify", str(root), "--quarantine"])
    assert f"{NUM_ROWS} verdicts are gone: teacher-cache judge {root} restores them\n" in ended.stdout
    assert "chains are gone" not in ended.stdout
    assert judge_cache(root, kind="exact").by_judge["exact"].num_chains == NUM_ROWS


def test_verdicts_leave_with_their_chains(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next build may give these samples other answers, which nobody has judged."""
    monkeypatch.setattr(JudgeProcess, "prepare", lambda *_: None)
    monkeypatch.setattr(JudgeProcess, "judge", lambda *_: Verdict(True, 1.0))
    judge_cache(root, kind="exact")
    lost = damage_group(largest(root), 1)
    assert run(root, "--quarantine")[0] == 0
    table = Catalog(root).verdicts
    judged = [one for file in table.files() for one in read_sample_ids(table.path_of(file))]
    assert sorted(judged) == visible_ids(root)
    assert verify_cache(root).ok
    run_build(make_config(root), make_requests(NUM_ROWS))
    assert judge_cache(root, kind="exact").by_judge["exact"].num_chains == len(lost)


def test_a_crash_before_the_commit_leaves_the_table_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_group(largest(root), 1)
    with killed_before_commit(monkeypatch):
        quarantine_damaged(Catalog(root), verify_cache(root))
    assert len(Catalog(root).chains.files()) == len(list((root / "chains").glob("*/w0-*.parquet")))
    assert run(root, "--quarantine")[0] == 0
    run_build(make_config(root), make_requests(NUM_ROWS))
    assert visible_ids(root) == sorted(one.sample_id for one in make_requests(NUM_ROWS))
    assert verify_cache(root).ok


def test_a_build_that_starts_meanwhile_leaves_the_new_shard_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would see a published file of which every row is visible in the damaged shard, and remove it."""
    lost = damage_group(largest(root), 1)
    commit = Table.commit

    def build_first(self: Table, *arguments: Any) -> None:
        monkeypatch.setattr(Table, "commit", commit)
        Build(make_config(root), make_teacher(), "w1").close()
        commit(self, *arguments)

    monkeypatch.setattr(Table, "commit", build_first)
    (taken,) = quarantine_damaged(Catalog(root), verify_cache(root))
    assert taken.num_rows - taken.num_kept == len(lost)
    assert len(visible_ids(root)) == NUM_ROWS - len(lost)


def test_a_commit_whose_answer_was_lost_on_the_way_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that answers a repeated put with a refusal took the first one."""
    lost = damage_group(largest(root), 1)
    commit = Table.commit

    def unanswered(table: Table, *arguments: Any) -> None:
        monkeypatch.undo()
        commit(table, *arguments)
        raise CacheConflict("another commit came first")

    report = verify_cache(root)
    monkeypatch.setattr(Table, "commit", unanswered)
    (taken,) = quarantine_damaged(Catalog(root), report)
    assert taken.num_rows - taken.num_kept == len(lost)
    assert verify_cache(root).ok
    assert visible_ids(root) == sorted({one.sample_id for one in make_requests(NUM_ROWS)} - set(lost))
