"""Verdicts on chains that left the cache: the next build may give their samples other answers."""

import pyarrow as pa

from stillroom.cache.catalog import Catalog
from teacher_cache.maintenance.replacing import keep_rows
from teacher_cache.writer.commit import VisibleSamples, read_sample_ids


def drop_chainless_verdicts(
    catalog: Catalog, *, dry_run: bool = False, without_run: str | None = None
) -> dict[str, int]:
    """Removes verdicts on samples without a visible chain; returns their number by file.

    Files stay on disk for older versions. `without_run`: as if that run's files were gone, for a dry run.
    Raises CorruptError naming a damaged file.
    """
    table, chains = catalog.verdicts, VisibleSamples(catalog.chains)
    # Before the chains are read: a build commits a chain before its verdict, so this one's chain is seen below.
    table.refresh()
    files = [file for file in table.files() if not file.path.startswith(f"{without_run}/")]
    catalog.chains.refresh()
    for file in catalog.chains.files() if files else ():
        if not file.path.startswith(f"{without_run}/"):
            chains.add(file.path, read_sample_ids(catalog.chains.path_of(file)))

    def has_chain(rows: pa.Table) -> list[bool]:
        return [sample_id in chains for sample_id in rows.column("sample_id").to_pylist()]

    dropped: dict[str, int] = {}
    for file in files:
        found = [sample_id in chains for sample_id in read_sample_ids(table.path_of(file))]
        if not all(found):
            dropped[f"verdicts/{file.path}"] = found.count(False)
            if not dry_run:
                keep_rows(catalog.root, table, file, has_chain if any(found) else None)
    return dropped
