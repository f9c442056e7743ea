"""SQL over a cache: time to the first answer, the cookbook's queries, and the bytes read by a question about lengths.

    python -m benchmarks.sql [--json] [--tokens N] [--cache FOLDER]

A cache is built with the fake engine (topk-u8, nucleus 0.999 of at most 64, vocabulary 129,280, mean length 1,500, row
groups of 65,536 tokens), in FOLDER, where it stays for another run, or in a temporary folder. First answer: a new
process of `teacher-cache sql` counts the chains, wall clock, best of three. Queries: every SQL block of docs/sql.md in
one session, wall clock and CPU seconds of one run each, with the cache attached to itself as the second teacher.
Bytes: what the process read (rchar of /proc/self/io) for one query about lengths in a new session, footers included.
The last line is one JSON object; with --json it is the only one.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stillroom.cache.catalog import Catalog, publish
from stillroom.schema.records import Message, Prompt, prompt_id_of, sample_id_of
from stillroom.schema.tables import VERDICT_SCHEMA
from stillroom.sql.session import Session, open_session
from stillroom.storage.paths import spool
from teacher_cache.building.build import Build
from teacher_cache.engine.api import Request
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.prompts import seed_of
from tests.helpers.fake_builds import make_config, make_teacher

VOCAB_SIZE = 129_280
SUPPORT = 64
MEAN_TOKENS = 1500
MAX_TOKENS = 4096
SAMPLES, NUM_SOURCES = 4, 6
EOS_ID, THINK_END_ID = 1, 150
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": MAX_TOKENS}
COOKBOOK = Path(__file__).parent.parent / "docs" / "sql.md"
LENGTHS = "SELECT source, avg(num_tokens) FROM chains GROUP BY source"

Result = dict[str, object]


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_400_000, help="completion tokens of the cache, about")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")
    parser.add_argument("--cache", type=Path, help="where the cache is, or is to be made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillroom-sql-benchmark-") as name:
        root = arguments.cache or Path(name) / "cache"
        if not root.exists():
            _write_cache(root, arguments.tokens)
        catalog = Catalog(root)
        result = _shape(catalog)
        result["first_answer_s"] = round(min(_first_answer_s(root) for _ in range(3)), 3)
        result["length_bytes_read"] = _bytes_read(catalog)
        result["queries"] = list(_time_queries(catalog))
    if not arguments.json:
        _show(result)
    print(json.dumps(result))


def _write_cache(root: Path, num_tokens: int) -> None:
    """Builds with the fake engine, as `teacher-cache build` does with a real one; then a verdict for every chain."""
    config = make_config(
        root,
        capture={"max_support": SUPPORT, "draws": 0},
        shard={"max_mb": 64.0, "row_group_tokens": 65_536},
    )
    tokenizer, teacher = _tokenizer(), make_teacher()
    record = teacher.record.model_copy(update={"vocab_size": VOCAB_SIZE})
    build = Build(config, IdentifiedTeacher(record, tokenizer), "w0")
    num_chains = num_tokens // MEAN_TOKENS
    try:
        build.run(_requests(num_chains), num_chains, _engine)
    finally:
        build.close()
    _write_verdicts(Catalog(root))


def _engine() -> FakeEngine:
    return FakeEngine(VOCAB_SIZE, SUPPORT, max_model_len=MAX_TOKENS + 256, mean_tokens=MEAN_TOKENS, eos_id=EOS_ID)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Made-up words, the commonest first, as FakeEngine draws them; among them those of the cookbook's questions."""
    words = {
        0: "<unk>",
        EOS_ID: "<eos>",
        2: "<think>",
        100: "▁wait",
        120: "▁but",
        140: "▁hmm",
        THINK_END_ID: "</think>",
    }
    vocab = {words.get(token, f"▁w{token}"): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def _requests(num_chains: int) -> Iterator[Request]:
    """Prompts of NUM_SOURCES sources with SAMPLES chains each."""
    for number in range(num_chains):
        question, index = divmod(number, SAMPLES)
        messages = (Message("user", f"question {question}: " + "what is known of it? " * 20),)
        source, split = f"source {question % NUM_SOURCES}", "heldout" if question % 50 == 0 else "train"
        prompt = Prompt(prompt_id_of(messages), messages, source, split, reference="5")
        prompt_ids = [3, *range(1000, 1100), 1000 + question % 50_000]
        seed = seed_of(0, prompt.prompt_id, index)
        sample_id = sample_id_of("f" * 32, prompt_ids, SAMPLING, seed, index)
        yield Request(prompt, prompt_ids, index, seed, SAMPLING, MAX_TOKENS, sample_id)


def _write_verdicts(catalog: Catalog) -> None:
    """Right by the hash of the sample, more often in the later sources."""
    with open_session(catalog) as session:
        rows = session.arrow(
            "SELECT sample_id, 'exact' AS judge,"
            " hash(sample_id) % 10 < 2 + split_part(source, ' ', 2)::INTEGER AS correct FROM chains"
        ).to_pylist()
    now = datetime.datetime.now(datetime.UTC)
    verdicts = [{**row, "score": float(row["correct"]), "judged_at": now} for row in rows]
    temp = spool(catalog.verdicts.folder) / ".verdicts.tmp"
    pq.write_table(pa.Table.from_pylist(verdicts, schema=VERDICT_SCHEMA), temp)
    file = publish(temp, catalog.verdicts.folder, "judge/w0-000001", len(verdicts))
    catalog.verdicts.commit([file], "stillroom/judge/w0", 1)


def _shape(catalog: Catalog) -> Result:
    files = catalog.chains.files()
    with open_session(catalog) as session:
        (row,) = session.arrow("SELECT count(*) AS chains, sum(num_tokens)::BIGINT AS tokens FROM chains").to_pylist()
    return {**row, "shards": len(files), "shard_bytes": sum(file.size_bytes for file in files)}


def _first_answer_s(root: Path) -> float:
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "teacher_cache.cli", "sql", str(root), "SELECT count(*) FROM chains"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started_s


def _bytes_read(catalog: Catalog) -> int:
    with open_session(catalog) as session:
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
    print(f"{result['chains']:,} chains, {result['tokens']:,} tokens, {result['shards']} shards")
    print(f"first answer {result['first_answer_s']:.2f} s, lengths read {result['length_bytes_read']:,} bytes")
    print(f"of {result['shard_bytes']:,} bytes of shards")
    queries = result["queries"]
    assert isinstance(queries, list)
    for one in queries:
        print(f"{one['wall_s']:8.2f} s  {one['cpu_s']:8.2f} CPU s  {one['question']}")


if __name__ == "__main__":
    main()
