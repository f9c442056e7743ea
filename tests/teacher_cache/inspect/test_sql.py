"""`teacher-cache sql`: formats, files, limits, the session at the prompt, and what a model wrote stays text."""

import csv
import gzip
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.log import cut, harmless, one_line, pad, width_of
from stillroom.sql.session import Session
from stillroom.storage.paths import check_out
from teacher_cache.cli import app
from teacher_cache.inspect.shell import SqlShell, is_complete
from teacher_cache.inspect.sql import (
    Shown,
    check_files,
    open_caches,
    run_query,
    table_text,
    write_views,
)
from tests.helpers.caches import SyntheticCache, damage, make_cache

EVERY_TYPE = """
    SELECT 1 AS i, 1.5::DOUBLE AS f, 'NaN'::FLOAT AS nan, true AS b, NULL AS n, '' AS e, 'a,"b' || chr(10) || 'c' AS s,
    [1, 2] AS l, {'k': NULL, 'v': [0.5]} AS d, sum(3) AS h, 2.50::DECIMAL(4,2) AS dec, DATE '2026-11-21' AS day,
    TIMESTAMPTZ '2026-11-21 01:02:03+00' AS t, INTERVAL 2 DAY AS gap, 'x'::BLOB AS raw, '{"a": 1}'::JSON AS j
"""
PROGRAM = [sys.executable, "-m", "teacher_cache.cli", "sql"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("cache"), num_chains=10)


@pytest.fixture(scope="module")
def session(cache: SyntheticCache) -> Iterator[Session]:
    with Session({"main": cache.catalog}) as session:
        yield session


@pytest.fixture
def typed() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def answered(session: Session, capsys: pytest.CaptureFixture[str], query: str, output_format: str | None = None) -> str:
    run_query(session, query, output_format)
    return capsys.readouterr().out


def test_a_table_shows_null_numbers_and_lists(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    text = answered(
        session, capsys, "SELECT 'a' AS name, 1.23456789::DOUBLE AS x UNION ALL SELECT NULL, NULL ORDER BY name"
    )
    assert text == "name        x\n────  ───────\na     1.23457\nNULL     NULL\n"
    assert "[1, 2]" in answered(session, capsys, EVERY_TYPE)
    intervals = "SELECT INTERVAL 1 MONTH + INTERVAL 3 DAY AS a, -INTERVAL 90 MINUTE AS b, INTERVAL 0 DAY AS c"
    assert answered(session, capsys, intervals, "csv") == '"a","b","c"\n"1 month 3 days","-1:30:00","0:00:00"\n'


def test_a_table_says_what_it_leaves_out(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run_query(session, "SELECT * FROM range(100)", max_rows=5)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 7
    assert "first 5 rows of 100:" in captured.err
    assert "--max-rows" in captured.err
    run_query(session, "SELECT * FROM range(1000000000000)", max_rows=5)
    assert "more than" in capsys.readouterr().err


def test_a_plan_is_shown_as_drawn(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run_query(session, "EXPLAIN SELECT num_tokens FROM chains")
    drawn = capsys.readouterr().out
    assert "\\n" not in drawn
    assert len(drawn.splitlines()) > 3


def test_csv_tells_null_from_empty(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    text = answered(session, capsys, EVERY_TYPE, "csv")
    (row,) = csv.DictReader(io.StringIO(text))
    assert (row["i"], row["f"], row["h"], row["dec"], row["day"]) == ("1", "1.5", "3", "2.50", "2026-11-21")
    assert (row["s"], row["l"], json.loads(row["d"])) == ('a,"b\nc', "[1, 2]", {"k": None, "v": [0.5]})
    assert ',,"",' in text
    empty = answered(session, capsys, "SELECT source, num_tokens FROM chains WHERE false", "csv")
    assert empty == '"source","num_tokens"\n'


def test_json_is_json(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(answered(session, capsys, EVERY_TYPE, "json"))
    assert row["nan"] is None
    assert (row["i"], row["h"], row["dec"], row["b"], row["l"]) == (1, 3, 2.5, True, [1, 2])
    assert (row["d"], row["t"]) == ({"k": None, "v": [0.5]}, "2026-11-21T01:02:03+00:00")
    assert json.loads(row["j"]) == {"a": 1}
    assert json.loads(answered(session, capsys, "SELECT 1 WHERE false", "json")) == []
    assert json.loads(answered(session, capsys, "SELECT 1 AS a, 2 AS a", "json")) == [{"a": 1, "a_1": 2}]
    many = json.loads(answered(session, capsys, "SELECT * FROM range(30000)", "json"))
    assert [row["range"] for row in many] == list(range(30000))


def test_markdown_cells_cannot_end_or_be_html(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    text = answered(session, capsys, "SELECT 'a|b<script>`x`' || chr(10) || 'c' AS s, 1 AS n", "markdown")
    assert text.splitlines() == ["| s | n |", "| --- | --: |", "| a\\|b&lt;script&gt;&#96;x&#96;\\nc | 1 |"]


def test_results_go_to_files_whole(session: Session, cache: SyntheticCache, tmp_path: Path) -> None:
    run_query(session, "SELECT * FROM tokens", out=tmp_path / "tokens.parquet")
    assert pq.read_table(tmp_path / "tokens.parquet").num_rows == sum(len(chain.token_ids) for chain in cache.chains)
    run_query(session, f"SELECT * EXCLUDE (gap) FROM ({EVERY_TYPE})", out=tmp_path / "types.parquet")
    assert pq.read_table(tmp_path / "types.parquet").column("l").to_pylist() == [[1, 2]]
    run_query(session, "SELECT 7 AS x", out=tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == '"x"\n7\n'
    run_query(session, "SELECT 8 AS x", "json", tmp_path / "x.csv")
    assert json.loads((tmp_path / "x.csv").read_text()) == [{"x": 8}]
    with pytest.raises(ConfigError):
        run_query(session, "SELECT 1/0 AS x, 'a'::INTEGER AS y", out=tmp_path / "x.csv")
    assert json.loads((tmp_path / "x.csv").read_text()) == [{"x": 8}]
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.parquet", "types.parquet", "x.csv"}


def test_mistakes_about_files_and_formats_are_reported(session: Session, cache: SyntheticCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of table, csv"):
        run_query(session, "SELECT 1", "xml")
    with pytest.raises(ConfigError, match="--out"):
        run_query(session, "SELECT 1", "parquet")
    with pytest.raises(ConfigError, match="cast it"):
        run_query(session, "SELECT INTERVAL 2 DAY AS gap", out=tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="set --format"):
        run_query(session, "SELECT 1", out=tmp_path / "x.tsv")
    with pytest.raises(ConfigError, match="read-only"):
        check_out("--out", cache.root / "chains" / "x.csv", [cache.root])
    with pytest.raises(DataError, match="there is no folder"):
        check_out("--out", tmp_path / "missing" / "x.csv", [cache.root])
    with pytest.raises(DataError, match=r"--out /proc/x.csv cannot be written \("):
        check_out("--out", Path("/proc/x.csv"))
    with pytest.raises(ConfigError, match="NAME=CACHE"):
        open_caches(cache.root, [str(cache.root)])
    with pytest.raises(ConfigError, match="taken"):
        open_caches(cache.root, [f"main={cache.root}"])


def test_control_characters_are_written_out() -> None:
    nasty = "a\x1b[31mred\x07\x9b2J\u202eevil\ttab\nline"
    assert harmless(nasty) == "a\\x1b[31mred\\x07\\x9b2J\\u202eevil\ttab\nline"
    assert one_line("a\tb\nc\r") == "a\\tb\\nc\\r"
    assert harmless("数 é 😀") == "数 é 😀"


def test_wide_characters_take_their_columns() -> None:
    assert width_of("数x") == 3
    assert pad("数", 4) == "数  "
    assert pad("7", 3, right=True) == "  7"
    assert cut("数数数", 4) == "数…"
    assert cut("abc", 3) == "abc"


def test_a_table_fits_the_terminal(session: Session) -> None:
    query = "SELECT sample_id, prompt, repeat('long ', 50) AS text, num_tokens FROM chains"
    for width in (60, 100):
        text = "".join(table_text(session.batches(query), 5, width, Shown()))
        assert max(map(width_of, text.splitlines())) <= width
        assert "…" in text
    everything = "".join(table_text(session.batches("SELECT * FROM chains"), 2, 80, Shown()))
    assert "─ row 1 " in everything
    assert max(map(width_of, everything.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("", True),
        (".help", True),
        ("SELECT 1", False),
        ("SELECT 1;", True),
        ("SELECT 1; -- done", True),
        ("SELECT\n-- why;\n", False),
        ("SELECT '--';", True),
        ("SELECT 'a;", False),
        ("SELECT $$a;", False),
        ("SELECT 1 /* why;", False),
    ],
)
def test_enter_ends_a_complete_query(text: str, complete: bool) -> None:
    assert is_complete(text) is complete


def test_the_session_answers_until_the_user_leaves(
    session: Session,
    typed: PipeInput,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for line in (
        ".tables",
        ".schema chains",
        ".schema nothing",
        ".mode csv",
        ".rows none",
        "SELECT 40 + 2",
        "AS x;",
        "SELECT 1 AS a; SELECT 2 AS b;",
        "SELEC;",
        ".bogus",
        "help",
        "quit",
        "SELECT 99;",
    ):
        typed.send_text(line + "\r")
    SqlShell(session, 40, ["main"]).run(typed, DummyOutput())
    captured = capsys.readouterr()
    assert "one row per chain" in captured.out
    assert "Tab completes" in captured.out
    assert "mean_tail_mass" in captured.out
    assert '"x"\n42\n' in captured.out
    assert '"a"\n1\n' in captured.out
    assert '"b"\n2\n' in captured.out
    assert "99" not in captured.out
    assert "syntax error" in captured.err
    assert ".bogus is unknown" in captured.err
    history = tmp_path / "state" / "stillroom" / "sql_history"
    assert "SELECT 40 + 2" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_the_program_answers_from_stdin(cache: SyntheticCache) -> None:
    answer = subprocess.run(
        [*PROGRAM, str(cache.root), "-", "--format", "csv"],
        input="SELECT count(*) AS n FROM chains;",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, '"n"\n10\n', "")


def test_a_reader_that_leaves_early_ends_the_query_without_a_word(cache: SyntheticCache) -> None:
    process = subprocess.Popen(
        [*PROGRAM, str(cache.root), "SELECT * FROM range(5000000)", "--format", "csv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (128 + signal.SIGPIPE, b"")
    process.stderr.close()


def read_until(terminal: int, words: bytes, limit_s: float = 240) -> bytes:
    seen, end_s = b"", time.monotonic() + limit_s
    while words not in seen:
        assert select.select([terminal], [], [], end_s - time.monotonic())[0], seen
        seen += os.read(terminal, 65536)
    return seen


TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
# A shell that starts a program in the background lets it, and all below it, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_ctrl_c_ends_a_query_on_a_real_terminal_and_ctrl_d_leaves(cache: SyntheticCache, tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    # Ctrl-C arrives as a signal only in the session that owns the terminal.
    command = [sys.executable, "-c", TAKE_TERMINAL, *PROGRAM[1:], str(cache.root)]
    with subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=environ, start_new_session=True
    ) as process:
        os.close(inside)
        try:
            read_until(terminal, b"sql>")
            os.write(
                terminal, b"SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = -3;\r"
            )
            seen, end_s = b"", time.monotonic() + 240
            while b"interrupted" not in seen:
                # A Ctrl-C that comes while the prompt still owns the keyboard is lost: press again, as one would.
                assert time.monotonic() < end_s, seen
                os.write(terminal, b"\x03")
                pressed_s = time.monotonic()
                while b"interrupted" not in seen and (left_s := pressed_s + 0.5 - time.monotonic()) > 0:
                    if select.select([terminal], [], [], left_s)[0]:
                        seen += os.read(terminal, 65536)
            if b"sql>" not in seen.rpartition(b"interrupted")[2]:
                read_until(terminal, b"sql>")
            os.write(terminal, b"SELECT 6 * 7 AS answer, chr(27) || '[2J' AS wipe;\r")
            read_until(terminal, b"\\x1b[2J")
            read_until(terminal, b"sql>")
            os.write(terminal, b"\x04")
            assert process.wait(timeout=240) == 0
        finally:
            process.kill()
            os.close(terminal)


@pytest.mark.parametrize("table", ["chains", "verdicts"])
def test_a_check_finds_the_byte_that_duckdb_reads_over(tmp_path: Path, table: str) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=20)
    arguments = ["sql", str(cache.root), "SELECT count(*) AS n FROM chains", "--format", "csv"]
    assert CliRunner().invoke(app, [*arguments, "--check"]).stdout == '"n"\n20\n'
    path = next((cache.root / table).glob("*/*.parquet"))
    damage(path)
    with pytest.raises(CorruptError, match=path.name):
        check_files([cache.catalog])
    failed = CliRunner().invoke(app, [*arguments, "--check"])
    assert isinstance(failed.exception, CorruptError)


def test_views_replace_an_earlier_export_and_nothing_else(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "views.duckdb"
    catalogs = {"main": cache.catalog}
    write_views(catalogs, path)
    write_views(catalogs, path)
    for content in (b"question,answer\n1,2\n3,4\n", b""):
        notes = tmp_path / "notes.csv"
        notes.write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"notes\.csv exists and is not a DuckDB database: delete it, or use another"
        ):
            write_views(catalogs, notes)
        assert notes.read_bytes() == content


def test_a_session_says_no_rows_and_names_its_own_commands(
    session: Session,
    typed: PipeInput,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for line in ("SELECT 1 WHERE false;", "FROM range(9);", ".mode csv", "SELECT 2 AS a;", ".quit"):
        typed.send_text(line + "\r")
    SqlShell(session, 3, ["main"]).run(typed, DummyOutput())
    told = capsys.readouterr().err
    assert told.count("0 rows\n") == 1
    assert "the first 3 rows of 9: .rows N shows more, .mode csv all of them" in told
    run_query(session, "FROM range(9)", max_rows=3)
    assert "--max-rows shows more, --format csv all of them" in capsys.readouterr().err


def run_app(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and the message of `teacher-cache`."""
    ran = CliRunner().invoke(app, [str(one) for one in arguments])
    return ran.exit_code, ran.stdout, str(ran.exception or "")


def test_a_query_may_begin_with_a_comment_and_hold_several_statements(cache: SyntheticCache) -> None:
    for comment in ("-- why\n", "--why\n", "/* why */ "):
        assert run_app("sql", cache.root, f"{comment}SELECT 1 AS x", "--format", "csv")[:2] == (0, '"x"\n1\n')
    code, out, _ = run_app("sql", cache.root, "SELECT 1 AS a; -- and\nSELECT ';' AS b;")
    assert (code, out.split()) == (0, ["a", "─", "1", "b", "─", ";"])
    assert (
        "--out x.csv holds one result, 2 statements given: run one at a time"
        in run_app("sql", cache.root, "SELECT 1; SELECT 2", "--out", "x.csv")[2]
    )


def test_results_come_as_json_lines_compressed_csv_and_arrow(cache: SyntheticCache, tmp_path: Path) -> None:
    query = "SELECT sample_id, token_ids[1:2] AS ids FROM shards ORDER BY sample_id"
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv.gz", "x.arrow"):
        assert run_app("sql", cache.root, query, "--out", tmp_path / name)[0] == 0
    wanted = json.loads(run_app("sql", cache.root, query, "--format", "json")[1])
    lines = run_app("sql", cache.root, query, "--format", "jsonl")[1]
    assert [json.loads(line) for line in lines.splitlines()] == wanted
    assert (
        (tmp_path / "x.jsonl").read_text() == gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()).decode() == lines
    )
    assert gzip.decompress((tmp_path / "x.csv.gz").read_bytes()).startswith(b'"sample_id","ids"\n')
    with pa.ipc.open_file(tmp_path / "x.arrow") as reader:
        assert reader.read_all().to_pylist() == wanted
    for given, message in (
        (["--format", "arrow"], "--format arrow needs --out FILE"),
        (["--out", str(tmp_path / "x.parquet.gz")], "remove .gz"),
        (["--out", str(tmp_path / "x.gz")], "set --format"),
    ):
        assert message in run_app("sql", cache.root, query, *given)[2]


def test_a_session_has_a_version_own_files_and_limits(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", num_chains=24).root
    (tmp_path / "mine.csv").write_text("x\n3\n4\n")
    query = "SELECT (SELECT count(*) FROM chains) AS n, sum(x) AS s, current_setting('threads') AS t FROM mine"
    given = ["--with", f"mine={tmp_path / 'mine.csv'}", "--threads", "2", "--memory", "400MB", "--format", "csv"]
    assert run_app("sql", root, query, *given)[1].split() == ['"n","s","t"', "24,7,2"]
    assert run_app("sql", root, query, *given, "--version", "1")[1].split() == ['"n","s","t"', "12,7,2"]
    for wrong, message in (
        (["--version", "99"], "has no version 99: the latest is 2"),
        (["--with", "mine"], "not of the form NAME=FILE"),
        (["--with", f"mine={tmp_path / 'mine.csv'}"], "the name 'mine' is taken"),
        (["--memory", "much"], "is not a size: write 4GB"),
    ):
        assert message in run_app("sql", root, query, *given, *wrong)[2]
    assert "remove --threads" in run_app("sql", root, "--export-views", tmp_path / "v.duckdb", "--threads", 2)[2]


def test_files_prints_what_is_visible_at_a_version(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=30)
    (cache.root / "chains" / "orphan.parquet").write_bytes(b"of a crash")
    counts = []
    for version in (0, 1, 2, 3):
        paths = run_app("files", cache.root, "--version", version)[1].split()
        counts.append(sum(pq.read_metadata(path).num_rows for path in paths))
    assert counts == [0, 12, 24, 30]
    found = json.loads(run_app("files", cache.root, "--json")[1])
    assert (found["version"], [one["path"] for one in found["files"]]) == (3, paths)
    assert [one["num_rows"] for one in found["files"]] == [12, 12, 6]
    assert len(run_app("files", cache.root, "--table", "verdicts")[1].split()) == 1
    assert "choose one of chains, verdicts, failures" in run_app("files", cache.root, "--table", "x")[2]
    assert "has no version 9" in run_app("files", cache.root, "--version", 9)[2]
