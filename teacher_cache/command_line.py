"""Arguments that several commands of `teacher-cache` take."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the build.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://BUCKET/PREFIX.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. sampling.samples=4; may be given again."),
]
Worker = Annotated[str, typer.Option(metavar="I/N", help="Take share I (from 0) of N of the work.")]
