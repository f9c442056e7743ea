#!/usr/bin/env bash
# polars 2.1.0: Float16 sums of lists, arrays and groups stop at 2048; the sum of the same values as a column does not.
#
# Above 2048 half floats are 2 apart, so a running sum in half precision no longer moves when 1 is added. Series.sum
# adds in a wider type and rounds once. list.sum, arr.sum and a sum per group add in Float16 itself. 3,000 log
# probabilities of -0.7 sum to -2100 as a column and to -2048 as one list. The result type, Float16 in both cases, does
# not tell. Float32 lists do the same from 2**24 on. Cast the values to Float32 (or Float64) first.
# Seen, 5,000 ones: column 5000, exploded list 5000, list.sum 2048, arr.sum 2048, group 2048, list cast to Float32
# 5000.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet polars==2.1.0
cat > "$folder/check.py" <<'PY'
import sys

import polars as pl

NUM_VALUES = 5000
column = pl.Series("x", [1.0] * NUM_VALUES, dtype=pl.Float16)
lists = pl.Series([column])
array = pl.Series([column.to_list()], dtype=pl.Array(pl.Float16, NUM_VALUES))
groups = pl.DataFrame({"group": [1] * NUM_VALUES, "x": column}).group_by("group").agg(pl.col("x").sum())
found = {
    "column": column.sum(),
    "exploded list": lists.explode().sum(),
    "list.sum": lists.list.sum()[0],
    "arr.sum": array.arr.sum()[0],
    "group": groups["x"][0],
    "list cast to Float32": lists.cast(pl.List(pl.Float32)).list.sum()[0],
}
for name, total in found.items():
    print(f"{name}: {total}")
sys.exit(list(found.values()) != [5000, 5000, 2048, 2048, 2048, 5000])
PY
"$folder/venv/bin/python" "$folder/check.py"
