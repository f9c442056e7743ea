"""`teacher-cache recode CACHE DEST --codec NAME`: a cache anew in another codec.

In: a cache. Out: another with the same chains, verdicts, failures, manifests and vocabularies, whose distributions are
stored differently. Crash-safe and resumable as `copy` is, whose commit protocol it uses; one row group is in memory.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import FORMAT_VERSION
from schemas.manifest import SHARD_METADATA_KEY, ShardHeader
from schemas.tables import CODECS, chain_schema
from shared.catalog import Catalog
from shared.codec import check_codec
from shared.errors import ConfigError
from shared.recode import recode_columns
from shared.shards import open_shard, read_row_group
from shared.storage import Location
from teacher_cache.care.copy_cache import CopyReport, copy_caches
from teacher_cache.shard import parquet_options

EXACT = "topk-f32"


def recode_cache(source: Location, dest: Location, codec: str, *, lossy: bool = False) -> CopyReport:
    """Writes what `source` shows to `dest` with every shard in `codec`.

    Raises ConfigError for an unknown codec, where nothing would be gained, and where exact numbers would be rounded
    unless `lossy`; otherwise as `copy_caches`.
    """
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r} is unknown: choose one of {', '.join(sorted({*CODECS} - {EXACT}))}")
    check_codec(codec)
    _check_gain(_codecs(Catalog(source)), source, codec, lossy=lossy)

    def recode(copied: Path, temp: Path) -> None:
        recode_shard(copied, temp, codec)

    return copy_caches([source], dest, recode)


def recode_shard(path: Path, temp: Path, codec: str) -> None:
    """Writes the shard at `path` to `temp` in another codec, row group by row group; all but the signals is kept.

    Raises CorruptError naming row group, row and column where the shard is damaged.
    """
    file, old = open_shard(path)
    new = old.model_copy(update={"codec": codec, "format_version": FORMAT_VERSION})
    schema = chain_schema(codec).with_metadata({SHARD_METADATA_KEY: new.model_dump_json()})
    with file, pq.ParquetWriter(temp, schema, **parquet_options(schema, new.vocab_size)) as writer:
        for index in range(file.num_row_groups):
            table = read_row_group(file, index, file.schema_arrow.names, str(path))
            writer.write_table(_recoded(table, old, codec, schema, f"{path}: row group {index}"))


def _recoded(table: pa.Table, header: ShardHeader, codec: str, schema: pa.Schema, where: str) -> pa.Table:
    coded = table if header.codec == codec and header.format_version == FORMAT_VERSION else None
    if coded is not None:
        return coded.select(schema.names).cast(schema)
    columns = recode_columns(table, header, codec, where)
    return pa.table({name: columns[name] if name in columns else table.column(name) for name in schema.names}, schema)


def _codecs(catalog: Catalog) -> Sequence[str]:
    found = set()
    for data_file in catalog.chains.files():
        file, header = open_shard(catalog.chains.path_of(data_file))
        file.close()
        found.add(header.codec)
    return sorted(found)


def _check_gain(codecs: Sequence[str], source: Location, codec: str, *, lossy: bool) -> None:
    if not set(codecs) - {codec}:
        stored = f"is stored as {codec} already" if codecs else "holds no chain"
        raise ConfigError(f"{source} {stored}: teacher-cache copy copies it")
    if EXACT in codecs and codec != EXACT and not lossy:
        raise ConfigError(
            f"{source} holds exact distributions ({EXACT}), which {codec} rounds to 8-bit codes: add --lossy to go on"
        )
    if codec == EXACT:
        raise ConfigError(
            f"{source} holds 8-bit codes ({', '.join(sorted(set(codecs) - {EXACT}))}), and {EXACT} promises what the "
            "teacher said, exactly: recoding would take three times the bytes and win no precision back; a build with "
            f"capture.codec={EXACT} writes exact distributions"
        )
