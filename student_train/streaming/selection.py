"""A frozen selection: one row a chain, where it lies, how long it is and what it weighs. The format of
`selection.parquet`.

R selected chains, G row groups that hold some of them
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from schemas.records import Float32, Int32
from shared.errors import ConfigError, CorruptError, DataError
from shared.files import atomic_path
from shared.storage import Location, location

SELECTION_FORMAT = 1
METADATA_KEY = b"stillroom-selection"
ID_CHARS = 32
KEY_CHARS = 16

UInt64 = npt.NDArray[np.uint64]

SCHEMA = pa.schema(
    [
        pa.field("cache", pa.int16(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row_in_group", pa.int32(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PinnedCache(_Frozen):
    """A cache as it was when the selection was frozen."""

    root: str
    weight: float
    chains_version: int
    verdicts_version: int


class SelectionHeader(_Frozen):
    """What was asked, of which versions, and what was found."""

    format_version: int = SELECTION_FORMAT
    caches: list[PinnedCache]
    where: str | None
    weight: str | None
    max_chains: int | None
    text: str | None = None
    """None: token ids and distributions of the caches. Else the folder of retokenised text beside the selection."""
    num_chains: int
    num_prompt_tokens: int
    num_tokens: int
    num_zero_weight: int
    """Chains left out because their weight is 0."""
    num_empty: int
    """Chains left out because they have no completion or no prompt token."""
    teacher_fingerprints: list[str]
    tokenizer_fingerprints: list[str]
    """One, unless the rows were selected for their text."""
    template_fingerprints: list[str]
    codecs: list[str]
    vocab_size: int
    """Every token id and stored id is below it."""
    max_support: int
    """Entries a token's stored distribution has at most; 0 for text."""
    draws: int = 0
    """Draws that every shard holds of a token whose support was cut short; 0: not every shard holds any."""
    temperatures: list[float] = []
    """Temperatures whose log-partition every shard holds, ascending."""
    hash: str = ""
    """Of the rows and of everything above except where the caches lie."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A frozen selection. Rows are ordered by group; file paths of a group: `path_of`.

    group_R int32, row_in_group_R int32, key_R uint64 (the first 16 hex digits of sample_id), num_prompt_R int32,
    num_tokens_R int32 (completion), weight_R float32; cache_G int32, file_G int32 (index into files), row_group_G
    int32.
    """

    header: SelectionHeader
    folders: list[Location]
    files: list[str]
    cache_G: Int32
    file_G: Int32
    row_group_G: Int32
    group_R: Int32
    row_in_group_R: Int32
    key_R: UInt64
    num_prompt_R: Int32
    num_tokens_R: Int32
    weight_R: Float32

    @property
    def num_chains(self) -> int:
        return len(self.group_R)

    @property
    def is_text(self) -> bool:
        """Whether rows are retokenised text, without distributions."""
        return self.header.text is not None

    def path_of(self, group: int) -> Location:
        """The file that row group number `group` lies in."""
        return self.folders[int(self.cache_G[group])] / self.files[int(self.file_G[group])]

    def where(self, group: int) -> str:
        """Names a row group in an error."""
        return f"{self.path_of(group)}: row group {self.row_group_G[group]}"


def totals_of(rows: pa.Table) -> dict[str, int]:
    """The counts of a header that follow from its rows."""
    return {
        "num_chains": rows.num_rows,
        "num_prompt_tokens": int(rows.column("num_prompt_tokens").to_numpy().sum(dtype=np.int64)),
        "num_tokens": int(rows.column("num_tokens").to_numpy().sum(dtype=np.int64)),
    }


def write_selection(path: Path, rows: pa.Table, header: SelectionHeader) -> Selection:
    """Writes rows (SCHEMA, ordered by cache, file, row group, row) and header, hash filled in, to `path`."""
    rows = rows.cast(SCHEMA)
    selection = _selection(path, rows.column, header, None)
    selection = replace(selection, header=header.model_copy(update={"hash": _hash(selection)}))
    table = rows.replace_schema_metadata({METADATA_KEY: selection.header.model_dump_json().encode()})
    with atomic_path(path) as temp:
        pq.write_table(table, temp, compression="zstd", write_page_checksum=True)
    return selection


def load_selection(path: Path, roots: Sequence[Location] | None = None) -> Selection:
    """Reads a frozen selection; `roots` says where its caches lie now, None takes where they lay.

    Raises DataError where there is none or a newer program wrote it, CorruptError when it is not what was written.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: a run freezes its selection when it starts")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["file"]) as file:
            header = SelectionHeader.model_validate_json((file.schema_arrow.metadata or {})[METADATA_KEY])
            if header.format_version > SELECTION_FORMAT:
                raise DataError(
                    f"{path} has format {header.format_version}, above {SELECTION_FORMAT}: upgrade this program"
                )
            if roots is not None and len(roots) != len(header.caches):
                raise ConfigError(f"{path} selects from {len(header.caches)} caches, {len(roots)} were named")

            def column(name: str) -> pa.ChunkedArray:
                # One at a time, as the strings are most of the bytes.
                return file.read(columns=[name], use_threads=False).column(0)

            selection = _selection(path, column, header, roots)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptError(f"{path} is not a readable selection: {str(error).strip().splitlines()[0]}") from error
    if _hash(selection) != header.hash:
        raise CorruptError(f"{path} does not have the hash that its header names: it was changed after it was frozen")
    return selection


def keys_of(sample_ids: pa.ChunkedArray, where: str) -> UInt64:
    """uint64 [R]: the first 16 hex digits of each sample id. Raises CorruptError for ids that are not 32 hex digits."""
    array = _array(sample_ids)
    if not len(array):
        return np.zeros(0, np.uint64)
    try:
        fixed = array.cast(pa.binary()).cast(pa.binary(ID_CHARS))
    except pa.ArrowException as error:
        raise CorruptError(f"{where}: a sample_id does not have 32 characters") from error
    start = fixed.offset * ID_CHARS
    text_R32 = np.frombuffer(fixed.buffers()[1], np.uint8)[start : start + len(array) * ID_CHARS]
    nibbles_R16 = _NIBBLE[text_R32.reshape(len(array), ID_CHARS)[:, :KEY_CHARS]]
    if int(nibbles_R16.max()) > 15:
        raise CorruptError(f"{where}: a sample_id holds characters that are not hex digits")
    bytes_R8 = nibbles_R16[:, 0::2] << 4 | nibbles_R16[:, 1::2]
    return np.ascontiguousarray(bytes_R8).view(">u8")[:, 0].astype(np.uint64)


def _selection(
    path: Path, column: Callable[[str], pa.ChunkedArray], header: SelectionHeader, roots: Sequence[Location] | None
) -> Selection:
    places = list(roots) if roots is not None else [location(cache.root) for cache in header.caches]
    folders: list[Location] = [root / "chains" for root in places]
    if header.text is not None:
        folders = [path.parent / header.text for _ in places]
    cache_R, row_group_R = _numbers(column("cache")), _numbers(column("row_group"))
    names = _array(column("file").cast(pa.dictionary(pa.int32(), pa.string())).unify_dictionaries())
    # Rows come ordered by file and row group, so one begins wherever a number changes.
    file_changes_R = _changes(cache_R) | _changes(names.indices.to_numpy())
    changes_R = file_changes_R | _changes(row_group_R)
    starts_G = np.flatnonzero(changes_R)
    return Selection(
        header=header,
        folders=folders,
        files=names.take(pa.array(np.flatnonzero(file_changes_R))).to_pylist(),
        cache_G=cache_R[starts_G].astype(np.int32),
        file_G=(np.cumsum(file_changes_R) - 1)[starts_G].astype(np.int32),
        row_group_G=row_group_R[starts_G],
        group_R=np.cumsum(changes_R, dtype=np.int32) - np.int32(1),
        row_in_group_R=_numbers(column("row_in_group")),
        key_R=keys_of(column("sample_id"), str(path)),
        num_prompt_R=_numbers(column("num_prompt_tokens")),
        num_tokens_R=_numbers(column("num_tokens")),
        weight_R=_numbers(column("weight")),
    )


def _changes(numbers_R: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    changes_R = np.ones(len(numbers_R), bool)
    changes_R[1:] = numbers_R[1:] != numbers_R[:-1]
    return changes_R


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    return np.asarray(_array(column).to_numpy(zero_copy_only=False))


def _nibbles() -> npt.NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    for value, digit in enumerate(b"0123456789abcdef"):
        table[digit] = value
    return table


_NIBBLE = _nibbles()


def _array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _hash(selection: Selection) -> str:
    """Of the header except where the caches lie, and of all that the selection holds in memory."""
    digest = hashlib.blake2b(digest_size=16)
    about: dict[str, Any] = selection.header.model_dump(
        mode="json", exclude={"hash": True, "caches": {"__all__": {"root"}}}
    )
    digest.update(json.dumps([about, selection.files], sort_keys=True).encode())
    groups = (selection.cache_G, selection.file_G, selection.row_group_G, selection.group_R, selection.row_in_group_R)
    chains = (selection.key_R, selection.num_prompt_R, selection.num_tokens_R, selection.weight_R)
    for array in (*groups, *chains):
        digest.update(array.tobytes())
    return digest.hexdigest()
