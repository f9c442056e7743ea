"""Columns that SQL selects chains by, read once with their page checksums before a selection is frozen.

DuckDB reads Parquet without verifying checksums, so a changed byte in `split` could bring a held-out chain into
training without a word. What training itself reads (tokens, distributions) is verified whenever it is read.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from schemas.manifest import ShardHeader
from schemas.records import Int64
from schemas.tables import CHAIN_FIELDS
from shared.catalog import Catalog, DataFile, check_hash
from shared.shards import open_shard, read_row_group

CHECKED_TOGETHER = 16
"""Shards are read so many at a time: on distant storage each row group costs a round trip."""

LARGE = {
    "messages": ("messages", "prompt"),
    "prompt_token_ids": ("prompt_token_ids",),
    "metadata": ("metadata",),
    "reference": ("reference",),
    "text": ("text",),
    "reasoning": ("reasoning",),
    "answer": ("answer",),
}
"""Columns of text, verified only where the condition names them, and the names that SQL has for each."""


@dataclass(frozen=True, slots=True)
class ShardFooter:
    """What a shard's footer says: its header, and the number of the first row of each of its row groups, int64 [G]."""

    header: ShardHeader
    first_rows_G: Int64


def check_filter_columns(catalog: Catalog, condition: str) -> dict[str, ShardFooter]:
    """Verifies what a SQL `condition` over `chains` can depend on: small columns, named large ones, verdicts.

    Returns the footers that were read for it, by the shard's path below `chains`. Raises CorruptError naming the shard
    and row group, or the file of verdicts, that is damaged.
    """
    words = set(re.findall(r"\w+", condition.lower()))
    small = [field.name for field in CHAIN_FIELDS if not pa.types.is_list(field.type) and field.name not in LARGE]
    columns = [*small, *(name for name, names in LARGE.items() if words.intersection(names))]

    def check_shard(file: DataFile) -> ShardFooter:
        path = catalog.chains.path_of(file)
        shard, header = open_shard(path)
        with shard:
            sizes_G = [
                read_row_group(shard, group, columns, str(path)).num_rows for group in range(shard.num_row_groups)
            ]
        return ShardFooter(header, np.cumsum(sizes_G, dtype=np.int64) - np.array(sizes_G, np.int64))

    files = catalog.chains.files()
    with ThreadPoolExecutor(CHECKED_TOGETHER) as pool:
        verdicts = pool.map(check_hash, map(catalog.verdicts.path_of, catalog.verdicts.files()))
        footers = dict(zip([file.path for file in files], pool.map(check_shard, files), strict=True))
        # A list, so that the first error is raised here.
        list(verdicts)
    return footers
