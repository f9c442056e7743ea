"""`teacher-cache verify --quarantine`: removes damaged files from their tables, with a note why, and keeps sound rows.

    CACHE/quarantine/<table>/<file>.json    file, problems, rows, rows kept, last version that uses it, when

The file stays on disk: earlier versions use it, and a student pinned there may read its sound row groups (page
checksums protect it from the others). Rows of sound row groups are written to a new shard that replaces the damaged one
in the same transaction; the next build regenerates the others. `teacher-cache gc --delete-removed` deletes the files.
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
from teacher_cache.maintenance.chainless_verdicts import drop_chainless_verdicts
from teacher_cache.maintenance.feature_checks import drop_chainless
from teacher_cache.maintenance.replacing import keep_rows, replace_rows
from teacher_cache.maintenance.shard_checks import Damage
from teacher_cache.maintenance.verify import VerifyReport, summary_of, verify_cache
from teacher_cache.writer.commit import remove_files


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that was quarantined, relative to the cache; `num_kept` of its rows are in a new shard."""

    file: str
    num_rows: int
    num_kept: int
    problems: Sequence[str]


def quarantine_damaged(catalog: Catalog, report: VerifyReport) -> list[Quarantined]:
    """Removes the report's damaged files from their tables, and their problems from the report.

    Raises CacheConflict if others keep committing, OSError if the cache cannot be written.
    """
    # A build may have committed since the check began.
    catalog.chains.refresh()
    quarantined = [_quarantine(catalog, damage) for damage in report.damages]
    if any(damage.table == "chains" for damage in report.damages):
        # The next build may generate other tokens for these samples.
        for file, num_rows in drop_chainless(catalog).items():
            quarantined.append(Quarantined(file, num_rows, 0, ("rows whose chains were quarantined",)))
        for file, num_rows in drop_chainless_verdicts(catalog).items():
            quarantined.append(Quarantined(file, num_rows, 0, ("verdicts on chains that were quarantined",)))
    # Removing a file does not repair the rest, which stays reported.
    names = {one.file for one in quarantined}
    report.problems = [problem for problem in report.problems if problem.file not in names]
    report.damages = []
    return quarantined


def verify_command(root: Location, *, quarantine: bool) -> tuple[Json, list[str]]:
    """Verifies and, on request, quarantines; returns the result for programs and its lines for a person.

    `ok` means that nothing is wrong now: quarantined problems no longer count.
    """
    report = verify_cache(root)
    lines = [*(f"{problem.file}: {problem.problem}" for problem in report.problems), summary_of(report)]
    quarantined: list[Quarantined] = []
    if report.damages and quarantine:
        try:
            quarantined = quarantine_damaged(Catalog(root), report)
        except OSError as error:
            raise DataError(f"{root} cannot be written: {error}") from error
    elif report.damages:
        lines.append(
            f"teacher-cache verify {root} --quarantine removes damaged files; the next build regenerates their rows"
        )
    result = asdict(report)
    del result["damages"]
    result |= {"quarantined": [asdict(one) for one in quarantined], "ok": report.ok}
    return result, [*lines, *quarantine_lines(quarantined, root)]


def quarantine_lines(quarantined: Sequence[Quarantined], root: Location) -> list[str]:
    """What was done to the cache at `root`, and how to restore what is lost, for a person."""
    lines = [f"quarantined {one.file}: kept {one.num_kept} of {one.num_rows} rows" for one in quarantined]
    lost = Counter[str]()
    for one in quarantined:
        lost[one.file.partition("/")[0]] += one.num_rows - one.num_kept
    if lost["chains"]:
        lines.append(f"{_gone(lost['chains'], 'chain')} until the build runs again")
    if lost["verdicts"]:
        makes = "restores it" if lost["verdicts"] == 1 else "restores them"
        lines.append(f"{_gone(lost['verdicts'], 'verdict')}: teacher-cache judge {root} {makes}")
    if lost["features"]:
        lines.append(f"features of {format_plural(lost['features'], 'chain')} are gone until their pass runs again")
    if lost["failures"]:
        lines.append(f"{_gone(lost['failures'], 'failure')}: the build tries those samples again")
    if quarantined:
        lines.append("earlier versions still use the damaged files (teacher-cache gc --delete-removed deletes them)")
    return lines


def _quarantine(catalog: Catalog, damage: Damage) -> Quarantined:
    table = next(one for one in catalog.tables() if one.folder.name == damage.table)
    note = catalog.root / "quarantine" / damage.table / f"{damage.file.path}.json"
    name = f"{damage.table}/{damage.file.path}"
    # A shard without problems of its own may still repeat rows of others.
    problems = list(damage.problems) or [f"{len(damage.repeated)} samples are also visible in other files"]
    content = {
        "file": name,
        "problems": problems,
        "num_rows": damage.file.num_rows,
        "last_version": table.version,
        "quarantined_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # The note comes first: a file must never leave its table unexplained.
    write_text_atomic(note, json.dumps(content, indent=2) + "\n")
    num_kept = _keep_sound_rows(catalog, damage) if damage.table == "chains" and damage.good_groups else 0
    if damage.table == "features":
        groups = frozenset(damage.good_groups)
        num_kept = keep_rows(catalog.root, table, damage.file, _all_rows if groups else None, groups)
    # Otherwise one commit has replaced the shard by its sound rows.
    elif not num_kept:
        remove_files(table, lambda file: file.path == damage.file.path)
    write_text_atomic(note, json.dumps({**content, "num_kept": num_kept}, indent=2) + "\n")
    return Quarantined(name, damage.file.num_rows, num_kept, tuple(problems))


def _keep_sound_rows(catalog: Catalog, damage: Damage) -> int:
    """Replaces the damaged shard with one that holds the rows of its sound row groups; returns their number."""
    table, run_id = catalog.chains, damage.file.owner
    if not _header_is_right(table, damage, catalog.runs().get(run_id)):
        return 0
    left = Counter(damage.repeated)

    def is_sound(rows: pa.Table) -> list[bool]:
        keep = []
        for sample_id in rows.column("sample_id").to_pylist():
            keep.append(not left[sample_id])
            # Of a repeated id only the surplus rows are left out.
            left[sample_id] -= not keep[-1]
        return keep

    return replace_rows(catalog.root, table, damage.file, is_sound, damage.good_groups)


def _header_is_right(table: Table, damage: Damage, manifest: RunManifest | None) -> bool:
    """Whether the shard's header agrees with its run's manifest: a footer has no checksum of its own.

    The codec may differ in a copy (`copy --round`); columns that do not fit the header's codec were found before.
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
        # Lower is right too: a vocabulary smaller than max_support limits what a build writes.
        and header.max_support <= asked.get("max_support", header.max_support)
        and header.vocab_size == teacher.vocab_size
        and header.teacher_fingerprint == teacher.fingerprint
        and header.tokenizer_fingerprint == teacher.tokenizer_fingerprint
        and header.template_fingerprint == teacher.template_fingerprint
    )


def _all_rows(rows: pa.Table) -> list[bool]:
    return [True] * rows.num_rows


def _gone(number: int, noun: str) -> str:
    return f"{format_plural(number, noun)} {'is' if number == 1 else 'are'} gone"
