"""Receipts: what each writer last committed to each table, kept beside the tables.

A Delta log whose newest entry is lost looks like a shorter log that is whole. The receipt, written after the commit,
still knows of it.

    CACHE/receipts/<table>.<application, / as .>.json
"""

import json
from dataclasses import dataclass

from shared.errors import CorruptError, StillroomError
from shared.files import write_text_atomic
from shared.log import warn
from shared.storage import Location, matching

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
