"""Columns that SQL selects chains by, read once with their page checksums before a selection is frozen.

DuckDB reads Parquet without verifying checksums, so a changed byte in `split` could bring a held-out chain into
training without a word. What training itself reads (tokens, distributions) is verified whenever it is read.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from schemas.tables import CHAIN_FIELDS
from shared.catalog import Catalog, DataFile, check_hash
from shared.shards import open_shard, read_row_group

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


def check_filter_columns(catalog: Catalog, condition: str) -> None:
    """Verifies what a SQL `condition` over `chains` can depend on: small columns, named large ones, verdicts.

    Raises CorruptError naming the shard and row group, or the file of verdicts, that is damaged.
    """
    words = set(re.findall(r"\w+", condition.lower()))
    small = [field.name for field in CHAIN_FIELDS if not pa.types.is_list(field.type) and field.name not in LARGE]
    columns = [*small, *(name for name, names in LARGE.items() if words.intersection(names))]

    def check_shard(file: DataFile) -> None:
        path = catalog.chains.path_of(file)
        shard, _ = open_shard(path)
        with shard:
            for group in range(shard.num_row_groups):
                read_row_group(shard, group, columns, str(path))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Lists, so that the first error is raised here.
        list(pool.map(check_shard, catalog.chains.files()))
        list(pool.map(check_hash, map(catalog.verdicts.path_of, catalog.verdicts.files())))
