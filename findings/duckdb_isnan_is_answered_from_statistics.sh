#!/usr/bin/env bash
# duckdb 2.0.0: isnan(x) over a Parquet file from pyarrow or Polars is false for every row, even where x is NaN.
#
# The Parquet standard keeps NaN out of a column's minimum and maximum. DuckDB reads finite bounds as a promise that
# there is no NaN (can_have_nan of read_parquet is false by default), and version 2.0 folds isnan(x) itself to false,
# which 1.5.5 did not. The check written to find NaN is the one that cannot: it counts 0, and `WHERE NOT isnan(x)`
# keeps the NaN rows, while avg over the same column is NaN and isfinite sees them. DuckDB's own writer omits the
# bounds next to a NaN, so a test that creates its file with COPY passes. For other files pass can_have_nan = true to
# read_parquet, or use NOT isfinite.
# Seen, x = 1, NaN, 2: from pyarrow and Polars 0 rows by isnan, 1 by NOT isfinite, mean nan; with can_have_nan, and in
# a file written by DuckDB: 1, 1, nan.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet duckdb==2.0.0 polars==2.1.0 pyarrow==26.0.1
cat > "$folder/check.py" <<'PY'
import sys

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

folder = sys.argv[1]
losses = pa.table({"x": [1.0, float("nan"), 2.0]})
pq.write_table(losses, f"{folder}/pyarrow.parquet")
pl.from_arrow(losses).write_parquet(f"{folder}/polars.parquet")
duckdb.execute(f"COPY (SELECT * FROM losses) TO '{folder}/duckdb.parquet'")


def outcome(source: str) -> tuple[int, int, str]:
    where = [f"SELECT count(*) FROM {source} WHERE {predicate}" for predicate in ("isnan(x)", "NOT isfinite(x)")]
    return (*(duckdb.execute(query).fetchone()[0] for query in where),
            duckdb.execute(f"SELECT avg(x)::VARCHAR FROM {source}").fetchone()[0])


found = {
    "pyarrow": outcome(f"read_parquet('{folder}/pyarrow.parquet')"),
    "Polars": outcome(f"read_parquet('{folder}/polars.parquet')"),
    "pyarrow, can_have_nan": outcome(f"read_parquet('{folder}/pyarrow.parquet', can_have_nan = true)"),
    "DuckDB": outcome(f"read_parquet('{folder}/duckdb.parquet')"),
}
for name, (num_nan, num_not_finite, mean) in found.items():
    print(f"{name}: isnan {num_nan}, not isfinite {num_not_finite}, mean {mean}")
sys.exit(list(found.values()) != [(0, 1, "nan"), (0, 1, "nan"), (1, 1, "nan"), (1, 1, "nan")])
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
