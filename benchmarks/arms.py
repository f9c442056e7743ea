"""The frame of benchmarks that train several arms with several seeds: folder, rows, progress, last line of JSON."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from stillroom.config import Json
from student_train.runtime.ranks import Ranks, joined_ranks

Arm = TypeVar("Arm")


def print_measured(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[Path, argparse.Namespace], Json],
    show: Callable[[Json], None],
) -> Json:
    """Measures in --folder, or a temporary one; prints a table unless --json is set, then one JSON object."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"stillroom-{name}-") as temp:
        folder = arguments.folder or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        result = {**measure(folder, arguments), "seconds": round(time.monotonic() - started_s, 1)}
    if not arguments.json:
        show(result)
    print(json.dumps(result))
    return result


def measured_rows(
    arms: Sequence[Arm], seeds: Iterable[int], row_of: Callable[[Arm, int, Ranks], tuple[Json, str]]
) -> list[Json]:
    """A row for every arm with every seed; `row_of` also says what to print of it, before the seconds it took."""
    rows = []
    with joined_ranks() as ranks:
        for seed in seeds:
            for arm in arms:
                begun_s = time.monotonic()
                row, said = row_of(arm, seed, ranks)
                rows.append(row)
                print(f"{said} {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
    return rows
