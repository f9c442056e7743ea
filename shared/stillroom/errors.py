"""Errors that users may see, each with the exit code of the command that it ends.

    StillroomError              1  failed at run time
    ├── ConfigError             2  a value of the configuration or command line breaks a rule
    ├── DataError               2  input named by the user is missing, malformed or empty
    ├── CorruptError            3  stored bytes are not what was written
    ├── Disagreement            3  an exported model is not the student that it was made from
    └── CacheConflict           1  another process holds or changed what this one needs

Messages are one line: what, where, the rule, the remedy. Commands print them without a traceback.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Libraries colour their messages for terminals, and ours also go to logs and JSON.
_COLOUR = re.compile("\x1b\\[[0-9;]*m")


class StillroomError(Exception):
    """Base of all errors meant for users."""

    exit_code = 1


class ConfigError(StillroomError):
    """A setting is unknown, missing, out of range or has no effect."""

    exit_code = 2


class DataError(StillroomError):
    """A named input is missing, unreadable or empty."""

    exit_code = 2


class CorruptError(StillroomError):
    """Stored bytes contradict each other, their hash or the format."""

    exit_code = 3


class Disagreement(StillroomError):
    """An export answers held-out chains differently from the float student."""

    exit_code = 3


class CacheConflict(StillroomError):
    """Another process holds or changed what this one needs."""


def require_version(where: str, found: int, known: int) -> None:
    """Raises DataError for a file of a newer format: its columns may mean something else."""
    if found > known:
        raise DataError(f"{where} has format version {found}, this program reads up to {known}: upgrade it")


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefixes a DataError with the configuration key that named the input."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def one_line(error: BaseException) -> str:
    """A library's message without line breaks and terminal colours; its type if the message is empty."""
    return " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's message; its type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
