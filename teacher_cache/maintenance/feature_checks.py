"""Features in `verify`, `gc`, `copy` and quarantine: checks of files and sets, and removal of rows without a chain.

sets       manifest, constants and head are there, and their bytes have the hashes in their names
files      hash, header, schema, page checksums; each belongs to the set whose folder holds it
rows       decoding, positions within the chain, one row per chain and set; the chain is visible, with these tokens,
           and in the shard that the header names if that is visible too
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stillroom.cache.catalog import HASH_CHARS, Catalog, DataFile, Table, check_hash
from stillroom.cache.features import (
    SETS_FOLDER,
    FeatureRow,
    RowDecoder,
    open_features,
    read_codecs,
    read_sets,
    set_folder,
)
from stillroom.cache.shards import open_shard, read_row_group
from stillroom.errors import CorruptError, StillroomError
from stillroom.schema.features import FEATURE_SCHEMA, PAYLOADS, FeatureHeader, SetManifest
from stillroom.storage.paths import Location, sha256_of
from teacher_cache.maintenance.replacing import keep_rows
from teacher_cache.maintenance.shard_checks import Damage, without_path


@dataclass(frozen=True, slots=True)
class ChainAt:
    """A visible chain: what a row of features must agree with."""

    chain_id: str
    file: str
    num_tokens: int
    num_context: int


Chains = Mapping[str, ChainAt]


def visible_chains(catalog: Catalog) -> dict[str, ChainAt]:
    """Every visible chain by sample id. Raises CorruptError for a shard that cannot be read."""
    found: dict[str, ChainAt] = {}
    columns = ["sample_id", "chain_id", "num_tokens", "num_prompt_tokens"]
    for file in catalog.chains.files():
        path = catalog.chains.path_of(file)
        parquet, _ = open_shard(path)
        with parquet:
            for group in range(parquet.num_row_groups):
                table = read_row_group(parquet, group, columns, str(path))
                for sample_id, chain_id, num, prompt in zip(*(one.to_pylist() for one in table.columns), strict=True):
                    found[sample_id] = ChainAt(chain_id, file.path, num, num + prompt)
    return found


def verify_sets(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """Yields file and problem of each set whose constants or head are not what was written."""
    try:
        sets = read_sets(catalog.root)
    except StillroomError as error:
        yield SETS_FOLDER, str(error)
        return
    for manifest in sets.values():
        parts = [set_folder(catalog.root, manifest.set_id) / f"constants-{manifest.constants}.safetensors"]
        parts += [] if manifest.head is None else [catalog.root / SETS_FOLDER / manifest.head.file]
        for path in parts:
            problem = _named_problem(path)
            if problem is not None:
                remedy = "restore it from a copy, or drop the set (gc --drop-run) and run its pass under another name"
                yield str(path).removeprefix(f"{catalog.root}/"), f"{problem}: {remedy}"


def verify_features(catalog: Catalog, chains: Chains | None) -> Iterator[tuple[str, list[str], Damage | None]]:
    """Yields each file of the table with its problems, if any, and the damage that quarantine can remove.

    `chains` is None if the chains themselves are damaged: then rows are not compared with them.
    """
    table = catalog.features
    if table is None:
        return
    try:
        sets = read_sets(catalog.root)
    except StillroomError:
        # verify_sets says what is wrong; without manifests nothing can be decoded.
        return
    seen: dict[str, set[str]] = {}
    shards = frozenset(one.file for one in chains.values()) if chains is not None else frozenset()
    for file in table.files():
        in_set = seen.setdefault(file.owner, set())
        checker = _FileChecker(catalog, table, file, sets.get(file.owner), chains, shards, in_set)
        checker.check()
        if checker.problems:
            damage = Damage("features", file, tuple(checker.problems), sorted(checker.sound_groups))
            yield f"features/{file.path}", checker.problems, damage if checker.is_damaged else None


class _FileChecker:
    """Checks of one file; `sound_groups` are row groups in which nothing is wrong."""

    def __init__(
        self,
        catalog: Catalog,
        table: Table,
        file: DataFile,
        manifest: SetManifest | None,
        chains: Chains | None,
        shards: frozenset[str],
        seen: set[str],
    ) -> None:
        self._catalog, self._file, self._manifest = catalog, file, manifest
        self._chains, self._shards, self._seen = chains, shards, seen
        self._path = table.path_of(file)
        self.problems: list[str] = []
        self.sound_groups: set[int] = set()
        self.is_damaged = True

    def check(self) -> None:
        try:
            check_hash(self._path)
        except StillroomError as error:
            self._add(error)
        if not self._path.exists():
            return
        try:
            self._check_content()
        except StillroomError as error:
            self._add(error)

    def _add(self, error: StillroomError) -> None:
        self.problems.append(without_path(str(error).removeprefix(": "), self._path))
        # A disk that cannot be read says nothing about the bytes.
        self.is_damaged &= isinstance(error, CorruptError)

    def _check_content(self) -> None:
        if self._manifest is None:
            self.problems.append("belongs to a set without manifest.json: restore it from a copy")
            self.is_damaged = False
            return
        try:
            decoder = RowDecoder(self._manifest, read_codecs(self._catalog.root, self._manifest))
        except StillroomError:
            # verify_sets names the file. The rows are sound: with a copy of it they decode again.
            self.problems.append("cannot be decoded without its set's constants: restore them from a copy")
            self.is_damaged = False
            return
        parquet, header = open_features(self._path)
        with parquet:
            wrong = _header_problem(header, self._manifest)
            if wrong is None and not parquet.schema_arrow.equals(FEATURE_SCHEMA):
                wrong = "schema does not match the table"
            if wrong is not None:
                self.problems.append(wrong)
                return
            if parquet.metadata.num_rows != self._file.num_rows:
                self.problems.append(f"has {parquet.metadata.num_rows} rows, but {self._file.num_rows} were registered")
            for group in range(parquet.num_row_groups):
                try:
                    table = read_row_group(parquet, group, FEATURE_SCHEMA.names, "")
                    self._check_rows(table, decoder, header, f"row group {group}")
                    self.sound_groups.add(group)
                except StillroomError as error:
                    self._add(error)

    def _check_rows(self, table: pa.Table, decoder: RowDecoder, header: FeatureHeader, where: str) -> None:
        rows = table.drop_columns(["positions"]).to_pylist()
        for number, row in enumerate(rows):
            at = f"{where}: row {number}"
            positions_P = table.column("positions")[number].values.to_numpy()
            if not len(positions_P) or positions_P[0] < 0 or (np.diff(positions_P) <= 0).any():
                raise CorruptError(f"{at}, column positions does not rise from 0 or more")
            sample_id = row["sample_id"]
            if sample_id in self._seen:
                raise CorruptError(f"{at}, column sample_id: {sample_id} is visible more than once in this set")
            self._seen.add(sample_id)
            found = decoder.row(row, positions_P, {name: row[name] for name in PAYLOADS}, at).decode()
            if not _is_finite(found):
                raise CorruptError(f"{at} holds states that are not numbers")
            problem = self._chain_problem(found, row["num_context"], header)
            if problem is not None:
                raise CorruptError(f"{at}, column sample_id: {problem}")

    def _chain_problem(self, row: FeatureRow, num_context: int, header: FeatureHeader) -> str | None:
        if self._chains is None:
            return None
        chain = self._chains.get(row.sample_id)
        if chain is None:
            return f"{row.sample_id} is not a visible chain"
        if chain.chain_id != row.chain_id or chain.num_context != num_context:
            return f"{row.sample_id} has other tokens than the chain of that name"
        if int(row.positions_P[-1]) >= chain.num_tokens:
            return f"{row.sample_id} has {chain.num_tokens} tokens, fewer than its positions"
        # The named shard may have been replaced by a copy or a repair; then any shard will do.
        if header.chains_file in self._shards and chain.file != header.chains_file:
            return f"{row.sample_id} is in {chain.file}, not in the shard {header.chains_file} that the header names"
        return None


def drop_chainless(catalog: Catalog, *, dry_run: bool = False, without_run: str | None = None) -> dict[str, int]:
    """Removes rows of features whose chain is not visible or has other tokens; returns their number by file.

    Files stay on disk for older versions. `without_run`: as if that run's chains were gone, for a dry run.
    """
    table = catalog.features
    if table is None:
        return {}
    # Before the chains are read: a features pass commits rows of chains that are there, so these are seen below.
    table.refresh()
    files = table.files()
    catalog.chains.refresh()
    chains = visible_chains(catalog)

    def has_chain(rows: pa.Table) -> list[bool]:
        ids = zip(*(rows.column(name).to_pylist() for name in ("sample_id", "chain_id")), strict=True)
        found = ((chains.get(sample_id), chain_id) for sample_id, chain_id in ids)
        return [
            chain is not None and chain.chain_id == chain_id and not chain.file.startswith(f"{without_run}/")
            for chain, chain_id in found
        ]

    dropped: dict[str, int] = {}
    for file in files:
        parquet, _ = open_features(table.path_of(file))
        with parquet:
            num_kept = sum(has_chain(parquet.read(columns=["sample_id", "chain_id"], use_threads=False)))
        if num_kept < file.num_rows:
            dropped[f"features/{file.path}"] = file.num_rows - num_kept
            if not dry_run:
                keep_rows(catalog.root, table, file, has_chain if num_kept else None)
    return dropped


def _named_problem(path: Location) -> str | None:
    """Whether a file's bytes have the hash in its name."""
    if not path.exists():
        return "is missing"
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    named = path.name.removesuffix(".safetensors").rpartition("-")[2]
    return None if found[:HASH_CHARS] == named else "does not have the bytes that were written"


def _header_problem(header: FeatureHeader, manifest: SetManifest) -> str | None:
    for key, said, meant in (
        ("set_id", header.set_id, manifest.set_id),
        ("constants", header.constants, manifest.constants),
        ("teacher_fingerprint", header.teacher_fingerprint, manifest.teacher.fingerprint),
    ):
        if said != meant:
            return f"has {key} {said} in its header, but its set has {meant}"
    return None


def _is_finite(row: FeatureRow) -> bool:
    states = [*row.layers.values(), *([] if row.hidden_PD is None else [row.hidden_PD])]
    return all(bool(np.isfinite(one).all()) for one in states)
