"""The registry: visible means complete, once, and as it was written."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog, DataFile, Table, check_hash, publish
from stillroom.cache.delta_log import read_markers
from stillroom.errors import CacheConflict, CorruptError, DataError
from stillroom.schema.tables import FAILURE_SCHEMA
from tests.helpers.caches import on_disk


def written(table: Table, stem: str, num_rows: int = 0) -> DataFile:
    """A published file of the failures table, not committed."""
    temp = on_disk(table.folder / f"{stem.replace('/', '-')}.tmp")
    row: dict[str, object] = {**dict.fromkeys(FAILURE_SCHEMA.names, "x"), "sample_index": 0, "failed_at": 0}
    rows = [row] * num_rows
    pq.write_table(pa.Table.from_pylist(rows, schema=FAILURE_SCHEMA), temp)
    return publish(temp, table.folder, stem, num_rows)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.create(tmp_path / "cache")


def test_a_new_cache_is_empty_and_opens_again(catalog: Catalog) -> None:
    again = Catalog.create(catalog.root)
    assert again.chains.files() == []
    assert again.chains.version == 0
    assert again.runs() == {}


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a cache"):
        Catalog(tmp_path)


def test_published_files_are_visible_only_after_the_commit(catalog: Catalog) -> None:
    file = written(catalog.failures, "run/w0-000000", 3)
    assert Catalog(catalog.root).failures.files() == []
    catalog.failures.commit([file], "app/w0", 0)
    (seen,) = Catalog(catalog.root).failures.files()
    assert seen == file
    assert seen.num_rows == 3
    assert Catalog(catalog.root).failures.last_sequence("app/w0") == 0


def test_a_commit_marker_names_the_version_of_its_commit(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though others have committed by the time it is written."""
    other, refresh = Catalog(catalog.root).failures, Table.refresh

    def refresh_late(table: Table) -> None:
        monkeypatch.undo()
        refresh(other)
        other.commit([written(other, "run/w1-000000")], "app/w1", 0)
        refresh(table)

    monkeypatch.setattr(Table, "refresh", refresh_late)
    catalog.failures.commit([written(catalog.failures, "run/w0-000000")], "app/w0", 0)
    versions = {one.application: one.version for one in read_markers(catalog.failures.folder)}
    assert (versions, catalog.failures.version) == ({"app/w0": 1, "app/w1": 2}, 2)


def test_of_two_writers_on_one_version_the_second_must_look_again(catalog: Catalog) -> None:
    other = Catalog(catalog.root)
    catalog.failures.commit([written(catalog.failures, "run/w0-000000")], "app/w0", 0)
    late = written(other.failures, "run/w1-000000")
    with pytest.raises(CacheConflict, match="came first"):
        other.failures.commit([late], "app/w1", 0)
    other.failures.refresh()
    other.failures.commit([late], "app/w1", 0)
    assert len(Catalog(catalog.root).failures.files()) == 2


def test_a_replayed_transaction_is_refused_also_by_a_fresh_handle(catalog: Catalog) -> None:
    file = written(catalog.failures, "run/w0-000000")
    catalog.failures.commit([file], "app/w0", 0)
    with pytest.raises(CacheConflict, match="already committed"):
        Catalog(catalog.root).failures.commit([file], "app/w0", 0)
    assert len(Catalog(catalog.root).failures.files()) == 1


def test_a_file_that_is_missing_or_short_is_not_committed(catalog: Catalog) -> None:
    file = written(catalog.failures, "run/w0-000000")
    path = catalog.failures.path_of(file)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="bytes"):
        catalog.failures.commit([file], "app/w0", 0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        catalog.failures.commit([file], "app/w0", 0)
    assert Catalog(catalog.root).failures.files() == []


def test_names_carry_the_hash_of_the_bytes(catalog: Catalog) -> None:
    path = on_disk(catalog.failures.path_of(written(catalog.failures, "run/w0-000000")))
    check_hash(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="SHA-256"):
        check_hash(path)
    with pytest.raises(CorruptError, match="not named"):
        check_hash(path.rename(path.with_name("other.parquet")))


def test_pinned_versions_stay_while_the_cache_grows(catalog: Catalog) -> None:
    for sequence in range(3):
        catalog.failures.commit([written(catalog.failures, f"run/w0-{sequence:06}")], "app/w0", sequence)
    pinned = Table(catalog.failures.folder, version=1)
    assert len(pinned.files()) == 1
    with pytest.raises(DataError, match="has no version 9: the latest is 3"):
        Table(catalog.failures.folder, version=9)


def test_logs_are_never_cleaned_by_age(catalog: Catalog) -> None:
    for name in ("chains", "verdicts", "failures"):
        log = (catalog.root / name / "_delta_log" / f"{0:020}.json").read_text()
        assert '"delta.enableExpiredLogCleanup":"false"' in log


def test_a_log_that_lost_an_entry_is_named(catalog: Catalog) -> None:
    for sequence in range(3):
        catalog.failures.commit([written(catalog.failures, f"run/w0-{sequence:06}")], "app/w0", sequence)
    (catalog.failures.folder / "_delta_log" / f"{2:020}.json").unlink()
    with pytest.raises((CorruptError, DataError), match="failures"):
        Catalog(catalog.root)


def test_a_manifest_that_cannot_be_read_is_named(catalog: Catalog) -> None:
    (catalog.root / "runs").mkdir()
    on_disk(catalog.root / "runs" / "broken.json").write_text("{")
    with pytest.raises(CorruptError, match=r"broken\.json is not a run manifest"):
        catalog.runs()
