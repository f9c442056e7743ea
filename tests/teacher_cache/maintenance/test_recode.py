"""teacher_cache.maintenance.copy: the same cache in another codec, whatever stops it on the way."""

from pathlib import Path

import pytest

from stillroom.cache.reader import open_cache
from stillroom.errors import ConfigError, CorruptError
from teacher_cache.maintenance import copy
from teacher_cache.maintenance.copy import recode_cache
from teacher_cache.maintenance.verify import verify_cache
from tests.helpers.caches import damage, make_cache

QUERY = "SELECT c.*, v.judge FROM chains c LEFT JOIN verdicts v USING (sample_id) ORDER BY sample_id"


def test_archive_and_back_keep_every_chain_verdict_and_code(tmp_path: Path) -> None:
    make_cache(tmp_path / "u8", 30, "topk-u8", draws=2, temperatures=(2.0,))
    recode_cache(tmp_path / "u8", tmp_path / "archive", "archive")
    recode_cache(tmp_path / "archive", tmp_path / "again", "topk-u8")
    for name in ("archive", "again"):
        assert verify_cache(tmp_path / name).problems == []
    with (
        open_cache(tmp_path / "u8") as first,
        open_cache(tmp_path / "archive") as archive,
        open_cache(tmp_path / "again") as last,
    ):
        assert first.sql(QUERY).fetchall() == archive.sql(QUERY).fetchall() == last.sql(QUERY).fetchall()
        counts = "SELECT rank, drawn, count(*), sum(prob) FROM topk GROUP BY ALL ORDER BY ALL"
        assert [row[:3] for row in first.sql(counts).fetchall()] == [row[:3] for row in last.sql(counts).fetchall()]
        codes = "SELECT sample_id, topk_codes[1:4], tail_codes, topk_n, draw_n FROM shards ORDER BY sample_id"
        assert first.sql(codes).fetchall() == last.sql(codes).fetchall()


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "u8", 30, "topk-u8")
    whole = copy.recode_shard
    done: list[Path] = []

    def killed(path: Path, temp: Path, codec: str) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(path)
        whole(path, temp, codec)

    monkeypatch.setattr(copy, "recode_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        recode_cache(tmp_path / "u8", tmp_path / "archive", "archive")
    monkeypatch.setattr(copy, "recode_shard", whole)
    report = recode_cache(tmp_path / "u8", tmp_path / "archive", "archive")
    assert 0 < report.num_known < 30
    assert report.num_known + report.num_chains == 30
    assert verify_cache(tmp_path / "archive").problems == []
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("stored", "codec", "reason"),
    [
        ("topk-u8", "topk-u8", "is stored as topk-u8 already: teacher-cache copy"),
        ("topk-u8", "topk-f32", "promises what the teacher said, exactly: .* win no precision back"),
        ("topk-f32", "archive", "add --lossy to go on"),
        ("topk-u8", "zip", "'zip' is unknown: choose one of archive, topk-u8$"),
    ],
)
def test_what_loses_or_gains_nothing_is_refused(tmp_path: Path, stored: str, codec: str, reason: str) -> None:
    make_cache(tmp_path / "cache", 6, stored)
    with pytest.raises(ConfigError, match=reason):
        recode_cache(tmp_path / "cache", tmp_path / "dest", codec)
    assert not (tmp_path / "dest").exists()


def test_exact_distributions_are_rounded_when_asked(tmp_path: Path) -> None:
    make_cache(tmp_path / "f32", 6, "topk-f32")
    assert recode_cache(tmp_path / "f32", tmp_path / "archive", "archive", lossy=True).num_chains == 6
    assert verify_cache(tmp_path / "archive").problems == []


def test_damage_in_the_source_is_named(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", 6, "topk-u8")
    path = next((made.root / "chains").rglob("*.parquet"))
    damage(path)
    with pytest.raises(CorruptError, match=path.name):
        recode_cache(tmp_path / "cache", tmp_path / "dest", "archive")


def test_views_refuse_an_archive_and_name_the_way_out(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", 6, "archive")
    with open_cache(tmp_path / "cache") as cache:
        for view in ("tokens", "topk"):
            with pytest.raises(ConfigError, match="cannot read codec archive: teacher-cache recode CACHE DEST"):
                cache.arrow(f"SELECT count(*) FROM {view}")
        assert cache.sql("SELECT count(*) FROM chains").fetchall() == [(6,)]
