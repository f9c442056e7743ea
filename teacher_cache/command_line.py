"""What the commands of `teacher-cache` have in common: arguments, exit codes, and how a result is printed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shared.config import Json

FAILED, DAMAGED, INTERRUPTED = 1, 3, 130

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the build.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://BUCKET/PREFIX.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. sampling.samples=4.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Worker = Annotated[str, typer.Option(metavar="I/N", help="Take share I (from 0) of N of the work.")]


def print_result(result: "Json", lines: list[str], as_json: bool) -> None:
    """A command's result on stdout: one JSON object for programs, or lines for people."""
    print(json.dumps(result) if as_json else "\n".join(lines), flush=True)
