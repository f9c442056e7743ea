"""`teacher-cache verify`: checks that a cache holds what was written into it and that its rows make sense.

    logs       all entries of the Delta logs exist and are readable; commit markers prove the newest
    files      every registered file exists with its size, and its SHA-256 is the one in its name
    shards     header, page checksums, decoding of all row groups, row counts, checks of every row (shard_checks)
    features   files, sets, and that every row's chain is visible with the same tokens (feature_checks)
    cache      sample ids are unique; every shard has its run's manifest and its tokenizer's vocabulary; manifests
               agree with their run ids and shards

Files that no log names are orphans: left by a crash, never read, and not an error (`teacher-cache gc` handles them).

A run id contains a hash of teacher, sampling, capture and reasoning, so changes to those in a manifest are found.
Weights, engine, prompts and software are recorded nowhere else, so changes to them are not.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from stillroom.cache.catalog import Catalog, DataFile, Table, check_hash, manifest_problem
from stillroom.cache.delta_log import broken_entries, log_problems
from stillroom.errors import CorruptError, StillroomError, first_line
from stillroom.log import Progress, format_bytes, format_plural
from stillroom.schema import FORMAT_VERSION
from stillroom.schema.manifest import RunManifest, ShardHeader, Teacher, run_id_for
from stillroom.schema.tables import FAILURE_SCHEMA, VERDICT_SCHEMA, VOCAB_SCHEMA
from stillroom.storage.paths import Location, matching, open_parquet, require_cache
from teacher_cache.maintenance.feature_checks import verify_features, verify_sets, visible_chains
from teacher_cache.maintenance.orphans import OrphanFile, find_orphans, lost_commits
from teacher_cache.maintenance.shard_checks import Damage, ShardFindings, packed, verify_shard, without_path

FORMED_ID = re.compile(r".+_[0-9a-f]{8}")
TABLES = ("chains", "verdicts", "failures")
WRITTEN_AGAIN = "running its build again writes it"


@dataclass(frozen=True, slots=True)
class Problem:
    """A file, relative to the cache, and what is wrong with it, with row and column."""

    file: str
    problem: str


@dataclass(slots=True)
class VerifyReport:
    """What was found. `num_chains`, `num_tokens` and `size_bytes` count readable shards; no version uses `orphans`,
    only older versions use `removed` files.
    """

    num_shards: int = 0
    num_chains: int = 0
    num_tokens: int = 0
    size_bytes: int = 0
    num_feature_files: int = 0
    feature_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    orphans: list[OrphanFile] = field(default_factory=list)
    removed: list[OrphanFile] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify_cache(root: Location, num_threads: int | None = None) -> VerifyReport:
    """Checks everything, `num_threads` shards at a time (None: one per core). Raises DataError if there is no cache."""
    require_cache(root)
    report = VerifyReport()
    has_features = (root / "features" / "_delta_log").is_dir()
    for name in (*TABLES, *(["features"] if has_features else [])):
        log = root / name / "_delta_log"
        # An entry that is missing explains whatever else cannot be read.
        problems = log_problems(log) or broken_entries(log)
        report.problems += [Problem(f"{name}/_delta_log", text) for text in problems]
    # Without a whole log nobody can tell which files should exist.
    if report.problems:
        return report
    try:
        catalog = Catalog(root)
    except StillroomError as error:
        report.problems.append(Problem("_delta_log", str(error)))
        return report
    findings = _verify_shards(catalog, num_threads or os.cpu_count() or 1, report)
    _verify_together(catalog, findings, report)
    report.damages += [damage for one in findings if (damage := one.damage()) is not None]
    for table, schema in ((catalog.verdicts, VERDICT_SCHEMA), (catalog.failures, FAILURE_SCHEMA)):
        for problem, damage in _verify_small(table, schema):
            report.problems.append(problem)
            report.damages += [damage] if damage is not None else []
    _verify_features(catalog, report)
    for table in catalog.tables():
        _verify_log(table, report)
    return report


def summary_of(report: VerifyReport) -> str:
    """One line for a person."""
    chains, tokens = format_plural(report.num_chains, "chain"), format_plural(report.num_tokens, "token")
    found = f"{chains}, {tokens}, {format_bytes(report.size_bytes)}"
    state = "no problems" if report.ok else format_plural(len(report.problems), "problem")
    for noun, items in (("orphan", report.orphans), ("superseded file", report.removed)):
        if items:
            state += f", {format_plural(len(items), noun)} ({format_bytes(sum(one.size_bytes for one in items))})"
    if report.num_feature_files:
        found += (
            f", {format_plural(report.num_feature_files, 'file')} of features ({format_bytes(report.feature_bytes)})"
        )
    return f"{format_plural(report.num_shards, 'shard')}, {found}: {state}"


def _verify_features(catalog: Catalog, report: VerifyReport) -> None:
    if catalog.features is None:
        return
    files = catalog.features.files()
    report.num_feature_files, report.feature_bytes = len(files), sum(file.size_bytes for file in files)
    # Damaged chains would accuse sound features, and so would the chains of when the command began: some are newer.
    is_damaged = any(one.file.startswith("chains/") for one in report.problems)
    chains = None if is_damaged else visible_chains(Catalog(catalog.root))
    report.problems += [Problem(file, problem) for file, problem in verify_sets(catalog)]
    for name, problems, damage in verify_features(catalog, chains):
        report.problems += [Problem(name, problem) for problem in problems]
        report.damages += [] if damage is None else [damage]


def _verify_log(table: Table, report: VerifyReport) -> None:
    """The log against commit markers and against the files on disk."""
    try:
        problems = lost_commits(table)
        orphans = find_orphans(table)
    except StillroomError as error:
        report.problems.append(Problem(f"{table.folder.name}/_delta_log", str(error)))
        return
    report.problems += [Problem(f"{table.folder.name}/_delta_log", problem) for problem in problems]
    report.removed += [one for one in orphans if one.kind == "removed"]
    report.orphans += [one for one in orphans if one.kind != "removed"]


def _verify_shards(catalog: Catalog, num_threads: int, report: VerifyReport) -> list[ShardFindings]:
    files = catalog.chains.files()
    findings: list[ShardFindings] = []
    with ThreadPoolExecutor(num_threads) as pool, Progress("verify", len(files), "shards") as progress:
        for one in pool.map(lambda file: verify_shard(catalog.chains, file), files):
            findings.append(one)
            report.num_shards += 1
            report.num_chains += one.num_chains
            report.num_tokens += one.num_tokens
            report.size_bytes += one.file.size_bytes
            report.problems += [Problem(f"chains/{one.file.path}", problem) for problem in one.problems]
            progress.update(report.num_shards, report.num_tokens, {"": format_plural(len(report.problems), "problem")})
    return findings


def _verify_together(catalog: Catalog, findings: list[ShardFindings], report: VerifyReport) -> None:
    report.problems += _duplicates(findings)
    headers = [one.header for one in findings if one.header is not None]
    sound = [one.header for one in findings if one.header is not None and not one.problems]
    report.problems += [Problem(file, problem) for file, problem in _verify_runs(catalog, headers, sound)]
    for fingerprint in sorted({header.tokenizer_fingerprint for header in headers}):
        report.problems += _verify_vocab(catalog, fingerprint)


def _duplicates(findings: list[ShardFindings]) -> Iterator[Problem]:
    """Rows whose sample id an earlier row has."""
    ids = np.concatenate([one.sample_ids for one in findings]) if findings else packed([])
    # return_index is the first occurrence: of equal rows the earliest stays and the others are surplus.
    _, first = np.unique(ids, return_index=True)
    repeated = np.ones(len(ids), bool)
    repeated[first] = False
    ends = np.cumsum([len(one.sample_ids) for one in findings])
    for place in np.flatnonzero(repeated):
        shard = int(np.searchsorted(ends, place, side="right"))
        row = int(place) - (int(ends[shard - 1]) if shard else 0)
        sample_id = bytes(ids[place]).hex()
        findings[shard].repeated[sample_id] += 1
        problem = f"row {row}, column sample_id: {sample_id} is visible more than once"
        yield Problem(f"chains/{findings[shard].file.path}", problem)


def _verify_vocab(catalog: Catalog, fingerprint: str) -> Iterator[Problem]:
    path = catalog.vocab_path(fingerprint)
    name = f"vocab/{path.name}"
    if not path.exists():
        yield Problem(name, f"is missing, so tokens have no text in SQL: {WRITTEN_AGAIN}")
        return
    try:
        with open_parquet(path) as file:
            schema = file.read().schema
    except (pa.ArrowException, OSError) as error:
        yield Problem(name, f"is not a readable Parquet file: remove it, and {WRITTEN_AGAIN} ({first_line(error)})")
        return
    if not schema.equals(VOCAB_SCHEMA):
        yield Problem(name, f"schema is not token_id, piece, is_special: remove it, and {WRITTEN_AGAIN}")


def _verify_small(table: Table, schema: pa.Schema) -> Iterator[tuple[Problem, Damage | None]]:
    """Files of the verdicts or failures table: hash, schema, rows."""
    for file in table.files():
        try:
            problem = _small_problem(table.path_of(file), file, schema)
        except CorruptError as error:
            problem = without_path(str(error), table.path_of(file))
        except StillroomError as error:
            # A disk or store that cannot be read says nothing about the bytes: nothing to quarantine.
            yield Problem(f"{table.folder.name}/{file.path}", without_path(str(error), table.path_of(file))), None
            continue
        if problem is not None:
            found = Problem(f"{table.folder.name}/{file.path}", problem)
            yield found, Damage(table.folder.name, file, [problem])


def _small_problem(path: Location, file: DataFile, schema: pa.Schema) -> str | None:
    check_hash(path)
    try:
        with open_parquet(path) as opened:
            content = opened.read()
    except (pa.ArrowException, OSError) as error:
        return f"is not a readable Parquet file: {first_line(error)}"
    if not _has_columns(content.schema, schema):
        return "schema does not match the table"
    if content.num_rows != file.num_rows:
        return f"has {content.num_rows} rows, but {file.num_rows} were registered"
    return None


def _has_columns(found: pa.Schema, schema: pa.Schema) -> bool:
    """Whether a file has its table's columns; nullable ones that later versions added may be missing at the end."""
    # Files are never rewritten when a column is added to the format.
    missing = schema.names[len(found) :]
    return found.equals(pa.schema(list(schema)[: len(found)])) and all(schema.field(name).nullable for name in missing)


def _verify_runs(
    catalog: Catalog, headers: Sequence[ShardHeader], sound: Sequence[ShardHeader]
) -> Iterator[tuple[str, str]]:
    """Yields file and problem. `headers` are those of all readable shards, `sound` those of shards without problems."""
    paths = {path.name.removesuffix(".json"): path for path in matching(catalog.root / "runs", "*.json")}
    for run_id in sorted({header.run_id for header in headers} - set(paths)):
        num_shards = sum(header.run_id == run_id for header in headers)
        yield (
            f"runs/{run_id}.json",
            f"is missing, although the run has {format_plural(num_shards, 'shard')}: {WRITTEN_AGAIN}",
        )
    for run_id, path in sorted(paths.items()):
        # Only sound shards are witnesses: a damaged header must not accuse a manifest.
        problem = _problem_of(run_id, path, [header for header in sound if header.run_id == run_id])
        if problem is not None:
            yield f"runs/{path.name}", f"{problem}: restore it from a copy, or remove it, and {WRITTEN_AGAIN}"


def _problem_of(run_id: str, path: Location, headers: Sequence[ShardHeader]) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run = RunManifest.model_validate(content)
    except ValueError as error:
        return f"is not a run manifest ({manifest_problem(error)})"
    # A changed name of a key would otherwise pass as an optional key that is absent.
    unknown = [*_unknown(content, RunManifest.model_fields), *_unknown(content["teacher"], Teacher.model_fields)]
    if unknown and run.format_version <= FORMAT_VERSION:
        return f"has the unknown key {unknown[0]!r}"
    if run.run_id != run_id:
        return f"is that of run {run.run_id}"
    settings = (run.sampling, run.capture, run.reasoning, run.chat_template_kwargs)
    meant = run_id_for(run.name, run.kind, run.teacher.fingerprint, *settings)
    # The id is a hash of the settings, so it also tells whether they were edited later.
    if FORMED_ID.fullmatch(run_id) and run.format_version <= FORMAT_VERSION and meant != run_id:
        return f"was changed: its name, teacher and settings make the run id {meant}, not {run_id}"
    return _difference(run.teacher, headers)


def _unknown(content: Mapping[str, object], fields: Mapping[str, object]) -> list[str]:
    return sorted(set(content) - set(fields))


def _difference(teacher: Teacher, headers: Sequence[ShardHeader]) -> str | None:
    """A property of the teacher in which the manifest disagrees with its shards' headers."""
    said: list[tuple[str, str, set[str]]] = [
        ("fingerprint", teacher.fingerprint, {one.teacher_fingerprint for one in headers}),
        ("tokenizer_fingerprint", teacher.tokenizer_fingerprint, {one.tokenizer_fingerprint for one in headers}),
        ("template_fingerprint", teacher.template_fingerprint, {one.template_fingerprint for one in headers}),
        ("vocab_size", str(teacher.vocab_size), {str(one.vocab_size) for one in headers}),
    ]
    for key, value, found in said:
        if found and value not in found:
            return f"has teacher.{key} {value}, but its shards' headers have {', '.join(sorted(found))}"
    return None
