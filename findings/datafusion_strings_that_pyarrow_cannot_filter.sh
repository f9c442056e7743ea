#!/usr/bin/env bash
# datafusion 55.0.0 beside pyarrow 26.0.1: a query's Arrow table cannot be filtered or sorted by pyarrow.
#
# DataFusion returns text columns as string_view, also those that were read as string. pyarrow holds such columns, but
# Table.filter, take and sort_by have no kernel for them, so an ordinary step after the query fails although the query
# did not touch the column. Casting the column to string first helps.
# Seen: type string_view; filter raises ArrowNotImplementedError naming array_take; after the cast it gives one row.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datafusion==55.0.0 pyarrow==26.0.1
cat > "$folder/check.py" <<'PY'
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from datafusion import SessionContext

path = f"{sys.argv[1]}/a.parquet"
pq.write_table(pa.table({"name": ["a", "b"], "n": [1, 2]}), path)
context = SessionContext()
context.register_parquet("t", path)
table = context.sql("SELECT name, n FROM t").to_arrow_table()
mask = pa.array([value == 2 for value in table.column("n").to_pylist()])
try:
    said = f"{table.filter(mask).num_rows} row"
except pa.ArrowNotImplementedError as error:
    said = str(error)
cast = table.cast(pa.schema([("name", pa.string()), ("n", pa.int64())]))
print(table.schema.field("name").type, "|", said, "| after the cast:", cast.filter(mask).num_rows)
as_seen = table.schema.field("name").type == pa.string_view() and "array_take" in said
sys.exit(0 if as_seen and cast.filter(mask).num_rows == 1 else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
