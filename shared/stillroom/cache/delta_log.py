"""What a `_delta_log` says entry by entry: entries that are missing, and every file that was ever visible.

deltalake reads the latest state; care of a cache must also know what older versions hold. Entries are JSON lines
(https://github.com/delta-io/delta/blob/master/PROTOCOL.md), checkpoints are not read.

Receipts: what each writer last committed to each table, kept beside the tables.

A Delta log whose newest entry is lost looks like a shorter log that is whole. The receipt, written after the commit,
still knows of it.

    CACHE/receipts/<table>.<application, / as .>.json
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from stillroom.errors import CorruptError, StillroomError
from stillroom.log import warn
from stillroom.storage.paths import Location, matching, write_text_atomic

LOG_ENTRY = re.compile(r"^(\d{20})\.json$")
LOG_CHECKPOINT = re.compile(r"^(\d{20})\.checkpoint.*\.parquet$")


@dataclass(frozen=True, slots=True)
class Span:
    """A file was visible from version `added` to version `removed` - 1, or still is where that is None."""

    added: int
    removed: int | None


def log_problems(log: Location) -> list[str]:
    """Entries of the folder `log` that are missing between the first and the last that is there, one line each."""
    if not log.is_dir():
        return ["is missing"]
    entries, checkpoints = _versions(log)
    if not entries and not checkpoints:
        return ["holds no entry: no file of this table can be told from an orphan"]
    last, bridged = max(entries | checkpoints), max(checkpoints, default=-1)
    missing = [version for version in range(last + 1) if version not in entries]
    hinted = _hinted_checkpoint(log)
    lost = [] if hinted is None or hinted in checkpoints else [hinted]
    return [
        f"checkpoint {version} is missing, to which _last_checkpoint points: restore it from a copy, or remove "
        "_last_checkpoint, which loses nothing while every entry is there"
        for version in lost
    ] + [
        f"entry {version:020d}.json is missing: restore it from a copy; "
        + (
            f"versions before the checkpoint {bridged} can no longer be read"
            if version <= bridged
            else "the shards it registered are still there"
        )
        for version in missing
    ]


def broken_entries(log: Location) -> list[str]:
    """Entries and what is wrong with them that hold no JSON, as one that was cut short; one line each."""
    entries, _ = _versions(log)
    found = []
    for version in sorted(entries):
        try:
            _actions(log / f"{version:020d}.json")
        except CorruptError as error:
            if isinstance(error.__cause__, OSError):
                # A disk that refuses to read says nothing about what was written.
                continue
            found.append(
                f"entry {version:020d}.json is damaged or cut short: restore it from a copy; the shards it registered "
                "are still there"
            )
    return found


def file_history(log: Location) -> dict[str, list[Span]]:
    """Every file that an entry adds, by path relative to the table, with the versions that hold it.

    Raises CorruptError where an entry is missing or no JSON: what cannot be read may have named any file.
    """
    problems = log_problems(log)
    if problems:
        raise CorruptError(f"{log}: {problems[0]} (`teacher-cache verify` lists what is wrong)")
    entries, _ = _versions(log)
    found: dict[str, list[Span]] = {}
    for version in sorted(entries):
        for action in _actions(log / f"{version:020d}.json"):
            if "add" in action:
                found.setdefault(unquote(action["add"]["path"]), []).append(Span(version, None))
            elif "remove" in action:
                spans = found.get(unquote(action["remove"]["path"]), [])
                if spans and spans[-1].removed is None:
                    spans[-1] = Span(spans[-1].added, version)
    return found


def merged_ranges(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """First and last versions that hold at least one of these files; spans that have no end are left out.

    Example: spans 2..5 and 4..9 (not included) become [(2, 8)].
    """
    merged: list[tuple[int, int]] = []
    for first, last in sorted((span.added, span.removed - 1) for span in spans if span.removed is not None):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _versions(log: Location) -> tuple[set[int], set[int]]:
    names = [path.name for path in log.iterdir()]
    entries = {int(match[1]) for match in map(LOG_ENTRY.match, names) if match}
    checkpoints = {int(match[1]) for match in map(LOG_CHECKPOINT.match, names) if match}
    return entries, checkpoints


def _hinted_checkpoint(log: Location) -> int | None:
    hint = log / "_last_checkpoint"
    if not hint.exists():
        return None
    try:
        return int(json.loads(hint.read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        # deltalake looks for checkpoints by itself then.
        return None


def _actions(entry: Location) -> list[dict[str, dict[str, str]]]:
    try:
        return [json.loads(line) for line in entry.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CorruptError(f"{entry} cannot be read: {' '.join(str(error).split())}") from error


FOLDER = "receipts"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The last transaction that an application committed to a table, and the version which that became."""

    application: str
    sequence: int
    version: int


def write_receipt(table: Location, receipt: Receipt) -> None:
    """Notes a commit to the table in folder `table`. A receipt that cannot be written undoes no commit: it warns."""
    path = table.parent / FOLDER / f"{table.name}.{receipt.application.replace('/', '.')}.json"
    content = {"application": receipt.application, "sequence": receipt.sequence, "version": receipt.version}
    try:
        write_text_atomic(path, json.dumps(content) + "\n")
    except (OSError, StillroomError) as error:
        warn(f"{path} cannot be written ({error}): the commit stands")


def read_receipts(table: Location) -> list[Receipt]:
    """Receipts of the table in folder `table`. Raises CorruptError naming one that cannot be read."""
    receipts = []
    for path in matching(table.parent / FOLDER, f"{table.name}.*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            receipts.append(Receipt(content["application"], int(content["sequence"]), int(content["version"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path} is no receipt ({error}): remove it, nothing but a check needs it") from error
    return receipts
