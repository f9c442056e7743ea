"""`teacher-cache verify --quarantine`: damaged files leave their tables, with a note why; what is sound stays in use.

    CACHE/quarantine/<table>/<file>.json    file, problems, rows, rows kept, version that no longer holds it, when

The file itself stays where it lies: versions before that still name it, and a student pinned there may read its sound
row groups (page checksums keep it from the others). Where row groups of a shard are sound, their rows are written to a
new shard that takes its place in the same transaction. Everything else is missing now, and the next build makes it
again. `teacher-cache gc --delete-removed` deletes the files.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from stillroom.cache.catalog import Catalog, Table
from stillroom.cache.shards import open_shard
from stillroom.config import Json
from stillroom.errors import CorruptError, DataError
from stillroom.log import format_plural
from stillroom.schema.manifest import RunManifest
from stillroom.storage.paths import Location, write_text_atomic
from teacher_cache.maintenance.shard_checks import Damage
from teacher_cache.maintenance.verify import VerifyReport, summary_of, verify_cache
from teacher_cache.writer.commit import (
    Committer,
    VisibleSamples,
    lock_path,
    remove_files,
    replace_file,
    rewrite,
    worker_lock,
)

MENDER = "mended"
"""Stands in the file names of shards with what was sound, where others have their worker."""
LOCK_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that was taken out; `file` is relative to the cache, `num_kept` of its rows are in a new shard."""

    file: str
    num_rows: int
    num_kept: int
    problems: Sequence[str]


def quarantine_damaged(catalog: Catalog, report: VerifyReport) -> list[Quarantined]:
    """Takes the report's damaged files out of their tables, and their problems out of the report.

    Raises CacheConflict where others commit without a pause, OSError where the cache cannot be written.
    """
    catalog.chains.refresh()
    taken = [_take(catalog, damage) for damage in report.damages]
    names = {one.file for one in taken}
    report.problems = [problem for problem in report.problems if problem.file not in names]
    report.damages = []
    return taken


def quarantine_lines(taken: Sequence[Quarantined], root: Location) -> list[str]:
    """What was done to the cache at `root`, and what brings back what is lost, for a person."""
    lines = [f"quarantined {one.file}: {one.num_kept} of {one.num_rows} rows are kept" for one in taken]
    lost = Counter[str]()
    for one in taken:
        lost[one.file.partition("/")[0]] += one.num_rows - one.num_kept
    if lost["chains"]:
        lines.append(f"{_gone(lost['chains'], 'chain')} until the build runs again")
    if lost["verdicts"]:
        makes = "makes it again" if lost["verdicts"] == 1 else "makes them again"
        lines.append(f"{_gone(lost['verdicts'], 'verdict')}: teacher-cache judge {root} {makes}")
    if lost["failures"]:
        lines.append(f"{_gone(lost['failures'], 'failure')}: the build tries those samples again")
    if taken:
        lines.append(
            "versions before this one still name the damaged files (teacher-cache gc --delete-removed deletes them)"
        )
    return lines


def _gone(number: int, noun: str) -> str:
    return f"{format_plural(number, noun)} {'is' if number == 1 else 'are'} gone"


def _take(catalog: Catalog, damage: Damage) -> Quarantined:
    table = {"chains": catalog.chains, "verdicts": catalog.verdicts, "failures": catalog.failures}[damage.table]
    note = catalog.root / "quarantine" / damage.table / f"{damage.file.path}.json"
    name = f"{damage.table}/{damage.file.path}"
    problems = list(damage.problems) or [f"{len(damage.repeated)} samples are visible elsewhere too"]
    content = {
        "file": name,
        "problems": problems,
        "num_rows": damage.file.num_rows,
        "last_version": table.version,
        "quarantined_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # The note comes first: a file that is out of its table must never lie there unexplained.
    write_text_atomic(note, json.dumps(content, indent=2) + "\n")
    num_kept = _keep_sound_rows(catalog, damage) if damage.table == "chains" and damage.good_groups else 0
    if not num_kept:
        remove_files(table, lambda file: file.path == damage.file.path)
    write_text_atomic(note, json.dumps({**content, "num_kept": num_kept}, indent=2) + "\n")
    return Quarantined(name, damage.file.num_rows, num_kept, tuple(problems))


def _keep_sound_rows(catalog: Catalog, damage: Damage) -> int:
    """Writes the rows of sound row groups to a shard in the damaged one's place; how many, 0 where none is."""
    table, run_id = catalog.chains, damage.file.path.partition("/")[0]
    if not _header_is_right(table, damage, catalog.runs().get(run_id)):
        return 0
    left = Counter(damage.repeated)

    def is_sound(rows: pa.Table) -> list[bool]:
        keep = []
        for sample_id in rows.column("sample_id").to_pylist():
            keep.append(not left[sample_id])
            left[sample_id] -= not keep[-1]
        return keep

    committer = Committer(table, VisibleSamples(table), run_id, MENDER)
    temp = committer.temp_path()
    # Without the lock a build that starts now would take the new file for an orphan, all of whose rows are visible.
    with worker_lock(lock_path(catalog.root, run_id, MENDER), LOCK_WAIT_S):
        try:
            num_rows = rewrite(table.path_of(damage.file), temp, is_sound, frozenset(damage.good_groups))
            if not num_rows or not replace_file(table, committer, damage.file, temp, num_rows):
                return 0
        finally:
            temp.unlink(missing_ok=True)
    return num_rows


def _header_is_right(table: Table, damage: Damage, manifest: RunManifest | None) -> bool:
    """Whether the shard's header says what its run's manifest says: a footer has no checksum of its own.

    `copy --round` may have changed the codec; columns that are not those of the header's codec were found before.
    """
    try:
        shard, header = open_shard(table.path_of(damage.file))
    except CorruptError:
        return False
    shard.close()
    if manifest is None or header.run_id != manifest.run_id:
        return False
    asked, said = manifest.capture, header.model_dump(mode="json")
    teacher = manifest.teacher
    return (
        all(said[key] == asked[key] for key in ("nucleus", "draws", "temperatures") if key in asked)
        and header.max_support <= asked.get("max_support", header.max_support)
        and header.vocab_size == teacher.vocab_size
        and header.teacher_fingerprint == teacher.fingerprint
        and header.tokenizer_fingerprint == teacher.tokenizer_fingerprint
        and header.template_fingerprint == teacher.template_fingerprint
    )


def verify_command(root: Location, *, quarantine: bool) -> tuple[Json, list[str]]:
    """Verifies and, if asked, quarantines; the result for programs and its lines for a person.

    `ok` means that nothing is wrong any more: problems that were quarantined are no longer the cache's.
    """
    report = verify_cache(root)
    lines = [f"{problem.file}: {problem.problem}" for problem in report.problems]
    summary = summary_of(report)
    is_damaged = bool(report.damages)
    step = f"teacher-cache verify {root} --quarantine takes damaged files out; the next build makes them again"
    try:
        taken = quarantine_damaged(Catalog(root), report) if quarantine and report.damages else []
    except OSError as error:
        raise DataError(f"{root} cannot be written, nothing was taken out: {error}") from error
    result = asdict(report)
    del result["damages"]
    result |= {"quarantined": [asdict(one) for one in taken], "ok": report.ok}
    advice = [step] if is_damaged and not quarantine else []
    return result, [*lines, summary, *advice, *quarantine_lines(taken, root)]
