"""`teacher-cache verify`, `copy`, `recode` and `gc`: what is done to a cache that exists."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from shared.command_line import DAMAGED, INTERRUPTED, AsJson, print_result
from shared.errors import ConfigError, StillroomError
from teacher_cache.command_line import CachePath

app = typer.Typer()


@app.command()
def verify(
    cache: CachePath,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Take damaged files out of the cache, so that the rest is usable.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, decoding and uniqueness. Exit code 3 when something is wrong and stays so."""
    from shared.storage import location
    from teacher_cache.care.verify_command import verify_command

    result, lines = verify_command(location(cache), quarantine=quarantine)
    print_result(result, lines, as_json)
    if not result["ok"]:
        raise typer.Exit(DAMAGED)


@app.command()
def copy(
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE", help="Caches, the last of them the one that the others go into.")
    ],
    as_json: AsJson = False,
) -> None:
    """Copy or merge caches, no row twice. Visible shards alone, hashes checked; the same command resumes."""
    from dataclasses import asdict

    from shared.storage import location
    from teacher_cache.care.copy_cache import copy_caches, copy_lines

    *sources, dest = (location(one) for one in caches)
    if not sources:
        raise ConfigError("copy needs at least two folders: SRC... DEST")
    with _resumable():
        report = copy_caches(sources, dest)
    print_result(asdict(report), copy_lines(report, dest), as_json)
    if report.stopped:
        raise typer.Exit(INTERRUPTED)


@app.command()
def recode(
    cache: CachePath,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Where the new cache goes.")],
    codec: Annotated[str, typer.Option(help="archive or topk-u8.")],
    lossy: Annotated[bool, typer.Option("--lossy", help="Round exact distributions to 8-bit codes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a cache anew in another codec; the same command resumes."""
    from dataclasses import asdict

    from shared.storage import location
    from teacher_cache.care.copy_cache import copy_lines
    from teacher_cache.care.recode import recode_cache

    with _resumable():
        report = recode_cache(location(cache), location(dest), codec, lossy=lossy)
    print_result(asdict(report), copy_lines(report, location(dest)), as_json)
    if report.stopped:
        raise typer.Exit(INTERRUPTED)


@app.command()
def gc(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="Leave files alone that are younger.")] = 24.0,
    drop_run: Annotated[
        list[str] | None, typer.Option("--drop-run", metavar="RUN", help="Take a run, by name or id, out of the cache.")
    ] = None,
    delete_removed: Annotated[
        bool, typer.Option("--delete-removed", help="Delete files that only older versions hold.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Adopt or sweep what crashes left; drop runs on request. No row that could be read is lost unless you ask."""
    from dataclasses import asdict

    from shared.storage import location
    from teacher_cache.care.gc import gc_cache, gc_lines

    report = gc_cache(
        location(cache),
        dry_run=dry_run,
        grace_s=3600 * grace_hours,
        drop_runs=drop_run or [],
        delete_removed=delete_removed,
    )
    print_result({**asdict(report), "freed_bytes": report.freed_bytes}, gc_lines(report), as_json)


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StillroomError(f"{error}: mend that and start the same command again, it goes on") from error
