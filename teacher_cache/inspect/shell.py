"""The interactive session of `teacher-cache sql`: history, several lines up to `;`, Ctrl-C ends the query and stays,
Ctrl-D leaves. The only file that imports prompt_toolkit.
"""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.lexers import PygmentsLexer
from prompt_toolkit.output import Output
from pygments.lexers.sql import SqlLexer

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import note
from stillroom.sql.session import Session
from stillroom.sql.views import VIEWS, quote
from teacher_cache.inspect.sql import FILES_ONLY, FORMATS, run_query

QUOTED = re.compile(
    r"""'[^']*'|"[^"]*"|(?P<dollars>\$\w*\$).*?(?P=dollars)|(?P<comment>--[^\n]*|/\*.*?\*/)""", re.DOTALL
)
"""Strings, names in quotes and comments, whole. A doubled quote is two of them."""
PLAIN_WORDS = ("exit", "help", "quit")
"""Commands that also work without a dot and without `;`, as in other shells."""
PROMPT = "sql> "
CONTINUED = "...> "
KEYWORDS = """
    SELECT FROM WHERE GROUP BY ORDER LIMIT JOIN LEFT USING ON AS AND OR NOT NULL IS IN LIKE BETWEEN CASE WHEN THEN ELSE
    END WITH DISTINCT HAVING OVER PARTITION QUALIFY FILTER EXPLAIN ANALYZE DESCRIBE SUMMARIZE UNION ALL
    avg count max median min quantile_cont regexp_matches sum
"""
HELP = """\
A query ends with `;` and may take several lines. Tab completes.
.tables          list the views
.schema VIEW     the columns of a view
.mode FORMAT     table, csv, json, jsonl or markdown
.rows N          how many rows a table shows
.help            this text
.quit            leave (also Ctrl-D); Ctrl-C ends a running query
"""
ABOUT = {
    "chains": "one row per chain, with its latest verdict",
    "prompts": "one row per prompt: samples, pass rate, mean length",
    "tokens": "one row per completion token: log probability, rank, entropy, tail mass",
    "topk": "one row per stored candidate of a token",
    "verdicts": "the latest verdict of each judge on each sample",
    "failures": "failed requests",
    "runs": "one row per build: teacher, sampling, software",
    "vocab": "the text of every token",
    "features": "one row per chain and feature set: tokens with hidden states or attention, bytes",
    "feature_sets": "what each feature set holds",
    "storage": "bytes of each column of each shard",
    "shards": "one row per chain as stored: token ids, distributions",
}


class SqlShell:
    """One session at the prompt: where results go and how."""

    def __init__(self, session: Session, max_rows: int, caches: Sequence[str]) -> None:
        self._session, self._max_rows, self._caches = session, max_rows, caches
        self._format = "table"

    def run(self, terminal_in: Input | None = None, terminal_out: Output | None = None) -> None:
        """Reads and answers until the user leaves. The two arguments stand in for the terminal in tests."""
        prompt: PromptSession[str] = PromptSession(
            PROMPT,
            history=_history(),
            lexer=PygmentsLexer(SqlLexer),
            completer=WordCompleter(self._words(), ignore_case=True, match_middle=False),
            # On Tab only: caches have dozens of columns, and a menu of them would hide what is above.
            complete_while_typing=False,
            # Asked at every Enter, when `prompt` is bound.
            multiline=Condition(lambda: not is_complete(prompt.default_buffer.text)),
            prompt_continuation=CONTINUED,
            input=terminal_in,
            output=terminal_out,
        )
        note(".help for help, .tables for the views; end a query with `;`, Ctrl-D quits")
        while True:
            try:
                text = prompt.prompt().strip()
            # At the prompt Ctrl-C drops the line, as in any shell.
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text in PLAIN_WORDS:
                text = f".{text}"
            if text in (".quit", ".exit"):
                return
            with contextlib.suppress(KeyboardInterrupt):  # a second one, while the first is being told
                self._answer(text)

    def _answer(self, text: str) -> None:
        try:
            if text.startswith("."):
                self._command(text)
            elif text:
                for statement in self._session.statements(text):
                    self._query(statement)
        except StillroomError as error:
            note(str(error))
        except KeyboardInterrupt:
            note("interrupted")

    def _query(self, statement: str) -> None:
        started_s = time.monotonic()
        run_query(self._session, statement, self._format, max_rows=self._max_rows, in_session=True)
        note(f"{time.monotonic() - started_s:.2f} s")

    def _command(self, text: str) -> None:
        name, _, argument = text.rstrip(";").partition(" ")
        argument = argument.strip()
        if name == ".help":
            print(HELP, end="")
        elif name == ".tables":
            self._tables()
        elif name == ".schema":
            # Of an attached cache: `r1.chains`.
            _, _, view = argument.rpartition(".")
            if view not in VIEWS:
                raise ConfigError(f".schema {argument}: choose one of {', '.join(VIEWS)}")
            query = f"SELECT column_name AS column, column_type AS type FROM (DESCRIBE {argument})"
            run_query(self._session, query, max_rows=200)
        elif name == ".mode":
            if argument not in FORMATS or argument in FILES_ONLY:
                raise ConfigError(f".mode {argument}: choose table, csv, json, jsonl or markdown")
            self._format = argument
        elif name == ".rows":
            if not argument.isdigit() or int(argument) < 1:
                raise ConfigError(f".rows {argument}: give a whole number of at least 1")
            self._max_rows = int(argument)
        else:
            raise ConfigError(f"{name} is unknown: .help lists the commands")

    def _tables(self) -> None:
        for cache in self._caches:
            prefix = "" if cache == "main" else f"{cache}."
            for view in VIEWS:
                print(f"{prefix + view:<20} {ABOUT[view]}")

    def _words(self) -> list[str]:
        views = ", ".join(quote(view) for view in VIEWS)
        query = f"SELECT DISTINCT column_name FROM information_schema.columns WHERE table_name IN ({views})"
        columns = [str(name) for name in self._session.arrow(query).column(0).to_pylist()]
        return sorted(
            {*VIEWS, *columns, *KEYWORDS.split(), *(f"{name}.chains" for name in self._caches if name != "main")}
        )


def is_complete(text: str) -> bool:
    """Whether Enter ends the input: nothing, a dot command, or statements that end with `;`."""
    bare = QUOTED.sub(lambda found: " " if found["comment"] else "x", text).strip()
    # What is left of these signs opens a string or a comment that continues on the next line.
    is_open = any(sign in bare for sign in ("'", '"', "/*", "$$"))
    return not bare or bare.startswith(".") or bare in PLAIN_WORDS or (bare.endswith(";") and not is_open)


def _history() -> History:
    """The history file in the user's state folder, readable to the user alone; in memory where that cannot be."""
    base = os.environ.get("XDG_STATE_HOME")
    path = (Path(base) if base else Path.home() / ".local" / "state") / "stillroom" / "sql_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # FileHistory by itself creates its file as the umask says.
        path.touch(mode=0o600)
    except OSError as error:
        note(f"no history: {path} cannot be written ({error.strerror})")
        return InMemoryHistory()
    return FileHistory(str(path))
