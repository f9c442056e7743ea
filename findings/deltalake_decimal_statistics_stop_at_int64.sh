#!/usr/bin/env bash
# deltalake 1.6.6: statistics of DECIMAL(p, 0) are clamped to int64, so larger values are stored and never found.
#
# Delta has no unsigned type, and write_deltalake refuses uint64 values above 2**63 - 1, so 64-bit hashes and ids end
# up in DECIMAL(20, 0). At scale 0 the minimum and maximum in the log are clamped to the range of int64. The rows are
# in the Parquet file and a full scan returns them, but a filter that needs a larger value skips the file: in
# deltalake's SQL, in Polars, in a pyarrow dataset, and in DeltaTable.delete, which reports 0 deleted rows. Nothing
# fails. It affects half of all 64-bit hashes, and a file that also holds small values hides only the large ones. Store
# such ids as text, as binary, or as int64 with the same bits.
# Seen, values 2**64 - 1 and 2**63 + 2: both in the full scan; maximum in the log 9223372036854775807; found by SQL,
# Polars and pyarrow: 0; deleted: 0. Values up to 2**63 - 1 are found by all and deleted.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deltalake==1.6.6 polars==2.1.0 pyarrow==26.0.1
cat > "$folder/check.py" <<'PY'
import json
import sys
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable, QueryBuilder, write_deltalake


def outcome(folder: Path, ids: list[int]) -> dict[str, int | bool]:
    write_deltalake(folder, pa.table({"id": pa.array(map(Decimal, ids), pa.decimal128(20, 0))}))
    table, wanted = DeltaTable(folder), Decimal(ids[0])
    (log,) = (folder / "_delta_log").glob("*.json")
    (stats,) = (json.loads(entry["add"]["stats"]) for entry in map(json.loads, log.open()) if "add" in entry)
    predicate = f"id = CAST('{wanted}' AS DECIMAL(20, 0))"
    rows = QueryBuilder().register("t", table).execute(f"SELECT id FROM t WHERE {predicate}").read_all()
    is_id = ds.field("id") == pa.scalar(wanted, pa.decimal128(20, 0))
    polars_is_id = pl.col("id") == pl.lit(wanted, pl.Decimal(20, 0))
    return {
        "in the full scan": set(map(Decimal, ids)) == set(table.to_pyarrow_table()["id"].to_pylist()),
        "maximum in the log": stats["maxValues"]["id"],
        "found by SQL": pa.table(rows).num_rows,
        "found by Polars": pl.scan_delta(str(folder)).filter(polars_is_id).collect().height,
        "found by pyarrow": table.to_pyarrow_dataset().to_table(filter=is_id).num_rows,
        "deleted": table.delete(predicate)["num_deleted_rows"],
    }


large = outcome(Path(sys.argv[1], "large"), [2**64 - 1, 2**63 + 2])
small = outcome(Path(sys.argv[1], "small"), [2**63 - 1, 5])
print("above int64:", large)
print("within int64:", small)
sys.exit([*large.values()] != [True, 2**63 - 1, 0, 0, 0, 0] or [*small.values()] != [True, 2**63 - 1, 1, 1, 1, 1])
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
