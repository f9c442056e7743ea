"""Row groups decoded; damage is named."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.errors import CorruptError
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.rows import read_rows
from student_train.data.selection import Selection
from tests.helpers.caches import make_cache, on_disk


@pytest.mark.parametrize("codec", ["topk-f32", "topk-u8"])
def test_reads_what_was_written(tmp_path: Path, codec: str) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=20, codec=codec)
    selection = freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(cache.root)], "source = 'sums'"))
    chains = {int(one.sample_id[:16], 16): one for one in cache.chains}
    for group in range(len(selection.file_G)):
        rows = np.flatnonzero(selection.group_R == group)
        block = read_rows(selection, group, rows, with_signals=True)
        for index, row in enumerate(rows):
            chain = chains[int(selection.key_R[row])]
            assert block.prompt_of(index).tolist() == chain.prompt_ids.tolist()
            assert block.tokens_of(index).tolist() == chain.token_ids.tolist()
            part, wanted = block.signals_of(index, 1, 4), chain.signals.slice(1, 4)
            assert part is not None
            assert part.topk_ids_N.tolist() == wanted.topk_ids_N.tolist()
            exact = codec == "topk-f32"
            np.testing.assert_allclose(part.topk_logprobs_N, wanted.topk_logprobs_N, atol=0 if exact else 0.1)
            np.testing.assert_allclose(part.entropy_T, wanted.entropy_T, rtol=0 if exact else 1e-3)


def test_without_signals_only_ids_are_read(tmp_path: Path) -> None:
    selection, _ = one_file(tmp_path)
    block = read_rows(selection, 0, np.array([0, 2]), with_signals=False)
    assert block.signals is None
    assert block.signals_of(0, 0, 1) is None
    assert len(block.tokens_of(1)) == selection.num_tokens_R[2]


@pytest.mark.parametrize("column", ["topk_ids.list.element", "token_ids.list.element", "sample_id"])
def test_damage_names_shard_and_row_group(tmp_path: Path, column: str) -> None:
    selection, path = one_file(tmp_path)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(1)
        chunk = next(one for one in map(group.column, range(group.num_columns)) if one.path_in_schema == column)
        place = chunk.data_page_offset + chunk.total_compressed_size // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))
    rows = np.flatnonzero(selection.group_R == 1)
    with pytest.raises(CorruptError, match="row group 1") as caught:
        read_rows(selection, 1, rows, with_signals=True)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_rows(selection, 0, np.flatnonzero(selection.group_R == 0), with_signals=True).signals is not None


def test_another_file_of_the_same_name_is_found(tmp_path: Path) -> None:
    """Row numbers still exist there, but they are other chains."""
    selection, path = one_file(tmp_path)
    other = make_cache(tmp_path / "other", num_chains=12, seed=3, groups_per_shard=100)
    path.write_bytes(next(other.root.glob("chains/*/*.parquet")).read_bytes())
    with pytest.raises(CorruptError, match="holds a different chain than was selected"):
        read_rows(selection, 0, np.array([0]), with_signals=True)


def test_a_missing_file(tmp_path: Path) -> None:
    selection, path = one_file(tmp_path)
    path.unlink()
    with pytest.raises(CorruptError, match="registered but missing"):
        read_rows(selection, 0, np.array([0]), with_signals=True)


def one_file(tmp_path: Path) -> tuple[Selection, Path]:
    cache = make_cache(tmp_path / "cache", num_chains=12, groups_per_shard=100)
    selection = freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(cache.root)]))
    return selection, on_disk(selection.path_of(0))
