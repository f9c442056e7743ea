"""Files that the latest version of a table does not use, by kind, and commits that a log has lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stillroom.cache.catalog import Table
from stillroom.cache.delta_log import Span, file_history, read_markers
from stillroom.storage.paths import TEMP_SUFFIX, files_below, relative_name

Kind = Literal["removed", "unregistered", "temporary"]


@dataclass(frozen=True, slots=True)
class OrphanFile:
    """A file that readers of the latest version never see.

    `removed`: only older versions use it. `unregistered`: complete, but never committed; its worker's next build adopts
    it. `temporary`: never completed. `file` is relative to the cache, `modified_s` by its disk's clock.
    """

    file: str
    size_bytes: int
    modified_s: float
    kind: Kind


def find_orphans(table: Table, history: Mapping[str, Sequence[Span]] | None = None) -> list[OrphanFile]:
    """Files in the table's folder that its latest version does not use, ordered by path.

    Raises CorruptError if the log has gaps, which makes it impossible to know what a file was.
    """
    spans = file_history(table.folder / "_delta_log") if history is None else history
    # After the history is read: a file committed in between would count as removed.
    table.refresh()
    visible = {file.path for file in table.files()}
    found = []
    for path in files_below(table.folder):
        name = relative_name(path, table.folder)
        if name.startswith("_delta_log/") or name in visible:
            continue
        is_temporary = path.name.startswith(".") and path.name.endswith(TEMP_SUFFIX)
        kind: Kind = "removed" if name in spans else "temporary" if is_temporary else "unregistered"
        try:
            stat = path.stat()
        except FileNotFoundError:
            # Its worker has just renamed or removed it.
            continue
        found.append(OrphanFile(f"{table.folder.name}/{name}", stat.st_size, stat.st_mtime, kind))
    return found


def lost_commits(table: Table) -> list[str]:
    """Commits that have a commit marker but are missing from the log: its newest entries were lost.

    Raises CorruptError for a marker that cannot be read.
    """
    problems = []
    markers = read_markers(table.folder)
    # Refresh after reading the markers, or a commit in between would look lost.
    table.refresh()
    for marker in markers:
        last = table.last_sequence(marker.application)
        if last is None or last < marker.sequence:
            problems.append(
                f"version {marker.version} is missing: transaction {marker.sequence} of {marker.application} was "
                f"committed in it, but the log ends at {'none' if last is None else last}; restore the entry from a "
                "copy, or run that build again, which registers its files"
            )
    return problems
