"""`teacher-cache`: a teacher's chains and distributions, generated once, kept, and asked about.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3
something in the cache is damaged, 130 interrupted (and the command that resumes is printed).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import warn
from stillroom.program import DAMAGED, FAILED, INTERRUPTED, AsJson, new_program, print_result, run_program

if TYPE_CHECKING:
    from teacher_cache.building import BuildResult
    from teacher_cache.config import BuildConfig, ScoreConfig


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the build.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://BUCKET/PREFIX.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. sampling.samples=4; may be given again."),
]
Worker = Annotated[str, typer.Option(metavar="I/N", help="Take share I (from 0) of N of the work.")]


app = new_program(
    "teacher-cache", "Run a teacher once and keep what it said: chains, and the distribution of every token."
)


@app.command()
def plan(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a build, or a score, has left to do. What it will take, too; loads no model."""
    from dataclasses import asdict

    from teacher_cache.config import BuildConfig
    from teacher_cache.plan import disk_warning, plan_build, plan_lines, plan_score

    config = _any_config(config_path, overrides)
    planned = plan_build(config) if isinstance(config, BuildConfig) else plan_score(config)
    print_result(asdict(planned), plan_lines(planned), as_json)
    warning = disk_warning(planned)
    if warning is not None:
        warn(warning)


@app.command()
def build(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    retry_failures: Annotated[bool, typer.Option("--retry-failures", help="Ask failed prompts again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate what is missing, and capture it. The same command resumes."""
    from stillroom.program import StopRequest
    from teacher_cache.building import build_cache
    from teacher_cache.prompts.prompts import parse_worker

    config = _config(config_path, overrides)
    with StopRequest(at_once=True):
        result = build_cache(config, parse_worker(worker), retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    retry_failures: Annotated[bool, typer.Option("--retry-failures", help="Score failed completions again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Capture signals of completions that exist already. The same command resumes."""
    from stillroom.program import StopRequest
    from teacher_cache.building import score_cache
    from teacher_cache.prompts.prompts import parse_worker

    config = _score_config(config_path, overrides)
    with StopRequest(at_once=True):
        result = score_cache(config, parse_worker(worker), retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def judge(
    cache: CachePath,
    kind: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="Judge every chain by this kind: math, exact, regex, reasoning_gym or code; default: as its prompt "
            "says.",
        ),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over chains.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also chains that were judged before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Checks at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check answers; verdicts are added beside the shards.

    A chain's newest verdict, whichever judge gave it, is what `correct` shows; one that is undecided replaces none.
    """
    from dataclasses import asdict

    from stillroom.program import StopRequest
    from stillroom.storage.paths import location
    from teacher_cache.judging import judge_cache

    with StopRequest(at_once=True):
        report = judge_cache(location(cache), kind, where, again, processes)
    for warning in report.warnings():
        warn(warning)
    lines = [
        f"{name}: {one.num_chains} judged, {one.num_correct} right, {one.num_wrong} wrong, "
        f"{one.num_undecided} undecided"
        + (f", {one.num_kept} of them keep the verdict they had" if one.num_kept else "")
        for name, one in report.by_judge.items()
    ]
    if report.num_without_judge:
        lines.append(f"{report.num_without_judge} chains name no judge: choose one with --judge")
    print_result(asdict(report), lines or ["nothing to judge"], as_json)


@app.command()
def doctor(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Look also at this configuration's teacher and servers.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed and what is missing. With what it can do here, and the command that mends it."""
    from stillroom.program import diagnosis_lines
    from teacher_cache.doctor import diagnose

    if config_path is None and overrides:
        raise ConfigError("--set has no effect without a CONFIG: name one, or leave it out")
    found = diagnose(None if config_path is None else _any_config(config_path, overrides))
    print_result(found, diagnosis_lines(found), as_json)
    if not found["ok"]:
        raise typer.Exit(FAILED)


@app.command()
def sql(
    cache: CachePath,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="A SELECT, or - for stdin; none starts a session.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="table, csv, json, markdown or parquet.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    attach: Annotated[
        list[str] | None, typer.Option("--attach", metavar="NAME=CACHE", help="Another cache, as schema NAME.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows that a table shows.")] = 40,
    export_views: Annotated[
        Path | None, typer.Option(metavar="FILE.duckdb", help="Write the views for the plain duckdb program.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="First read every file and compare it with the hash in its name.")
    ] = False,
) -> None:
    """Ask the cache in SQL (DuckDB). The session reads this cache and nothing else, and writes nothing."""
    from stillroom.sql.session import Session
    from stillroom.storage.paths import check_out, location
    from teacher_cache.inspect.sql import check_files, open_caches, read_stdin, run_query, write_views

    catalogs = open_caches(location(cache), attach or [])
    if check:
        check_files(catalogs.values())
    if export_views is not None:
        if query is not None or out is not None or output_format is not None:
            raise ConfigError("--export-views writes a database and answers no query: leave QUERY, --out, --format out")
        write_views(catalogs, export_views)
        return
    if out is not None:
        check_out("--out", out, [one.root for one in catalogs.values()])
    with Session(catalogs) as session:
        if query is None and sys.stdin.isatty() and out is None:
            from teacher_cache.inspect.sql import SqlShell

            if output_format is not None:
                raise ConfigError("--format needs a QUERY: a session has .mode")
            SqlShell(session, max_rows, list(catalogs)).run()
        else:
            run_query(session, read_stdin() if query in (None, "-") else str(query), output_format, out, max_rows)


@app.command()
def show(
    cache: CachePath,
    sample: Annotated[str, typer.Argument(metavar="SAMPLE", help="A sample_id, or how one begins.")],
    token: Annotated[int | None, typer.Option(help="Show the distribution at this token, from 0.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Show one chain, coloured by how sure the teacher was. With --token its alternatives there."""
    from stillroom.cache.reader import open_cache
    from stillroom.storage.paths import check_out, location
    from teacher_cache.inspect.show import print_chain, print_token

    if html is not None:
        check_out("--html", html, [location(cache)])
    with open_cache(cache) as opened:
        # Our own CSV puts texts in quotes.
        found = opened.sample(sample.strip('"'))
    if html is not None:
        from teacher_cache.inspect.show import write_chain_page

        write_chain_page(found, html, token)
        print(html)
    elif token is not None:
        print_token(found, token)
    else:
        print_chain(found)


@app.command()
def stats(cache: CachePath, as_json: AsJson = False) -> None:
    """Count chains, tokens, bytes, truncated, right, failed."""
    from stillroom.cache.catalog import Catalog
    from stillroom.storage.paths import location
    from teacher_cache.inspect.stats import cache_stats, stats_text

    found = cache_stats(Catalog(location(cache)))
    print_result(found.model_dump(mode="json"), [stats_text(found).rstrip("\n")], as_json)


@app.command()
def report(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one worker's box, for costs.")] = None,
) -> None:
    """Write one HTML page about the cache, with plots."""
    from stillroom.cache.catalog import Catalog
    from stillroom.storage.paths import check_out, location
    from teacher_cache.inspect.report import write_cache_report

    check_out("--out", out, [location(cache)])
    write_cache_report(Catalog(location(cache)), out, price_per_hour)
    print(out)


@app.command()
def verify(
    cache: CachePath,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Take damaged files out of the cache, so that the rest is usable.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, decoding and uniqueness. Exit code 3 when something is wrong and stays so."""
    from stillroom.storage.paths import location
    from teacher_cache.maintenance.quarantine import verify_command

    result, lines = verify_command(location(cache), quarantine=quarantine)
    print_result(result, lines, as_json)
    if not result["ok"]:
        raise typer.Exit(DAMAGED)


@app.command()
def copy(
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE", help="Caches, the last of them the one that the others go into.")
    ],
    rounded: Annotated[
        bool, typer.Option("--round", help="Store exact distributions (topk-f32) as 8-bit codes (topk-u8).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy or merge caches, no row twice. Visible shards alone, hashes checked; the same command resumes."""
    from dataclasses import asdict

    from stillroom.storage.paths import location
    from teacher_cache.maintenance.copy import copy_caches, copy_lines

    *sources, dest = (location(one) for one in caches)
    if not sources:
        raise ConfigError("copy needs at least two folders: SRC... DEST")
    with _resumable():
        report = copy_caches(sources, dest, rounded=rounded)
    print_result(asdict(report), copy_lines(report, dest), as_json)
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


def main() -> None:
    """Entry point."""
    # Read when torch is loaded, which tokenizers do long before the engine.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_program(app, "teacher-cache", ("build", "score", "copy"))


def _print_build(config: "BuildConfig | ScoreConfig", result: "BuildResult", as_json: bool) -> None:
    from teacher_cache.building import result_json, result_lines

    printed = result_json(config, result)
    print_result(printed, result_lines(printed, str(config.cache)), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def _any_config(path: Path, overrides: list[str] | None) -> "BuildConfig | ScoreConfig":
    from stillroom.config import read_yaml

    return _score_config(path, overrides) if "completions" in read_yaml(path) else _config(path, overrides)


def _config(path: Path, overrides: list[str] | None) -> "BuildConfig":
    from stillroom.config import load_config, read_yaml
    from teacher_cache.config import BuildConfig

    if "completions" in read_yaml(path):
        raise ConfigError(f"{path} names completions that exist already: teacher-cache score {path}")
    return load_config(path, overrides or [], BuildConfig)


def _score_config(path: Path, overrides: list[str] | None) -> "ScoreConfig":
    from stillroom.config import load_config, read_yaml
    from teacher_cache.config import ScoreConfig

    if "prompts" in read_yaml(path):
        raise ConfigError(f"{path} names prompts for which chains are generated: teacher-cache build {path}")
    return load_config(path, overrides or [], ScoreConfig)


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StillroomError(f"{error}: mend that and start the same command again, it goes on") from error


if __name__ == "__main__":
    main()
