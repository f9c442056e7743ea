"""The files that make up a cache: Delta tables, run manifests and vocabularies. Only this file imports deltalake.

pyarrow writes the data files; the Delta log only says which of them are visible. A data file is written under a
temporary name, fsynced, renamed to a name that carries its SHA-256, and then committed with an AddAction and the
worker's transaction number. Hence a file is visible whole or not at all, a reader sees one consistent version, and a
file can be checked against its own name wherever it is copied.

    CACHE/chains/<run>/<worker>-<sequence>-<sha256, 32 hex>.parquet     + chains/_delta_log/
    CACHE/verdicts/..., CACHE/failures/...                               likewise
    CACHE/runs/<run_id>.json, CACHE/vocab/<tokenizer fingerprint>.parquet
    CACHE/receipts/                                                      commit markers (stillroom.cache.delta_log)
    CACHE/features/, CACHE/feature_sets/                                 optional (stillroom.cache.features)
"""

import functools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from stillroom.cache.delta_log import CommitMarker, broken_entries, log_problems, write_marker
from stillroom.errors import CacheConflict, CorruptError, DataError, StillroomError, first_line
from stillroom.schema.features import FEATURE_SCHEMA
from stillroom.schema.manifest import RunManifest
from stillroom.schema.tables import FAILURE_SCHEMA, VERDICT_SCHEMA, table_schema
from stillroom.storage.objects import ObjectPath, explained
from stillroom.storage.paths import (
    Location,
    check_reachable,
    delta_options,
    matching,
    require_cache,
    sha256_of,
    sync_file,
    sync_folder,
    write_text_atomic,
)

HASH_CHARS = 32
# The name carries the hash because Delta's add action has no checksum that survives a copy, and a sidecar gets lost.
SHARD_NAME = re.compile(
    rf"^(?P<worker>[A-Za-z0-9_.]+)-(?P<sequence>\d{{6,}})-(?P<hash>[0-9a-f]{{{HASH_CHARS}}})\.parquet$"
)
TWICE_DECODED = re.compile(r"%[0-9A-Fa-f]{2}")
"""deltalake 1.6 decodes such a path twice and does not find it."""
TABLE_CONFIGURATION = {
    # Otherwise checkpoints drop entries older than 30 days, and with them pinned versions.
    "delta.enableExpiredLogCleanup": "false",
    "delta.checkpointInterval": "100",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """One visible file of a table; `path` is relative to the table's folder."""

    path: str
    size_bytes: int
    num_rows: int

    @property
    def owner(self) -> str:
        """The run that wrote it, or the feature set that it belongs to: the first folder of its path."""
        return self.path.partition("/")[0]


class Table:
    """One Delta log and its folder of Parquet files. Shows one version until `refresh`."""

    def __init__(self, folder: Location, version: int | None = None) -> None:
        """Opens an existing table. Raises DataError if there is none, CorruptError if its log cannot be read."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        self.folder = folder
        try:
            self._delta: DeltaTable = DeltaTable(str(folder), storage_options=delta_options(folder))
            # Read before the older version is loaded, which would then be the latest that this handle knows.
            latest = self._delta.version()
            if version is not None and not 0 <= version <= latest:
                raise DataError(f"{folder} has no version {version}: the latest is {latest}")
            if version is not None:
                self._delta.load_as_version(version)
        except TableNotFoundError as error:
            raise DataError(f"{folder} is not a Delta table: use the folder of a cache") from error
        except (DeltaError, OSError, ValueError) as error:
            raise _log_error(folder, error) from error

    @classmethod
    def create(cls, folder: Location, schema: pa.Schema) -> "Table":
        """Opens the table, creating it if needed; safe when several workers do so at once."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        options = delta_options(folder)
        if not DeltaTable.is_deltatable(str(folder), options):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                DeltaTable.create(
                    str(folder), schema, mode="error", configuration=TABLE_CONFIGURATION, storage_options=options
                )
            except DeltaError as error:
                # Another worker may have created it since the check, which is fine.
                if not DeltaTable.is_deltatable(str(folder), options):
                    raise CacheConflict(f"cannot create the table {folder}: {first_line(error)}") from error
        table = cls(folder)
        # A cache of an older version gains the columns of this one.
        table.add_columns(schema)
        return table

    def add_columns(self, schema: pa.Schema) -> None:
        """Adds the nullable columns of a newer format to an older table; its files are unchanged."""
        from deltalake import Field, Schema
        from deltalake.exceptions import DeltaError

        # By name alone: the format never changes a column's type.
        known = {one.name for one in self._delta.schema().fields}
        missing = [one for one in schema if one.name not in known]
        if not missing:
            return
        fields: list[Field] = Schema.from_arrow(pa.schema(missing)).fields
        try:
            self._delta.alter.add_columns(fields)
        except DeltaError as error:
            # Another worker may have been first.
            self.refresh()
            if not {one.name for one in missing} <= {one.name for one in self._delta.schema().fields}:
                raise CacheConflict(f"cannot add columns to {self.folder}: {first_line(error)}") from error

    @property
    def version(self) -> int:
        """The version shown."""
        return self._delta.version()

    def refresh(self) -> None:
        """Moves on to the latest version."""
        from deltalake.exceptions import DeltaError

        try:
            self._delta.update_incremental()
        except (DeltaError, OSError) as error:
            raise _log_error(self.folder, error) from error

    def files(self) -> list[DataFile]:
        """Visible files of this version, ordered by path."""
        # pa.table() would also work, but imports pandas if it is installed: most of a second.
        actions = pa.RecordBatchReader.from_stream(self._delta.get_add_actions(flatten=True)).read_all()
        rows = zip(
            actions.column("path").to_pylist(),
            actions.column("size_bytes").to_pylist(),
            actions.column("num_records").to_pylist(),
            strict=True,
        )
        return sorted((DataFile(path, size, num or 0) for path, size, num in rows), key=lambda file: file.path)

    def path_of(self, file: DataFile) -> Location:
        """Path of a visible file."""
        return self.folder / file.path

    def last_sequence(self, application: str) -> int | None:
        """Number of the last transaction committed by `application`, None before the first."""
        return self._delta.transaction_version(application)

    def commit(
        self, files: Sequence[DataFile], application: str, sequence: int, removed: Sequence[DataFile] = ()
    ) -> None:
        """Makes `files` visible as transaction `sequence` of `application`, on exactly the version last refreshed to.

        Files in `removed` leave the table in the same transaction and stay on disk for older versions. Every file must
        exist with the stated size. Raises CacheConflict if another commit came first (refresh, check again what is
        visible, and retry) or if the sequence is already committed.
        """
        from deltalake import CommitProperties
        from deltalake.exceptions import CommitFailedError, DeltaError
        from deltalake.transaction import RemoveAction, Transaction

        # Taken now: after the refresh below, others may have committed too.
        version = self.version + 1
        last = self.last_sequence(application)
        if last is not None and sequence <= last:
            raise CacheConflict(f"transaction {sequence} of {application} is already committed (last is {last})")
        now_ms = int(time.time() * 1000)
        actions = [
            *(self._add_action(file) for file in files),
            # True: data changes, which readers that follow the log must know.
            *(RemoveAction(file.path, True, now_ms, file.size_bytes, {}) for file in removed),
        ]
        properties = CommitProperties(
            # With retries, two handles could both commit the same rows.
            max_commit_retries=0,
            app_transactions=[Transaction(application, sequence)],
        )
        try:
            self._delta.create_write_transaction(
                # The table's own schema: ours may be older than the one that another program has extended.
                actions,
                mode="append",
                schema=self._delta.schema(),
                commit_properties=properties,
            )
        except CommitFailedError as error:
            raise CacheConflict(f"another commit to {self.folder} came first: {first_line(error)}") from error
        except DeltaError as error:
            if "conflict" in str(error).lower() or "already exists" in str(error).lower():
                raise CacheConflict(f"another commit to {self.folder} came first: {first_line(error)}") from error
            raise
        self.refresh()
        # After the commit: a kill in between leaves an older marker, which proves less but never accuses a whole log.
        write_marker(self.folder, CommitMarker(application, sequence, version))

    def _add_action(self, file: DataFile) -> Any:
        from deltalake.transaction import AddAction

        # A file that was cut by a full disk or a broken upload must not become visible.
        size_bytes = self.path_of(file).stat().st_size
        if size_bytes != file.size_bytes:
            raise CorruptError(f"{self.path_of(file)} has {size_bytes} bytes, {file.size_bytes} were written")
        return AddAction(
            path=file.path,
            size=file.size_bytes,
            partition_values={},
            modification_time=int(time.time() * 1000),
            data_change=True,
            # `files` takes row counts from here, so that no footer has to be opened.
            stats=json.dumps({"numRecords": file.num_rows}),
        )


class Catalog:
    """A cache: its tables, run manifests and vocabularies."""

    def __init__(
        self,
        root: Location,
        chains_version: int | None = None,
        verdicts_version: int | None = None,
    ) -> None:
        """Opens an existing cache, at pinned versions where given.

        Raises DataError if there is none or its store refuses access, StillroomError if the store cannot be reached.
        """
        # First: deltalake would call a cache missing that is there.
        _require_openable(str(root.absolute()))
        require_cache(root)
        self.root = root
        self.chains = Table(root / "chains", chains_version)
        self.verdicts = Table(root / "verdicts", verdicts_version)
        self.failures = Table(root / "failures")

    @functools.cached_property
    def features(self) -> Table | None:
        """The table of hidden states and attention, which most caches do not have."""
        # Opened only when asked for: every reader would pay for it otherwise.
        return Table(self.root / "features") if (self.root / "features" / "_delta_log").is_dir() else None

    def features_at(self, version: int) -> Table | None:
        """The same at a version. Raises DataError if the table has no such version."""
        return None if self.features is None else Table(self.root / "features", version)

    def create_features(self) -> Table:
        """The table of features, created if needed."""
        Table.create(self.root / "features", FEATURE_SCHEMA)
        # The property may remember that there was none.
        self.__dict__.pop("features", None)
        assert self.features is not None
        return self.features

    def tables(self) -> list[Table]:
        """Every table of the cache, chains first."""
        return [
            *(self.chains, self.verdicts, self.failures),
            *([self.features] if self.features is not None else []),
        ]

    @classmethod
    def create(cls, root: Location) -> "Catalog":
        """Opens the cache, creating it if needed."""
        check_reachable(root)
        _require_openable(str(root.absolute()))
        # chains comes last: its log is what makes a folder a cache.
        for name, schema in (
            ("failures", FAILURE_SCHEMA),
            ("verdicts", VERDICT_SCHEMA),
            ("chains", table_schema()),
        ):
            Table.create(root / name, schema)
        return cls(root)

    def runs(self) -> dict[str, RunManifest]:
        """Manifests by run id. Raises CorruptError naming one that cannot be read."""
        found = {}
        for path in matching(self.root / "runs", "*.json"):
            try:
                manifest = RunManifest.model_validate_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CorruptError(f"{path} is not a run manifest: {manifest_problem(error)}") from error
            found[manifest.run_id] = manifest
        return found

    def write_run(self, manifest: RunManifest) -> None:
        """Writes `runs/<run_id>.json` whole."""
        write_text_atomic(self.root / "runs" / f"{manifest.run_id}.json", manifest.model_dump_json(indent=2) + "\n")

    def vocab_path(self, tokenizer_fingerprint: str) -> Location:
        """Path of a tokenizer's vocabulary."""
        return self.root / "vocab" / f"{tokenizer_fingerprint}.parquet"

    def vocab_paths(self) -> list[Location]:
        """All vocabularies of the cache."""
        return matching(self.root / "vocab", "*.parquet")


def publish(temp: Path, folder: Location, relative_stem: str, num_rows: int) -> DataFile:
    """Gives a finished temporary file its final name, which contains its hash, below `folder`: ready to commit.

    `relative_stem` is `<run>/<worker>-<sequence>`. The rename is atomic and flushed to disk before this returns. For an
    object store the file is uploaded and the local one removed.
    """
    # Content before name: after a power cut, a renamed file that was not flushed can be empty.
    sync_file(temp)
    path = f"{relative_stem}-{sha256_of(temp)[:HASH_CHARS]}.parquet"
    target = folder / path
    if not isinstance(target, Path):
        # One put is atomic, so a store needs neither temporary name nor rename.
        target.upload(temp)
        size_bytes = temp.stat().st_size
        temp.unlink()
        return DataFile(path, size_bytes, num_rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp.replace(target)
    # A rename is durable only once its folder is flushed.
    sync_folder(target.parent)
    return DataFile(path, target.stat().st_size, num_rows)


def check_hash(path: Location) -> None:
    """Raises CorruptError unless the file's bytes have the SHA-256 that its name carries."""
    match = SHARD_NAME.match(path.name)
    if match is None:
        raise CorruptError(f"{path} is not named <worker>-<sequence>-<hash>.parquet: stillroom did not write it")
    if not path.exists():
        raise CorruptError(f"{path} is registered but missing")
    try:
        found = sha256_of(path)
    except OSError as error:
        raise StillroomError(f"{path} cannot be read: {error.strerror}") from error
    if found[:HASH_CHARS] != match["hash"]:
        raise CorruptError(
            f"{path} does not have the bytes that were written: its SHA-256 differs from the one in its name"
        )


def manifest_problem(error: ValueError) -> str:
    """The first problem of a manifest in one line: key and reason."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key}: {first['msg']}" if key else first["msg"]


def _require_openable(path: str) -> None:
    if TWICE_DECODED.search(path):
        raise DataError(f"{path} contains a % before two hex digits, which deltalake cannot open: rename it")


def _log_error(folder: Location, error: Exception) -> StillroomError:
    # From a store, an OSError is about access, not about content.
    if isinstance(folder, ObjectPath) and isinstance(error, OSError):
        return explained(error, str(folder), folder.scheme)
    problems = log_problems(folder / "_delta_log") or broken_entries(folder / "_delta_log")
    reason = problems[0] if problems else first_line(error)
    return CorruptError(f"{folder}/_delta_log cannot be read: {reason}")
