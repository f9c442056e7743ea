"""A teacher's reasoning chains with the probabilities of every token, as one reads them from Python.

    import stillroom

    cache = stillroom.open_cache("s3://b/r1", chains_version=7)
    cache.sql("SELECT source, avg(num_tokens) AS tokens FROM chains GROUP BY source").df()
    ids_TK, logprobs_TK = cache.sample("3fa1").dense()
    for sample in cache.samples(where="split = 'train' and correct"):
        ...

Reading needs the base install only, without torch; `df()` and `pl()` need the extra `notebook`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.errors import CacheConflict, ConfigError, CorruptError, DataError, StillroomError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

    from stillroom.cache.reader import Cache
    from stillroom.storage.objects import ObjectPath

__all__ = [
    "CacheConflict",
    "ConfigError",
    "CorruptError",
    "DataError",
    "StillroomError",
    "__version__",
    "open_cache",
    "topk",
]

# Not read from the installed metadata, which takes longer to import than the rest of this module.
__version__ = "0.1.0"


def open_cache(
    root: str | Path | ObjectPath,
    chains_version: int | None = None,
    verdicts_version: int | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Cache:
    """Opens a cache: a folder, or s3://, gs:// or az://BUCKET/PREFIX; at its latest version, or at pinned ones.

    `files` are CSV, Parquet, JSON or Arrow files of your own, by the name of their table in SQL.
    Raises DataError if there is none or its store refuses access, StillroomError if the store cannot be reached.
    """
    # Imported here because pyarrow, deltalake and DuckDB take half a second.
    from stillroom.cache.reader import open_cache

    return open_cache(root, chains_version, verdicts_version, files)


def topk(chains: pa.Table | pa.RecordBatch) -> pa.Table:
    """Candidates with probabilities of chains that another program read, as in the SQL view `topk`.

    The same as `stillroom.arrow.topk`, which documents columns and errors. Needs numpy and pyarrow only.
    """
    from stillroom.arrow import topk

    return topk(chains)
