"""A user's SQL inside a query of ours: errors speak of the user's text alone, by the name the user knows it by.

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
    r'Binder Error: Referenced column "(?P<name>.+)" not found in FROM clause! Candidate bindings: (?P<known>.+)'
)


def in_brackets(condition: str) -> str:
    """The condition as a query holds it: the line breaks let it end in a `--` comment."""
    return f"(\n{condition}\n)"


def check_condition(session: Session, name: str, condition: str | None) -> None:
    """Raises ConfigError naming `name` where a SQL condition over `chains` is empty or wrong by itself."""
    if condition is not None:
        dry_run(session, name, condition, f"SELECT 1 FROM chains WHERE {in_brackets(condition)} LIMIT 0")


def dry_run(session: Session, name: str, given: str, query: str) -> None:
    """Refuses what `given` has wrong by itself; it stands in `query` between line breaks, as in what is run after."""
    if not given.strip():
        raise ConfigError(f"{name} is empty: leave it out, or say what it selects by")
    run_with(session, name, given, query)


def run_with(session: Session, name: str, given: str, query: str) -> pa.Table:
    """The result of a query that holds `given` from its second line on. Raises ConfigError of `given` alone."""
    try:
        return session.arrow(query)
    except ConfigError as error:
        raise ConfigError(f"{name} {given!r}: {_reason(str(error), given)}") from error


def _reason(said: str, given: str) -> str:
    """What DuckDB says, of the user's text alone: without its excerpt, which shows the query around that."""
    text = said.removeprefix("query: ")
    place = EXCERPT.search(text)
    text = EXCERPT.sub("", text).removesuffix(" Candidate functions:")
    # The user's first line is the second of the query; an error behind the last one is at our own bracket.
    if text.startswith("Parser Error") and place and int(place[1]) > 1 + len(given.splitlines()):
        return "it ends too early, or its brackets do not match"
    unknown = UNKNOWN_COLUMN.fullmatch(text)
    if unknown:
        return f"there is no column {unknown['name']}: the nearest are {unknown['known'].replace(chr(34), '')}"
    return DUCKDB_KIND.sub("", text)
