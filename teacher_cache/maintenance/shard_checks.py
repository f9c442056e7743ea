"""Checks of one shard: hash, header, page checksums, decoding, rows; and which of its row groups are sound.

Row checks find rows that were written wrong, not bytes that changed: ids, lengths, ranks, masses and scalars of a
decoded row group must agree with each other. Tolerances are the codecs' own rounding (FORMAT.md).

Shape legend: T tokens of the row group, N stored candidates of all tokens, D draws, R rows.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import DataFile, Table, check_hash
from stillroom.cache.columns import LOGPROB_RANGE_NATS
from stillroom.cache.shards import open_shard, read_signals
from stillroom.errors import CorruptError, StillroomError
from stillroom.schema.manifest import ShardHeader
from stillroom.schema.records import Int64, Message, Signals, chain_id_of, prompt_id_of
from stillroom.schema.tables import CHAIN_FIELDS, TOKEN_FIELDS, chain_schema
from stillroom.storage.paths import Location
from teacher_cache.writer.rows import scalars_of

# Nothing else in a row could contradict these.
NOT_CHECKED = {"sample_index", "created_at", "source", "split", "reference", "finish_reason", "seed"}
COLUMNS = [
    field.name
    for field in CHAIN_FIELDS
    if field not in TOKEN_FIELDS and field.name not in {*NOT_CHECKED, "text", "reasoning", "answer"}
]
"""Columns that `check_rows` reads besides the signals."""

SAMPLE_ID = re.compile(r"^[0-9a-f]{32}$")

F32_TOLERANCE = 1e-3
"""For logprobs and masses stored as float32; for scalars relative to 1 or their own size."""
U8_SCALAR_TOLERANCE = 0.03
"""Means of decoded 8-bit codes against means before coding."""

Bools = npt.NDArray[np.bool_]
PackedIds = npt.NDArray[np.void]
"""Sample ids as 16 bytes each: 160 MB for ten million chains."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Damage:
    """A registered file with wrong content, which may be quarantined.

    `good_groups` are the row groups that passed every check, empty if the damage is not confined to the others;
    `repeated` counts, by sample id, rows that are visible elsewhere.
    """

    table: str
    file: DataFile
    problems: Sequence[str]
    good_groups: Sequence[int] = ()
    repeated: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class ShardFindings:
    """What one shard holds, and what is wrong with it."""

    file: DataFile
    header: ShardHeader | None = None
    num_chains: int = 0
    num_tokens: int = 0
    sample_ids: PackedIds = field(default_factory=lambda: packed([]))
    problems: list[str] = field(default_factory=list)
    num_groups: int = 0
    bad_groups: set[int] = field(default_factory=set)
    is_damaged: bool = True
    repeated: Counter[str] = field(default_factory=Counter)

    def damage(self) -> Damage | None:
        """None if the bytes are sound: a newer format or an unreadable disk is not damage."""
        if not self.is_damaged or not (self.problems or self.repeated):
            return None
        # Damage outside all row groups is in the footer, which has no checksum: then no row group can be trusted.
        is_local = bool(self.bad_groups) or not self.problems
        good = sorted(set(range(self.num_groups)) - self.bad_groups) if is_local else []
        return Damage("chains", self.file, tuple(self.problems), good, dict(self.repeated))


def verify_shard(table: Table, file: DataFile) -> ShardFindings:
    """Runs every check on one shard."""
    findings = ShardFindings(file)
    path = table.path_of(file)
    try:
        # Besides the hash: a file that was cut short is told apart from one with a flipped bit.
        size_bytes = path.stat().st_size if path.exists() else None
        if size_bytes is not None and size_bytes != file.size_bytes:
            findings.problems.append(f"has {size_bytes} bytes, but {file.size_bytes} were registered")
        check_hash(path)
    except StillroomError as error:
        _add_error(findings, error, path)
    if not path.exists():
        return findings
    try:
        # Also with a wrong hash: the row groups tell what quarantine can keep.
        _read_shard(path, findings)
    except StillroomError as error:
        _add_error(findings, error, path)
    return findings


def check_rows(table: pa.Table, signals: Signals, offsets: Int64, header: ShardHeader) -> Iterator[str]:
    """Yields at most one problem per check, naming row and column. Rows count from 0 within the row group."""
    rows = table.to_pylist()
    token_ids_T = np.concatenate([np.asarray(row["token_ids"], np.int64) for row in rows]) if rows else np.zeros(0)
    yield from _check_plain(rows, header)
    yield from _check_tokens(signals, token_ids_T, offsets, header)
    yield from _check_scalars(rows, signals, offsets, header)


def packed(sample_ids: list[str]) -> PackedIds:
    """Ids of 32 hex digits as 16 bytes each."""
    return np.array([bytes.fromhex(sample_id) for sample_id in sample_ids], dtype="V16")


def without_path(message: str, path: Location) -> str:
    """An error's message without the file name that it begins with."""
    return message.removeprefix(f"{path}").removeprefix(":").strip()


def _add_error(findings: ShardFindings, error: StillroomError, path: Location) -> None:
    findings.problems.append(without_path(str(error), path))
    findings.is_damaged &= isinstance(error, CorruptError)


def _read_shard(path: Location, findings: ShardFindings) -> None:
    parquet, header = open_shard(path)
    with parquet:
        findings.header = header
        expected = chain_schema(header.codec, header.format_version)
        if not parquet.schema_arrow.equals(expected):
            findings.problems.append(f"schema does not match codec {header.codec}: {_difference(parquet, expected)}")
            return
        if parquet.metadata.num_rows != findings.file.num_rows:
            num_rows, num_registered = parquet.metadata.num_rows, findings.file.num_rows
            findings.problems.append(f"has {num_rows} rows, but {num_registered} were registered")
        # Not before: a file of another schema has no row group that could be kept.
        findings.num_groups = parquet.num_row_groups
        for index in range(parquet.num_row_groups):
            try:
                table, signals, offsets = read_signals(parquet, header, index, COLUMNS, "")
            except StillroomError as error:
                findings.problems.append(str(error).removeprefix(": "))
                findings.bad_groups.add(index)
                continue
            problems = [f"row group {index}: {one}" for one in check_rows(table, signals, offsets, header)]
            findings.problems += problems
            if problems:
                findings.bad_groups.add(index)
            # Others are reported by check_rows, and do not fit 16 bytes.
            ids = [one for one in table.column("sample_id").to_pylist() if SAMPLE_ID.match(one)]
            findings.sample_ids = np.concatenate([findings.sample_ids, packed(ids)])
            findings.num_tokens += len(signals.topk_n_T)
            findings.num_chains += table.num_rows


def _difference(parquet: pq.ParquetFile, expected: pa.Schema) -> str:
    for one in expected:
        place = parquet.schema_arrow.get_field_index(one.name)
        if place < 0:
            return f"{one.name} is missing"
        found = parquet.schema_arrow.field(place)
        if not found.equals(one):
            return f"{one.name} is {found.type}{'' if found.nullable else ' not null'}, not {one.type}"
    return "the order differs, or there are extra columns"


def _check_plain(rows: Sequence[Row], header: ShardHeader) -> Iterator[str]:
    checks: list[tuple[str, str, Callable[[Row], bool]]] = [
        ("sample_id", "is not 32 hex digits", lambda row: SAMPLE_ID.match(row["sample_id"]) is not None),
        ("run_id", f"is not the header's {header.run_id}", lambda row: row["run_id"] == header.run_id),
        ("worker", f"is not the header's {header.worker}", lambda row: row["worker"] == header.worker),
        ("prompt_id", "is not the hash of the messages", _prompt_id_fits),
        ("chain_id", "is not the hash of the token ids", _chain_id_fits),
        ("metadata", "is not a JSON object", _is_json_object),
        ("token_ids", "holds no token", lambda row: len(row["token_ids"]) > 0),
        ("num_tokens", "is not the length of token_ids", lambda row: row["num_tokens"] == len(row["token_ids"])),
        (
            "num_prompt_tokens",
            "is not the length of prompt_token_ids",
            lambda row: row["num_prompt_tokens"] == len(row["prompt_token_ids"]),
        ),
        ("reasoning_end", "lies outside the completion", _reasoning_end_fits),
        ("num_reasoning_tokens", "does not follow from reasoning_end", _num_reasoning_fits),
        (
            "prompt_token_ids",
            f"holds an id outside the vocabulary of {header.vocab_size}",
            lambda row: all(0 <= token_id < header.vocab_size for token_id in row["prompt_token_ids"]),
        ),
    ]
    for column, problem, fits in checks:
        # One example is enough: damage usually hits all rows of a group.
        number = next((number for number, row in enumerate(rows) if not fits(row)), None)
        if number is not None:
            yield f"row {number}, column {column} {problem}"


def _check_tokens(
    signals: Signals, token_ids_T: npt.NDArray[Any], offsets: Int64, header: ShardHeader
) -> Iterator[str]:
    n_T = signals.topk_n_T
    if not len(n_T):
        return
    sampled_T = signals.sampled_logprob_T.astype(np.float64)
    tolerance_T = _logprob_tolerance(sampled_T, header.codec)
    token_N = np.repeat(np.arange(len(n_T)), n_T)
    starts_T = np.cumsum(n_T, dtype=np.int64) - n_T
    # The stored probability of the token that came, where it is among the candidates.
    hit_N = signals.topk_ids_N == token_ids_T[token_N]
    stored_T = np.full(len(n_T), np.nan)
    stored_T[token_N[hit_N]] = signals.topk_logprobs_N[hit_N]
    last_T = signals.topk_logprobs_N[starts_T + n_T - 1]
    falling_N = np.concatenate([[True], np.diff(signals.topk_logprobs_N) <= 1e-6])
    # From one token to the next the log probability may rise.
    falling_N[starts_T] = True
    # Every support has an entry, or decoding had refused it: reduceat takes a neighbour's for an empty one.
    mass_T = np.add.reduceat(np.exp(signals.topk_logprobs_N, dtype=np.float64), starts_T)
    mass_T += np.exp(signals.tail_logmass_T, dtype=np.float64)
    inside_T = ~np.isnan(stored_T)
    outside_T, partitions_TS = _draws_outside(signals, header), signals.log_partitions_TS
    partitioned_T = np.ones(len(n_T), np.bool_) if partitions_TS is None else np.isfinite(partitions_TS).all(axis=1)
    checks = [
        (
            "token_ids",
            f"holds an id outside the vocabulary of {header.vocab_size}",
            (token_ids_T >= 0) & (token_ids_T < header.vocab_size),
        ),
        ("sampled_rank", "is below 1", signals.sampled_rank_T >= 1),
        ("sampled_logprob", "is not a log probability", np.isfinite(sampled_T) & (sampled_T <= F32_TOLERANCE)),
        ("entropy", "is negative or not a number", np.isfinite(signals.entropy_T) & (signals.entropy_T >= -1e-3)),
        ("topk_n", "has log probabilities that increase with rank", np.logical_and.reduceat(falling_N, starts_T)),
        ("topk_ids", "has entries that do not add up to mass 1 with the tail", np.abs(mass_T - 1) < F32_TOLERANCE),
        ("draw_n", "has draws that are in the support, have no probability or lack a tail", outside_T),
        ("log_partitions", "holds a value that is not a number", partitioned_T),
        (
            "sampled_logprob",
            "differs from the token's entry in the distribution: tokens and distributions are misaligned",
            ~inside_T | (np.abs(np.where(inside_T, stored_T, 0) - sampled_T) < tolerance_T),
        ),
        (
            "sampled_logprob",
            "exceeds a stored candidate's, but the token is not stored: tokens and distributions are misaligned",
            inside_T | (sampled_T < last_T + tolerance_T),
        ),
    ]
    for column, problem, good_T in checks:
        if not good_T.all():
            token = int(np.flatnonzero(~good_T)[0])
            row = int(np.searchsorted(offsets[1:], token, side="right"))
            yield f"row {row}, column {column}: token {token - int(offsets[row])} {problem}"


def _draws_outside(signals: Signals, header: ShardHeader) -> Bools:
    """Tokens without draws, or whose draws all come from an existing tail and are not ids of the support."""
    n_T, draws = signals.topk_n_T, signals.draws
    good_T = np.ones(len(n_T), np.bool_)
    if draws is None or not len(draws.ids_D):
        return good_T
    token_D, token_N = np.repeat(np.arange(len(n_T)), draws.n_T), np.repeat(np.arange(len(n_T)), n_T)
    # One number for each pair of token and id, so that one call compares all tokens.
    in_support_D = np.isin(token_D * header.vocab_size + draws.ids_D, token_N * header.vocab_size + signals.topk_ids_N)
    has_tail_T = np.isfinite(signals.tail_logmass_T)
    good_T[token_D[in_support_D | ~np.isfinite(draws.logprobs_D) | ~has_tail_T[token_D]]] = False
    return good_T


def _check_scalars(rows: Sequence[Row], signals: Signals, offsets: Int64, header: ShardHeader) -> Iterator[str]:
    tolerance = F32_TOLERANCE if header.codec == "topk-f32" else U8_SCALAR_TOLERANCE
    for number, row in enumerate(rows):
        start, stop = int(offsets[number]), int(offsets[number + 1])
        if start == stop:
            continue
        for column, mean in scalars_of(signals.slice(start, stop)).items():
            # Not `>`: nan must fail too.
            if not abs(row[column] - mean) <= tolerance * max(1.0, abs(mean)):
                yield f"row {number}, column {column} is {row[column]:.4g}, the chain's tokens have {mean:.4g}"
                return


def _logprob_tolerance(sampled_T: npt.NDArray[np.float64], codec: str) -> npt.NDArray[np.float64]:
    """How far a stored logprob may be from the sampled token's own, in nats.

    One code of `topk-u8` at logprob -32 r^2 covers +-32 r/255 nats, r from 0 to 1; renormalisation and the 10 mantissa
    bits of sampled_logprob add a little. Below the code's range anything is accepted.
    """
    if codec == "topk-f32":
        return np.full(len(sampled_T), F32_TOLERANCE)
    depth_T = np.clip(-sampled_T, 0, None) / LOGPROB_RANGE_NATS
    return np.where(depth_T > 0.95, np.inf, 0.06 + 0.16 * np.sqrt(np.minimum(depth_T, 1)))


def _prompt_id_fits(row: Row) -> bool:
    messages = [Message(message["role"], message["content"]) for message in row["messages"]]
    return bool(row["prompt_id"] == prompt_id_of(messages))


def _chain_id_fits(row: Row) -> bool:
    return bool(row["chain_id"] == chain_id_of(row["prompt_token_ids"], row["token_ids"]))


def _is_json_object(row: Row) -> bool:
    try:
        return isinstance(json.loads(row["metadata"]), dict)
    except ValueError:
        return False


def _reasoning_end_fits(row: Row) -> bool:
    return row["reasoning_end"] is None or 0 <= row["reasoning_end"] <= len(row["token_ids"])


def _num_reasoning_fits(row: Row) -> bool:
    expected = row["num_tokens"] if row["reasoning_end"] is None else row["reasoning_end"]
    return bool(row["num_reasoning_tokens"] == expected)
