"""`teacher-cache`: generate a teacher's chains and distributions once, store them, and query them.

Commands import what they need when they run, so that `--help` and `sql` start fast.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom.errors import ConfigError, StillroomError, one_line
from stillroom.log import note, warn
from stillroom.program import (
    DAMAGED,
    FAILED,
    INTERRUPTED,
    AsJson,
    StopRequest,
    new_program,
    print_result,
    run_and_leave,
    run_program,
)

if TYPE_CHECKING:
    from teacher_cache.building.result import BuildResult
    from teacher_cache.config import BuildConfig, ScoreConfig
    from teacher_cache.states.config import FeaturesConfig


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration file.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Cache: a folder or s3://BUCKET/PREFIX.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. sampling.samples=4. Repeatable."),
]
Worker = Annotated[str, typer.Option(metavar="I/N", help="Run as worker I (from 0) of N.")]
Join = Annotated[
    bool, typer.Option("--join", help="Work beside any number of others with --join, which may come, go and die.")
]
On = Annotated[
    str | None,
    typer.Option(
        metavar="ray[://HOST:PORT]",
        help="Run workers on a Ray cluster, as many as fit: `ray` uses RAY_ADDRESS or this machine's cluster, "
        "ray://HOST:PORT connects through Ray Client.",
    ),
]
NumWorkers = Annotated[int | None, typer.Option("--workers", min=1, help="With --on: maximum workers at a time.")]
NumCpus = Annotated[
    int | None, typer.Option("--cpus", min=1, help="With --on: CPUs per worker, for a teacher that uses no GPU.")
]
RetryFailures = Annotated[bool, typer.Option("--retry-failures", help="Retry samples that failed before.")]
MAX_THREADS = 1024
"""DuckDB starts as many as requested: 100,000 stall the machine."""
SQL_COMMENT = re.compile(r"--(?:\s|[^=]*\n)")
"""Begins a query and no option: `-- why` or a first line without `=`."""

app = new_program(
    "teacher-cache", "Run a teacher once and store its chains with the probability distribution of every token."
)


@app.command()
def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    num_shown: Annotated[
        int,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            show_default=False,
            help="Also print N prompts as the teacher reads them, special tokens included, from all sources in turn.",
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a build, score or features pass has left to do: tokens, disk space, time. Loads no model."""
    from dataclasses import asdict

    from teacher_cache.config import BuildConfig, load_run_config
    from teacher_cache.plan import disk_warning, plan_build, plan_lines, plan_score, shown_lines
    from teacher_cache.states.config import is_features_file, load_features_config

    if is_features_file(config_path):
        if num_shown:
            raise ConfigError("--show prints prompts, which a features configuration does not have: remove it")
        _plan_features(load_features_config(config_path, overrides or ()), as_json)
        return
    config = load_run_config(config_path, overrides or ())
    planned = plan_build(config, num_shown) if isinstance(config, BuildConfig) else plan_score(config, num_shown)
    print_result(asdict(planned), [*shown_lines(planned), *plan_lines(planned)], as_json)
    warning = disk_warning(planned)
    if warning is not None:
        warn(warning)


@app.command()
def build(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    retry_failures: RetryFailures = False,
    as_json: AsJson = False,
) -> None:
    """Generate and store the missing chains. The same command resumes."""
    import teacher_cache
    from teacher_cache.config import BuildConfig, load_run_config

    config = load_run_config(config_path, overrides or (), "build")
    assert isinstance(config, BuildConfig)
    if on is not None or (num_workers, num_cpus) != (None, None):
        if join or retry_failures or worker != "0/1":
            raise ConfigError("--on starts workers with --join: remove --join, --worker and --retry-failures")
        _run_on("build", config_path, overrides or (), config, on, num_workers, num_cpus, as_json)
        return
    with StopRequest(at_once=True):
        result = teacher_cache.build(config, worker=worker, join=join, retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def augment(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Ask the teacher for paraphrases, translations and solutions of prompt variants. The same command resumes."""
    from teacher_cache.augmenting import augment as ask
    from teacher_cache.config import BuildConfig, load_run_config

    config = load_run_config(config_path, overrides or (), "build")
    assert isinstance(config, BuildConfig)
    with StopRequest(at_once=True):
        done = ask(config)
    print_result(done.as_json(), done.lines(), as_json)
    if done.stopped is not None:
        raise typer.Exit(INTERRUPTED)


@app.command()
def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    retry_failures: RetryFailures = False,
    as_json: AsJson = False,
) -> None:
    """Store the teacher's distributions on existing completions. The same command resumes."""
    import teacher_cache
    from teacher_cache.config import ScoreConfig, load_run_config

    config = load_run_config(config_path, overrides or (), "score")
    assert isinstance(config, ScoreConfig)
    if on is not None or (num_workers, num_cpus) != (None, None):
        if join or retry_failures or worker != "0/1":
            raise ConfigError("--on starts workers with --join: remove --join, --worker and --retry-failures")
        _run_on("score", config_path, overrides or (), config, on, num_workers, num_cpus, as_json)
        return
    with StopRequest(at_once=True):
        result = teacher_cache.score(config, worker=worker, join=join, retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def features(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    as_json: AsJson = False,
) -> None:
    """Store the teacher's hidden states or attention at existing chains. The same command resumes."""
    import teacher_cache
    from teacher_cache.states.config import load_features_config
    from teacher_cache.states.passes import result_json, result_lines

    config = load_features_config(config_path, overrides or ())
    if on is not None or (num_workers, num_cpus) != (None, None):
        if join or worker != "0/1":
            raise ConfigError("--on starts workers with --join: remove --join and --worker")
        _run_on("features", config_path, overrides or (), config, on, num_workers, num_cpus, as_json)
        return
    with StopRequest(at_once=True):
        result = teacher_cache.features(config, worker=worker, join=join)
    print_result(result_json(result), result_lines(result, config.cache), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


@app.command()
def judge(
    cache: Annotated[
        str | None, typer.Argument(metavar="[CACHE]", help="Cache: a folder or s3://BUCKET/PREFIX.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="Judge every chain with this judge: math, exact, regex, reasoning_gym or code. Default: the one "
            "that its prompt names.",
        ),
    ] = None,
    llm: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask a language model about chains that are still undecided. FILE is YAML: model, endpoint, prompt.",
        ),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition on chains.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Include chains that were judged before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of judge processes.")] = 1,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Judge this file's pairs instead of a cache: JSON Lines with judge, reference and answer. Prints one "
            "verdict per line, with its rule; pairs with `right` (true or false) also give the agreement.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check answers and add verdicts. Shards are not rewritten.

    `correct` shows a chain's newest verdict from any judge; an undecided verdict never replaces a decided one.
    """
    from dataclasses import asdict

    import teacher_cache

    if llm is not None and (kind is not None or processes != 1):
        raise ConfigError("--llm asks a language model: remove --judge and --processes")
    if pairs is not None:
        if cache is not None or where is not None or again:
            raise ConfigError("--pairs judges a file: remove CACHE, --where and --again, or remove --pairs")
        _judge_pairs(pairs, kind, llm, processes, as_json)
        return
    if cache is None:
        raise ConfigError("pass a CACHE, or a file with --pairs FILE")
    with StopRequest(at_once=True):
        report = teacher_cache.judge(cache, kind=kind, where=where, again=again, processes=processes, llm=llm)
    for warning in report.warnings():
        warn(warning)
    lines = [f"{name}: {one.line}" for name, one in report.by_judge.items()]
    if report.num_without_judge:
        lines.append(f"{report.num_without_judge} chains have no judge: choose one with --judge, or --llm")
    if report.num_not_judged:
        lines.append(f"{report.num_not_judged} chains need their own judge first: teacher-cache judge {cache}")
    print_result(asdict(report), lines or ["nothing to judge"], as_json)


def _judge_pairs(path: Path, kind: str | None, llm: Path | None, num_processes: int, as_json: bool) -> None:
    """Verdicts on stdout as JSON Lines, the agreement on stderr; with --json the agreement alone, on stdout."""
    from dataclasses import asdict

    from stillroom.judging.pairs import Agreement, agreement_lines, judge_pairs, read_pairs, verdict_line
    from stillroom.log import Progress

    if llm is None:
        found = read_pairs(path, kind)
        judged = judge_pairs(found, num_processes)
    else:
        from teacher_cache.llm_judge import llm_judge_name, load_llm_judge, opinions_on_pairs

        config = load_llm_judge(llm)
        found = read_pairs(path, llm_judge_name(config), is_model=True)
        judged = opinions_on_pairs(config, found)
    agreements: dict[str, Agreement] = {}
    with StopRequest(at_once=True), Progress("judge", len(found), "pairs") as progress:
        for number, (pair, verdict) in enumerate(judged, 1):
            agreements.setdefault(pair.judge, Agreement()).add(pair, verdict)
            if not as_json:
                print(verdict_line(pair, verdict), flush=True)
            progress.update(number, 0)
    if as_json:
        print_result({name: asdict(one) for name, one in agreements.items()}, [], as_json)
    for line in () if as_json else agreement_lines(agreements.items()):
        note(line)


@app.command()
def rounds(
    config_path: ConfigPath,
    overrides: Overrides = None,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only show rounds, tokens and time, and check the configuration.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """On-policy rounds: generate with the student, score with the teacher, whenever it is this side's turn.

    `student-train rounds` on the same file does the training, on a machine that sees the same folder; with --both it
    does all parts on one.
    """
    from stillroom.config import load_config
    from stillroom.rounds.config import RoundsConfig
    from stillroom.rounds.turns import state_lines, take_turns
    from teacher_cache.rounds import plan_lines, plan_rounds

    config = load_config(config_path, overrides or (), RoundsConfig)
    planned = plan_rounds(config)
    if only_plan:
        print_result(planned, plan_lines(config, planned), as_json)
        return
    state = take_turns(config, {"teacher-cache"})
    print_result(state.model_dump(mode="json"), state_lines(config, state), as_json)


@app.command()
def doctor(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check this configuration's teacher and servers.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check what is installed. Lists what is missing and the command that installs it."""
    from stillroom.doctor import report_lines
    from teacher_cache.config import load_run_config
    from teacher_cache.doctor import diagnose

    if config_path is None and overrides:
        raise ConfigError("--set has no effect without a CONFIG: pass one, or remove --set")
    result = diagnose(None if config_path is None else load_run_config(config_path, overrides or ()))
    print_result(result, report_lines(result), as_json)
    if not result["ok"]:
        raise typer.Exit(FAILED)


class _SqlCommand(typer.core.TyperCommand):
    """A command whose QUERY may begin with a comment, `-- why`, which would look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        comments = [one for one in args if SQL_COMMENT.match(one)]
        rest = [one for one in args if one not in comments]
        return super().parse_args(ctx, [*rest, "--", *comments] if comments and "--" not in rest else args)


@app.command(cls=_SqlCommand)
def sql(
    cache: CachePath,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="QUERY", help="SELECTs separated by ;, or - for stdin. Without it an interactive session starts."
        ),
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="table, csv, json, jsonl, markdown, parquet or arrow.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file instead of stdout.")] = None,
    attach: Annotated[
        list[str] | None,
        typer.Option("--attach", metavar="NAME=CACHE", help="Attach another cache as schema NAME. Repeatable."),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME=FILE",
            help="Add a CSV, Parquet, JSON or Arrow file as table NAME, read-only. Repeatable.",
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=0, help="Version of CACHE's chains. Default: the latest, as of attached caches always."),
    ] = None,
    verdicts_version: Annotated[
        int | None, typer.Option(min=0, help="Version of CACHE's verdicts. Default: the latest.")
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="Threads. Default: all cores.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit, e.g. 4GB. Default: 80% of the machine's.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Maximum rows of a printed table.")] = 40,
    export_views: Annotated[
        Path | None, typer.Option(metavar="FILE.duckdb", help="Write the views to a database for the duckdb program.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="First verify every file against the hash in its name.")
    ] = False,
) -> None:
    """Query the cache in SQL (DuckDB). Read-only; other files cannot be accessed unless named with --with."""
    from stillroom.sql.session import Session
    from stillroom.storage.paths import check_out, location
    from teacher_cache.inspect.sql import check_files, open_caches, own_files, read_stdin, run_queries, write_views

    catalogs, files = open_caches(location(cache), attach or [], version, verdicts_version), own_files(own or [])
    if check:
        check_files(catalogs.values())
    if export_views is not None:
        if query is not None or out is not None or output_format is not None:
            raise ConfigError("--export-views runs no query: remove QUERY, --out and --format")
        if num_threads is not None or memory is not None:
            raise ConfigError("--export-views runs no query: remove --threads and --memory")
        write_views(catalogs, export_views, files)
        return
    if out is not None:
        check_out("--out", out, [one.root for one in catalogs.values()])
    with Session(catalogs, files, num_threads, memory) as session:
        if query is None and sys.stdin.isatty() and out is None:
            from teacher_cache.inspect.shell import SqlShell

            if output_format is not None:
                raise ConfigError("--format needs a QUERY: use .mode in a session")
            SqlShell(session, max_rows, list(catalogs)).run()
        else:
            text = read_stdin() if query in (None, "-") else str(query)
            run_queries(session, text, output_format, out, max_rows)


@app.command()
def files(
    cache: CachePath,
    table: Annotated[str, typer.Option(help="chains, verdicts, failures or features.")] = "chains",
    version: Annotated[int | None, typer.Option(min=0, help="Version of the table. Default: the latest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the visible files of a table at a version, one per line: what any Parquet reader may read."""
    from stillroom.storage.paths import location
    from teacher_cache.inspect.files import list_files

    found = list_files(location(cache), table, version)
    print_result(found.model_dump(mode="json"), [one.path for one in found.files], as_json)


@app.command()
def show(
    cache: CachePath,
    sample: Annotated[
        str, typer.Argument(metavar="SAMPLE", help="A sample_id (`teacher-cache sql` lists them) or a unique prefix.")
    ],
    token: Annotated[int | None, typer.Option(help="Show the distribution at this token (from 0).")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page instead.")] = None,
) -> None:
    """Show one chain, coloured by the teacher's confidence. With --token: the alternatives at one token."""
    from stillroom.cache.reader import open_cache
    from stillroom.storage.paths import check_out, location
    from teacher_cache.inspect.show import print_chain, print_token

    if html is not None:
        check_out("--html", html, [location(cache)])
    with open_cache(cache) as opened:
        # Ids copied from our CSV output come in quotes.
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
def stats(
    cache: CachePath,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, help="Price of one worker's machine, for costs of a build and a right answer."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print counts of chains, tokens, bytes, truncations, verdicts and failures."""
    from stillroom.cache.catalog import Catalog
    from stillroom.storage.paths import location
    from teacher_cache.inspect.stats import cache_stats, stats_text

    found = cache_stats(Catalog(location(cache)), price_per_hour)
    print_result(found.model_dump(mode="json"), [stats_text(found).rstrip("\n")], as_json)


@app.command()
def report(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of one worker's machine, to show costs.")
    ] = None,
) -> None:
    """Write an HTML report of the cache with charts."""
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


@app.command()
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


@app.command()
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


def program() -> None:
    """Entry point."""
    run_and_leave(main)


def main() -> None:
    """The program, for callers that go on."""
    # torch reads it when it is loaded, which tokenizers do long before the engine starts.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_program(app, "teacher-cache", ("build", "augment", "score", "features", "rounds", "copy"))


def _plan_features(config: "FeaturesConfig", as_json: bool) -> None:
    from dataclasses import asdict

    from teacher_cache.states.plan import plan_features, plan_lines, plan_warning

    planned = plan_features(config)
    print_result({**asdict(planned), "fits": planned.fits}, plan_lines(planned), as_json)
    warning = plan_warning(planned)
    if warning is not None:
        warn(warning)


def _run_on(
    command: str,
    path: Path,
    overrides: Sequence[str],
    config: "BuildConfig | ScoreConfig | FeaturesConfig",
    on: str | None,
    num_workers: int | None,
    num_cpus: int | None,
    as_json: bool,
) -> None:
    from teacher_cache.building.result import result_lines
    from teacher_cache.on_ray import joining_job, replica_size, run_on_ray

    if on is None:
        raise ConfigError("--workers and --cpus have no effect without --on")
    with StopRequest(at_once=True):
        job = joining_job(command, path, overrides, config)
        result = run_on_ray(on, job, replica_size(config, num_cpus), num_workers)
    if result is not None and command == "features":
        from teacher_cache.states.passes import FeaturesResult
        from teacher_cache.states.passes import result_lines as feature_lines

        print_result(result, feature_lines(FeaturesResult.of(result), config.cache), as_json)
    elif result is not None:
        print_result(result, result_lines(result, str(config.cache)), as_json)
    if result is None or result["stopped"] is not None:
        raise typer.Exit(INTERRUPTED)


def _print_build(config: "BuildConfig | ScoreConfig", result: "BuildResult", as_json: bool) -> None:
    from teacher_cache.building.result import result_json, result_lines

    printed = result_json(config, result)
    print_result(printed, result_lines(printed, str(config.cache)), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


if __name__ == "__main__":
    program()
