"""`teacher-cache gc`: adopts or deletes what crashes left behind, and removes whole runs on request.

    adopted    complete files that were never registered: their rows become visible
    swept      unfinished files, and files that are damaged or whose rows are all visible elsewhere: no row is lost
    removed    files that only older versions use (dropped runs, quarantined shards); deleted only on request
    kept       files of running workers, files younger than the grace period, files of other programs

Nothing is touched while a log is damaged: without one of its entries, that entry's shards look like orphans.
"""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stillroom.cache.catalog import SHARD_NAME, Catalog, DataFile, Table
from stillroom.cache.delta_log import Span, file_history, merged_ranges
from stillroom.cache.features import SETS_FOLDER, read_sets, set_folder
from stillroom.config import nearest_name
from stillroom.errors import CacheConflict, ConfigError, CorruptError, DataError, one_line
from stillroom.log import format_bytes, format_plural
from stillroom.storage.paths import TEMP_SUFFIX, Location, file_clock_s, files_below, matching, relative_name
from teacher_cache.maintenance.chainless_verdicts import drop_chainless_verdicts
from teacher_cache.maintenance.feature_checks import drop_chainless
from teacher_cache.maintenance.orphans import OrphanFile, find_orphans, lost_commits
from teacher_cache.states.sets import CREATOR
from teacher_cache.workers.leases import leases_folder, living_workers
from teacher_cache.writer.commit import Committer, VisibleSamples, is_locked, lock_path, remove_files, worker_lock

TEMP_NAME = re.compile(rf"^\.(?P<worker>[A-Za-z0-9_.]+)-\d+\.[0-9a-f]+{re.escape(TEMP_SUFFIX)}$")
JOINED_LOCK = re.compile(r"\.j[0-9a-f]{8}\.lock$")
COMPANION_FOLDERS = ("runs", "vocab", "receipts", "quarantine", SETS_FOLDER)


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the cache, and why it was treated so."""

    file: str
    size_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """What left the latest version with a run."""

    run_id: str
    num_shards: int
    num_chains: int
    size_bytes: int
    num_features: int = 0
    num_verdicts: int = 0


@dataclass(slots=True)
class GcReport:
    """What was done, or would be with `dry_run`. `unreadable` are ranges of versions (first, last) of each table that
    use a deleted file; `num_adopted` counts rows (a dry run lists files in `adoptable`).
    """

    dry_run: bool
    num_adopted: int = 0
    adoptable: list[Item] = field(default_factory=list)
    swept: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    removed: list[Item] = field(default_factory=list)
    deleted: list[Item] = field(default_factory=list)
    unreadable: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        return sum(item.size_bytes for item in [*self.swept, *self.deleted])


def gc_cache(
    root: Location, *, dry_run: bool, grace_s: float, drop_runs: Sequence[str] = (), delete_removed: bool = False
) -> GcReport:
    """Cleans the cache at `root`; files younger than `grace_s` seconds are kept.

    `drop_runs` names runs or feature sets (by name or id) whose files leave the latest version. Their files
    stay for older versions until `delete_removed`, which deletes whatever the latest version does not use.
    Raises CorruptError if a log is damaged, ConfigError for an unknown run, CacheConflict for a running one, DataError
    if the cache cannot be written.
    """
    report = GcReport(dry_run)
    try:
        catalog = Catalog(root)
        tables = catalog.tables()
        for table in tables:
            if problems := lost_commits(table):
                raise CorruptError(f"{table.folder}/_delta_log: {problems[0]}: nothing is deleted from a damaged cache")
        if not dry_run:
            # A cache without runs has no such folder yet.
            (root / "runs").mkdir(parents=True, exist_ok=True)
        # A network disk's clock may differ from ours. Asking it writes a file, which a dry run must not do.
        now_s = time.time() if dry_run else file_clock_s(root / "runs")
        # Before orphans are looked for, or a file of a dropped run would be adopted.
        for run_id in _runs_named(catalog, drop_runs):
            report.dropped.append(_drop_run(catalog, run_id, now_s, dry_run))
        collector = _Collector(report, now_s, grace_s, delete_removed)
        for table in tables:
            collector.clean_table(table)
        if report.num_adopted:
            # Features whose chains were dropped before they were registered.
            drop_chainless(catalog)
        collector.sweep_companions(root)
        collector.sweep_fleets(root)
        if delete_removed:
            collector.delete_unused_sets(catalog)
    except OSError as error:
        raise DataError(f"{root} cannot be written: {one_line(error)}") from error
    return report


def gc_lines(report: GcReport) -> list[str]:
    """The report for a person."""
    lines = []
    for one in report.dropped:
        features = f", {format_plural(one.num_features, 'row')} of features" if one.num_features else ""
        features += f", {format_plural(one.num_verdicts, 'verdict')}" if one.num_verdicts else ""
        lines.append(
            f"dropped  run {one.run_id}: {format_plural(one.num_shards, 'shard')}, "
            f"{format_plural(one.num_chains, 'chain')}{features}, "
            f"{format_bytes(one.size_bytes)} removed from the latest version; running its build again would regenerate "
            "them"
        )
    if report.num_adopted or report.adoptable:
        rows = (
            format_plural(report.num_adopted, "row")
            if report.num_adopted
            else format_plural(len(report.adoptable), "file")
        )
        lines.append(f"adopted  {rows} written but not registered; `teacher-cache judge` gives chains their verdicts")
    for label, items in (("swept", report.swept), ("deleted", report.deleted), ("kept", report.kept)):
        lines += [f"{label:8} {item.file} ({format_bytes(item.size_bytes)}): {item.why}" for item in items]
    if report.removed:
        size = format_bytes(sum(item.size_bytes for item in report.removed))
        files = format_plural(len(report.removed), "file")
        lines.append(f"no longer in the latest version: {files} ({size}); --delete-removed deletes them")
    for name, ranges in report.unreadable.items():
        spans = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ranges)
        lines.append(
            f"versions {spans} of {name} can no longer be read in full: a student whose selection is pinned there must "
            "select again"
        )
    freed = f"{format_bytes(report.freed_bytes)} freed" if report.freed_bytes else "nothing to free"
    return [*lines, f"{freed} (dry run: nothing was changed)" if report.dry_run else freed]


def _runs_named(catalog: Catalog, names: Sequence[str]) -> list[str]:
    runs = {run_id: run.name for run_id, run in catalog.runs().items()}
    if names:
        runs |= {set_id: one.name for set_id, one in read_sets(catalog.root).items()}
    found: list[str] = []
    for name in names:
        ids = [run_id for run_id, own_name in runs.items() if name in (run_id, own_name)]
        if not ids:
            known = sorted({*runs.values(), *runs})
            raise ConfigError(f"--drop-run {name!r}: {catalog.root} has no such run{nearest_name(name, known)}")
        found += ids
    return list(dict.fromkeys(found))


def _drop_run(catalog: Catalog, run_id: str, now_s: float, dry_run: bool) -> Dropped:
    def is_of_run(file: DataFile) -> bool:
        return file.owner == run_id

    with contextlib.ExitStack() as locks:
        for path in matching(catalog.root / "runs", f"{run_id}.*.lock"):
            if is_locked(path):
                raise CacheConflict(f"run {run_id} is being built ({path} is locked): stop its workers first")
            if not dry_run:
                # Held until the run has left all tables: a worker that starts in between would add shards to it.
                locks.enter_context(worker_lock(path, 0.0))
        # A store has no locks, and a worker may run on another machine.
        if alive := living_workers(leases_folder(catalog.root, run_id), now_s):
            workers = ", ".join(f"{one.worker} on {one.host}" for one in alive)
            raise CacheConflict(f"run {run_id} is being built ({workers}): stop its workers first")
        chains = [file for file in catalog.chains.files() if is_of_run(file)]
        features = [] if catalog.features is None else [file for file in catalog.features.files() if is_of_run(file)]
        others = [file for t in (catalog.verdicts, catalog.failures) for file in t.files() if is_of_run(file)]
        num_features = sum(file.num_rows for file in features)
        num_verdicts = sum(file.num_rows for file in catalog.verdicts.files() if is_of_run(file))
        if not dry_run:
            for table in catalog.tables():
                remove_files(table, is_of_run)
        if chains:
            # Of chains that are gone: a later build may generate other tokens for the same samples.
            num_features += sum(drop_chainless(catalog, dry_run=dry_run, without_run=run_id).values())
            num_verdicts += sum(drop_chainless_verdicts(catalog, dry_run=dry_run, without_run=run_id).values())
    size_bytes = sum(file.size_bytes for file in [*chains, *features, *others])
    return Dropped(run_id, len(chains), sum(file.num_rows for file in chains), size_bytes, num_features, num_verdicts)


class _Collector:
    """Decides about every orphan file and records that in the report."""

    def __init__(self, report: GcReport, now_s: float, grace_s: float, delete_removed: bool) -> None:
        self._report, self._now_s, self._grace_s, self._delete_removed = report, now_s, grace_s, delete_removed
        self._dropped = {one.run_id for one in report.dropped}

    def clean_table(self, table: Table) -> None:
        history = file_history(table.folder / "_delta_log")
        orphans = find_orphans(table, history)
        self._clean_removed(table, history, [one for one in orphans if one.kind == "removed"])
        # Read once, when the first file is adopted; a sample has features once per set.
        by_set: dict[str, VisibleSamples] = {}
        for (run_id, worker), group in _by_worker([one for one in orphans if one.kind != "removed"]).items():
            if worker is None:
                self._keep(group, "not written by this program")
            else:
                within = run_id if table.folder.name == "features" else None
                visible = by_set.setdefault(within or "", VisibleSamples(table, within))
                self._clean_worker(Committer(table, visible, run_id, worker), table, run_id, worker, group)

    def sweep_companions(self, root: Location) -> None:
        """Unfinished files of manifests, vocabularies, commit markers and notes."""
        for path in (one for name in COMPANION_FOLDERS for one in files_below(root / name)):
            if path.name.startswith(".") and path.name.endswith(TEMP_SUFFIX):
                self._sweep_old(root, path, "was never finished")

    def sweep_fleets(self, root: Location) -> None:
        """What dead workers that had joined left beside the manifests: leases, heartbeats, locks and marks."""
        dead = [one for one in matching(root / "runs", "*.lock") if JOINED_LOCK.search(one.name) and not is_locked(one)]
        is_alive = False
        for folder in matching(root / "runs", "*.leases"):
            if living_workers(folder, self._now_s):
                is_alive = True
            else:
                dead += [path for path in matching(folder, "*") if not path.name.startswith(".")]
        if not is_alive:
            # A fleet writes its mark when it starts, and reads it whenever one more worker does.
            dead += matching(root / "runs", "*.fleet")
        for path in dead:
            self._sweep_old(root, path, "its worker is dead")

    def delete_unused_sets(self, catalog: Catalog) -> None:
        """Constants of feature sets without files, and heads that no set refers to."""
        sets = read_sets(catalog.root)
        unused = {one for one in sets if not matching(catalog.root / "features" / one, "*.parquet")}
        for set_id in sorted(unused):
            # A set that is being fitted has no manifest yet, and one that is being filled may have no file.
            if any(map(is_locked, matching(catalog.root / "runs", f"{set_id}.*.lock"))):
                continue
            # The manifest first: without it the rest does not count as a set.
            for path in reversed(matching(set_folder(catalog.root, set_id), "*")):
                self._delete(catalog.root, path, "its feature set has no file")
            del sets[set_id]
        # A worker writes the head before the manifest that names it.
        if any(map(is_locked, matching(catalog.root / "runs", f"*.{CREATOR}.lock"))):
            return
        named = {one.head.file for one in sets.values() if one.head is not None}
        for path in matching(catalog.root / SETS_FOLDER, "head-*.safetensors"):
            if path.name not in named:
                self._delete(catalog.root, path, "no feature set uses it")

    def _delete(self, root: Location, path: Location, why: str) -> None:
        self._report.deleted.append(Item(relative_name(path, root), path.stat().st_size, why))
        if not self._report.dry_run:
            path.unlink(missing_ok=True)

    def _clean_removed(self, table: Table, history: dict[str, list[Span]], removed: Sequence[OrphanFile]) -> None:
        root, report = table.folder.parent, self._report
        files = [(root / one.file, one.size_bytes) for one in removed]
        if report.dry_run:
            # Files of runs that would be dropped are still visible.
            doomed = [file for file in table.files() if file.owner in self._dropped]
            files += [(table.path_of(file), file.size_bytes) for file in doomed]
        spans: list[Span] = []
        for path, size_bytes in files:
            relative = relative_name(path, table.folder)
            item = Item(f"{table.folder.name}/{relative}", size_bytes, "only older versions use it")
            (report.deleted if self._delete_removed else report.removed).append(item)
            # In a dry run, files of a run to be dropped are still visible; they would leave with the next version.
            spans += [span if span.removed else Span(span.added, table.version + 1) for span in history[relative]]
            if self._delete_removed and not report.dry_run:
                path.unlink(missing_ok=True)
        if self._delete_removed and spans:
            report.unreadable[table.folder.name] = merged_ranges(spans)

    def _clean_worker(
        self, committer: Committer, table: Table, run_id: str, worker: str, files: Sequence[OrphanFile]
    ) -> None:
        is_dropped = run_id in self._dropped
        old = [one for one in files if is_dropped or not self._is_young(one)]
        self._keep([one for one in files if one not in old], "younger than the grace period")
        with contextlib.ExitStack() as stack:
            try:
                for lock in self._locks(table, run_id, worker) if old else []:
                    if is_locked(lock):
                        raise CacheConflict(f"{lock} is locked")
                    if not self._report.dry_run and lock.exists():
                        stack.enter_context(worker_lock(lock, 0.0))
            except CacheConflict:
                self._keep(old, "its worker is running")
                return
            for one in old:
                self._clean_file(committer, table, one, is_dropped)

    def _locks(self, table: Table, run_id: str, worker: str) -> Sequence[Location]:
        root = table.folder.parent
        # Files directly in the table's folder (unfinished verdicts) may belong to any run.
        is_any_run = run_id == table.folder.name
        return matching(root / "runs", f"*.{worker}.lock") if is_any_run else [lock_path(root, run_id, worker)]

    def _clean_file(self, committer: Committer, table: Table, one: OrphanFile, is_dropped: bool) -> None:
        root = table.folder.parent
        if one.kind == "temporary":
            self._sweep(root, one, "was never finished")
        elif is_dropped:
            # Adopting it, now or in a later gc, would bring a part of the run back.
            self._sweep(root, one, "was never registered, and its run is dropped")
        elif table.folder.name == "verdicts":
            self._sweep(root, one, "was never registered; `teacher-cache judge` makes such verdicts again")
        elif self._report.dry_run:
            self._report.adoptable.append(_item(one, "was never registered"))
        else:
            num_rows = committer.adopt(root / one.file)
            self._report.num_adopted += num_rows
            if not num_rows:
                self._report.swept.append(_item(one, "was damaged, or its rows are visible elsewhere"))

    def _is_young(self, one: OrphanFile) -> bool:
        return self._now_s - one.modified_s < self._grace_s

    def _sweep_old(self, root: Location, path: Location, why: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            one = OrphanFile(relative_name(path, root), stat.st_size, stat.st_mtime, "temporary")
            if self._is_young(one):
                self._keep([one], "younger than the grace period")
            else:
                self._sweep(root, one, why)

    def _keep(self, files: Sequence[OrphanFile], why: str) -> None:
        self._report.kept += [_item(one, why) for one in files]

    def _sweep(self, root: Location, one: OrphanFile, why: str) -> None:
        self._report.swept.append(_item(one, why))
        if not self._report.dry_run:
            (root / one.file).unlink(missing_ok=True)


def _by_worker(files: Sequence[OrphanFile]) -> dict[tuple[str, str | None], list[OrphanFile]]:
    """Files by run and worker; the worker is None for a name that is not ours."""
    grouped: dict[tuple[str, str | None], list[OrphanFile]] = {}
    for one in files:
        path = Path(one.file)
        name = TEMP_NAME.match(path.name) or SHARD_NAME.match(path.name)
        grouped.setdefault((path.parent.name, name["worker"] if name else None), []).append(one)
    return grouped


def _item(one: OrphanFile, why: str) -> Item:
    return Item(one.file, one.size_bytes, why)
