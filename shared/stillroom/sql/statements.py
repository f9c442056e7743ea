"""Which statements a locked session runs: one that only reads, in the very text that was checked.

The lock of the session alone is not enough: DuckDB may write to the paths it may read, and `COPY ... (USE_TMP_FILE
false)` would truncate a shard, also inside a WITH clause of a SELECT and under EXPLAIN ANALYZE. Statements that people
expect and that DuckDB does not count as SELECT (PIVOT without values, PRAGMA table_info) are rewritten as one, and what
comes out passes the same checks.
"""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from stillroom.errors import ConfigError, CorruptError, StillroomError
from stillroom.sql.views import quote

if TYPE_CHECKING:
    import duckdb

READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
"""Nodes of DuckDB's syntax tree that only read; there are others for COPY, INSERT and the like in a WITH clause."""
# Only words in the parentheses: strings or parentheses could make what follows look like another query.
EXPLAIN_PREFIX = re.compile(r"EXPLAIN\s+(?:ANALYZE\s+)?(?:\([A-Za-z_,\s]*\)\s*)?", re.IGNORECASE)
PRAGMA = re.compile(
    r"""PRAGMA\s+(?:(?P<name>show_tables|version)|(?:table_info|show)\s*\(\s*(?P<table>'[^']*'|"[^"]*"|[\w.]+)\s*\))\s*""",
    re.IGNORECASE,
)
DAMAGE_SIGNS = ("IO Error", "No magic bytes", "TProtocolException", "Snappy", "ZSTD", "Parquet file")
"""Parts of DuckDB's messages about missing or damaged files."""
FULL_DISK = "No space left on device"
"""Of temporary files: an IO Error too, but no damage."""
ABOUT_TEXT = ("Parser Error", "Binder Error", "Catalog Error")
"""How messages about the query itself begin, which quote it."""
CLOSED_FILE = re.compile(r"Permission Error: Cannot access (?:file|directory) (\".*\") - file system operations")
UNKNOWN_NAME = re.compile(r'Referenced (?:column|table) "([^"]+)" not found')
LINE_NUMBER = re.compile(r"\bLINE (\d+):")
OWN_OPTIONS = "options of the session are --threads N and --memory SIZE"
WAYS = {
    "COPY": "--out FILE writes a result",
    "EXPORT": "--out FILE writes a result, --export-views the views",
    "CREATE": "WITH name AS (SELECT ...) names a result, --with NAME=FILE adds a table of your own",
    "INSERT": "--with NAME=FILE adds a table of your own",
    "ATTACH": "--attach NAME=CACHE attaches another cache, --with NAME=FILE a table of your own",
    "SET": OWN_OPTIONS,
    "RESET": OWN_OPTIONS,
    "PRAGMA": f"PRAGMA table_info(VIEW) works, and {OWN_OPTIONS}",
    "USE": "write NAME.chains for a view of another cache",
    "CALL": "SELECT * FROM the function",
    "INSTALL": "extensions are not available",
    "LOAD": "extensions are not available",
    "DELETE": "`teacher-cache gc --drop-run` removes a run",
    "TRANSACTION": "a session sees one version of the cache, without a transaction",
    "PIVOT": "inside another query PIVOT needs its values: PIVOT ... ON x IN ('a', 'b')",
}
"""What works in place of a refused statement, by the name DuckDB or the user gives it."""


class _Word(NamedTuple):
    """A word of a query that is not a comment: its text in lower case, whether it is SQL's own, and its bytes."""

    text: str
    is_keyword: bool
    start: int
    end: int
    depth: int


def prepare(connection: "duckdb.DuckDBPyConnection", query: str) -> str:
    """The statement to run. Raises ConfigError unless it is one SELECT (DESCRIBE, SHOW, SUMMARIZE and EXPLAIN count).

    What DuckDB itself raises (a query that cannot be parsed) becomes a ConfigError by `query_error`.
    """
    explain, select = _split_explain(query)
    return explain + require_select(connection, select)


def require_select(connection: "duckdb.DuckDBPyConnection", query: str) -> str:
    """The query without its last `;`, PIVOT and PRAGMA rewritten. Raises as `prepare`."""
    import duckdb

    select = _with_values(connection, _without_pragma(_without_end(query)))
    statements = connection.extract_statements(select)
    kinds = [statement.type.name for statement in statements]
    if not kinds:
        raise ConfigError("query: it is empty: write one SELECT")
    if set(kinds) == {"SELECT"} and len(kinds) > 1:
        raise ConfigError(f"query: {len(kinds)} SELECTs given: run one at a time")
    if kinds != ["SELECT"]:
        raise ConfigError(f"query: {_refusal(statements)}")
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchone()
    try:
        tree = json.loads(row[0]) if row else {"error": True}
    except RecursionError as error:
        raise ConfigError("query: it is nested too deeply: name its parts in WITH clauses") from error
    if tree["error"] or not _only_reads(tree):
        raise ConfigError("query: part of it is not a SELECT: a cache is read-only")
    # Planned inside another SELECT, where DuckDB itself refuses WITH clauses that write.
    try:
        connection.execute(f"EXPLAIN SELECT * FROM (\n{select}\n)")
    except duckdb.Error as error:
        raise query_error(error, num_lines_before=1, query=select) from error
    return select


def query_error(error: Exception, num_lines_before: int = 0, query: str = "") -> Exception:
    """DuckDB's error as one line for the user: CorruptError for a damaged file, else ConfigError about the query.

    `num_lines_before` is the number of lines before the user's own, which DuckDB counts too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        # DuckDB calls Python only for stillroom.sql.object_files; the last line is its error.
        kind, _, problem = lines[-1].partition(": ")
        return CorruptError(f"{problem} is missing") if kind == "FileNotFoundError" else StillroomError(problem)
    text = " ".join(lines[:2]) if lines else type(error).__name__
    # DuckDB's advice is on settings that a session locks.
    text = (
        text.removesuffix(" Possible solutions:")
        .removesuffix(" Candidate functions:")
        .partition(" Try increasing 'sample_size'")[0]
    )
    if text.startswith("Out of Memory"):
        return ConfigError(f"query: {text}: raise --memory")
    if FULL_DISK in text:
        return StillroomError(f"query: {text}: free some space, or set TMPDIR to a folder on a larger disk")
    if closed := CLOSED_FILE.search(text):
        return ConfigError(f"query: {closed[1]} is not a file of the cache: --with NAME=FILE adds a table of your own")
    if not text.startswith(ABOUT_TEXT) and any(sign in text for sign in DAMAGE_SIGNS):
        return CorruptError(f"{text} (`teacher-cache verify` lists what is wrong)")
    text = LINE_NUMBER.sub(lambda found: f"LINE {int(found[1]) - num_lines_before}:", text)
    # SQL reads x and "x" as the name of a column: the usual mistake of those who come from Python.
    if (unknown := UNKNOWN_NAME.search(text)) and re.search(
        rf'"{re.escape(unknown[1])}"|=\s*{re.escape(unknown[1])}\b', query
    ):
        text += f" (text goes in single quotes: '{unknown[1]}')"
    return ConfigError(f"query: {text}")


def _refusal(statements: list["duckdb.Statement"]) -> str:
    kinds = [_kind_of(statement) for statement in statements]
    ways = dict.fromkeys(WAYS[kind] for kind in kinds if kind in WAYS)
    way = "".join(f"; {one}" for one in ways)
    found = " and ".join(kinds)
    return f"one SELECT (or EXPLAIN of one) is allowed here, found {found}: a cache is read-only{way}"


def _kind_of(statement: "duckdb.Statement") -> str:
    """INSERT, COPY and the like; the user's own word if DuckDB has another one (PIVOT is MULTI, USE is SET)."""
    kind = statement.type.name
    words = [word.text.upper() for word in _words(statement.query)]
    if kind in ("CALL", "LOAD", "MULTI", "PRAGMA", "SET") and words:
        # FORCE INSTALL; a PIVOT somewhere inside a SELECT or a WITH clause.
        return next((word for word in words if word in WAYS), words[0])
    return kind.replace("_", " ")


def _only_reads(tree: Any) -> bool:
    # A list instead of recursion: generated queries nest deeper than Python's stack.
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            kind = node.get("type")
            if (isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES) or "info_type" in node:
                return False
            left += node.values()
    return True


def _split_explain(query: str) -> tuple[str, str]:
    """`EXPLAIN`, `EXPLAIN ANALYZE` or nothing, and the query without it and without comments before it."""
    first = next(_words(query), None)
    # Offsets count bytes. Comments before EXPLAIN would hide it from the pattern.
    begun = query.encode()[first.start :].decode() if first else ""
    prefix = EXPLAIN_PREFIX.match(begun)
    return (prefix[0], begun[prefix.end() :]) if prefix else ("", begun)


def _without_end(query: str) -> str:
    """The query without a final `;` and comments around it."""
    import duckdb

    text = query.encode()
    for offset, kind in reversed(duckdb.tokenize(query)):
        if kind != duckdb.token_type.comment and text[offset : offset + 1] != b";":
            break
        text = text[:offset]
    return text.decode()


def _without_pragma(query: str) -> str:
    """The query, or for a PRAGMA that only shows something the SELECT that shows the same."""
    found = PRAGMA.fullmatch(query.strip())
    if found is None:
        return query
    if found["name"]:
        return "SHOW TABLES" if found["name"].lower() == "show_tables" else "SELECT * FROM pragma_version()"
    return f"SELECT * FROM pragma_table_info({quote(found['table'].strip(chr(39)))})"


def _with_values(connection: "duckdb.DuckDBPyConnection", query: str) -> str:
    """The query, or for a PIVOT without values one with them: DuckDB would create a type, which is not a SELECT.

    `PIVOT chains ON split USING count(*)` becomes `PIVOT chains ON (split) IN ('heldout', 'train') USING count(*)`.
    """
    words, text = list(_words(query)), query.encode()
    top = [word for word in words if word.depth == 0 and word.is_keyword]
    pivot = next((word for word in top if word.text in ("pivot", "pivot_wider")), None)
    # Elsewhere PIVOT is part of a FROM clause, which names its values.
    if pivot is None or (words[0] is not pivot and words[0].text != "with") or "select" in {word.text for word in top}:
        return query
    ends = [word.start for word in top if word.start > pivot.end and word.text in ("using", "group", "order", "limit")]
    end = min(ends, default=len(text))
    on = [word for word in top if word.text == "on" and pivot.end < word.start < end]
    if not on:
        return query
    before, source = text[: pivot.start].decode(), text[pivot.end : on[0].start].decode()
    columns = []
    for start, stop in _columns(words, on[0].end, end):
        column = text[start:stop].decode().strip()
        # `x % 2 IN (0, 1)` is a condition whose values have to be found, `(x % 2) IN (0, 1)` names them.
        probe = connection.extract_statements(f"PIVOT t ON {column}\nUSING count(*)")
        if [one.type.name for one in probe] == ["SELECT"]:
            columns.append(column)
            continue
        distinct = f"{before}SELECT DISTINCT ({column}\n)::VARCHAR AS value FROM {source} ORDER BY value"
        found = connection.execute(require_select(connection, distinct)).fetchall()
        values = [quote(value) for (value,) in found if value is not None]
        if not values:
            raise ConfigError(f"query: PIVOT finds no values of {column}")
        columns.append(f"({column}\n) IN ({', '.join(values)})")
    return f"{text[: on[0].end].decode()} {', '.join(columns)} {text[end:].decode()}"


def _columns(words: list[_Word], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of the expressions between commas."""
    for word in words:
        if start <= word.start < end and word.depth == 0 and word.text == ",":
            yield start, word.start
            start = word.end
    yield start, end


def _words(query: str) -> Iterator[_Word]:
    """The words of a query without its comments; `depth` counts the brackets around each."""
    import duckdb

    text, tokens = query.encode(), duckdb.tokenize(query)
    ends = [*(offset for offset, _ in tokens), len(text)][1:]
    depth = 0
    for (start, kind), end in zip(tokens, ends, strict=True):
        if kind == duckdb.token_type.comment:
            continue
        word = text[start:end].decode().strip()
        if kind == duckdb.token_type.operator:
            depth -= sum(word.count(one) for one in ")]}")
        yield _Word(word.lower(), kind == duckdb.token_type.keyword, start, start + len(word.encode()), depth)
        if kind == duckdb.token_type.operator:
            depth += sum(word.count(one) for one in "([{")
