"""docs/other_programs.md: the blocks whose programs are installed read what SQL reads; the folder holds more.

`python -m benchmarks.readers` runs all of them, each in an environment of its own.
"""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.dataset
import pytest

from benchmarks.readers import HARNESS, Numbers, blocks, is_same, own_numbers, write_cache
from stillroom import arrow
from stillroom.cache.catalog import Catalog
from stillroom.schema.tables import table_schema

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
    names: dict[str, Any] = {"root": str(root), "version": version, "COLUMNS": arrow.TOKENS_COLUMNS}
    exec(HARNESS, names)
    exec(block, names)
    numbers = names["numbers"]
    newest, older = names["newest"], names["older"]
    assert is_same([numbers(newest, names["candidates"]), numbers(older, arrow.topk(older))], wanted)


def test_ray_and_spark_decode_as_their_blocks_say(cache: tuple[Path, int, Numbers]) -> None:
    """Neither is installed here: what they would call with a part of the chains at a time."""
    root, _, wanted = cache
    table = Catalog(root).chains
    chains = pyarrow.dataset.dataset([str(table.path_of(file)) for file in table.files()], schema=table_schema())
    batches = list(chains.to_batches(columns=arrow.TOKENS_COLUMNS, batch_size=20))
    names: dict[str, Any] = {}
    exec(HARNESS, names)
    sums, num_chains = names["sums"], chains.count_rows()
    tokens = sums(pyarrow.Table.from_batches(arrow.tokens_batches(batches)), "top1_prob", "tail_mass")
    for candidates in (
        pyarrow.concat_tables(map(arrow.topk, batches)),
        pyarrow.Table.from_batches(arrow.topk_batches(batches)),
    ):
        assert is_same([[num_chains, *sums(candidates, "prob", "weight"), *tokens]], wanted[:1])


def test_the_folder_holds_more_than_the_log_shows(cache: tuple[Path, int, Numbers]) -> None:
    root, _, wanted = cache
    assert pyarrow.dataset.dataset(root / "chains").count_rows() > wanted[0][0]
