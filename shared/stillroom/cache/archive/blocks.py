"""The `archive` codec: the content of `topk-u8` in fewer bytes. FORMAT.md is normative.

In: codes, ids and counts as `topk-u8` stores them, and three columns that stay readable in SQL (token ids, sampled rank
and log probability). Out: two binary columns, and back, the same but for the order of equal codes and of draws. The
rows of a block (one row group) are coded one after the other, each learning from those before, and decoded together.

Cost of a block: its arrays, and 8 bytes a candidate for what is learned. Needs numba, which compiles the two walks on
first use and keeps them in its cache.

Shape legend: T tokens, E entries (supports and draws) of all tokens, R rows, V' ids up to the largest that occurs.
"""

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stillroom.cache.archive.decode import STATE_WORDS, Candidates, Columns, Tables, decode_rows, margin_words
from stillroom.cache.archive.encode import pack_rows, room_for, walk
from stillroom.cache.archive.lists import empty_lists
from stillroom.cache.archive.model import (
    NUM_CONTEXTS,
    NUM_SYMBOLS,
    Model,
    ModelError,
    classes_of,
    ids_by_rank,
    lookup_table,
    number_tables,
    parse_model,
    weights_of,
)
from stillroom.cache.columns import codes_of
from stillroom.errors import CorruptError, StillroomError
from stillroom.schema.records import Float32, Int32, Int64

_HEAD = struct.Struct("<II")
_CHECKSUM = struct.Struct("<I")
MIN_ROW_BYTES = _HEAD.size + 4 * STATE_WORDS
MODEL, STREAM = "archive_model", "archive"


class Known(NamedTuple):
    """Columns of the same rows that the streams build upon; row r has tokens offsets_R[r]..offsets_R[r + 1] - 1."""

    token_ids_T: Int32
    sampled_rank_T: Int32
    sampled_logprob_T: Float32
    offsets_R: Int64

    def rows(self, start: int, stop: int) -> "Known":
        """Rows start..stop-1."""
        tokens = slice(self.offsets_R[start], self.offsets_R[stop])
        offsets_R = self.offsets_R[start : stop + 1] - self.offsets_R[start]
        return Known(self.token_ids_T[tokens], self.sampled_rank_T[tokens], self.sampled_logprob_T[tokens], offsets_R)


def encode_block(known: Known, candidates: Candidates) -> tuple[list[bytes], list[bytes]]:
    """The columns `archive_model` and `archive` of one block. Raises StillroomError where a support repeats an id."""
    num_rows = len(known.offsets_R) - 1
    if not num_rows:
        return [], []
    support, draws = int(candidates.size_T.max(initial=0)), int(candidates.num_draws_T.max(initial=0))
    class_V = classes_of(candidates.id_E)
    ids_D = ids_by_rank(class_V)
    rank_V = _ranks(ids_D, len(class_V))
    symbols = room_for(len(known.token_ids_T), len(candidates.id_E))
    ends_R = np.zeros(num_rows, np.int64)
    columns = _columns(known, rank_V)
    lists = empty_lists(columns.list_T, support + draws)
    rank_E = rank_V[candidates.id_E]
    repeats = walk(candidates, rank_E, known.offsets_R, support, draws, len(ids_D), columns, lists, symbols, ends_R)
    if repeats >= 0:
        raise StillroomError(f"the support of token {repeats} of this row group holds an id twice")
    used = slice(0, ends_R[-1])
    pairs_Q = symbols.context_Q[used].astype(np.int64) * NUM_SYMBOLS + symbols.symbol_Q[used]
    counts_CS = np.bincount(pairs_Q, minlength=NUM_CONTEXTS * NUM_SYMBOLS).reshape(NUM_CONTEXTS, NUM_SYMBOLS)
    model = Model(class_V, weights_of(counts_CS), support, draws)
    words = np.zeros(2 * int(ends_R[-1]) + STATE_WORDS * num_rows, np.uint32)
    bounds_R = np.zeros(num_rows + 1, np.int64)
    pack_rows(symbols, ends_R, model.weights_CS, words, bounds_R)
    return _sealed(known, candidates, model, words.astype("<u4"), bounds_R)


def decode_blocks(
    models: Sequence[bytes], streams: Sequence[bytes], known: Known, limits: tuple[int, int, int], where: str
) -> tuple[Candidates, Int64]:
    """Candidates of all rows and how many entries each row has, [R] int64.

    `limits`: width of the vocabulary, largest support, most draws a token. Raises CorruptError naming `where`, row and
    column where bytes changed, contradict each other or a limit, or rows of a block are missing or out of order.
    """
    starts = [row for row, model in enumerate(models) if model]
    if len(models) and starts[:1] != [0]:
        raise CorruptError(f"{where}: row 0, column {MODEL} is empty: rows of this block are missing or out of order")
    parts, counts = [], []
    for start, stop in pairwise([*starts, len(models)]):
        block = known.rows(start, stop)
        candidates, num_entries_R = _decode_block(models[start], streams[start:stop], block, limits, where, start)
        parts.append(candidates)
        counts.append(num_entries_R)
    if not parts:
        return _empty_candidates(0, 0), np.zeros(0, np.int64)
    merged = (
        parts[0] if len(parts) == 1 else Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    )
    return merged, np.concatenate(counts)


def _empty_candidates(num_tokens: int, num_entries: int) -> Candidates:
    return Candidates(
        size_T=np.zeros(num_tokens, np.int32),
        num_draws_T=np.zeros(num_tokens, np.int32),
        tail_T=np.zeros(num_tokens, np.uint8),
        id_E=np.zeros(num_entries, np.int32),
        code_E=np.zeros(num_entries, np.uint8),
    )


def _decode_block(
    sealed_model: bytes,
    streams: Sequence[bytes],
    known: Known,
    limits: tuple[int, int, int],
    where: str,
    first_row: int,
) -> tuple[Candidates, Int64]:
    vocab_size, max_support, max_draws = limits
    try:
        checksum = _model_checksum(sealed_model)
        model = parse_model(sealed_model[_CHECKSUM.size :], vocab_size, max_support, max_draws)
    except ModelError as error:
        raise CorruptError(f"{where}: row {first_row}, column {MODEL} {error}") from error
    num_entries_R = _checked_entries(streams, known, model, checksum, where, first_row)
    widths_R = np.array([len(stream) - _HEAD.size for stream in streams], np.int64) // 4
    bounds_R = np.concatenate([[0], np.cumsum(widths_R)]).astype(np.int64)
    margin = bytes(4 * margin_words(model.max_support, model.max_draws))
    words = np.frombuffer(b"".join([*(stream[_HEAD.size :] for stream in streams), margin]), "<u4").astype(np.uint32)
    out = _empty_candidates(len(known.token_ids_T), int(num_entries_R.sum()))
    ids_D = ids_by_rank(model.class_V)
    tables = Tables(lookup_table(model.weights_CS), *number_tables(), ids_D, model.max_support, model.max_draws)
    columns = _columns(known, _ranks(ids_D, len(model.class_V)))
    lists = empty_lists(columns.list_T, model.max_support + model.max_draws)
    entries_R = np.concatenate([[0], np.cumsum(num_entries_R)]).astype(np.int64)
    bad_row = decode_rows(words, bounds_R, known.offsets_R, entries_R, columns, tables, lists, out)
    if bad_row >= 0:
        raise CorruptError(f"{where}: row {first_row + bad_row}, column {STREAM} contradicts itself")
    return out, num_entries_R


def _sealed(
    known: Known, candidates: Candidates, model: Model, words: npt.NDArray[np.uint32], bounds_R: Int64
) -> tuple[list[bytes], list[bytes]]:
    """Model and streams with their checksums, each of which covers the row before."""
    num_entries_T = candidates.size_T.astype(np.int64) + candidates.num_draws_T
    totals_T = np.concatenate([[0], np.cumsum(num_entries_T)])
    num_entries_R = np.diff(totals_T[known.offsets_R])
    body = model.to_bytes()
    checksum = zlib.crc32(body)
    models = [_CHECKSUM.pack(checksum) + body, *[b""] * (len(num_entries_R) - 1)]
    streams = []
    for row, num_entries in enumerate(num_entries_R.tolist()):
        stream = _CHECKSUM.pack(num_entries) + words[bounds_R[row] : bounds_R[row + 1]].tobytes()
        checksum = _row_checksum(checksum, stream, known, row)
        streams.append(_CHECKSUM.pack(checksum) + stream)
    return models, streams


def _checked_entries(
    streams: Sequence[bytes], known: Known, model: Model, checksum: int, where: str, first_row: int
) -> Int64:
    """Entries of each row, once lengths and checksums are right."""
    num_tokens_R = np.diff(known.offsets_R).tolist()
    found = []
    for row, (stream, num_tokens) in enumerate(zip(streams, num_tokens_R, strict=True)):
        place = f"{where}: row {first_row + row}, column {STREAM}"
        if len(stream) < MIN_ROW_BYTES or len(stream) % 4:
            raise CorruptError(f"{place} has {len(stream)} bytes, which no stream has: it is cut off")
        expected, num_entries = _HEAD.unpack_from(stream)
        checksum = _row_checksum(checksum, stream[_CHECKSUM.size :], known, row)
        if checksum != expected:
            raise CorruptError(
                f"{place} fails its checksum: bytes changed, or rows of its block are missing or out of order"
            )
        if not num_tokens <= num_entries <= num_tokens * (model.max_support + model.max_draws):
            raise CorruptError(f"{place} states {num_entries} entries for {num_tokens} tokens")
        found.append(num_entries)
    return np.array(found, np.int64)


def _row_checksum(previous: int, stream: bytes, known: Known, row: int) -> int:
    """CRC-32 of the checksum before, what follows the row's own, and the columns that it builds upon."""
    tokens = slice(known.offsets_R[row], known.offsets_R[row + 1])
    checksum = zlib.crc32(stream, zlib.crc32(_CHECKSUM.pack(previous)))
    checksum = zlib.crc32(known.token_ids_T[tokens].astype("<i4").tobytes(), checksum)
    checksum = zlib.crc32(known.sampled_rank_T[tokens].astype("<i4").tobytes(), checksum)
    return zlib.crc32(known.sampled_logprob_T[tokens].astype("<f4").tobytes(), checksum)


def _model_checksum(sealed: bytes) -> int:
    if len(sealed) < _CHECKSUM.size:
        raise ModelError("is cut off")
    (checksum,) = _CHECKSUM.unpack_from(sealed)
    if zlib.crc32(sealed[_CHECKSUM.size :]) != checksum:
        raise ModelError("fails its checksum: bytes changed")
    return int(checksum)


def _ranks(ids_D: Int32, num_ids: int) -> Int64:
    """Rank in the model of each id below `num_ids`, -1 for those that do not occur."""
    rank_V = np.full(num_ids, -1, np.int64)
    rank_V[ids_D] = np.arange(len(ids_D))
    return rank_V


def _columns(known: Known, rank_V: Int64) -> Columns:
    token_ids_T = known.token_ids_T.astype(np.int64)
    previous_T = np.concatenate([[-1], token_ids_T])[: len(token_ids_T)]
    first_R = known.offsets_R[:-1]
    previous_T[first_R[first_R < known.offsets_R[1:]]] = -1
    inside_T = (token_ids_T >= 0) & (token_ids_T < len(rank_V))
    return Columns(
        list_T=np.unique(previous_T, return_inverse=True)[1].astype(np.int64),
        sampled_T=np.where(inside_T, rank_V[np.where(inside_T, token_ids_T, 0)], -1),
        sampled_code_T=codes_of(known.sampled_logprob_T).astype(np.int64),
        sampled_rank_T=known.sampled_rank_T.astype(np.int32),
    )
