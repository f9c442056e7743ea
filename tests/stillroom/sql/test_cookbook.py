"""docs/sql.md and other pages with SQL: every query, condition and Python example runs, and answers something."""

import re
from pathlib import Path

import pytest
import yaml

from stillroom.schema.tables import CODECS
from stillroom.sql.conditions import check_condition, in_brackets
from stillroom.sql.session import Session
from stillroom.sql.views import VIEWS
from tests.helpers import ROOT
from tests.helpers.caches import SyntheticCache, make_cache

PAGE = (ROOT / "docs" / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"^```sql\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
RECIPE = (ROOT / "docs" / "recipes" / "data.md").read_text(encoding="utf-8")
OTHER_QUERIES = [
    query
    for page in (RECIPE, (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8"))
    for query in re.findall(r"^```sql\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
]
CONDITIONS = [
    found["data"]["where"]
    for block in re.findall(r"^```yaml\n(data:.*?)^```", RECIPE, re.DOTALL | re.MULTILINE)
    if (found := yaml.safe_load(block))
]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module", params=CODECS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("cache"), codec=request.param, num_chains=60)


def test_the_page_has_its_questions() -> None:
    assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) == 10
    assert len(QUERIES) >= 10
    assert len(EXAMPLES) == 1
    for view in VIEWS:
        assert f"| `{view}` |" in PAGE


@pytest.mark.parametrize("query", [*QUERIES, *OTHER_QUERIES], ids=lambda query: " ".join(query.split())[:40])
def test_every_query_answers(cache: SyntheticCache, query: str) -> None:
    with Session({"main": cache.catalog, "other": cache.catalog}) as session:
        assert session.arrow(query.replace("SAMPLE", cache.chains[0].sample_id)).num_rows > 0


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_selects_right_chains(cache: SyntheticCache, condition: str) -> None:
    with Session({"main": cache.catalog}) as session:
        check_condition(session, "data.where", condition)
        query = f"SELECT count(*) AS n, count(DISTINCT prompt_id) AS prompts FROM chains WHERE {in_brackets(condition)}"
        assert all(row["n"] >= row["prompts"] for row in session.arrow(query).to_pylist())


def test_a_written_out_sample_reaches_parquet(cache: SyntheticCache) -> None:
    with Session({"main": cache.catalog}) as session:
        plan = session.explain("SELECT * FROM topk WHERE sample_id = 'a0b1' AND position = 0")
    scan = plan[plan.index("Filters") :]
    assert "sample_id" in scan
    assert "a0b1" in scan


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_runs(cache: SyntheticCache, example: str) -> None:
    values: dict[str, object] = {}
    exec(example.replace("runs/demo/cache", str(cache.root)), values)
    assert {"logprobs", "frame"} & set(values)
    if "cache" in values:
        values["cache"].close()  # type: ignore[attr-defined]


def test_what_a_student_should_train_on_is_never_trivial(cache: SyntheticCache) -> None:
    (query,) = [query for query in QUERIES if "pass_rate, c.num_tokens" in query]
    with Session({"main": cache.catalog}) as session:
        assert all(0 < rate < 1 for rate in session.arrow(query)["pass_rate"].to_pylist())


def test_alternatives_exclude_draws(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=8, draws=3)
    (query,) = [query for query in QUERIES if "'SAMPLE'" in query]
    with Session({"main": made.catalog}) as session:
        (row,) = session.arrow("SELECT sample_id, position FROM topk WHERE drawn LIMIT 1").to_pylist()
        here = query.replace("SAMPLE", row["sample_id"]).replace("position = 0", f"position = {row['position']}")
        assert None not in session.arrow(here)["rank"].to_pylist()
        assert None in session.arrow(here.replace(" AND NOT drawn", "").replace("LIMIT 10", ""))["rank"].to_pylist()
