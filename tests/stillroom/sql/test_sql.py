"""The views say what the shards say, for every codec; a query reads its cache and nothing else, and writes nowhere."""

import contextlib
import gzip
import math
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import Mock

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, CorruptError, DataError, StillroomError
from stillroom.schema.tables import CODECS
from stillroom.sql.session import Session, _interrupt, export_views, open_session
from stillroom.sql.statements import query_error
from stillroom.sql.views import VIEWS
from tests.helpers.caches import THINK_END_ID, Chain, SyntheticCache, damage, make_cache, on_disk

SLOW = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = -3"


@pytest.fixture(scope="module", params=CODECS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("cache"), codec=request.param, num_runs=2, num_workers=2)


@pytest.fixture(scope="module")
def session(cache: SyntheticCache) -> Iterator[Session]:
    with open_session(cache.catalog) as session:
        yield session


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("small"), num_chains=6)


def rows(session: Session, query: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = session.arrow(query).to_pylist()
    return found


def test_chains_holds_every_row_with_its_verdict(cache: SyntheticCache, session: Session) -> None:
    found = {row["sample_id"]: row for row in rows(session, "SELECT * FROM chains")}
    assert len(found) == len(cache.chains)
    for chain in cache.chains:
        row = found[chain.sample_id]
        assert (row["prompt"], row["text"], row["source"]) == (chain.prompt, chain.text, chain.source)
        assert (row["correct"], row["num_tokens"]) == (chain.correct, len(chain.token_ids))
        assert row["truncated"] is (chain.finish_reason == "length")


def test_tokens_are_the_decoded_signals(cache: SyntheticCache, session: Session) -> None:
    tolerance = 1e-6 if cache.manifests[0].capture["codec"] == "topk-f32" else 0.03
    for chain in cache.chains[:8]:
        table = session.arrow(f"SELECT * FROM tokens WHERE sample_id = '{chain.sample_id}' ORDER BY position")
        columns = {name: table.column(name).to_numpy() for name in table.column_names if name not in ("piece", "part")}
        signals = chain.signals
        starts_T = np.cumsum(signals.topk_n_T) - signals.topk_n_T
        assert columns["position"].tolist() == list(range(len(chain.token_ids)))
        assert columns["token_id"].tolist() == chain.token_ids.tolist()
        assert columns["rank"].tolist() == signals.sampled_rank_T.tolist()
        assert columns["support"].tolist() == signals.topk_n_T.tolist()
        np.testing.assert_allclose(columns["logprob"], signals.sampled_logprob_T, rtol=1e-3)
        np.testing.assert_allclose(columns["entropy"], signals.entropy_T, rtol=1e-3)
        np.testing.assert_allclose(columns["top1_prob"], np.exp(signals.topk_logprobs_N[starts_T]), rtol=tolerance)
        np.testing.assert_allclose(columns["tail_mass"], np.exp(signals.tail_logmass_T), rtol=max(tolerance, 0.1))
        assert table.column("piece").to_pylist() == [f"w{token}" for token in chain.token_ids]
        end = chain.token_ids.tolist().index(THINK_END_ID) + 1
        assert table.column("part").to_pylist() == ["reasoning"] * end + ["answer"] * (len(chain.token_ids) - end)


def test_topk_are_the_candidates_in_rank_order(cache: SyntheticCache, session: Session) -> None:
    tolerance = 1e-6 if cache.manifests[0].capture["codec"] == "topk-f32" else 0.1
    for chain in cache.chains[:8]:
        table = session.arrow(f"SELECT * FROM topk WHERE sample_id = '{chain.sample_id}' ORDER BY position, rank")
        n_T = chain.signals.topk_n_T
        assert table.column("token_id").to_pylist() == chain.signals.topk_ids_N.tolist()
        assert table.column("position").to_pylist() == np.repeat(np.arange(len(n_T)), n_T).tolist()
        assert table.column("rank").to_pylist() == [rank + 1 for n in n_T for rank in range(n)]
        probs = table.column("prob").to_numpy()
        np.testing.assert_allclose(probs, np.exp(chain.signals.topk_logprobs_N), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_drawn_tails_are_distinguished_from_the_support(tmp_path: Path, codec: str) -> None:
    cache = make_cache(tmp_path, num_chains=6, codec=codec, max_support=3, draws=2, temperatures=(2.0,))
    with open_session(cache.catalog) as session:
        for chain in cache.chains:
            signals, draws = chain.signals, chain.signals.draws
            assert draws is not None
            named = f"WHERE sample_id = '{chain.sample_id}'"
            entries = session.arrow(f"SELECT * FROM topk {named} ORDER BY drawn, position, rank, token_id")
            drawn = entries.filter(pc.field("drawn"))
            positions = np.repeat(np.arange(len(draws.n_T)), draws.n_T).tolist()
            wanted = sorted(zip(positions, draws.ids_D.tolist(), strict=True))
            found = zip(drawn.column("position").to_pylist(), drawn.column("token_id").to_pylist(), strict=True)
            assert list(found) == wanted
            assert set(drawn.column("rank").to_pylist()) <= {None}
            np.testing.assert_allclose(drawn.column("prob").to_numpy(), np.exp(draws.logprobs_D), rtol=0.1)
            kept = entries.filter(~pc.field("drawn"))
            assert kept.column("token_id").to_pylist() == signals.topk_ids_N.tolist()
            assert kept.column("rank").to_pylist() == [rank + 1 for n in signals.topk_n_T for rank in range(n)]
            tokens = session.arrow(f"SELECT * FROM tokens {named} ORDER BY position")
            assert tokens.column("draws").to_pylist() == draws.n_T.tolist()
            starts_T = np.cumsum(signals.topk_n_T) - signals.topk_n_T
            top1_T = np.exp(signals.topk_logprobs_N[starts_T])
            np.testing.assert_allclose(tokens.column("top1_prob").to_numpy(), top1_T, rtol=0.03)


def test_prompts_have_pass_rates_and_lengths(cache: SyntheticCache, session: Session) -> None:
    by_prompt: dict[str, list[Chain]] = {}
    for chain in cache.chains:
        by_prompt.setdefault(chain.prompt, []).append(chain)
    found = rows(session, "SELECT * FROM prompts")
    assert len(found) == len(by_prompt)
    for row in found:
        chains = by_prompt[str(row["prompt"])]
        judged = [chain.correct for chain in chains if chain.correct is not None]
        assert (row["num_samples"], row["num_judged"], row["num_correct"]) == (len(chains), len(judged), sum(judged))
        assert row["pass_rate"] == (sum(judged) / len(judged) if judged else None)
        assert row["mean_num_tokens"] == np.mean([len(chain.token_ids) for chain in chains])
        assert row["num_truncated"] == sum(chain.finish_reason == "length" for chain in chains)


def test_chain_rows_says_where_each_chain_lies(cache: SyntheticCache, session: Session) -> None:
    located = rows(session, "SELECT sample_id, file, row_group, row_in_group FROM internal.chain_rows")
    assert len(located) == len(cache.chains)
    for row in located:
        file = pq.ParquetFile(cache.root / "chains" / str(row["file"]))
        group = file.read_row_group(row["row_group"], columns=["sample_id"])
        assert group.column("sample_id")[row["row_in_group"]].as_py() == row["sample_id"]


def test_storage_adds_up_to_the_columns_of_the_footers(cache: SyntheticCache, session: Session) -> None:
    expected: Counter[str] = Counter()
    for file in (cache.root / "chains").rglob("*.parquet"):
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                expected[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    found = rows(session, "SELECT column_name, sum(bytes)::BIGINT AS bytes FROM storage GROUP BY ALL")
    assert {row["column_name"]: row["bytes"] for row in found} == dict(expected)


def test_both_codecs_answer_in_one_cache(tmp_path: Path) -> None:
    first = make_cache(tmp_path / "mixed", codec="topk-u8", num_chains=10)
    second = make_cache(tmp_path / "mixed", codec="topk-f32", num_chains=10, seed=1)
    with open_session(Catalog(tmp_path / "mixed")) as session:
        tokens = sum(len(chain.token_ids) for made in (first, second) for chain in made.chains)
        entries = sum(len(chain.signals.topk_ids_N) for made in (first, second) for chain in made.chains)
        (row,) = rows(session, "SELECT count(*) AS n, count(top1_prob) AS p, count(tail_mass) AS t FROM tokens")
        assert row == {"n": tokens, "p": tokens, "t": tokens}
        assert rows(session, "SELECT count(*) AS n, count(prob) AS p FROM topk") == [{"n": entries, "p": entries}]


def test_an_empty_cache_has_all_views_and_no_rows(tmp_path: Path) -> None:
    with open_session(Catalog.create(tmp_path / "empty")) as session:
        for view in (*VIEWS, "internal.chain_rows"):
            assert rows(session, f"SELECT count(*) AS n FROM {view}") == [{"n": 0}]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT avg(num_tokens) FROM chains",
        "SELECT source, avg(num_tokens) FROM chains WHERE split = 'train' GROUP BY source",
        "SELECT num_samples, mean_num_tokens FROM prompts",
    ],
)
def test_a_question_about_lengths_reads_no_distribution(session: Session, query: str) -> None:
    plan = session.explain(query)
    assert "num_tokens" in plan
    for column in ("topk_ids", "topk_codes", "topk_logprobs", "topk_n", "tail_codes", "entropy", "token_ids", "text"):
        assert column not in plan
    assert "topk_ids" in session.explain("SELECT avg(prob) FROM topk WHERE token_id = 7")


def test_filters_reach_the_scan(session: Session) -> None:
    plan = session.explain("SELECT sample_id FROM chains WHERE num_tokens > 40")
    scan = plan[plan.index("Filters") :]
    assert "num_tokens>40" in scan.replace(" ", "")


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


WRITES = [
    "COPY chains TO '{other}/x.csv'",
    "COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{shard}' (FORMAT parquet, USE_TMP_FILE false)",
    "/* note */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x",
    "EXPLAIN ANALYZE WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x",
    "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x)",
    "WITH x AS (INSERT INTO runs SELECT * FROM runs RETURNING *) SELECT * FROM x",
    "EXPLAIN ANALYZE (WITH x AS (COPY (SELECT ')SELECT 1 --' AS c) TO '{shard}' (USE_TMP_FILE false)) SELECT 1)",
    "EXPLAIN ANALYZE (FORMAT json) WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT 1",
    "(WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x)",
    "SELECT 1 UNION ALL (WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT 1 FROM x)",
    "SELECT (WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT count(*) FROM x)",
    "WITH RECURSIVE x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x",
    "WITH x AS MATERIALIZED (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x",
    "DESCRIBE (WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x)",
    "SUMMARIZE WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x",
    "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''{shard}'' (USE_TMP_FILE false)) SELECT * FROM x')",
    "SELECT 1 /* ; */ ; COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false); --",
    "SELECT 1; COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{shard}'' (USE_TMP_FILE false)')",
    "PREPARE p AS COPY (SELECT 1) TO '{shard}'",
    "EXPORT DATABASE '{other}'",
    "ATTACH '{other}/new.duckdb' AS fresh",
    "CREATE TABLE mine (i INTEGER)",
    "CREATE TEMP TABLE mine (i INTEGER)",
    "CREATE OR REPLACE VIEW chains AS SELECT 1",
    "INSERT INTO runs SELECT * FROM runs",
    "DELETE FROM runs",
    "UPDATE runs SET name = 'x'",
    "DROP VIEW chains",
    "ALTER TABLE runs RENAME TO walks",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
]
ESCAPES = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_json('{other}/secret.json')",
    "SELECT * FROM read_parquet('{other}/*.parquet')",
    "SELECT * FROM '{other}/secret.json'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM parquet_metadata('{other}/x.parquet')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "SELECT * FROM 'https://127.0.0.1:9/x.parquet'",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM secret_frame",
    "ATTACH '{root}/other.duckdb' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "FORCE INSTALL httpfs",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET allowed_paths = ['/etc/passwd']",
    "RESET allowed_paths",
    "PRAGMA enable_external_access = true",
    "CALL pragma_version()",
    "USE main",
    "",
    "-- nothing",
    "PIVOT (WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) SELECT * FROM x) t ON a USING count(*)",
    "WITH x AS (COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)) PIVOT x ON a USING count(*)",
    "PIVOT chains ON (SELECT content FROM read_text('/etc/passwd')) USING count(*)",
    "PIVOT chains ON split) IN ('a') USING count(*); COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false); --",
    "PIVOT '{other}/secret.json' ON password USING count(*)",
    "PRAGMA table_info('{other}/secret.json')",
    "PRAGMA table_info('chains'); COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "FROM read_csv('{other}/secret.json')",
]


@pytest.mark.parametrize("template", [*WRITES, *ESCAPES])
def test_every_way_out_is_refused(small: SyntheticCache, tmp_path: Path, template: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret.json").write_text('{"password": "hunter2"}')
    secret_frame = small.catalog.runs()
    shard = next((small.root / "chains").rglob("*.parquet"))
    before = snapshot(tmp_path) | snapshot(small.root)
    with open_session(small.catalog) as session:
        with pytest.raises(ConfigError):
            session.arrow(template.format(shard=shard, other=other, root=small.root))
        # What was refused leaves the session as it was.
        assert rows(session, "SELECT count(*) AS n FROM chains") == [{"n": 6}]
    assert snapshot(tmp_path) | snapshot(small.root) == before
    assert secret_frame


def test_the_lock_holds_without_the_check_of_statements(small: SyntheticCache) -> None:
    with open_session(small.catalog) as session:
        for query in ("SET lock_configuration = false", "CREATE TABLE x (i INTEGER)", "ATTACH '/tmp/x.duckdb' AS x"):
            with pytest.raises(duckdb.Error):
                session.connection.execute(query)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS x",
        "  -- a comment\n SELECT 1 AS x ; -- and one behind",
        "FROM (VALUES (1)) t(x)",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a",
        "SELECT x FROM (SELECT ';' AS y, 1 AS x)",
        "SELECT 'é; --' AS x /* ü */ ;; -- ж",
        "(SELECT 1 AS x)",
        "SELECT 1 AS x UNION ALL SELECT 2 ORDER BY x",
        "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM r WHERE x < 5) SELECT * FROM r",
        "PIVOT chains ON split IN ('train', 'heldout') USING count(*) GROUP BY source",
        "SELECT list_transform([1, 2], lambda i: i + 1) AS x",
        "EXPLAIN (SELECT 1)",
        "EXPLAIN (FORMAT json) SELECT 1",
        "EXPLAIN SELECT 1",
        "/* why */ EXPLAIN ANALYZE SELECT 1",
        "DESCRIBE chains",
        "-- PIVOT\nPIVOT chains ON split, /* , ON */ coalesce(source, 'a,b') USING count(*), max(num_tokens)",
        "PIVOT chains ON num_tokens % 2 IN (0, 1), split USING count(*) GROUP BY source ORDER BY source LIMIT 1;",
        "WITH x AS (SELECT * FROM chains) PIVOT x ON split USING count(*)",
        "EXPLAIN PIVOT chains ON split USING count(*)",
        "PRAGMA table_info('chains');",
        "pragma table_info(tokens)",
        "PRAGMA show_tables",
        "PRAGMA version",
        "SHOW TABLES",
        "SUMMARIZE SELECT num_tokens FROM chains",
    ],
)
def test_ways_of_asking_are_accepted(session: Session, query: str) -> None:
    assert session.arrow(query).num_rows >= 1


def test_a_mistake_is_one_line(session: Session) -> None:
    with pytest.raises(ConfigError, match="chainz") as caught:
        session.arrow("SELECT *\nFROM chainz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT *\nFROM nowhere.chains", r"LINE 2: FROM nowhere\.chains"),
        ("SELECT *\nFRM chains", "LINE 2: FRM chains"),
        ("SELECT 1; SELECT 2", "query: 2 SELECTs given: run one at a time"),
        ("-- nothing", "query: it is empty"),
        # Words of messages about damaged files.
        ("SELECT ZSTD FROM chains", "query: Binder Error"),
    ],
)
def test_a_mistake_says_where_and_what(session: Session, query: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        session.arrow(query)


def test_a_large_result_streams(session: Session) -> None:
    reader = session.batches("SELECT range AS i FROM range(1000000000000)")
    assert reader.read_next_batch().num_rows > 0
    # Another query is answered while the first is still open.
    assert rows(session, "SELECT 1 AS x") == [{"x": 1}]
    assert reader.read_next_batch().num_rows > 0


def test_an_error_in_the_middle_of_a_stream_is_the_users(session: Session) -> None:
    query = "SELECT CASE WHEN range < 900000 THEN '1' ELSE 'x' END::INTEGER AS i FROM range(1000000)"
    with pytest.raises(ConfigError, match="Conversion"):
        session.arrow(query)


def test_ctrl_c_ends_the_query_and_not_the_session(session: Session) -> None:
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.arrow(SLOW)
    timer.join()
    assert rows(session, "SELECT 1 AS x") == [{"x": 1}]


def test_a_second_ctrl_c_leaves_no_query_running() -> None:
    future: Future[None] = Future()

    def interrupt() -> None:
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        future.set_result(None)

    pressed: list[bool] = []
    with contextlib.suppress(KeyboardInterrupt):
        _interrupt(Mock(interrupt=interrupt), future)
    assert future.done()


def test_two_caches_join_on_the_chain(tmp_path: Path) -> None:
    first = make_cache(tmp_path / "one", num_chains=8)
    second = make_cache(tmp_path / "two", num_chains=5, codec="topk-u8")
    with Session({"main": first.catalog, "small": second.catalog}) as session:
        assert rows(session, "SELECT count(*) AS n FROM chains") == [{"n": 8}]
        assert rows(session, "SELECT count(*) AS n FROM small.chains") == [{"n": 5}]
        joined = rows(
            session, "SELECT a.sample_id AS a, b.sample_id AS b FROM chains a JOIN small.chains b USING (chain_id)"
        )
        assert all(row["a"] == row["b"] for row in joined)
        tokens = sum(len(chain.token_ids) for chain in second.chains)
        assert rows(session, "SELECT count(*) AS n FROM small.tokens") == [{"n": tokens}]


def test_a_full_disk_is_not_damage() -> None:
    found = query_error(OSError('IO Error: Could not write all bytes to file "t.tmp": No space left on device'))
    assert isinstance(found, StillroomError)
    assert (found.exit_code, "set TMPDIR" in str(found)) == (1, True)


def test_deep_queries_run_or_are_refused_in_one_line(session: Session) -> None:
    assert session.arrow("SELECT * FROM (" * 150 + "SELECT 1" + ")" * 150).num_rows == 1
    with pytest.raises(ConfigError, match=r"^query: it is nested too deeply: name its parts in WITH clauses$"):
        session.arrow(f"SELECT {'+'.join(['1'] * 900)}")


@pytest.mark.parametrize("name", ["a b", 'x"; DROP', "1st", "", "temp", "information_schema", "select"])
def test_names_of_caches_are_plain(small: SyntheticCache, name: str) -> None:
    with pytest.raises(ConfigError, match=r"SQL name|reserved word of SQL"):
        Session({"main": small.catalog, name: small.catalog})


def test_paths_with_quotes_are_quoted(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it's [1] a 'cache'? *", num_chains=4)
    with open_session(cache.catalog) as session:
        assert rows(session, "SELECT count(*) AS n FROM tokens") == [
            {"n": sum(len(chain.token_ids) for chain in cache.chains)}
        ]


def test_exported_views_open_in_plain_duckdb(cache: SyntheticCache, tmp_path: Path) -> None:
    path = tmp_path / "views.duckdb"
    export_views({"main": cache.catalog, "again": cache.catalog}, path)
    export_views({"main": cache.catalog, "again": cache.catalog}, path)
    tokens = sum(len(chain.token_ids) for chain in cache.chains)
    with duckdb.connect(str(path), read_only=True) as connection:
        for name in ("tokens", "again.tokens"):
            assert connection.execute(f"SELECT count(*) FROM {name}").fetchone() == (tokens,)
        assert connection.execute("SELECT count(*) FROM internal.chain_rows").fetchone() == (len(cache.chains),)
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS other (READ_ONLY)")
        assert connection.execute("SELECT count(*) FROM other.runs").fetchone() == (2,)
    with pytest.raises(DataError, match="folder"):
        export_views({"main": cache.catalog}, tmp_path)


def test_every_probability_is_one(session: Session) -> None:
    query = """SELECT min(mass) AS low, max(mass) AS high FROM (
        SELECT any_value(t.tail_mass) + sum(k.prob) AS mass FROM tokens t JOIN topk k USING (sample_id, position)
        GROUP BY sample_id, position)"""
    (row,) = rows(session, query)
    assert math.isclose(float(str(row["low"])), 1, abs_tol=1e-5)
    assert math.isclose(float(str(row["high"])), 1, abs_tol=1e-5)


def test_a_folder_named_like_a_column_changes_nothing(tmp_path: Path) -> None:
    """DuckDB would take `source=zzz` on the path for a partition, and its value for that of every row."""
    made = make_cache(tmp_path / "source=zzz" / "split=none" / "cache", 6)
    with open_session(made.catalog) as session:
        rows = session.arrow("SELECT DISTINCT source, split FROM chains").to_pylist()
    assert {row["source"] for row in rows} == {chain.source for chain in made.chains}
    assert {row["split"] for row in rows} <= {"train", "heldout"}


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        ("chains", Path.unlink, "is registered but missing"),
        ("verdicts", Path.unlink, "is registered but missing"),
        ("chains", lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes, \d+ were registered"),
        ("chains", lambda path: path.write_bytes(b""), r"has 0 bytes, \d+ were registered"),
        ("verdicts", lambda path: damage(path, 0.1), ".*differs from the one in its name"),
    ],
)
def test_damage_is_named_with_its_remedy_before_a_query(
    tmp_path: Path, table: str, change: Callable[[Path], object], problem: str
) -> None:
    catalog = make_cache(tmp_path / "cache", num_chains=30).catalog
    files = {"chains": catalog.chains, "verdicts": catalog.verdicts}[table]
    path = on_disk(files.path_of(files.files()[-1]))
    change(path)
    remedy = f"teacher-cache verify {tmp_path / 'cache'} --quarantine"
    with pytest.raises(CorruptError, match=f"^{re.escape(str(path))} {problem}: {re.escape(remedy)}$"):
        open_session(catalog)


def test_a_damaged_footer_is_reported(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", num_chains=12)
    # The last byte: the magic of the footer.
    damage(next((cache.root / "chains").rglob("*.parquet")), 0.99999)
    with pytest.raises(CorruptError), open_session(cache.catalog) as session:
        session.arrow("SELECT * FROM chains")


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("FROM (PIVOT chains ON split USING count(*))", r"PIVOT: .*PIVOT \.\.\. ON x IN"),
        ("/* now */ install httpfs;", "INSTALL: .*extensions are not available"),
        ("LOAD httpfs", "LOAD: "),
        ("COPY chains TO 'x.csv'", "COPY: .*; --out FILE writes a result"),
        ("CREATE TABLE x AS SELECT 1", "CREATE: .*; WITH name AS"),
        ("ATTACH 'x.duckdb'", "ATTACH: .*--attach NAME=CACHE"),
        ("SET threads = 2", "SET: .*--threads N and --memory SIZE"),
        ("PRAGMA threads = 2", "PRAGMA: .*--threads N"),
        ("USE other", "USE: .*; write NAME.chains"),
    ],
)
def test_a_refused_statement_is_named_as_it_was_written(session: Session, query: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"is allowed here, found {word}"):
        session.arrow(query)


def test_a_pivot_finds_its_values(session: Session, cache: SyntheticCache) -> None:
    (row,) = rows(session, "PIVOT (SELECT split, 1 AS n FROM chains) ON split USING sum(n)")
    assert row == Counter(chain.split for chain in cache.chains)
    (row,) = rows(session, "PIVOT (SELECT 'it''s' AS a, 2 AS b, 1 AS c) ON a, c USING sum(b)")
    assert row == {"it's_1": 2}


def test_the_listed_tables_are_the_documented_ones(cache: SyntheticCache) -> None:
    with Session({"main": cache.catalog, "other": cache.catalog}) as session:
        assert {row["name"] for row in rows(session, "SHOW TABLES")} == set(VIEWS)
        assert rows(session, "SELECT count(*) AS n FROM other.chains") == [{"n": len(cache.chains)}]


OWN = {
    "labels.csv": b"sample_id,label\n{id},7\n",
    "labels.csv.gz": gzip.compress(b"sample_id,label\n{id},7\n"),
    "odd [1] it's.tsv": b"sample_id\tlabel\n{id}\t7\n",
    "labels.jsonl": b'{"sample_id": "{id}", "label": 7}\n',
    "labels.json": b'[\n{"sample_id": "{id}", "label": 7}]\n',
    "labels.parquet": b"",
    "labels.arrow": b"",
}


@pytest.fixture(scope="module")
def own(small: SyntheticCache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same table in every kind of file."""
    folder, found = tmp_path_factory.mktemp("own=1"), {}
    table = pa.table({"sample_id": [small.chains[0].sample_id], "label": pa.array([7], pa.int64())})
    for number, (name, content) in enumerate(OWN.items()):
        found[f"t{number}"] = folder / name
        found[f"t{number}"].write_bytes(content)
        if not name.endswith("gz"):
            found[f"t{number}"].write_bytes(content.replace(b"{id}", small.chains[0].sample_id.encode()))
    (folder / "labels.csv.gz").write_bytes(gzip.compress((folder / "labels.csv").read_bytes()))
    pq.write_table(table, folder / "labels.parquet")
    with pa.ipc.new_file(folder / "labels.arrow", table.schema) as writer:
        writer.write_table(table)
    return found


def test_own_files_join_and_stay_as_they_are(small: SyntheticCache, own: dict[str, Path], tmp_path: Path) -> None:
    folder = next(iter(own.values())).parent
    (folder / "beside.csv").write_text("a\n1\n")
    before = snapshot(folder)
    with Session({"main": small.catalog}, own, num_threads=2, memory="500MB") as session:
        for name in own:
            query = f"SELECT num_tokens, label FROM chains JOIN {name} USING (sample_id)"
            assert rows(session, query) == [{"num_tokens": len(small.chains[0].token_ids), "label": 7}]
        settings = rows(session, "SELECT current_setting('threads') AS t, current_setting('memory_limit') AS m")
        assert settings == [{"t": 2, "m": "476.8 MiB"}]
        csv = own["t0"]
        for query in (
            f"COPY (SELECT 1) TO '{csv}' (USE_TMP_FILE false)",
            f"WITH x AS (COPY (SELECT 1) TO '{csv}' (USE_TMP_FILE false)) SELECT * FROM x",
            f"FROM '{folder}/beside.csv'",
            f"FROM read_csv('{folder}/*.csv')",
            f"FROM glob('{folder}/*')",
            "INSERT INTO t6 SELECT 'a', 1",
            "SET threads = 8",
        ):
            with pytest.raises(ConfigError):
                session.arrow(query)
        with pytest.raises(ConfigError, match=r"beside\.csv\" is not a file of the cache: --with NAME=FILE adds"):
            session.arrow(f"FROM '{folder}/beside.csv'")
    export_views({"main": small.catalog}, tmp_path / "views.duckdb", own)
    with duckdb.connect(str(tmp_path / "views.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT (SELECT sum(label) FROM t0) + (SELECT sum(label) FROM t6)").fetchone() == (
            14,
        )
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("mine", "/etc/passwd", "its name must end in one of"),
        ("mine", "/nowhere/x.csv", "does not exist: use one file"),
        ("mine", "/nowhere/*.csv", "does not exist: use one file"),
        ("mine", "https://127.0.0.1:9/x.csv", "is a URL: download the file"),
        ("chains", "x.csv", "'chains' is taken by a view of the cache"),
        ("semi", "{folder}/late.jsonl", "table name 'semi' is a reserved word of SQL"),
        ('x" AS SELECT 1; --', "x.csv", "is not a valid SQL name"),
        ("mine", "{folder}/bad.parquet", "cannot be read as .parquet"),
        ("mine", "{folder}/bad.arrow", "cannot be read as .arrow"),
        # DuckDB alone would drop the first lines as a preamble.
        ("mine", "{folder}/ragged.csv", "ragged.csv: its lines have different numbers of cells"),
        ("mine", "{folder}/empty.csv", "empty.csv is empty"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused(
    small: SyntheticCache, tmp_path: Path, name: str, path: str, message: str
) -> None:
    for ending in ("parquet", "arrow"):
        (tmp_path / f"bad.{ending}").write_bytes(b"no table")
    (tmp_path / "late.jsonl").write_text("{}\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n4,5,6\n")
    (tmp_path / "empty.csv").touch()
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        Session({"main": small.catalog}, {name: Path(path.format(folder=tmp_path)) if "://" not in path else path})  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)


def test_what_comes_late_in_a_file_counts(small: SyntheticCache, tmp_path: Path) -> None:
    """DuckDB alone looks at 20,480 rows."""
    numbers = [str(number) for number in range(25_000)]
    (tmp_path / "late.csv").write_text("\n".join(["a", *numbers, "x"]))
    (tmp_path / "late.jsonl").write_text("\n".join([*(f'{{"a": {one}}}' for one in numbers), '{"b": "x"}']))
    with Session({"main": small.catalog}, {"t": tmp_path / "late.csv", "j": tmp_path / "late.jsonl"}) as session:
        assert rows(session, "SELECT max(a) AS a, count(*) AS n FROM t") == [{"a": "x", "n": 25_001}]
        assert rows(session, "SELECT count(a) AS a, count(b) AS b FROM j") == [{"a": 25_000, "b": 1}]


@pytest.mark.parametrize("memory", ["4XB", "-1", "", "4GB'; SET threads = 1; --"])
def test_a_memory_limit_is_a_size(small: SyntheticCache, memory: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: write 4GB"):
        Session({"main": small.catalog}, memory=memory)
