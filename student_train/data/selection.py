"""A frozen selection: one row per chain, where it lies, how long it is and what it weighs. The format of
`selection.parquet`.

R selected chains, G row groups that hold some of them
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from stillroom.errors import ConfigError, CorruptError, DataError, first_line, require_version
from stillroom.schema.records import Float32, Int32
from stillroom.storage.paths import Location, atomic_path, location

if TYPE_CHECKING:
    from student_train.data.steps import Examples

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


class Projection(_Frozen):
    """How well distributions came over into the student's vocabulary. Counts are of the selection's chains."""

    num_aligned: int
    """Chains with distributions; the others are learnt as text."""
    num_changed: int
    """Chains that the student's tokenizer cannot spell: it changes their bytes, or they are not UTF-8."""
    num_respelled: int
    """Chains whose tokens do not spell the text that the cache holds."""
    num_common: int
    """Student tokens that begin where a teacher token does."""
    num_teacher_tokens: int
    """Tokens of the teacher in the aligned chains."""
    mass: float
    """Mean probability of the stored student ids at those tokens."""
    special: list[tuple[str, str | None]]
    """Special tokens of the teacher and what the student writes for them; None is their text."""


class Prepared(_Frozen):
    """How rows differ from those of the caches: rewritten prompts, mixed teachers, pairs of chains."""

    identity: str
    """Hash of the settings that they were prepared by."""
    num_rewritten: int = 0
    """Chains whose prompt the student reads differently."""
    num_reached: int = 0
    """Chains that one of the further teachers has scored with a weight above 0."""
    num_mixed: int = 0
    """Chains that several teachers scored."""
    num_pairs: int = 0
    """Rows that hold a right and a wrong chain of one prompt; 0: every row is one chain."""
    num_unpaired: int = 0
    """Chains left out because no chain of the other kind has their prompt, or both together exceed a pack."""


class SelectionHeader(_Frozen):
    """The request, the versions it was answered at, and what was found."""

    format_version: int = SELECTION_FORMAT
    caches: list[PinnedCache]
    where: str | None
    weight: str | None
    max_chains: int | None
    text: str | None = None
    """None: token ids and distributions of the caches. Else the folder of retokenised chains beside the selection."""
    projection: Projection | None = None
    """Of retokenised chains with distributions."""
    prepared: Prepared | None = None
    """Rows lie in the folder `text` in the teacher's tokens."""
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
    kept_ids: str | None = None
    """Ids of the cache that the student's cut vocabulary keeps (kept_ids.py); ids here are then the student's."""
    hash: str = ""
    """Of the rows and of everything above except where the caches lie."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A frozen selection. Rows are ordered by group; file paths of a group: `path_of`.

    group_R int32, row_in_group_R int32, key_R uint64 (the first 16 hex digits of sample_id), num_prompt_R int32,
    num_tokens_R int32 (completion), weight_R float32; cache_G int32, file_G int32 (index into files), row_group_G
    int32. `examples`: what chains are split into; None leaves them whole.
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
    examples: "Examples | None" = None

    @property
    def num_chains(self) -> int:
        return len(self.group_R)

    @property
    def is_text(self) -> bool:
        """Whether rows are retokenised text, without distributions."""
        return self.is_retokenised and not self.is_projected

    @property
    def is_projected(self) -> bool:
        """Whether rows are retokenised chains with distributions over the student's ids."""
        return self.header.projection is not None

    @property
    def is_retokenised(self) -> bool:
        """Whether rows lie in the run's folder, in the student's own tokens."""
        return self.header.text is not None and self.header.prepared is None

    @property
    def has_pairs(self) -> bool:
        """Whether each row holds a right and a wrong chain of one prompt."""
        return self.header.prepared is not None and self.header.prepared.num_pairs > 0

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
    # Hashed over what a reader holds in memory, so that the check on loading covers decoding too.
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
        # `file` as a dictionary: one path stands in very many rows.
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["file"]) as file:
            header = SelectionHeader.model_validate_json((file.schema_arrow.metadata or {})[METADATA_KEY])
            require_version(str(path), header.format_version, SELECTION_FORMAT)
            if roots is not None and len(roots) != len(header.caches):
                raise ConfigError(f"{path} selects from {len(header.caches)} caches, {len(roots)} were given")

            def column(name: str) -> pa.ChunkedArray:
                # One at a time, as the strings are most of the bytes.
                return file.read(columns=[name], use_threads=False).column(0)

            selection = _selection(path, column, header, roots)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptError(f"{path} is not a readable selection: {first_line(error)}") from error
    if _hash(selection) != header.hash:
        raise CorruptError(f"{path} does not match the hash in its header: it was changed after it was frozen")
    return selection


def keys_of(sample_ids: pa.ChunkedArray, where: str) -> UInt64:
    """uint64 [R]: the first 16 hex digits of each sample id. Raises CorruptError for ids that are not 32 hex digits."""
    array = _array(sample_ids)
    if not len(array):
        return np.zeros(0, np.uint64)
    try:
        # Fixed width makes all ids one buffer: keys of millions of rows without a Python string each.
        fixed = array.cast(pa.binary()).cast(pa.binary(ID_CHARS))
    except pa.ArrowException as error:
        raise CorruptError(f"{where}: a sample_id does not have 32 characters") from error
    # The array may be a slice of a longer buffer.
    start = fixed.offset * ID_CHARS
    text_R32 = np.frombuffer(fixed.buffers()[1], np.uint8)[start : start + len(array) * ID_CHARS]
    nibbles_R16 = _NIBBLE[text_R32.reshape(len(array), ID_CHARS)[:, :KEY_CHARS]]
    # _NIBBLE is 255 for all bytes that are not a lower-case hex digit.
    if int(nibbles_R16.max()) > 15:
        raise CorruptError(f"{where}: a sample_id holds characters that are not hex digits")
    bytes_R8 = nibbles_R16[:, 0::2] << 4 | nibbles_R16[:, 1::2]
    # Big-endian: the first hex digit is the highest, as in int(digits, 16).
    return np.ascontiguousarray(bytes_R8).view(">u8")[:, 0].astype(np.uint64)


def _selection(
    path: Path, column: Callable[[str], pa.ChunkedArray], header: SelectionHeader, roots: Sequence[Location] | None
) -> Selection:
    places = list(roots) if roots is not None else [location(cache.root) for cache in header.caches]
    folders: list[Location] = [root / "chains" for root in places]
    if header.text is not None:
        folders = [path.parent / header.text for _ in places]
    cache_R, row_group_R = _numbers(column("cache")), _numbers(column("row_group"))
    # Chunks of a dictionary column may number the same file differently.
    names = _array(column("file").cast(pa.dictionary(pa.int32(), pa.string())).unify_dictionaries())
    # Rows come ordered by file and row group, so one begins wherever a number changes.
    file_changes_R = changes(cache_R) | changes(names.indices.to_numpy())
    changes_R = file_changes_R | changes(row_group_R)
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


def changes(numbers_R: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """bool [R]: whether a number differs from the one before it; the first does."""
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
    # Without roots: a cache that was moved is the same selection.
    about: dict[str, Any] = selection.header.model_dump(
        mode="json", exclude={"hash": True, "caches": {"__all__": {"root"}}}
    )
    for name in ("projection", "prepared", "kept_ids"):
        if about[name] is None:
            # Selections that were frozen before there was any keep their hash.
            del about[name]
    digest.update(json.dumps([about, selection.files], sort_keys=True).encode())
    groups = (selection.cache_G, selection.file_G, selection.row_group_G, selection.group_R, selection.row_in_group_R)
    chains = (selection.key_R, selection.num_prompt_R, selection.num_tokens_R, selection.weight_R)
    for array in (*groups, *chains):
        digest.update(array.tobytes())
    return digest.hexdigest()
