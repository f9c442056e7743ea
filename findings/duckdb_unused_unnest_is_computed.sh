#!/usr/bin/env bash
# duckdb 2.0.0: of several lists unnested side by side every one is computed, also those that nobody selects.
#
# `SELECT unnest(a) AS x, unnest(f(b)) AS y` as a view looks like two columns of which a query takes what it needs, and
# with scalars that is so. Lists that are unnested together are padded to the longest, so the number of rows depends on
# all of them, and the optimizer drops none: count(*) over the view runs f for every row. With f decoding a distribution
# this made counting tokens nine times slower than it need be. What is pruned: unnest the positions alone, and index the
# other lists by them, `f(b)[position]`. The inner list must then stand in a subquery below the unnest: in the same
# SELECT it is computed once for every position.
# Seen: an unused scalar f never runs; an unused unnest(f) runs; an unused f[position] does not.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet duckdb==2.0.0
cat > "$folder/check.py" <<'PY'
import sys

import duckdb

connection = duckdb.connect()
connection.execute("CREATE TABLE chains AS SELECT range(3) AS tokens FROM range(2)")
# f says by failing that it was computed.
F = "list_transform(tokens, lambda token: error('computed'))"
VIEWS = {
    "scalar beside an unnest": f"SELECT unnest(tokens) AS x, len({F}) AS y FROM chains",
    "unnest beside an unnest": f"SELECT unnest(tokens) AS x, unnest({F}) AS y FROM chains",
    "list indexed by unnested positions": "SELECT tokens[position + 1] AS x, f[position + 1] AS y FROM"
    f" (SELECT *, unnest(range(len(tokens))) AS position FROM (SELECT *, {F} AS f FROM chains))",
}


def outcome(view: str) -> str:
    try:
        (count,) = connection.execute(f"SELECT count(*) FROM ({view})").fetchone()
    except duckdb.Error as error:
        return "computed" if "computed" in str(error) else str(error)
    return f"left out, {count} rows"


found = {name: outcome(view) for name, view in VIEWS.items()}
for name, said in found.items():
    print(f"{name}: unused column {said}")
sys.exit(list(found.values()) != ["left out, 6 rows", "computed", "left out, 6 rows"])
PY
"$folder/venv/bin/python" "$folder/check.py"
