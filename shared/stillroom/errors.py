"""Errors a user can meet, each with the exit code its command ends with.

    StillroomError              1  failed at run time
    ├── ConfigError             2  a value of the configuration or command line breaks a rule
    ├── DataError               2  input that the user named cannot be used (missing, malformed, empty)
    ├── CorruptError            3  stored bytes are not what was written
    └── CacheConflict           1  another process holds or changed what this one needs

Messages are one line: what, where, the rule, the remedy. A command prints them without a traceback.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_COLOUR = re.compile("\x1b\\[[0-9;]*m")


class StillroomError(Exception):
    """Base of every error meant for a user's eyes."""

    exit_code = 1


class ConfigError(StillroomError):
    """A setting is unknown, missing, out of range or without effect."""

    exit_code = 2


class DataError(StillroomError):
    """A named input is missing, unreadable or empty."""

    exit_code = 2


class CorruptError(StillroomError):
    """Stored bytes contradict themselves, their hash or the format."""

    exit_code = 3


class CacheConflict(StillroomError):
    """Another process holds or changed what this one needs."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key of the configuration that named an input before what is wrong with the input (DataError)."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def one_line(error: BaseException) -> str:
    """What a library's error says, without line breaks and terminal colours; its type where it says nothing."""
    return " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
