"""Caches that hold shards of format version 1 beside newer ones: SQL, selections, rows and copies read them alike."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog, publish
from stillroom.cache.reader import open_cache
from stillroom.cache.shards import open_shard
from stillroom.schema.manifest import SHARD_METADATA_KEY
from stillroom.storage.paths import Location
from student_train.data.freezing import CacheSource, SelectionRequest, open_selection
from student_train.data.rows import read_rows
from teacher_cache.maintenance.copy import copy_caches
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.writer.commit import remove_files
from tests.helpers.caches import CacheShape, make_cache, on_disk, write_cache

CODES = "SELECT sample_id, topk_codes, tail_codes, topk_n FROM shards ORDER BY sample_id"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Thirty chains in three shards with draws and a temperature, the first shard as version 1 wrote it."""
    root = make_cache(tmp_path / "mixed", 30, "topk-u8", draws=2, temperatures=(2.0,)).root
    table = Catalog(root).chains
    name = table.files()[0]
    ids = _ids(table.path_of(name))
    path = next(one for one in _paths(make_cache(tmp_path / "plain", 30, "topk-u8").root) if _ids(one) == ids)
    file, header = open_shard(path)
    with file:
        content = file.read().drop_columns(["draw_n", "log_partitions"])
    older = header.model_copy(update={"format_version": 1}).model_dump_json()
    remove_files(table, lambda one: one == name)
    temp = root / "chains" / ".old.tmp"
    pq.write_table(content.replace_schema_metadata({SHARD_METADATA_KEY: older}), temp, write_page_checksum=True)
    table.commit([publish(temp, table.folder, f"{header.run_id}/mended-000000", content.num_rows)], "test/mended", 1)
    return root


def _ids(path: Location) -> list[str]:
    ids: list[str] = pq.read_table(on_disk(path), columns=["sample_id"]).column(0).to_pylist()
    return ids


def test_views_show_tokens_of_both_versions(root: Path) -> None:
    with open_cache(root) as cache:
        by_version = "SELECT s.draw_n IS NULL AS older, count(*), count(t.draws), sum(t.draws) > 0 FROM tokens t"
        rows = cache.sql(f"{by_version} JOIN shards s USING (sample_id) GROUP BY 1 ORDER BY 1").fetchall()
        assert [(older, tokens == counted, drawn) for older, tokens, counted, drawn in rows] == [
            (False, True, True),
            (True, True, False),
        ]
        (entries,) = cache.sql("SELECT sum(len(topk_ids)) FROM shards").fetchall()[0]
        (stored,) = cache.sql("SELECT sum(support + draws) FROM tokens").fetchall()[0]
        assert cache.sql("SELECT count(*), count(rank) + count(*) FILTER (drawn) FROM topk").fetchall() == [
            (entries, entries)
        ]
        assert stored == entries


def test_a_selection_of_both_uses_what_all_shards_hold(root: Path, tmp_path: Path) -> None:
    selection = open_selection(tmp_path / "selection.parquet", SelectionRequest([CacheSource(root)]))
    assert (selection.header.draws, selection.header.temperatures) == (0, [])
    for group in range(len(selection.row_group_G)):
        rows_R = np.flatnonzero(selection.group_R == group)
        signals = read_rows(selection, group, rows_R, with_signals=True).signals
        assert signals is not None
        assert (signals.draws, signals.log_partitions_TS) == (None, None)


@pytest.mark.parametrize("rounded", [False, True])
def test_copies_keep_the_codes_of_both(root: Path, tmp_path: Path, rounded: bool) -> None:
    copy_caches([root], tmp_path / "copy", rounded=rounded)
    assert verify_cache(tmp_path / "copy").problems == []
    assert {_header_of(path)[0] for path in _paths(tmp_path / "copy")} == {1, 2}
    with open_cache(root) as here, open_cache(tmp_path / "copy") as there:
        assert there.sql(CODES).fetchall() == here.sql(CODES).fetchall()


def test_chains_of_a_run_lie_in_two_codecs_once_it_was_rounded(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "f32", 12, "topk-f32").root
    copy_caches([source], tmp_path / "both", rounded=True)
    write_cache(source, CacheShape(num_chains=30, codec="topk-f32"))
    copy_caches([source], tmp_path / "both")
    codecs = Counter(_header_of(on_disk(path))[1] for path in _paths(tmp_path / "both"))
    assert codecs["topk-f32"] > 0
    assert codecs["topk-u8"] > 0
    with open_cache(tmp_path / "both") as cache, open_cache(source) as first:
        ids = "SELECT DISTINCT sample_id, num_tokens FROM chains ORDER BY sample_id"
        assert cache.sql(ids).fetchall() == first.sql(ids).fetchall()
        counted = "SELECT count(DISTINCT sample_id) FROM topk"
        assert cache.sql(counted).fetchall() == first.sql(counted).fetchall()


def _paths(root: Path) -> list[Path]:
    table = Catalog(root).chains
    return [on_disk(table.path_of(file)) for file in table.files()]


def _header_of(path: Path) -> tuple[int, str]:
    file, header = open_shard(path)
    file.close()
    return header.format_version, header.codec
