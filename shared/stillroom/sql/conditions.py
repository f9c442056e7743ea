"""A user's SQL inside a query of ours: errors refer to the user's text only, by the name the user knows it by.

DuckDB's own message shows the query around it, which the user never wrote.
"""

import re

import pyarrow as pa

from stillroom.errors import ConfigError
from stillroom.sql.session import Session

# Of messages of DuckDB: `Binder Error: Referenced column "corect" not found in FROM clause! Candidate bindings: ...`
EXCERPT = re.compile(r"\s+LINE (\d+): .*$")
DUCKDB_KIND = re.compile(r"^[A-Z][A-Za-z ]* Error: ")
UNKNOWN_COLUMN = re.compile(
    r'Binder Error: Referenced column "(?P<name>.+)" not found in FROM clause! Candidate bindings: (?P<known>.+?)'
    r"(?P<hint> \(text goes .+\))?"
)


def in_brackets(condition: str) -> str:
    """The condition in parentheses; the line breaks allow it to end in a `--` comment."""
    return f"(\n{condition}\n)"


def shown(condition: str | None) -> str:
    """A condition in a message, on one line: joined ones have the line breaks of in_brackets()."""
    return repr(None if condition is None else " ".join(condition.split()))


def check_condition(session: Session, name: str, condition: str | None) -> None:
    """Raises ConfigError naming `name` if a SQL condition over `chains` is empty or wrong by itself."""
    if condition is not None:
        dry_run(session, name, condition, f"SELECT 1 FROM chains WHERE {in_brackets(condition)} LIMIT 0")


def dry_run(session: Session, name: str, given: str, query: str) -> None:
    """Raises ConfigError if `given` is wrong by itself; `query` contains it between line breaks."""
    if not given.strip():
        raise ConfigError(f"{name} is empty: leave it out, or give a SQL expression")
    run_with(session, name, given, query)


def run_with(session: Session, name: str, given: str, query: str) -> pa.Table:
    """The result of a query that has `given` from its second line on. Raises ConfigError about `given` only."""
    try:
        return session.arrow(query)
    except ConfigError as error:
        raise ConfigError(f"{name} {given!r}: {_reason(str(error), given)}") from error


def _reason(said: str, given: str) -> str:
    """DuckDB's message about the user's text, without its excerpt of the query around that."""
    text = said.removeprefix("query: ")
    place = EXCERPT.search(text)
    text = EXCERPT.sub("", text).removesuffix(" Candidate functions:")
    # The user's text begins in line 2 of the query; an error after its last line is at our own parenthesis.
    if text.startswith("Parser Error") and place and int(place[1]) > 2 + given.rstrip("\n").count("\n"):
        return "it ends too early, or its brackets do not match"
    unknown = UNKNOWN_COLUMN.fullmatch(text)
    if unknown:
        nearest = unknown["known"].replace('"', "")
        return f"there is no column {unknown['name']}: the nearest are {nearest}{unknown['hint'] or ''}"
    return DUCKDB_KIND.sub("", text)
