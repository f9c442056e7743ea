"""The entries of a `_delta_log`, one by one: which are missing, and every file that was ever visible.

deltalake reads the latest state; maintenance must also know what older versions hold. Entries are JSON lines
(https://github.com/delta-io/delta/blob/master/PROTOCOL.md); checkpoints are not read.

A log that lost its newest entry looks like a shorter log that is complete. So after each commit its writer records a
commit marker beside the tables:

    CACHE/receipts/<table>.<application, / as .>.json
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from urllib.parse import unquote

from stillroom.errors import CorruptError, StillroomError
from stillroom.log import warn
from stillroom.storage.paths import Location, matching, write_text_atomic

LOG_ENTRY = re.compile(r"^(\d{20})\.json$")
LOG_CHECKPOINT = re.compile(r"^(\d{20})\.checkpoint.*\.parquet$")
MARKER_FOLDER = "receipts"


@dataclass(frozen=True, slots=True)
class Span:
    """A file is visible from version `added` to version `removed` - 1, or until now if that is None."""

    added: int
    removed: int | None


def log_problems(log: Location) -> list[str]:
    """One line for each entry missing between the first and the last in the folder `log`."""
    if not log.is_dir():
        return ["is missing"]
    entries, checkpoints = _versions(log)
    if not entries and not checkpoints:
        return ["has no entry: files of this table cannot be distinguished from orphans"]
    # A checkpoint proves that its version existed even if its entry is gone.
    last, bridged = max(entries | checkpoints), max(checkpoints, default=-1)
    # From 0, also below a checkpoint: tables are created without log cleanup, so no entry may be missing.
    missing = [version for version in range(last + 1) if version not in entries]
    hinted = _hinted_checkpoint(log)
    # deltalake follows the hint, and fails if its checkpoint is gone although the entries would do.
    lost = [] if hinted is None or hinted in checkpoints else [hinted]
    return [
        f"checkpoint {version}, named by _last_checkpoint, is missing: restore it from a copy, or delete "
        "_last_checkpoint, which is safe while every entry exists"
        for version in lost
    ] + [
        f"entry {version:020d}.json is missing: restore it from a copy; "
        + (
            f"versions before the checkpoint {bridged} can no longer be read"
            if version <= bridged
            else "the shards it registered still exist"
        )
        for version in missing
    ]


def broken_entries(log: Location) -> list[str]:
    """One line for each entry that is not JSON, for example because it was truncated."""
    entries, _ = _versions(log)
    found = []
    for version in sorted(entries):
        try:
            _actions(log / f"{version:020d}.json")
        except CorruptError as error:
            if isinstance(error.__cause__, OSError):
                # A disk that cannot be read says nothing about what was written.
                continue
            found.append(
                f"entry {version:020d}.json is damaged or truncated: restore it from a copy; the shards it registered "
                "still exist"
            )
    return found


def file_history(log: Location) -> dict[str, list[Span]]:
    """Every file that was ever added, by path relative to the table, with the versions that hold it.

    Raises CorruptError if an entry is missing or not JSON: it may have named any file.
    """
    problems = log_problems(log)
    if problems:
        raise CorruptError(f"{log}: {problems[0]} (`teacher-cache verify` lists what is wrong)")
    entries, _ = _versions(log)
    found: dict[str, list[Span]] = {}
    for version in sorted(entries):
        for action in _actions(log / f"{version:020d}.json"):
            # Paths in Delta actions are URL-encoded.
            if "add" in action:
                found.setdefault(unquote(action["add"]["path"]), []).append(Span(version, None))
            elif "remove" in action:
                spans = found.get(unquote(action["remove"]["path"]), [])
                if spans and spans[-1].removed is None:
                    spans[-1] = Span(spans[-1].added, version)
    return found


def merged_ranges(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Ranges of versions (first, last) that hold at least one of these files; spans without an end are ignored.

    Example: spans from 2 until before 5 and from 4 until before 9 become [(2, 8)].
    """
    merged: list[tuple[int, int]] = []
    for first, last in sorted((span.added, span.removed - 1) for span in spans if span.removed is not None):
        # Versions are whole numbers, so adjacent ranges are one.
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


@dataclass(frozen=True, slots=True)
class CommitMarker:
    """The last transaction that an application committed to a table, and the version that it became."""

    application: str
    sequence: int
    version: int


def write_marker(table: Location, marker: CommitMarker) -> None:
    """Records a commit to the table in folder `table`. If that fails, the commit stands and a warning says so."""
    path = table.parent / MARKER_FOLDER / f"{table.name}.{marker.application.replace('/', '.')}.json"
    try:
        write_text_atomic(path, json.dumps(asdict(marker)) + "\n")
    except (OSError, StillroomError) as error:
        warn(f"{path} cannot be written ({error}): the commit itself succeeded")


def read_markers(table: Location) -> list[CommitMarker]:
    """Commit markers of the table in folder `table`. Raises CorruptError naming one that cannot be read."""
    markers = []
    for path in matching(table.parent / MARKER_FOLDER, f"{table.name}.*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            markers.append(CommitMarker(content["application"], int(content["sequence"]), int(content["version"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{path} is not a readable commit marker ({error}): delete it, only `verify` needs it"
            ) from error
    return markers


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
        # deltalake then finds checkpoints by listing the folder.
        return None


def _actions(entry: Location) -> list[dict[str, dict[str, str]]]:
    try:
        # Not splitlines: JSON strings may hold other line breaks, such as U+2028.
        return [json.loads(line) for line in entry.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise CorruptError(f"{entry} cannot be read: {' '.join(str(error).split())}") from error
