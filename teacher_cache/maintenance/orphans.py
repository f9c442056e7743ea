"""Files below a table that its latest version does not name, told apart; and logs that have lost their newest entry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stillroom.cache.catalog import Table
from stillroom.cache.delta_log import Span, file_history, read_markers
from stillroom.storage.paths import TEMP_SUFFIX, files_below, relative_name


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that readers of the latest version never see.

    `removed`: an older version holds it. `unregistered`: finished, but no version ever named it; its worker's next
    build adopts it. `temporary`: never finished. `file` is relative to the cache, `modified_s` by its disk's clock.
    """

    file: str
    size_bytes: int
    modified_s: float
    kind: Literal["removed", "unregistered", "temporary"]


def find_leftovers(table: Table, history: Mapping[str, Sequence[Span]] | None = None) -> list[Leftover]:
    """Files below the table's folder that its latest version does not name, ordered by path.

    Raises CorruptError where the log has gaps: then nobody can tell what a file was.
    """
    spans = file_history(table.folder / "_delta_log") if history is None else history
    table.refresh()
    visible = {file.path for file in table.files()}
    found = []
    for path in files_below(table.folder):
        name = relative_name(path, table.folder)
        if name.startswith("_delta_log/") or name in visible:
            continue
        is_temporary = path.name.startswith(".") and path.name.endswith(TEMP_SUFFIX)
        kind: Literal["removed", "unregistered", "temporary"] = (
            "removed" if name in spans else "temporary" if is_temporary else "unregistered"
        )
        try:
            stat = path.stat()
        except FileNotFoundError:
            # Its worker was quicker.
            continue
        found.append(Leftover(f"{table.folder.name}/{name}", stat.st_size, stat.st_mtime, kind))
    return found


def receipt_problems(table: Table) -> list[str]:
    """Transactions that a writer has a receipt for and the log has forgotten: its newest entries were lost.

    Raises CorruptError for a receipt that cannot be read.
    """
    problems = []
    receipts = read_markers(table.folder)
    # After the receipts: what was committed since this table was opened is no loss.
    table.refresh()
    for receipt in receipts:
        last = table.last_sequence(receipt.application)
        if last is None or last < receipt.sequence:
            problems.append(
                f"version {receipt.version} is missing: transaction {receipt.sequence} of {receipt.application} was "
                f"committed in it and the log knows of {'none' if last is None else last}; restore the entry from a "
                "copy, or start that build again: it registers what it had written"
            )
    return problems
