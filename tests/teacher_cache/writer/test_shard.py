"""Shard files: encodings as FORMAT.md wants them, row groups by tokens, a header that describes them, bytes as
written.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.cache.columns import list_column
from stillroom.cache.shards import open_shard, read_signals
from stillroom.errors import StillroomError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int32
from stillroom.schema.tables import CHAIN_FIELDS, TOKEN_FIELDS
from teacher_cache.config import CaptureConfig, ReasoningConfig
from teacher_cache.engine.api import Finished, Request
from teacher_cache.writer import shard as shard_module
from teacher_cache.writer.rows import ChainRow, RowMaker, support_of
from teacher_cache.writer.shard import ShardFile
from tests.helpers.fake_builds import VOCAB_SIZE, K, make_config, make_engine, make_requests, make_teacher, run_build


def make_finished(num_rows: int) -> list[Finished]:
    engine, made = make_engine(), []
    for request in make_requests(num_rows):
        engine.submit(request)
    while engine.num_unfinished:
        made += [outcome for outcome in engine.step() if isinstance(outcome, Finished)]
    return made


def make_rows(finished: list[Finished]) -> list[ChainRow]:
    maker = RowMaker(make_teacher().tokenizer, CaptureConfig(max_support=K, draws=0), ReasoningConfig(), "fake_0", "w0")
    return [maker.row(one) for one in finished]


def make_header(codec: str) -> ShardHeader:
    return ShardHeader(
        codec=codec,
        max_support=K,
        nucleus=0.999,
        entropy="support",
        vocab_size=VOCAB_SIZE,
        run_id="fake_0",
        worker="w0",
        teacher_fingerprint="f" * 32,
        tokenizer_fingerprint="b" * 32,
        template_fingerprint="c" * 32,
    )


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_signals_come_back_and_row_groups_close_by_tokens(tmp_path: Path, codec: str) -> None:
    finished = make_finished(30)
    shard = ShardFile(tmp_path / "s.parquet", make_header(codec), row_group_tokens=300)
    for row in make_rows(finished):
        shard.add(row)
    shard.close()
    assert shard.num_bytes == shard.temp.stat().st_size
    file, header = open_shard(shard.temp)
    assert header == make_header(codec)
    seen = 0
    for index in range(file.num_row_groups):
        table, signals, offsets = read_signals(file, header, index, ["sample_id", "num_tokens"], "s")
        lengths = table.column("num_tokens").to_pylist()
        assert np.diff(offsets).tolist() == lengths
        assert sum(lengths[:-1]) < 300, "a row group closes at the first row that brings it to its tokens"
        for place in range(table.num_rows):
            wanted = support_of(finished[seen].capture, K, 0.999)
            got = signals.slice(int(offsets[place]), int(offsets[place + 1]))
            assert got.topk_ids_N.tolist() == wanted.topk_ids_N.tolist()
            error = np.abs(np.exp(got.topk_logprobs_N) - np.exp(wanted.topk_logprobs_N)).max()
            assert error <= (0.02 if codec == "topk-u8" else 0)
            seen += 1
    assert seen == 30
    assert file.num_row_groups > 2


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_columns_are_encoded_as_the_format_says(tmp_path: Path, codec: str) -> None:
    shard = ShardFile(tmp_path / "s.parquet", make_header(codec), row_group_tokens=300)
    for row in make_rows(make_finished(10)):
        shard.add(row)
    shard.close()
    group = pq.ParquetFile(shard.temp).metadata.row_group(0)
    encodings = {}
    for index in range(group.num_columns):
        column = group.column(index)
        assert column.compression == "ZSTD"
        encodings[column.path_in_schema] = set(column.encodings)
    for name in ("topk_ids", "topk_n", "token_ids", "sampled_rank"):
        assert "RLE_DICTIONARY" in encodings[f"{name}.list.element"], name
    floats = ["sampled_logprob", "entropy", *(["topk_logprobs", "tail_logmass"] if codec == "topk-f32" else [])]
    for name in floats:
        assert "BYTE_STREAM_SPLIT" in encodings[f"{name}.list.element"], name
        assert "RLE_DICTIONARY" not in encodings[f"{name}.list.element"], name


def test_reasoning_is_split_on_its_token(tmp_path: Path) -> None:
    teacher = make_teacher()
    start, end = teacher.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    hello, five = (teacher.tokenizer.encode(text, add_special_tokens=False) for text in ("hello", "5"))
    maker = RowMaker(teacher.tokenizer, CaptureConfig(max_support=K, draws=0), ReasoningConfig(), "fake_0", "w0")
    (finished,) = make_finished(1)

    def split(token_ids: list[int]) -> tuple[object, ...]:
        num = len(token_ids)
        capture = finished.capture
        repeat = np.arange(num) % len(capture.token_ids_T)
        cut = type(capture)(
            token_ids_T=np.array(token_ids, np.int32),
            sampled_logprob_T=capture.sampled_logprob_T[repeat],
            sampled_rank_T=capture.sampled_rank_T[repeat],
            topk_ids_TK=capture.topk_ids_TK[repeat],
            topk_logprobs_TK=capture.topk_logprobs_TK[repeat],
        )
        row = maker.row(Finished(finished.request, cut, "stop"))
        return row.reasoning, row.answer, row.reasoning_end, row.num_reasoning_tokens

    closed = [start, *hello, end, *five]
    assert split(closed) == ("hello", "5", len(hello) + 2, len(hello) + 2)
    assert split([start, *hello]) == ("hello", None, None, len(hello) + 1)
    assert split(five) == (None, "5", 0, 0)


def test_reasoning_that_the_template_opened_is_found_and_an_unfinished_one_is_marked() -> None:
    """R1's template ends the prompt with <think>: the completion begins in the middle of the reasoning."""
    teacher = make_teacher()
    start, end = teacher.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    maker = RowMaker(teacher.tokenizer, CaptureConfig(max_support=K, draws=0), ReasoningConfig(), "fake_0", "w0")
    (finished,) = make_finished(1)
    capture = finished.capture
    plain = np.where(np.isin(capture.token_ids_T, [start, end]), 65, capture.token_ids_T).astype(np.int32)
    closed = plain.copy()
    closed[5] = end
    opened = dataclasses.replace(finished.request, prompt_token_ids=[*finished.request.prompt_token_ids, start])
    silent = dataclasses.replace(finished.request, prompt_token_ids=[*finished.request.prompt_token_ids, start, end])

    def make(request: Request, token_ids: Int32, reason: str) -> ChainRow:
        return maker.row(Finished(request, dataclasses.replace(capture, token_ids_T=token_ids), reason))

    row = make(opened, closed, "stop")
    assert (row.reasoning_end, row.num_reasoning_tokens) == (6, 6)
    assert row.reasoning is not None
    assert row.answer is not None
    row = make(opened, plain, "length")
    assert (row.reasoning_end, row.answer, row.num_reasoning_tokens) == (None, None, len(plain))
    assert row.reasoning is not None
    assert make(silent, plain, "stop").reasoning_end == 0


def test_a_row_has_a_field_for_every_plain_column() -> None:
    wanted = [field.name for field in CHAIN_FIELDS if field not in TOKEN_FIELDS]
    assert [field.name for field in dataclasses.fields(ChainRow)] == [*wanted, "signals"]


def test_memory_of_the_writer_is_one_row_group(tmp_path: Path) -> None:
    """The file grows while rows are added, so that nothing waits for the end."""
    shard = ShardFile(tmp_path / "s.parquet", make_header("topk-u8"), row_group_tokens=200)
    sizes = []
    for row in make_rows(make_finished(30)):
        shard.add(row)
        sizes.append(shard.num_bytes)
    shard.close()
    assert len(set(sizes)) > 3


def test_lists_of_a_row_group_stay_within_their_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow counts a column's list elements in 32 bits: past them offsets would wrap and rows take others' values."""
    monkeypatch.setattr(shard_module, "MAX_GROUP_ELEMENTS", 1000)
    shard = ShardFile(tmp_path / "s.parquet", make_header("topk-u8"), row_group_tokens=100_000)
    rows = make_rows(make_finished(30))
    for row in rows:
        shard.add(row)
    shard.close()
    file, _ = open_shard(shard.temp)
    groups = [file.read_row_group(index, columns=["sample_id", "topk_ids"]) for index in range(file.num_row_groups)]
    assert [one for group in groups for one in group.column("sample_id").to_pylist()] == [one.sample_id for one in rows]
    sizes = [len(group.column("topk_ids").combine_chunks().flatten()) for group in groups]
    assert len(sizes) > 2
    assert max(sizes) <= 1000
    with pytest.raises(StillroomError, match="a chain has 4,294,967,300 candidates and draws"):
        list_column(np.zeros(4, np.int16), np.array([2**32, 4]))


def test_a_shard_describes_its_run(tmp_path: Path) -> None:
    run_build(make_config(tmp_path / "c"), make_requests(5))
    catalog = Catalog(tmp_path / "c")
    for file in catalog.chains.files():
        _, header = open_shard(catalog.chains.path_of(file))
        assert header.run_id in catalog.runs()
        assert (header.worker, header.vocab_size, header.codec) == ("w0", VOCAB_SIZE, "topk-u8")
