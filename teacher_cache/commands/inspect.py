"""`teacher-cache sql`, `files`, `show`, `stats` and `report`."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom.errors import ConfigError
from stillroom.program import AsJson, print_result
from teacher_cache.commands.options import CachePath

MAX_THREADS = 1024
"""DuckDB starts as many as requested: 100,000 stall the machine."""
SQL_COMMENT = re.compile(r"--(?:\s|[^=]*\n)")
"""Begins a query and no option: `-- why` or a first line without `=`."""


class SqlCommand(typer.core.TyperCommand):
    """A command whose QUERY may begin with a comment, `-- why`, which would look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        comments = [one for one in args if SQL_COMMENT.match(one)]
        rest = [one for one in args if one not in comments]
        return super().parse_args(ctx, [*rest, "--", *comments] if comments and "--" not in rest else args)


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
