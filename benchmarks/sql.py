"""SQL over a cache: time to the first answer, the cookbook's queries, and the bytes read by a question about lengths.

    python -m benchmarks.sql [--json] [--tokens N]

A cache of synthetic chains (topk-u8, vocabulary 129,280, row groups of 65,536 tokens) is written. First answer: a new
process of `teacher-cache sql` counts the chains, wall clock, best of three. Queries: every SQL block of docs/sql.md in
one session, wall clock and CPU seconds of one run each, with the cache attached to itself as the second teacher.
Bytes: what the process read (rchar of /proc/self/io) for one query about lengths in a new session, footers included.
The last line is one JSON object; with --json it is the only one.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shared.catalog import Catalog
from shared.sql import Session, open_cache
from tests.caches import make_cache

MEAN_TOKENS = 1500
GROUP_TOKENS = 65_536
COOKBOOK = Path(__file__).parent.parent / "docs" / "sql.md"
LENGTHS = "SELECT source, avg(num_tokens) FROM chains GROUP BY source"

Result = dict[str, object]


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="completion tokens of the cache")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillroom-sql-benchmark-") as name:
        catalog = _write_cache(Path(name) / "cache", arguments.tokens)
        shard_bytes = sum(file.size_bytes for file in catalog.chains.files())
        result: Result = {"tokens": arguments.tokens, "shard_bytes": shard_bytes}
        result["first_answer_s"] = min(_first_answer_s(catalog.root) for _ in range(3))
        result["length_bytes_read"] = _bytes_read(catalog)
        result["queries"] = list(_time_queries(catalog))
    if not arguments.json:
        _show(result)
    print(json.dumps(result))


def _write_cache(root: Path, num_tokens: int) -> Catalog:
    made = make_cache(
        root,
        num_chains=num_tokens // MEAN_TOKENS,
        codec="topk-u8",
        vocab_size=129_280,
        max_support=64,
        min_tokens=MEAN_TOKENS // 3,
        max_tokens=MEAN_TOKENS * 5 // 3,
        max_prompt_tokens=200,
        rows_per_group=GROUP_TOKENS // MEAN_TOKENS,
        groups_per_shard=6,
        id_skew=4.0,
    )
    return made.catalog


def _first_answer_s(root: Path) -> float:
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "teacher_cache.cli", "sql", str(root), "SELECT count(*) FROM chains"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started_s


def _bytes_read(catalog: Catalog) -> int:
    with open_cache(catalog) as session:
        before = _rchar()
        session.arrow(LENGTHS)
        return _rchar() - before


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def _time_queries(catalog: Catalog) -> Iterator[Result]:
    text = COOKBOOK.read_text(encoding="utf-8")
    with Session({"main": catalog, "other": catalog}) as session:
        sample = session.arrow("SELECT min(sample_id) AS sample_id FROM chains")["sample_id"][0].as_py()
        for title, body in re.findall(r"^### (.*?)\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE):
            for query in re.findall(r"^```sql\n(.*?)^```", body, re.DOTALL | re.MULTILINE):
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                num_rows = session.arrow(query.replace("SAMPLE", sample)).num_rows
                yield {
                    "question": title,
                    "rows": num_rows,
                    "wall_s": round(time.perf_counter() - wall_s, 3),
                    "cpu_s": round(time.process_time() - cpu_s, 3),
                }


def _show(result: Result) -> None:
    print(f"first answer {result['first_answer_s']:.2f} s, lengths read {result['length_bytes_read']:,} bytes")
    print(f"of {result['shard_bytes']:,} bytes of shards")
    queries = result["queries"]
    assert isinstance(queries, list)
    for one in queries:
        print(f"{one['wall_s']:8.2f} s  {one['cpu_s']:8.2f} CPU s  {one['question']}")


if __name__ == "__main__":
    main()
