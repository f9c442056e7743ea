#!/usr/bin/env bash
# fsspec 2026.9.0 ArrowFSWrapper registered with duckdb 2.0.0: wrong reads as soon as DuckDB uses several threads.
#
# DuckDB opens a file once and lets its threads seek and read through the one handle. A handle of ArrowFSWrapper has a
# single position and no lock, so one thread's seek moves another thread's read. Seen with valid Parquet files on a
# local disk: with one thread the sums are right; with eight, all of 12 runs ended in errors such as
# "don't know what type" (a Parquet header read at the wrong place) or "only 0 bytes returned".
# A wrapper for DuckDB must give each read its own position (read_at / cat_ranges), or hold a lock over seek and read.
# Fails if eight threads agree with one in every run, or if one thread is wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet duckdb==2.0.0 fsspec==2026.9.0 pyarrow==26.0.0 numpy==2.3.5
cat > "$folder/race.py" <<'PY'
import datetime
import sys
import tempfile

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper

NUM_RUNS, NUM_COLUMNS = 12, 8


class Wrapped(ArrowFSWrapper):
    protocol = "wrapped"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("wrapped://")

    def modified(self, path):
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


def sums(folder, num_threads):
    files = [f"wrapped://{folder}/{number}.parquet" for number in range(4)]
    columns = ", ".join(f"sum(c{number})" for number in range(NUM_COLUMNS))
    connection = duckdb.connect()
    connection.execute(f"SET threads={num_threads}")
    connection.register_filesystem(Wrapped(pa.fs.LocalFileSystem()))
    try:
        return connection.execute(f"SELECT {columns} FROM read_parquet({files})").fetchall()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]!r}"


with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    table = pa.table({f"c{number}": rng.integers(0, 1 << 40, 400_000) for number in range(NUM_COLUMNS)})
    for number in range(4):
        pq.write_table(table, f"{folder}/{number}.parquet", row_group_size=20_000)
    expected = [tuple(4 * int(table.column(number).to_numpy().sum()) for number in range(NUM_COLUMNS))]
    alone = sums(folder, 1)
    print("one thread is right:", alone == expected)
    wrong = [result for result in (sums(folder, 8) for _ in range(NUM_RUNS)) if result != expected]
    print(f"eight threads: {len(wrong)} of {NUM_RUNS} runs wrong, for example {wrong[:1]}")
    sys.exit(0 if alone == expected and wrong else 1)
PY
"$folder/venv/bin/python" "$folder/race.py"
