"""Reads a feature set: the states and attention that a teacher had at the tokens of a cache's chains.

    states = FeatureSet.open("runs/demo/cache")
    row = states.read([sample_id])[sample_id]
    logits_PV = states.head().logits(row.hidden_PD)         # of the completion tokens row.positions_P

Needs numpy and pyarrow only. Rows are found by sample_id: chains may move to other shards, features stay valid.

Shape legend: P stored positions of a chain, D channels, R coefficients, V vocabulary, M keys per query.
"""

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache import tensors
from stillroom.cache.catalog import Catalog, DataFile, Table, manifest_problem
from stillroom.cache.feature_codec import (
    Attention,
    Basis,
    VectorCodec,
    attention_token_bytes,
    decode_attention,
)
from stillroom.cache.shards import open_registered, read_row_group
from stillroom.errors import CorruptError, DataError, require_version
from stillroom.schema.features import (
    FEATURE_SCHEMA,
    FEATURES_METADATA_KEY,
    FEATURES_VERSION,
    PAYLOADS,
    FeatureHeader,
    SetManifest,
    StoredVectors,
)
from stillroom.schema.records import Float32, Int32
from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import Location, location, matching

SETS_FOLDER = "feature_sets"
NUM_KEPT_GROUPS = 4
"""Row groups kept in memory: a stream of chains in stored order reads each once."""
COLUMNS = FEATURE_SCHEMA.names


@dataclass(frozen=True)
class FeatureRow:
    """One chain's features.

    `positions_P` int32: indices of completion tokens, rising. The state at t is the one whose product with the head is
    the distribution that completion token t was sampled from; the queries of `attention` are at the same place.
    `hidden_PD` float32 after the final norm; `layers` by number of decoder layers passed, before any final norm;
    `attention` by (decoder layer, head), both from 0. What the set does not store is None or empty. Read with
    `expand=False`, states are coefficients [P, R] of the set's bases.
    """

    sample_id: str
    chain_id: str
    positions_P: Int32
    hidden_PD: Float32 | None = None
    layers: dict[int, Float32] = field(default_factory=dict)
    attention: dict[tuple[int, int], Attention] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FeatureParts:
    """What is read of rows: the last hidden state, middle layers by number, attention."""

    hidden: bool
    layers: tuple[int, ...]
    attention: bool


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One chain's features in their codes, a quarter of the bytes of what they decode to; None is not read."""

    sample_id: str
    chain_id: str
    num_context: int
    positions_P: Int32
    hidden: bytes | None
    layers: dict[int, bytes]
    attention: bytes | None
    where: str
    decoder: "RowDecoder"

    def decode(self, first: int = 0, stop: int | None = None, *, expand: bool = True) -> FeatureRow:
        """Features of the stored positions first..stop-1. Without `expand` states stay coefficients of the bases.

        Raises CorruptError naming file and row if what is stored contradicts the set.
        """
        return self.decoder.decode(self, first, len(self.positions_P) if stop is None else stop, expand=expand)


class RowDecoder:
    """Decodes rows of one set, in any thread."""

    def __init__(self, manifest: SetManifest, codecs: Mapping[str, VectorCodec]) -> None:
        self.manifest, self.codecs = manifest, codecs

    def row(
        self,
        keys: Mapping[str, Any],
        positions_P: Int32,
        payloads: Mapping[str, bytes | None],
        where: str,
        layers: Sequence[int] | None = None,
    ) -> StoredRow:
        """The row with these `keys` (sample_id, chain_id, num_context) and those columns that were read; of the layers
        all or some. Raises CorruptError if the columns contradict the set.
        """
        num_positions, num_context = len(positions_P), int(keys["num_context"])
        for name, token_bytes in self._token_bytes(num_context).items():
            data = payloads.get(name)
            if name in payloads and (data is not None) != bool(token_bytes):
                held = "is null" if data is None else "holds data"
                raise CorruptError(f"{where}: column {name} {held}, unlike its set")
            if data is not None and len(data) != num_positions * token_bytes:
                raise CorruptError(
                    f"{where}: column {name}: {len(data)} bytes, {num_positions * token_bytes} expected for "
                    f"{num_positions} positions"
                )
        found, start, data = {}, 0, payloads.get("layers")
        for one in self.manifest.layers if data is not None else []:
            assert data is not None
            assert one.layer is not None
            # Layers lie one behind the other, without offsets: those that are not read have to be counted too.
            stop = start + num_positions * self.codecs[one.name].token_bytes
            if layers is None or one.layer in layers:
                found[one.layer] = data[start:stop]
            start = stop
        return StoredRow(
            sample_id=keys["sample_id"],
            chain_id=keys["chain_id"],
            num_context=num_context,
            positions_P=positions_P,
            hidden=payloads.get("hidden"),
            layers=found,
            attention=payloads.get("attention"),
            where=where,
            decoder=self,
        )

    def decode(self, row: StoredRow, first: int, stop: int, *, expand: bool) -> FeatureRow:
        """See StoredRow.decode."""

        def states(name: str, data: bytes) -> Float32:
            codec = self.codecs[name]
            own = data[first * codec.token_bytes : stop * codec.token_bytes]
            coefficients_PR = codec.coefficients(own, stop - first, f"{row.where}: {name}")
            return codec.expand(coefficients_PR) if expand else coefficients_PR

        attention: dict[tuple[int, int], Attention] = {}
        stored = self.manifest.attention
        if row.attention is not None and stored is not None:
            parts = decode_attention(
                row.attention,
                len(row.positions_P),
                len(stored.heads),
                stored.num_keys,
                row.num_context,
                f"{row.where}: column attention",
            )
            own = slice(first, stop)
            attention = {
                head: Attention(one.keys_PM[own], one.weights_PM[own], one.rest_P[own])
                for head, one in zip(stored.heads, parts, strict=True)
            }
        return FeatureRow(
            row.sample_id,
            row.chain_id,
            row.positions_P[first:stop],
            None if row.hidden is None else states("hidden", row.hidden),
            {layer: states(f"layer{layer}", data) for layer, data in row.layers.items()},
            attention,
        )

    def _token_bytes(self, num_context: int) -> dict[str, int]:
        """Bytes of one stored position in each column, 0 where the set stores nothing."""
        manifest, attention = self.manifest, self.manifest.attention
        return {
            "hidden": 0 if manifest.hidden is None else self.codecs["hidden"].token_bytes,
            "layers": sum(self.codecs[one.name].token_bytes for one in manifest.layers),
            "attention": 0
            if attention is None
            else attention_token_bytes(len(attention.heads), attention.num_keys, num_context),
        }


@dataclass(frozen=True)
class Head:
    """The teacher's output layer: weight_VD float32, bias_V float32 or None."""

    weight_VD: Float32
    bias_V: Float32 | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden_PD: Float32) -> Float32:
        """Logits [P, V] at temperature 1."""
        logits_PV: Float32 = hidden_PD @ self.weight_VD.T
        if self.bias_V is not None:
            logits_PV += self.bias_V
        # In place: of a large vocabulary each copy is gigabytes.
        logits_PV *= np.float32(self.logit_scale)
        if self.softcap is not None:
            logits_PV = np.float32(self.softcap) * np.tanh(logits_PV / np.float32(self.softcap))
        return logits_PV


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    group: int
    row: int


class FeatureSet:
    """One feature set of a cache at one version of its table; may be read from several threads."""

    def __init__(self, catalog: Catalog, manifest: SetManifest, table: Table) -> None:
        self.manifest = manifest
        self.set_id = manifest.set_id
        self.version = table.version
        self._root = catalog.root
        self._table = table
        self._files = [file for file in table.files() if file.path.startswith(f"{self.set_id}/")]
        self._decoder = RowDecoder(manifest, read_codecs(catalog.root, manifest))
        self._places: dict[str, _Place] | None = None
        # It calls _read_group without a lock, or the reads of a distant store would wait for each other. Weak: in a
        # cycle with its cache this would outlive its last use.
        read = functools.partial(type(self)._read_group, weakref.proxy(self))
        self._group = functools.lru_cache(NUM_KEPT_GROUPS)(read)
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, cache: str | Path | ObjectPath | Catalog, set_id: str | None = None, version: int | None = None
    ) -> "FeatureSet":
        """Opens a set by id or name; None is the only one. `version` pins the table.

        Raises DataError if there is no such set, or several and none is named; CorruptError for a damaged one.
        """
        catalog = cache if isinstance(cache, Catalog) else Catalog(location(cache))
        table = catalog.features if version is None else catalog.features_at(version)
        sets = read_sets(catalog.root)
        if table is None or not sets:
            raise DataError(f"{catalog.root} has no features: `teacher-cache features CONFIG` adds them")
        found = [one for one in sets.values() if set_id in (None, one.set_id, one.name)]
        # A dropped set leaves its manifest until its files are deleted.
        held = {file.owner for file in table.files()}
        found = [one for one in found if one.set_id in held] or found
        if len(found) != 1:
            problem = f"no feature set {set_id!r}" if not found else "several feature sets"
            raise DataError(f"{catalog.root} has {problem}: choose one of {', '.join(sorted(sets))}")
        return cls(catalog, found[0], table)

    @property
    def hidden_size(self) -> int:
        """D, the width of the teacher."""
        return self.manifest.hidden_size

    @property
    def stores_hidden(self) -> bool:
        """Whether the last hidden state is stored."""
        return self.manifest.hidden is not None

    @property
    def layers(self) -> tuple[int, ...]:
        """Stored middle layers: layer i is the stream after i decoder layers."""
        return tuple(one.layer for one in self.manifest.layers if one.layer is not None)

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Stored heads as (decoder layer, head)."""
        return () if self.manifest.attention is None else tuple(self.manifest.attention.heads)

    @property
    def num_keys(self) -> int:
        """M, the most attended positions stored per query and head; 0 without attention."""
        return 0 if self.manifest.attention is None else self.manifest.attention.num_keys

    def basis(self, of: int | str) -> Basis | None:
        """The low-rank basis of a layer's number or of "hidden"; None if all channels are stored."""
        return self._decoder.codecs["hidden" if of == "hidden" else f"layer{of}"].basis

    def head(self) -> Head:
        """The teacher's head, read from disk each time. Raises DataError if the set stores no last hidden state."""
        stored = self.manifest.head
        if stored is None:
            raise DataError(f"feature set {self.set_id} stores no last hidden state, and therefore no head")
        read = tensors.read_tensors(self._root / SETS_FOLDER / stored.file)
        weight_VD = read["weight"].astype(np.float32)
        bias_V = read["bias"].astype(np.float32) if "bias" in read else None
        return Head(weight_VD, bias_V, stored.logit_scale, stored.softcap)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._index()

    def __len__(self) -> int:
        return len(self._index())

    def sample_ids(self) -> Iterator[str]:
        """Chains with features, in stored order."""
        return iter(self._index())

    def read(self, sample_ids: Iterable[str], *, expand: bool = True) -> dict[str, FeatureRow]:
        """Features of those of these chains that have any. Without `expand` states stay coefficients of the bases.

        Raises CorruptError naming file and row if what is stored contradicts the set.
        """
        everything = FeatureParts(hidden=True, layers=self.layers, attention=True)
        return {one: row.decode(expand=expand) for one, row in self.read_stored(sample_ids, everything).items()}

    def read_stored(self, sample_ids: Iterable[str], parts: FeatureParts) -> dict[str, StoredRow]:
        """`parts` of those of these chains that have features, to be decoded later. Other columns are not read.

        Raises CorruptError naming file and row if what is stored contradicts the set.
        """
        wanted: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for sample_id in dict.fromkeys(sample_ids):
            place = self._index().get(sample_id)
            if place is not None:
                wanted.setdefault((place.file, place.group), []).append((sample_id, place.row))
        are_read = {"hidden": parts.hidden, "layers": bool(parts.layers), "attention": parts.attention}
        columns = tuple(name for name in COLUMNS if are_read.get(name, True))
        found = {}
        # Row group by row group, in the order on disk, however the chains were asked for.
        for key, rows in sorted(wanted.items()):
            group, where = self._group(*key, columns), f"{self._files[key[0]].path}: row group {key[1]}"
            for sample_id, row in rows:
                found[sample_id] = self._row(group.slice(row, 1), f"{where}: row {row}", parts.layers)
        return found

    def _index(self) -> dict[str, _Place]:
        # The whole build under the lock: a second thread would otherwise read every file's ids again.
        with self._lock:
            if self._places is None:
                places: dict[str, _Place] = {}
                for number, file in enumerate(self._files):
                    with self._opened(file) as parquet:
                        for group in range(parquet.num_row_groups):
                            ids = read_row_group(parquet, group, ["sample_id"], file.path).column(0).to_pylist()
                            places.update({one: _Place(number, group, row) for row, one in enumerate(ids)})
                # Only when it is whole: a file that cannot be read must not leave half an index behind.
                self._places = places
            return self._places

    def _read_group(self, number: int, group: int, columns: tuple[str, ...]) -> pa.Table:
        file = self._files[number]
        with self._opened(file) as parquet:
            return read_row_group(parquet, group, columns, file.path)

    def _opened(self, file: DataFile) -> pq.ParquetFile:
        parquet, header = open_features(self._table.path_of(file))
        if header.constants != self.manifest.constants:
            parquet.close()
            raise CorruptError(f"features/{file.path} was written with other scales than those of set {self.set_id}")
        return parquet

    def _row(self, row: pa.Table, where: str, layers: Sequence[int]) -> StoredRow:
        (keys,) = row.select(["sample_id", "chain_id", "num_context"]).to_pylist()
        # A copy: a view would keep the whole row group in memory.
        positions_P = row.column("positions")[0].values.to_numpy().astype(np.int32)
        payloads = {name: _bytes_of(row, name) for name in PAYLOADS if name in row.column_names}
        return self._decoder.row(keys, positions_P, payloads, where, layers)


def read_sets(root: Location) -> dict[str, SetManifest]:
    """Manifests of a cache's feature sets by id. Raises CorruptError naming one that cannot be read."""
    found = {}
    # Sets are folders, heads are files beside them.
    for folder in matching(root / SETS_FOLDER, "*_*"):
        path = folder / "manifest.json"
        if not path.exists():
            # Its constants are there and its first worker died, or is at work.
            continue
        try:
            manifest = SetManifest.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"{path} is not the manifest of a feature set: {manifest_problem(error)}") from error
        require_version(str(path), manifest.format_version, FEATURES_VERSION)
        found[manifest.set_id] = manifest
    return found


def open_features(path: Location) -> tuple[pq.ParquetFile, FeatureHeader]:
    """Opens a file of the table `features` with page checksums verified. Raises CorruptError, or DataError for a newer
    format.
    """
    file = open_registered(path)
    raw = (file.schema_arrow.metadata or {}).get(FEATURES_METADATA_KEY)
    try:
        header = FeatureHeader.model_validate_json(raw or b"")
        require_version(str(path), header.format_version, FEATURES_VERSION)
    except ValueError as error:
        file.close()
        raise CorruptError(f"{path} has no header of features that can be read") from error
    except DataError:
        file.close()
        raise
    return file, header


def set_folder(root: Location, set_id: str) -> Location:
    """Where a set's manifest and constants lie."""
    return root / SETS_FOLDER / set_id


def read_codecs(root: Location, manifest: SetManifest) -> dict[str, VectorCodec]:
    """Codecs by name: "hidden", "layer7", ... Raises CorruptError if the constants are missing or damaged."""
    path = set_folder(root, manifest.set_id) / f"constants-{manifest.constants}.safetensors"
    return codecs_of(manifest, tensors.read_tensors(path), str(path))


def codecs_of(manifest: SetManifest, read: Mapping[str, tensors.Array], where: str) -> dict[str, VectorCodec]:
    """The codecs that constants make. Raises CorruptError if one is missing."""
    found = {}
    for stored in stored_vectors(manifest):
        parts = [read[key] for part in ("mean", "vectors", "encode") if (key := f"{stored.name}.{part}") in read]
        basis = Basis(*parts) if len(parts) == 3 else None
        if f"{stored.name}.scale" not in read or (basis is None) != (stored.rank is None):
            raise CorruptError(f"{where} lacks the scales or the basis of {stored.name}: restore it from a copy")
        found[stored.name] = VectorCodec(stored.bits, read[f"{stored.name}.scale"], basis)
    return found


def constants_of(codecs: dict[str, VectorCodec]) -> dict[str, tensors.Array]:
    """The tensors that `read_codecs` reads."""
    found: dict[str, tensors.Array] = {}
    for name, codec in codecs.items():
        found[f"{name}.scale"] = codec.scale_R
        if codec.basis is not None:
            found[f"{name}.mean"] = codec.basis.mean_D
            found[f"{name}.vectors"] = np.ascontiguousarray(codec.basis.vectors_RD)
            found[f"{name}.encode"] = np.ascontiguousarray(codec.basis.encode_DR)
    return found


def stored_vectors(manifest: SetManifest) -> list[StoredVectors]:
    """Everything that is stored as vectors, the last hidden state first."""
    return [*([manifest.hidden] if manifest.hidden is not None else []), *manifest.layers]


def vectors_token_bytes(manifest: SetManifest) -> int:
    """Bytes of all states of one stored position."""
    return sum(vector_token_bytes(manifest.hidden_size, one.rank, one.bits) for one in stored_vectors(manifest))


def vector_token_bytes(hidden_size: int, rank: int | None, bits: int) -> int:
    """Bytes of one state."""
    num_coefficients = hidden_size if rank is None else rank
    return VectorCodec(bits, np.ones(num_coefficients, np.float32)).token_bytes


def _bytes_of(row: pa.Table, name: str) -> bytes | None:
    value: bytes | None = row.column(name)[0].as_py()
    return value
