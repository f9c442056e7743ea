"""What the views of a cache are made on: its visible files by layout, and its runs as rows. No database."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from schemas.manifest import RunManifest
from shared.catalog import Catalog, DataFile, Table
from shared.shards import open_shard
from shared.storage import Location
from shared.views import CacheFiles, Layout

REWRITTEN = ("copied-", "mended-")
"""How the names of shards begin that another shard was made into."""
OPENED_TOGETHER = 8


def visible_files(catalog: Catalog) -> CacheFiles:
    """Every visible file by table, shards by layout, vocabularies."""

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
