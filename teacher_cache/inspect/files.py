"""`teacher-cache files`: which files a table consists of at a version, for readers that do not know Delta's log.

Reading the folder instead would also return removed rows, orphans of crashed builds, and the log itself.
"""

from pydantic import BaseModel, ConfigDict, Field

from stillroom.cache.catalog import Catalog, Table
from stillroom.errors import ConfigError
from stillroom.storage.paths import Location

TABLES = ("chains", "verdicts", "failures", "features")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class VisibleFile(_Record):
    """One Parquet file."""

    path: str = Field(description="absolute path, or address in the object store")
    size_bytes: int
    num_rows: int


class VisibleFiles(_Record):
    """The files of a table at a version, ordered by path."""

    table: str
    version: int
    files: list[VisibleFile]


def list_files(cache: Location, table: str = "chains", version: int | None = None) -> VisibleFiles:
    """Reads the log only. Raises ConfigError for another table, DataError for a version that does not exist."""
    if table not in TABLES:
        raise ConfigError(f"--table {table} is unknown: choose one of {', '.join(TABLES)}")
    catalog = Catalog(cache)
    found = next((one for one in catalog.tables() if one.folder.name == table), None)
    if found is None:
        raise ConfigError(f"--table {table}: {cache} has no features (teacher-cache features CONFIG adds them)")
    if version is not None:
        found = Table(found.folder, version)
    files = [
        VisibleFile(path=str(found.path_of(file).absolute()), size_bytes=file.size_bytes, num_rows=file.num_rows)
        for file in found.files()
    ]
    return VisibleFiles(table=table, version=found.version, files=files)
