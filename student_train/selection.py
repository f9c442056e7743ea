"""A frozen selection: one row a chain, where it lies, how long it is and what it weighs. The format of
`selection.parquet`.

R selected chains, G row groups that hold some of them
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.records import Float32, Int32
from shared.errors import ConfigError, CorruptError, DataError
from shared.files import atomic_path

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
    folders: list[Path]
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

    def path_of(self, group: int) -> Path:
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
    rows = rows.cast(SCHEMA).combine_chunks()
    header = header.model_copy(update={"hash": _hash(rows, header)})
    table = rows.replace_schema_metadata({METADATA_KEY: header.model_dump_json().encode()})
    with atomic_path(path) as temp:
        pq.write_table(table, temp, compression="zstd", write_page_checksum=True)
    return _selection(path, rows, header, None)


def load_selection(path: Path, roots: Sequence[Path] | None = None) -> Selection:
    """Reads a frozen selection; `roots` says where its caches lie now, None takes where they lay.

    Raises DataError where there is none or a newer program wrote it, CorruptError when it is not what was written.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: a run freezes its selection when it starts")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        header = SelectionHeader.model_validate_json((table.schema.metadata or {})[METADATA_KEY])
        rows = table.select(SCHEMA.names).replace_schema_metadata(None).cast(SCHEMA).combine_chunks()
    except (pa.ArrowException, OSError, KeyError, ValidationError) as error:
        raise CorruptError(f"{path} is not a readable selection: {str(error).strip().splitlines()[0]}") from error
    if header.format_version > SELECTION_FORMAT:
        raise DataError(f"{path} has format {header.format_version}, this program reads {SELECTION_FORMAT}: upgrade it")
    if _hash(rows, header) != header.hash:
        raise CorruptError(f"{path} does not have the hash that its header names: it was changed after it was frozen")
    if roots is not None and len(roots) != len(header.caches):
        raise ConfigError(f"{path} selects from {len(header.caches)} caches, {len(roots)} were named")
    return _selection(path, rows, header, roots)


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


def _selection(path: Path, rows: pa.Table, header: SelectionHeader, roots: Sequence[Path] | None) -> Selection:
    places = list(roots) if roots is not None else [Path(cache.root) for cache in header.caches]
    folders = (
        [path.parent / header.text] * len(places) if header.text is not None else [root / "chains" for root in places]
    )
    encoded = _array(rows.column("file")).dictionary_encode()
    cache_R, file_R = rows.column("cache").to_numpy(), encoded.indices.to_numpy()
    group_rows_R = rows.column("row_group").to_numpy()
    # Rows come ordered by group, so a group starts wherever one of the three numbers changes.
    changes_R = np.ones(len(cache_R), bool)
    changes_R[1:] = (np.diff(cache_R) != 0) | (np.diff(file_R) != 0) | (np.diff(group_rows_R) != 0)
    starts_G = np.flatnonzero(changes_R)
    return Selection(
        header=header,
        folders=folders,
        files=encoded.dictionary.to_pylist(),
        cache_G=cache_R[starts_G].astype(np.int32),
        file_G=file_R[starts_G].astype(np.int32),
        row_group_G=group_rows_R[starts_G],
        group_R=(np.cumsum(changes_R) - 1).astype(np.int32),
        row_in_group_R=rows.column("row_in_group").to_numpy(),
        key_R=keys_of(rows.column("sample_id"), str(path)),
        num_prompt_R=rows.column("num_prompt_tokens").to_numpy(),
        num_tokens_R=rows.column("num_tokens").to_numpy(),
        weight_R=rows.column("weight").to_numpy(),
    )


def _nibbles() -> npt.NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    for value, digit in enumerate(b"0123456789abcdef"):
        table[digit] = value
    return table


_NIBBLE = _nibbles()


def _array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _hash(rows: pa.Table, header: SelectionHeader) -> str:
    digest = hashlib.blake2b(digest_size=16)
    about: dict[str, Any] = header.model_dump(mode="json", exclude={"hash": True, "caches": {"__all__": {"root"}}})
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name in SCHEMA.names:
        array = _array(rows.column(name))
        if not pa.types.is_string(array.type):
            digest.update(array.to_numpy(zero_copy_only=False).tobytes())
            continue
        encoded = array.dictionary_encode()
        digest.update("\n".join(encoded.dictionary.to_pylist()).encode())
        digest.update(encoded.indices.to_numpy().tobytes())
    return digest.hexdigest()
