"""`teacher-cache gc`: what a crash left behind is adopted or swept, whole runs are dropped on request.

    adopted    shards that were written and not registered: the rows become visible
    swept      unfinished files, and files whose rows are all visible elsewhere or damaged: no row is lost
    removed    files that only older versions hold (dropped runs, quarantined shards); deleted on request alone
    kept       files of a worker at work, files younger than the grace, files of other programs

Nothing is touched while a log is damaged: without an entry, its shards look like orphans.
"""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stillroom.cache.catalog import SHARD_NAME, Catalog, DataFile, Table
from stillroom.cache.delta_log import Span, file_history, merged_ranges
from stillroom.config import nearest_name
from stillroom.errors import CacheConflict, ConfigError, CorruptError, DataError, one_line
from stillroom.log import format_bytes, format_plural
from stillroom.storage.paths import TEMP_SUFFIX, Location, file_clock_s, files_below, matching, relative_name
from teacher_cache.maintenance.orphans import Leftover, find_leftovers, receipt_problems
from teacher_cache.writer.commit import Committer, VisibleSamples, is_locked, lock_path, remove_files, worker_lock

TEMP_NAME = re.compile(rf"^\.(?P<worker>[A-Za-z0-9_.]+)-\d+\.[0-9a-f]+{re.escape(TEMP_SUFFIX)}$")
COMPANION_FOLDERS = ("runs", "vocab", "receipts", "quarantine")


@dataclass(frozen=True, slots=True)
class Item:
    """One file below the cache, and why it was treated so."""

    file: str
    size_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a dropped run no longer shows."""

    run_id: str
    num_shards: int
    num_chains: int
    size_bytes: int


@dataclass(slots=True)
class GcReport:
    """What was done, or with `dry_run` would be. `unreadable` are ranges of versions (first, last) of each table that
    name a deleted file; `num_adopted` counts rows (files before a dry run's adoption are in `adoptable`).
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
    """Cleans the cache at `root`; files younger than `grace_s` seconds stay.

    `drop_runs` names runs (by name or id) whose shards, failures and verdicts leave the latest version; their files
    stay for older versions until `delete_removed`, which deletes what the latest version does not hold.
    Raises CorruptError while a log is damaged, ConfigError for an unknown run, CacheConflict for a run at work,
    DataError where the cache cannot be written.
    """
    try:
        return _gc(Catalog(root), GcReport(dry_run), grace_s, drop_runs, delete_removed)
    except OSError as error:
        raise DataError(f"{root} cannot be written: {one_line(error)}") from error


def _gc(catalog: Catalog, report: GcReport, grace_s: float, drop_runs: Sequence[str], delete_removed: bool) -> GcReport:
    root, dry_run = catalog.root, report.dry_run
    tables = (catalog.chains, catalog.verdicts, catalog.failures)
    for table in tables:
        problems = receipt_problems(table)
        if problems:
            raise CorruptError(f"{table.folder}/_delta_log: {problems[0]}: nothing is swept from a damaged cache")
    for run_id in _runs_named(catalog, drop_runs):
        report.dropped.append(_drop_run(catalog, run_id, dry_run))
    if not dry_run:
        # An empty cache has no runs yet.
        (root / "runs").mkdir(parents=True, exist_ok=True)
    now_s = time.time() if dry_run else file_clock_s(root / "runs")
    for table in tables:
        _clean_table(table, report, now_s, grace_s, delete_removed)
    _sweep_companions(root, report, now_s, grace_s)
    return report


def gc_lines(report: GcReport) -> list[str]:
    """The report for a person."""
    lines = []
    for one in report.dropped:
        lines.append(
            f"dropped  run {one.run_id}: {format_plural(one.num_shards, 'shard')}, "
            f"{format_plural(one.num_chains, 'chain')}, {format_bytes(one.size_bytes)} leave the latest version; a "
            "build with its configuration would make them again"
        )
    if report.num_adopted or report.adoptable:
        rows = f"{report.num_adopted} rows that were" if report.num_adopted else f"{len(report.adoptable)} files"
        lines.append(f"adopted  {rows} written and not registered")
    for label, items in (("swept", report.swept), ("deleted", report.deleted), ("kept", report.kept)):
        lines += [f"{label:8} {item.file} ({format_bytes(item.size_bytes)}): {item.why}" for item in items]
    if report.removed:
        size = format_bytes(sum(item.size_bytes for item in report.removed))
        files = format_plural(len(report.removed), "file")
        lines.append(f"no longer in the latest version: {files} ({size}); --delete-removed deletes them")
    for name, ranges in report.unreadable.items():
        spans = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ranges)
        lines.append(
            f"versions {spans} of {name} can no longer be read whole: a student whose selection is pinned there must "
            "select again"
        )
    freed = f"{format_bytes(report.freed_bytes)} freed" if report.freed_bytes else "nothing to free"
    return [*lines, f"{freed} (dry run: nothing was changed)" if report.dry_run else freed]


def _runs_named(catalog: Catalog, names: Sequence[str]) -> list[str]:
    runs = catalog.runs()
    found: list[str] = []
    for name in names:
        ids = [run_id for run_id, run in runs.items() if name in (run_id, run.name)]
        if not ids:
            known = sorted({run.name for run in runs.values()} | set(runs))
            raise ConfigError(f"--drop-run {name!r}: {catalog.root} has no such run{nearest_name(name, known)}")
        found += ids
    return list(dict.fromkeys(found))


def _drop_run(catalog: Catalog, run_id: str, dry_run: bool) -> Dropped:
    def is_of_run(file: DataFile) -> bool:
        return file.path.startswith(f"{run_id}/")

    with contextlib.ExitStack() as locks:
        for path in matching(catalog.root / "runs", f"{run_id}.*.lock"):
            if is_locked(path):
                raise CacheConflict(f"run {run_id} is being built ({path} is locked): stop its workers first")
            if not dry_run:
                locks.enter_context(worker_lock(path, 0.0))
        chains = [file for file in catalog.chains.files() if is_of_run(file)]
        others = [file for t in (catalog.verdicts, catalog.failures) for file in t.files() if is_of_run(file)]
        if not dry_run:
            for table in (catalog.chains, catalog.verdicts, catalog.failures):
                remove_files(table, is_of_run)
    size_bytes = sum(file.size_bytes for file in [*chains, *others])
    return Dropped(run_id, len(chains), sum(file.num_rows for file in chains), size_bytes)


def _clean_table(table: Table, report: GcReport, now_s: float, grace_s: float, delete_removed: bool) -> None:
    root, history = table.folder.parent, file_history(table.folder / "_delta_log")
    leftovers = find_leftovers(table, history)
    removed = [(root / one.file, one.size_bytes) for one in leftovers if one.kind == "removed"]
    if report.dry_run:
        # What the drop would have taken out is still visible.
        doomed = {one.run_id for one in report.dropped}
        files = [file for file in table.files() if file.path.partition("/")[0] in doomed]
        removed += [(table.path_of(file), file.size_bytes) for file in files]
    spans: list[Span] = []
    for path, size_bytes in removed:
        relative = relative_name(path, table.folder)
        item = Item(f"{table.folder.name}/{relative}", size_bytes, "only older versions hold it")
        (report.deleted if delete_removed else report.removed).append(item)
        spans += [span if span.removed else Span(span.added, table.version + 1) for span in history[relative]]
        if delete_removed and not report.dry_run:
            path.unlink(missing_ok=True)
    if delete_removed and spans:
        report.unreadable[table.folder.name] = merged_ranges(spans)
    # Read once, when the first file is adopted.
    visible = VisibleSamples(table)
    for (run_id, worker), group in _by_worker([one for one in leftovers if one.kind != "removed"]).items():
        _clean_worker(visible, table, run_id, worker, group, report, now_s, grace_s)


def _clean_worker(
    visible: VisibleSamples,
    table: Table,
    run_id: str,
    worker: str | None,
    files: Sequence[Leftover],
    report: GcReport,
    now_s: float,
    grace_s: float,
) -> None:
    if worker is None:
        report.kept += [_item(one, "not a file of this program") for one in files]
        return
    root = table.folder.parent
    is_dropped = any(one.run_id == run_id for one in report.dropped)
    young = [one for one in files if now_s - one.modified_s < grace_s and not is_dropped]
    old = [one for one in files if one not in young]
    report.kept += [_item(one, "younger than the grace") for one in young]
    # What lies beside the run's folders (verdicts in the making) may be any run's.
    beside = run_id == table.folder.name
    locks = matching(root / "runs", f"*.{worker}.lock") if beside else [lock_path(root, run_id, worker)]
    with contextlib.ExitStack() as stack:
        try:
            for lock in locks if old else []:
                if is_locked(lock):
                    raise CacheConflict(f"{lock} is locked")
                if not report.dry_run and lock.exists():
                    stack.enter_context(worker_lock(lock, 0.0))
        except CacheConflict:
            report.kept += [_item(one, "its worker is at work") for one in old]
            return
        for one in old:
            if one.kind == "temporary":
                _sweep(root, one, "was never finished", report)
            elif is_dropped:
                # Adopted, now or by the next one who cleans, it would bring a part of the run back.
                _sweep(root, one, "was never registered, and its run is dropped", report)
            elif table.folder.name == "verdicts":
                _sweep(root, one, "was never registered: `teacher-cache judge` makes such verdicts again", report)
            elif report.dry_run:
                report.adoptable.append(_item(one, "was never registered"))
            else:
                _adopt(Committer(table, visible, run_id, worker), table, one, report)


def _adopt(committer: Committer, table: Table, one: Leftover, report: GcReport) -> None:
    num_rows = committer.adopt(table.folder.parent / one.file)
    report.num_adopted += num_rows
    if not num_rows:
        report.swept.append(_item(one, "was damaged, or its rows are visible elsewhere"))


def _sweep_companions(root: Location, report: GcReport, now_s: float, grace_s: float) -> None:
    """Unfinished files of manifests, vocabularies and receipts."""
    for path in (one for name in COMPANION_FOLDERS for one in files_below(root / name)):
        if not (path.name.startswith(".") and path.name.endswith(TEMP_SUFFIX)):
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        is_young = now_s - stat.st_mtime < grace_s
        why = "younger than the grace" if is_young else "was never finished"
        (report.kept if is_young else report.swept).append(Item(relative_name(path, root), stat.st_size, why))
        if not is_young and not report.dry_run:
            path.unlink(missing_ok=True)


def _by_worker(files: Sequence[Leftover]) -> dict[tuple[str, str | None], list[Leftover]]:
    """Files by run and worker; the worker is None where the name is not one of ours."""
    grouped: dict[tuple[str, str | None], list[Leftover]] = {}
    for one in files:
        path = Path(one.file)
        name = TEMP_NAME.match(path.name) or SHARD_NAME.match(path.name)
        grouped.setdefault((path.parent.name, name["worker"] if name else None), []).append(one)
    return grouped


def _sweep(root: Location, one: Leftover, why: str, report: GcReport) -> None:
    report.swept.append(_item(one, why))
    if not report.dry_run:
        (root / one.file).unlink(missing_ok=True)


def _item(one: Leftover, why: str) -> Item:
    return Item(one.file, one.size_bytes, why)
