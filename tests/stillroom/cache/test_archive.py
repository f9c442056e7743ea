"""stillroom.cache.archive.blocks: the same content as `topk-u8`, and no byte changed without notice."""

import importlib.util
import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.archive.model import NUM_CONTEXTS, NUM_SYMBOLS, PRECISION
from stillroom.cache.codec import decode, encode
from stillroom.errors import ConfigError, CorruptError, StillroomError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Capture, Int32, Signals
from stillroom.schema.tables import list_of
from teacher_cache.writer.rows import support_of
from tests.stillroom.cache.test_codec import header

VOCAB = 1 << 20
DRAWS = 3


def rows_of(
    lengths: list[int], seed: int = 0, vocab_size: int = 3000, k: int = 12
) -> tuple[list[Signals], list[Int32]]:
    """Chains whose candidates follow from the token before, with draws where the support was cut short."""
    rng = np.random.default_rng(seed)
    # No id twice among 200 candidates.
    stride = 1 if vocab_size % 13 == 0 else 13
    found, tokens = [], []
    for length in lengths:
        noise_TV = rng.gumbel(size=(length, 200)) * rng.uniform(0.5, 3, (length, 1))
        token_T = rng.integers(0, 40, length).astype(np.int32)
        columns_TV = (np.roll(token_T, 1)[:, None] * 71 + np.arange(200) * stride) % vocab_size
        logits_TV = noise_TV - np.log1p(np.arange(200))
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        order_TV = np.argsort(-logprobs_TV, axis=1)
        ids_TV = np.take_along_axis(columns_TV, order_TV, axis=1).astype(np.int32)
        sorted_TV = np.take_along_axis(logprobs_TV, order_TV, axis=1).astype(np.float32)
        rank_T = rng.integers(0, 30, length)
        drawn_TM = rng.integers(k, 200, (length, DRAWS))
        drawn_TM[::3, 1] = drawn_TM[::3, 0]
        rows = np.arange(length)
        capture = Capture(
            ids_TV[rows, rank_T],
            sorted_TV[rows, rank_T],
            (rank_T + 1).astype(np.int32),
            ids_TV[:, :k],
            sorted_TV[:, :k],
            draw_ids_TM=np.take_along_axis(ids_TV, drawn_TM, axis=1),
            draw_logprobs_TM=np.take_along_axis(sorted_TV, drawn_TM, axis=1),
        )
        found.append(support_of(capture, k, 0.9))
        tokens.append(capture.token_ids_T)
    return found, tokens


def table_of(codec: str, rows: list[Signals], tokens: list[Int32]) -> pa.Table:
    return pa.table({"token_ids": pa.array(tokens, list_of(pa.int32())), **encode(codec, rows, tokens)})


def own_header(codec: str = "archive", **changes: Any) -> ShardHeader:
    return header(codec, **{"vocab_size": VOCAB, "max_support": 64, "draws": DRAWS, **changes})


def entries_by_token(signals: Signals, *, draws: bool) -> list[Any]:
    """Of each token its (log probability, id) pairs in order."""
    found, first = [], 0
    kind = signals.draws if draws else None
    n_T = signals.topk_n_T if kind is None else kind.n_T
    ids = signals.topk_ids_N if kind is None else kind.ids_D
    logprobs = signals.topk_logprobs_N if kind is None else kind.logprobs_D
    for n in n_T.tolist():
        found.append(sorted(zip(logprobs[first : first + n].tolist(), ids[first : first + n].tolist(), strict=True)))
        first += n
    return found


def replaced(table: pa.Table, column: str, values: list[bytes]) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, pa.array(values, pa.binary()))


def assert_same(one: Signals, other: Signals) -> None:
    np.testing.assert_array_equal(one.topk_n_T, other.topk_n_T)
    assert entries_by_token(one, draws=False) == entries_by_token(other, draws=False)
    starts_T = np.cumsum(one.topk_n_T) - one.topk_n_T
    np.testing.assert_array_equal(one.topk_ids_N[starts_T], other.topk_ids_N[starts_T])
    np.testing.assert_array_equal(one.topk_logprobs_N, other.topk_logprobs_N)
    np.testing.assert_array_equal(one.tail_logmass_T, other.tail_logmass_T)
    assert one.draws is not None
    assert other.draws is not None
    np.testing.assert_array_equal(one.draws.n_T, other.draws.n_T)
    assert entries_by_token(one, draws=True) == entries_by_token(other, draws=True)
    for name in ("sampled_logprob_T", "sampled_rank_T", "entropy_T"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 2**32 - 1), st.integers(200, VOCAB))
def test_archive_decodes_to_what_topk_u8_decodes_to(lengths: list[int], seed: int, vocab_size: int) -> None:
    rows, tokens = rows_of(lengths, seed, vocab_size)
    archived, offsets = decode(table_of("archive", rows, tokens), own_header(), "shard")
    plain, expected = decode(table_of("topk-u8", rows, tokens), own_header("topk-u8"), "shard")
    np.testing.assert_array_equal(offsets, expected)
    assert_same(archived, plain)


def test_what_repeats_gets_cheap() -> None:
    rows, tokens = rows_of([500] * 20, k=12)
    table = table_of("archive", rows, tokens)
    num_bytes = sum(len(blob) for blob in table["archive"].to_pylist())
    num_entries = sum(len(row.topk_ids_N) + len(row.draws.ids_D if row.draws is not None else []) for row in rows)
    # The ids alone would take 1.5 bytes if nothing were learned of what follows a token (3,000 of them).
    assert num_bytes < 2.1 * num_entries


def test_blocks_that_were_put_into_one_row_group_decode() -> None:
    one, two = rows_of([40, 9], 1), rows_of([0, 30], 2)
    merged = pa.concat_tables([table_of("archive", *one), table_of("archive", *two)])
    together, offsets = decode(merged, own_header(), "shard")
    plain, _ = decode(table_of("topk-u8", one[0] + two[0], one[1] + two[1]), own_header("topk-u8"), "shard")
    assert offsets.tolist() == [0, 40, 49, 49, 79]
    assert_same(together, plain)


def test_rows_that_moved_or_are_missing_are_named() -> None:
    table = table_of("archive", *rows_of([20, 21, 22]))
    for rows, named in (
        ([1, 2], "row 0, column archive_model"),
        ([0, 2], "row 1, column archive"),
        ([0, 2, 1], "row 1"),
    ):
        with pytest.raises(CorruptError, match=rf"the-shard: {named}.*missing or out of order"):
            decode(table.take(rows), own_header(), "the-shard")
    decode(table.take([0, 1]), own_header(), "the-shard")


FUZZED = table_of("archive", *rows_of([25, 0, 30, 12], 5))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_changed_byte_is_found_and_named(data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(["archive", "archive_model"]))
    blobs = FUZZED[column].to_pylist()
    row = data.draw(st.sampled_from([number for number, blob in enumerate(blobs) if blob]))
    damage = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    blob = bytearray(blobs[row])
    if damage == "flip":
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del blob[data.draw(st.integers(1, len(blob) - 1)) :]
    else:
        blob += data.draw(st.binary(min_size=1, max_size=40))
    blobs[row] = bytes(blob)
    with pytest.raises(CorruptError, match=rf"the-shard: row {row}, column {column} "):
        decode(replaced(FUZZED, column, blobs), own_header(), "the-shard")


@pytest.mark.parametrize("column", ["token_ids", "sampled_rank", "sampled_logprob"])
def test_columns_that_the_streams_build_upon_are_covered(column: str) -> None:
    lists = FUZZED[column].to_pylist()
    lists[2][3] += 1
    place = FUZZED.column_names.index(column)
    changed = FUZZED.set_column(place, column, pa.array(lists, FUZZED[column].type))
    with pytest.raises(CorruptError, match="the-shard: row 2, column archive fails its checksum"):
        decode(changed, own_header(), "the-shard")


def sealed_anew(table: pa.Table, streams: list[bytes], model: bytes) -> pa.Table:
    """The table with these bytes (without checksums) and checksums that fit: what only malice writes."""
    checksum = zlib.crc32(model)
    models = [struct.pack("<I", checksum) + model, *[b""] * (len(streams) - 1)]
    blobs = []
    for row, stream in enumerate(streams):
        checksum = zlib.crc32(stream, zlib.crc32(struct.pack("<I", checksum)))
        for column, dtype in (("token_ids", "<i4"), ("sampled_rank", "<i4"), ("sampled_logprob", "<f4")):
            checksum = zlib.crc32(np.array(table[column][row].as_py(), dtype).tobytes(), checksum)
        blobs.append(struct.pack("<I", checksum) + stream)
    return replaced(replaced(table, "archive", blobs), "archive_model", models)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_lying_bytes_under_right_checksums_end_in_an_error_or_in_sound_arrays(data: st.DataObject) -> None:
    streams = [blob[4:] for blob in FUZZED["archive"].to_pylist()]
    model = bytearray(FUZZED["archive_model"].to_pylist()[0][4:])
    row = data.draw(st.sampled_from([0, 2, 3]))
    stream = bytearray(streams[row])
    for _ in range(data.draw(st.integers(1, 4))):
        target = data.draw(st.sampled_from([stream, model]))
        target[data.draw(st.integers(0, len(target) - 1))] = data.draw(st.integers(0, 255))
    streams[row] = bytes(stream)
    table = sealed_anew(FUZZED, streams, bytes(model))
    try:
        signals, _ = decode(table, own_header(), "the-shard")
    except CorruptError:
        with pytest.raises(CorruptError, match=r"^the-shard: row [0-9]+, column (archive|archive_model|topk_)"):
            decode(table, own_header(), "the-shard")
    else:
        assert signals.topk_ids_N.max() < VOCAB
        assert signals.topk_n_T.max() <= 64


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"vocab_size": 100}, "vocabulary of 100"),
        ({"max_support": 5}, "entries and 3 draws a token, past the 5 and 3"),
        ({"draws": 1}, "draws a token, past the 64 and 1"),
    ],
)
def test_a_model_past_the_headers_limits_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CorruptError, match=rf"row 0, column archive_model .*{problem}"):
        decode(FUZZED, own_header(**change), "the-shard")


def test_stated_entries_allocate_no_more_than_the_tokens_can_hold() -> None:
    streams = [blob[4:] for blob in FUZZED["archive"].to_pylist()]
    streams[2] = struct.pack("<I", 0xFFFFFFFF) + streams[2][4:]
    model = FUZZED["archive_model"].to_pylist()[0][4:]
    with pytest.raises(CorruptError, match="row 2, column archive states 4294967295 entries"):
        decode(sealed_anew(FUZZED, streams, model), own_header(), "the-shard")


def test_a_support_that_holds_an_id_twice_is_refused() -> None:
    (row,), tokens = rows_of([9])
    token = int(np.flatnonzero(row.topk_n_T > 1)[0])
    first = int(row.topk_n_T[:token].sum())
    row.topk_ids_N[first + 1] = row.topk_ids_N[first]
    with pytest.raises(StillroomError, match=f"token {token} of this row group holds an id twice"):
        encode("archive", [row], tokens)


def test_limits_fit_what_the_format_can_say() -> None:
    assert NUM_CONTEXTS <= 256
    assert NUM_SYMBOLS == 256
    assert 8 + 2 * PRECISION <= 32


def test_without_numba_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs numba: pip install 'stillroom\[archive\]'"):
        decode(FUZZED, own_header(), "the-shard")
