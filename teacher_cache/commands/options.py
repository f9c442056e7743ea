"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

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
