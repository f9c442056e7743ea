"""Run manifests against their names, their own hash, and the headers of the shards they speak of.

A run id is made of a hash of what the run means, so that a changed teacher, sampling, capture or reasoning shows.
Which weights, engine, prompts and software it was is said nowhere else, so a change there is not found.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from schemas import FORMAT_VERSION
from schemas.manifest import RunManifest, ShardHeader, Teacher, run_id_for
from shared.catalog import Catalog, manifest_problem
from shared.log import format_plural
from shared.storage import Location, matching

FORMED_ID = re.compile(r".+_[0-9a-f]{8}")
WRITTEN_AGAIN = "the build with its configuration writes it again"


def verify_runs(
    catalog: Catalog, headers: Sequence[ShardHeader], sound: Sequence[ShardHeader]
) -> Iterator[tuple[str, str]]:
    """File and problem. `headers` are of all shards that have one, `sound` of those with which nothing is wrong."""
    paths = {path.name.removesuffix(".json"): path for path in matching(catalog.root / "runs", "*.json")}
    for run_id in sorted({header.run_id for header in headers} - set(paths)):
        num_shards = sum(header.run_id == run_id for header in headers)
        yield (
            f"runs/{run_id}.json",
            f"is missing, {format_plural(num_shards, 'shard')} of it are there: {WRITTEN_AGAIN}",
        )
    for run_id, path in sorted(paths.items()):
        problem = _problem_of(run_id, path, [header for header in sound if header.run_id == run_id])
        if problem is not None:
            yield f"runs/{path.name}", f"{problem}: restore it from a copy, or remove it and {WRITTEN_AGAIN}"


def _problem_of(run_id: str, path: Location, headers: Sequence[ShardHeader]) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run = RunManifest.model_validate(content)
    except ValueError as error:
        return f"is not a run manifest ({manifest_problem(error)})"
    unknown = [*_unknown(content, RunManifest.model_fields), *_unknown(content["teacher"], Teacher.model_fields)]
    if unknown and run.format_version <= FORMAT_VERSION:
        return f"has the unknown key {unknown[0]!r}"
    if run.run_id != run_id:
        return f"says that it is run {run.run_id}"
    meant = run_id_for(run.name, run.kind, run.teacher.fingerprint, run.sampling, run.capture, run.reasoning)
    if FORMED_ID.fullmatch(run_id) and run.format_version <= FORMAT_VERSION and meant != run_id:
        return (
            f"is not what was written: its name, teacher, sampling, capture and reasoning make the run id {meant}, "
            f"not {run_id}"
        )
    return _difference(run.teacher, headers)


def _unknown(content: Mapping[str, object], fields: Mapping[str, object]) -> list[str]:
    return sorted(set(content) - set(fields))


def _difference(teacher: Teacher, headers: Sequence[ShardHeader]) -> str | None:
    """What the manifest says of its teacher and no header of its shards does."""
    said: list[tuple[str, str, set[str]]] = [
        ("fingerprint", teacher.fingerprint, {one.teacher_fingerprint for one in headers}),
        ("tokenizer_fingerprint", teacher.tokenizer_fingerprint, {one.tokenizer_fingerprint for one in headers}),
        ("template_fingerprint", teacher.template_fingerprint, {one.template_fingerprint for one in headers}),
        ("vocab_size", str(teacher.vocab_size), {str(one.vocab_size) for one in headers}),
    ]
    for key, value, found in said:
        if found and value not in found:
            return f"says teacher.{key} {value}, the headers of its shards say {', '.join(sorted(found))}"
    return None
