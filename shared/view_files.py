"""What the views of a cache are made on: its visible files by layout, and its runs as rows. No database."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from schemas.manifest import RunManifest
from shared.catalog import Catalog, DataFile, Table, check_hash
from shared.errors import CorruptError
from shared.shards import open_shard
from shared.storage import Location
from shared.views import CacheFiles, Layout

REWRITTEN = ("copied-", "mended-")
"""How the names of shards begin that another shard was made into."""
OPENED_TOGETHER = 8
HASHED_BYTES = 64 * 2**20
"""Verdict files are hashed for every session up to this much in all: a fraction of a second."""


def visible_files(catalog: Catalog) -> CacheFiles:
    """Every visible file by table, shards by layout, vocabularies. Raises CorruptError as `require_sound` does."""
    require_sound(catalog)

    def visible(table: Table) -> list[str]:
        return [str(table.path_of(file).absolute()) for file in table.files()]

    by_layout: dict[Layout, list[str]] = {}
    codecs: dict[str, set[str]] = {}
    for layout, files in _alike(catalog):
        by_layout.setdefault(layout, []).extend(str(catalog.chains.path_of(file).absolute()) for file in files)
        codecs.setdefault(_run_of(files[0]), set()).add(layout[0])
    return CacheFiles(
        chains=by_layout,
        verdicts=visible(catalog.verdicts),
        failures=visible(catalog.failures),
        vocab=[str(path.absolute()) for path in catalog.vocab_paths()],
        codecs={run_id: ", ".join(sorted(names)) for run_id, names in codecs.items()},
    )


def require_sound(catalog: Catalog) -> None:
    """Raises CorruptError where a registered file is missing or has another size, or a verdict file another hash.

    Of a cache on a disk: in an object store each question is a request, and a query says what it did not find.
    """
    if not isinstance(catalog.root, Path):
        return
    remedy = f"teacher-cache verify {catalog.root} --quarantine"
    for table in (catalog.chains, catalog.verdicts, catalog.failures):
        for file in table.files():
            path = table.path_of(file)
            if not path.exists():
                raise CorruptError(f"{path} is registered but missing: {remedy}")
            size_bytes = path.stat().st_size
            if size_bytes != file.size_bytes:
                raise CorruptError(f"{path} has {size_bytes} bytes, {file.size_bytes} were registered: {remedy}")
    left_bytes = HASHED_BYTES
    for file in catalog.verdicts.files():
        left_bytes -= file.size_bytes
        if left_bytes < 0:
            return
        try:
            check_hash(catalog.verdicts.path_of(file))
        except CorruptError as error:
            raise CorruptError(f"{error}: {remedy}") from error


def run_rows(runs: Mapping[str, RunManifest], codecs: Mapping[str, str]) -> Iterator[list[Any]]:
    """Rows of the table `runs`; `codecs` says what a run's shards are in now, which `recode` may have changed."""
    for run in runs.values():
        dumped = run.model_dump(mode="json")
        yield [
            run.run_id,
            run.name,
            run.kind,
            run.created_at,
            run.teacher.model,
            run.teacher.fingerprint,
            run.teacher.tokenizer_fingerprint,
            codecs.get(run.run_id, run.capture.get("codec")),
            *(
                json.dumps(dumped[key], sort_keys=True)
                for key in ("sampling", "capture", "engine", "prompts", "software")
            ),
        ]


def _alike(catalog: Catalog) -> list[tuple[Layout, list[DataFile]]]:
    """Shards that have one layout. All that a run's build wrote are alike, so one of them is opened; `recode` gives a
    run's shards another, and `copy` and `verify --quarantine` keep it, so each of theirs is.
    """
    alike: dict[str, list[DataFile]] = {}
    for file in catalog.chains.files():
        is_rewritten = file.path.rpartition("/")[2].startswith(REWRITTEN)
        alike.setdefault(file.path if is_rewritten else _run_of(file), []).append(file)
    firsts = [catalog.chains.path_of(files[0]) for files in alike.values()]
    with ThreadPoolExecutor(OPENED_TOGETHER) as pool:
        layouts = list(pool.map(_layout_of, firsts))
    return list(zip(layouts, alike.values(), strict=True))


def _run_of(file: DataFile) -> str:
    return file.path.partition("/")[0]


def _layout_of(path: Location) -> Layout:
    file, header = open_shard(path)
    file.close()
    return header.codec, header.format_version
