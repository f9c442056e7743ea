"""`teacher-cache copy SOURCE... DEST`: merges caches into one, shard by shard.

Copies what each source's latest version shows and verifies every byte against the hash in its file's name. Rows whose
sample is already visible in the destination are skipped, so overlapping caches merge, and the same command resumes
after a kill. Builds may run in sources and destination meanwhile.

With --round, exact distributions (`topk-f32`) are stored as 8-bit codes (`topk-u8`).
"""

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.catalog import HASH_CHARS, SHARD_NAME, Catalog, DataFile, Table
from stillroom.cache.codec import encode
from stillroom.cache.delta_log import log_problems
from stillroom.cache.features import SETS_FOLDER, read_sets
from stillroom.cache.shards import open_shard, read_signals
from stillroom.errors import ConfigError, CorruptError, DataError, require_version
from stillroom.log import Progress, format_bytes, format_plural, warn
from stillroom.program import StopRequest
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import SHARD_METADATA_KEY, RunManifest
from stillroom.schema.tables import CHAIN_FIELDS, TOKEN_FIELDS, chain_schema
from stillroom.sql.session import Session
from stillroom.storage.paths import (
    Location,
    atomic_path,
    check_reachable,
    files_below,
    local_copy,
    parts_of,
    relative_name,
    sha256_of,
)
from teacher_cache.maintenance.feature_checks import drop_chainless
from teacher_cache.maintenance.orphans import lost_commits
from teacher_cache.writer.commit import Committer, VisibleSamples, lock_path, read_sample_ids, rewrite, worker_lock
from teacher_cache.writer.shard import parquet_options
from teacher_cache.writer.verdicts import commit_verdict_file, verdict_temp

COPIER = "copied"
"""Takes the worker's place in the names of copied files; rows keep their own worker."""
CACHE_FOLDERS = {"chains", "verdicts", "failures", "runs", "vocab", "receipts", "quarantine", "features", SETS_FOLDER}


@dataclass(slots=True)
class CopyReport:
    """What was copied; `num_known` rows were in the destination before. `stopped`: interrupted by a signal."""

    num_shards: int = 0
    num_chains: int = 0
    num_known: int = 0
    num_verdicts: int = 0
    num_failures: int = 0
    num_features: int = 0
    size_bytes: int = 0
    stopped: bool = False


def copy_caches(sources: Sequence[Location], dest: Location, *, rounded: bool = False) -> CopyReport:
    """Copies what `sources` show into `dest`, a cache or a folder that is empty or does not exist; `rounded` stores
    exact distributions as 8-bit codes.

    Raises ConfigError for caches that cannot be merged or contain each other, DataError for what is not a cache or has
    a newer format, CorruptError naming a damaged shard or log, CacheConflict while another copy into `dest` runs.
    """
    _require_apart(sources, dest)
    catalogs = [_open_source(source) for source in sources]
    check_reachable(dest)
    if dest.exists() and not dest.is_dir():
        raise DataError(f"{dest} is a file: use a cache or a new folder")
    # A mistyped destination must not be filled with the folders of a cache.
    others = {path.name for path in dest.iterdir()} - CACHE_FOLDERS if dest.exists() else set()
    if others and not (dest / "chains" / "_delta_log").is_dir():
        raise DataError(f"{dest} holds other files ({min(others)}): use a cache or a new folder")
    target = Catalog.create(dest)
    _require_same_meaning([*catalogs, target])
    report, total = CopyReport(), sum(file.num_rows for source in catalogs for file in source.chains.files())
    _warn_of_space(catalogs, target)
    with contextlib.ExitStack() as stack:
        for run_id in sorted({one for source in catalogs for one in (*source.runs(), *read_sets(source.root))}):
            # One copy per run and destination: two would publish under the same worker's name.
            stack.enter_context(worker_lock(lock_path(dest, run_id, COPIER), 0.0))
        # Between files: what was copied so far is a cache that can be used and resumed.
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(Progress("copy", total, "chains"))
        for source in catalogs:
            _copy_companions(source, target)
            for _ in _copy_one(source, target, report, rounded=rounded):
                progress.update(report.num_chains + report.num_known, 0, {"": format_bytes(report.size_bytes)})
                if stop.is_set:
                    report.stopped = True
                    return report
    return report


def copy_lines(report: CopyReport, dest: Location) -> list[str]:
    """The result for a person."""
    known = f"; {report.num_known} already there" if report.num_known else ""
    counts = [
        f"{format_plural(report.num_chains, 'chain')} in {format_plural(report.num_shards, 'shard')}",
        format_bytes(report.size_bytes),
        format_plural(report.num_verdicts, "verdict"),
        format_plural(report.num_failures, "failure"),
        *([f"features of {format_plural(report.num_features, 'chain')}"] if report.num_features else []),
    ]
    return [f"{dest}: {', '.join(counts)}{known}"]


def _require_apart(sources: Sequence[Location], dest: Location) -> None:
    folders = [path.resolve() for path in (*sources, dest)]
    # Resolved, because a symbolic link may lead from one cache into the other.
    for i, one in enumerate(folders):
        for other in folders[i + 1 :]:
            if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
                raise ConfigError(f"{one} and {other} are the same folder or contain each other: name separate caches")


def _open_source(root: Location) -> Catalog:
    catalog = Catalog(root)
    for table in catalog.tables():
        problems = log_problems(table.folder / "_delta_log") or lost_commits(table)
        if problems:
            raise CorruptError(f"{table.folder}/_delta_log: {problems[0]}: a copy would lack chains")
    for run in catalog.runs().values():
        require_version(f"run {run.run_id} of {root}", run.format_version, FORMAT_VERSION)
    missing = {file.owner for file in catalog.chains.files()} - set(catalog.runs())
    if missing:
        raise CorruptError(
            f"{root}/runs/{min(missing)}.json is missing, so its chains cannot be identified: restore it from a copy, "
            "or run its build again, which rewrites it"
        )
    return catalog


def _require_same_meaning(catalogs: Sequence[Catalog]) -> None:
    """In one cache a run id must stand for one teacher, one capture and one sampling."""
    seen: dict[str, tuple[Location, dict[str, object]]] = {}
    for catalog in catalogs:
        for run_id, run in catalog.runs().items():
            root, meaning = seen.setdefault(run_id, (catalog.root, _meaning(run)))
            different = [key for key, value in _meaning(run).items() if value != meaning[key]]
            if different:
                raise ConfigError(
                    f"run {run_id} of {catalog.root} and of {root} differ in {different[0]}: build one of them again "
                    "under another run name"
                )
    constants: dict[str, tuple[Location, str]] = {}
    for catalog in catalogs:
        for set_id, manifest in read_sets(catalog.root).items():
            root, name = constants.setdefault(set_id, (catalog.root, manifest.constants))
            if name != manifest.constants:
                raise ConfigError(
                    f"feature set {set_id} of {catalog.root} and of {root} was fitted separately, with different "
                    "scales: drop one of them (gc --drop-run) and run its pass again after the copy"
                )


def _meaning(run: RunManifest) -> dict[str, object]:
    # More samples continue a run; the run id leaves them out for the same reason.
    sampling = {key: value for key, value in run.sampling.items() if key != "samples"}
    return {
        "teacher": run.teacher.fingerprint,
        "tokenizer": run.teacher.tokenizer_fingerprint,
        "kind": run.kind,
        "sampling": sampling,
        "capture": run.capture,
        "reasoning": run.reasoning,
    }


def _warn_of_space(sources: Sequence[Catalog], target: Catalog) -> None:
    size_bytes = sum(
        file.size_bytes
        for source in sources
        for table in (source.chains, source.features)
        if table is not None
        for file in table.files()
    )
    # Nothing says how much an object store still takes.
    if not isinstance(target.root, Path):
        return
    free_bytes = shutil.disk_usage(target.root).free
    if size_bytes > free_bytes:
        warn(
            f"the sources hold {format_bytes(size_bytes)}, but {target.root} has {format_bytes(free_bytes)} free: "
            "enough only if most of it was copied before"
        )


def _copy_companions(source: Catalog, target: Catalog) -> None:
    """Vocabularies and manifests, before the first row refers to them."""
    for path in source.vocab_paths():
        if not (target.root / "vocab" / path.name).exists():
            with atomic_path(target.root / "vocab" / path.name) as temp, local_copy(path) as local:
                shutil.copyfile(local, temp)
    # Manifests last: a set without one does not exist yet.
    for path in sorted(files_below(source.root / SETS_FOLDER), key=lambda one: one.name == "manifest.json"):
        if not path.name.startswith(".") and not (copied := target.root / relative_name(path, source.root)).exists():
            with atomic_path(copied) as temp, local_copy(path) as local:
                shutil.copyfile(local, temp)
    known = target.runs()
    for run_id, run in source.runs().items():
        if run_id not in known:
            target.write_run(run)


def _copy_one(source: Catalog, target: Catalog, report: CopyReport, *, rounded: bool) -> Iterator[None]:
    """Yields after every file, so that the caller can show progress or stop."""
    # Chains before their verdicts and features, which refer to them.
    yield from _copy_rows(source.failures, target.failures, report, rounded=False)
    yield from _copy_rows(source.chains, target.chains, report, rounded=rounded)
    _copy_verdicts(source, target, report)
    yield
    if source.features is not None and source.features.files():
        yield from _copy_rows(source.features, target.create_features(), report, rounded=False)
        # Of a sample that both had, the destination keeps its own chain, which may have other tokens.
        for dropped in drop_chainless(target).values():
            report.num_features -= dropped


def _copy_rows(source: Table, target: Table, report: CopyReport, *, rounded: bool) -> Iterator[None]:
    committers: dict[str, Committer] = {}
    of_run: dict[str | None, VisibleSamples] = {}
    kind = target.folder.name
    for file in source.files():
        run_id = file.owner
        # A sample has features once per set.
        within = run_id if kind == "features" else None
        visible = of_run.setdefault(within, VisibleSamples(target, within))
        if run_id not in committers:
            # First adopt what an interrupted copy had published, so that it is not copied again.
            committers[run_id] = Committer(target, visible, run_id, COPIER)
            committers[run_id].recover()
            visible.refresh()
        size_bytes = 0
        sample_ids = read_sample_ids(source.path_of(file))
        # Only the ids are read of a shard that is there already: a repeated copy moves no bytes.
        num_fresh = sum(sample_id not in visible for sample_id in sample_ids)
        if num_fresh:
            temp = committers[run_id].temp_path()
            temp.parent.mkdir(parents=True, exist_ok=True)
            _copy_checked(source.path_of(file), temp)
            if rounded:
                temp = _round(temp, committers[run_id].temp_path())
            size_bytes = temp.stat().st_size
            num_fresh = committers[run_id].commit(temp, sample_ids)
        if kind == "chains":
            report.num_shards += bool(num_fresh)
            report.num_chains += num_fresh
            report.num_known += file.num_rows - num_fresh
            report.size_bytes += size_bytes if num_fresh else 0
        elif kind == "features":
            report.num_features += num_fresh
            report.size_bytes += size_bytes if num_fresh else 0
        else:
            report.num_failures += num_fresh
        yield


def _copy_verdicts(source: Catalog, target: Catalog, report: CopyReport) -> None:
    """Copies whole files: a sample may have many verdicts, so files are compared by hash and not row by row.

    Verdicts on chains that the destination has with other tokens are left out.
    """
    known = {_hash_of(file) for file in target.verdicts.files()}
    files = [file for file in source.verdicts.files() if _hash_of(file) not in known]
    others = _other_chains(source, target) if files and report.num_known else set()
    for file in files:
        temp, num_rows = verdict_temp(target.verdicts, COPIER), file.num_rows
        _copy_checked(source.verdicts.path_of(file), temp)
        if others:
            temp, num_rows = _without(temp, verdict_temp(target.verdicts, COPIER), others)
        # Without those rows it may be a file that an earlier copy has made already.
        if not num_rows or sha256_of(temp)[:HASH_CHARS] in known:
            temp.unlink()
            continue
        commit_verdict_file(target.verdicts, temp, num_rows, file.owner, COPIER)
        report.num_verdicts += num_rows


def _other_chains(source: Catalog, target: Catalog) -> set[str]:
    """Samples whose chain in `target` has other tokens than the one in `source`: of what both had, it keeps its own."""
    target.chains.refresh()
    query = "SELECT sample_id FROM shards a JOIN given.shards b USING (sample_id) WHERE a.chain_id <> b.chain_id"
    with Session({"main": target, "given": source}) as session:
        return set(session.arrow(query).column(0).to_pylist())


def _without(copied: Path, temp: Path, sample_ids: Collection[str]) -> tuple[Path, int]:
    """Replaces a file of verdicts with one at `temp` that lacks those on some samples; returns it and its rows."""
    try:
        num_rows = rewrite(
            copied, temp, lambda rows: [one not in sample_ids for one in rows.column("sample_id").to_pylist()]
        )
    finally:
        copied.unlink()
    return temp, num_rows


def _copy_checked(path: Location, temp: Path) -> None:
    digest = hashlib.sha256()
    try:
        with temp.open("wb") as out:
            # Hashed while it is copied, so that a large cache is read once.
            for chunk in parts_of(path):
                digest.update(chunk)
                out.write(chunk)
        name = SHARD_NAME.match(path.name)
        if name is None or digest.hexdigest()[:HASH_CHARS] != name["hash"]:
            raise CorruptError(
                f"{path} does not have the bytes that were written: remove it with "
                "`teacher-cache verify --quarantine`, then copy again"
            )
    except FileNotFoundError as error:
        temp.unlink(missing_ok=True)
        raise CorruptError(f"{path} is registered but missing") from error
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _hash_of(file: DataFile) -> str:
    name = SHARD_NAME.match(Path(file.path).name)
    return name["hash"] if name is not None else file.path


def _round(copied: Path, temp: Path) -> Path:
    """Replaces the copy of an exact shard with a `topk-u8` one at `temp`; returns the path of the file to commit."""
    file, old = open_shard(copied)
    with file:
        # Coded already: to code it again would round twice.
        if old.codec != "topk-f32":
            return copied
        # The columns are written as this version writes them, whatever version the source had.
        new = old.model_copy(update={"codec": "topk-u8", "format_version": FORMAT_VERSION})
        schema = chain_schema(new.codec).with_metadata({SHARD_METADATA_KEY: new.model_dump_json()})
        plain = [field.name for field in CHAIN_FIELDS if field not in TOKEN_FIELDS]
        try:
            with pq.ParquetWriter(temp, schema, **parquet_options(schema, new.vocab_size)) as writer:
                for index in range(file.num_row_groups):
                    table, signals, offsets = read_signals(file, old, index, plain, str(copied))
                    rows = [signals.slice(int(start), int(stop)) for start, stop in pairwise(offsets)]
                    columns = {name: table.column(name) for name in plain} | encode(new.codec, rows)
                    writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        finally:
            copied.unlink(missing_ok=True)
    return temp
