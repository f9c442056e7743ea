"""`teacher-cache sql`, `show`, `stats` and `report`: what people ask a cache."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.command_line import AsJson, print_result
from shared.errors import ConfigError
from teacher_cache.command_line import CachePath

app = typer.Typer()


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
    from shared.files import check_out
    from shared.sql import Session
    from shared.storage import location
    from teacher_cache.ask.query import check_files, open_caches, read_stdin, run_query, write_views

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
            from teacher_cache.ask.sql_shell import SqlShell

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
    from shared.files import check_out
    from shared.reader import open_cache
    from shared.storage import location
    from teacher_cache.ask.show import print_chain, print_token

    if html is not None:
        check_out("--html", html, [location(cache)])
    with open_cache(cache) as opened:
        # Our own CSV puts texts in quotes.
        found = opened.sample(sample.strip('"'))
    if html is not None:
        from teacher_cache.ask.show_page import write_chain_page

        write_chain_page(found, html, token)
        print(html)
    elif token is not None:
        print_token(found, token)
    else:
        print_chain(found)


@app.command()
def stats(cache: CachePath, as_json: AsJson = False) -> None:
    """Count chains, tokens, bytes, truncated, right, failed."""
    from shared.catalog import Catalog
    from shared.storage import location
    from teacher_cache.ask.stats import cache_stats, stats_text

    found = cache_stats(Catalog(location(cache)))
    print_result(found.model_dump(mode="json"), [stats_text(found).rstrip("\n")], as_json)


@app.command()
def report(
    cache: CachePath,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one worker's box, for costs.")] = None,
) -> None:
    """Write one HTML page about the cache, with plots."""
    from shared.catalog import Catalog
    from shared.files import check_out
    from shared.storage import location
    from teacher_cache.ask.report import write_cache_report

    check_out("--out", out, [location(cache)])
    write_cache_report(Catalog(location(cache)), out, price_per_hour)
    print(out)
