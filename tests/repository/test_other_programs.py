"""docs/other_programs.md: the blocks whose programs are installed read what SQL reads; the folder holds more.

`python -m benchmarks.readers` runs all of them, each in an environment of its own.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset
import pytest

import stillroom
from benchmarks.readers import COLUMNS, Numbers, blocks, own_numbers, write_cache

INSTALLED = ("pandas and pyarrow", "Polars", "Hugging Face datasets")
BLOCKS = list(blocks())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Numbers]:
    root = tmp_path_factory.mktemp("readers") / "cache"
    version = write_cache(root)
    return root, version, own_numbers(root, version)


def test_the_page_has_its_programs() -> None:
    assert len(BLOCKS) == 8
    assert {title for title, _, _ in BLOCKS} > set(INSTALLED)


@pytest.mark.parametrize(("title", "block"), [(title, code) for title, _, code in BLOCKS if title in INSTALLED])
def test_a_program_reads_what_sql_reads(
    cache: tuple[Path, int, Numbers], title: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "datasets" in title:
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    root, version, wanted = cache
    names: dict[str, Any] = {"stillroom": stillroom, "root": str(root), "version": version, "COLUMNS": COLUMNS}
    exec(block, names)
    for chains, candidates, numbers in (
        (names["newest"], names["candidates"], wanted[0]),
        (names["older"], stillroom.topk(names["older"]), wanted[1]),
    ):
        first = candidates.filter(pc.equal(candidates["rank"], 1))["prob"]
        assert [chains.num_rows, candidates.num_rows, round(pc.mean(first).as_py(), 6)] == numbers


def test_the_folder_holds_more_than_the_log_shows(cache: tuple[Path, int, Numbers]) -> None:
    root, _, wanted = cache
    assert pyarrow.dataset.dataset(root / "chains").count_rows() > wanted[0][0]
