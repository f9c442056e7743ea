"""`teacher-cache verify`, `copy` and `gc`."""

from typing import Annotated

import typer

from stillroom.errors import ConfigError, StillroomError, one_line
from stillroom.program import DAMAGED, INTERRUPTED, AsJson, print_result
from teacher_cache.commands.options import CachePath


def verify(
    cache: CachePath,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Remove damaged files from the cache, so that the rest is usable.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, decoding and uniqueness. Exits with 3 if damage remains."""
    from stillroom.storage.paths import location
    from teacher_cache.maintenance.quarantine import verify_command

    result, lines = verify_command(location(cache), quarantine=quarantine)
    print_result(result, lines, as_json)
    if not result["ok"]:
        raise typer.Exit(DAMAGED)


def copy(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="Source caches, followed by the destination.")],
    rounded: Annotated[
        bool, typer.Option("--round", help="Store exact distributions (topk-f32) as 8-bit codes (topk-u8).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy or merge caches without duplicate rows. Verifies hashes; the same command resumes."""
    from dataclasses import asdict

    from stillroom.storage.paths import location
    from teacher_cache.maintenance.copy import copy_caches, copy_lines

    *sources, dest = (location(one) for one in caches)
    if not sources:
        raise ConfigError("copy needs at least two caches: SOURCE... DEST")
    try:
        report = copy_caches(sources, dest, rounded=rounded)
    except OSError as error:
        raise StillroomError(f"{one_line(error)}: fix that and run the same command again to resume") from error
    print_result(asdict(report), copy_lines(report, dest), as_json)
    if report.stopped:
        raise typer.Exit(INTERRUPTED)


def gc(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="Keep files younger than this.")] = 24.0,
    drop_run: Annotated[
        list[str] | None,
        typer.Option("--drop-run", metavar="RUN", help="Remove a run or feature set, by name or id. Repeatable."),
    ] = None,
    delete_removed: Annotated[
        bool, typer.Option("--delete-removed", help="Delete files that only older versions use.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Adopt or delete files that crashes left behind. Readable rows are removed only by --drop-run."""
    from dataclasses import asdict

    from stillroom.storage.paths import location
    from teacher_cache.maintenance.gc import gc_cache, gc_lines

    report = gc_cache(
        location(cache),
        dry_run=dry_run,
        grace_s=3600 * grace_hours,
        drop_runs=drop_run or [],
        delete_removed=delete_removed,
    )
    print_result({**asdict(report), "freed_bytes": report.freed_bytes}, gc_lines(report), as_json)
