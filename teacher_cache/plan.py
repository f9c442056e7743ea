"""`teacher-cache plan`: what a build has left to do and what it will take, without loading a model.

In: a configuration, and the cache if there is one. Out: prompts by source, rows done and left (by sample id, so
exactly what `build` would generate), tokens, bytes, hours, and whether the disk is large enough. Where the cache has
chains of a source already, lengths and bytes are measured there; else they are upper bounds or documented defaults,
and the plan says which.

`teacher-cache plan` of completions that are scored: what is left, exactly, for every token is there already.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.cache.catalog import Catalog
from stillroom.log import Progress, format_bytes, format_count, format_duration, format_plural
from stillroom.sql.session import open_cache
from stillroom.storage.paths import Location, check_reachable, matching
from teacher_cache.build import run_id_of
from teacher_cache.config import BuildConfig, RunConfig, ScoreConfig, ServerConfig
from teacher_cache.engine.api import Request
from teacher_cache.engine.teacher import IdentifiedTeacher, identify_teacher
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import LoadedPrompts, load_prompts, num_requests, requests, sampling_of
from teacher_cache.prompts.sources import LoadFailure
from teacher_cache.writer.commit import VisibleSamples
from teacher_cache.writer.recorder import last_metrics

if TYPE_CHECKING:
    from teacher_cache.engine.http.server import EndpointLook


BYTES_PER_TOKEN = 20.0
BYTES_PER_ENTRY = {"topk-u8": 1.8, "topk-f32": 7.0}
"""At most, with every support full: measured at 16 and 64 entries and a vocabulary of 129,280. Used where the cache
tells nothing.
"""
BYTES_PER_TEMPERATURE = 4.0
"""A log-partition is a float32, of which the codecs of 8-bit codes keep 23 bits."""

METRICS_FRESH_S = 3600.0
"""Workers whose last metrics are older than the newest by more than this do not count as running together."""

NUM_SHOWN = 3
"""Examples of rows that were left out, of each kind."""


@dataclass(slots=True)
class SourcePlan:
    """One source. `mean_num_tokens` is of the chains that the cache has; None where it has none."""

    source: str
    num_prompts: int = 0
    num_chains: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_left: int = 0
    num_unusable: int = 0
    mean_num_tokens: float | None = None
    tokens_left: float = 0.0


@dataclass(slots=True)
class BuildPlan:
    """The plan. `tokens_left_measured`: whether lengths of all sources come from the cache; else they are limits.

    `num_failed` samples failed before and are retried only on request; `num_unusable` will fail: the chat template
    refuses them, or they leave no room for a completion.
    """

    run_id: str
    cache: str
    num_prompts: int = 0
    num_heldout: int = 0
    num_malformed: int = 0
    num_duplicates: int = 0
    num_contaminated: int = 0
    num_chains: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_unusable: int = 0
    num_left: int = 0
    tokens_left: float = 0.0
    tokens_left_measured: bool = True
    bytes_per_token: float = 0.0
    bytes_per_token_measured: bool = False
    gb_left: float = 0.0
    tokens_per_s: float | None = None
    hours_left: float | None = None
    disk_free_gb: float | None = None
    """None where the cache lies in an object store."""
    fits: bool = True
    sources: list[SourcePlan] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    endpoints: "list[EndpointLook]" = field(default_factory=list)


def plan_build(config: BuildConfig) -> BuildPlan:
    """Raises DataError or ConfigError as `build` would before it loads the model."""
    loaded = load_prompts(config.prompts)
    teacher = identify_teacher(config.teacher, config.engine)
    plan = begin_plan(config, teacher)
    sources = {source.name: SourcePlan(source.name) for source in config.prompts.sources}
    plan.sources = list(sources.values())
    catalog = existing_catalog(config.cache)
    _count_prompts(plan, sources, loaded)
    if catalog is not None:
        measure(plan, sources, catalog, teacher.record.fingerprint)
    _count_requests(plan, sources, config, loaded, teacher, catalog)
    predict(plan, config, catalog)
    return plan


def begin_plan(config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher) -> BuildPlan:
    """A plan that counts nothing yet, with a look at the endpoints of a server engine."""
    plan = BuildPlan(run_id=run_id_of(config, teacher.record), cache=str(config.cache))
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.engine.http.server import look_at_endpoints

        plan.endpoints = look_at_endpoints(config.engine, teacher, config.capture)
    return plan


def existing_catalog(cache: Location) -> Catalog | None:
    """The cache, None where there is none yet. Raises DataError where there can be none."""
    check_reachable(cache)
    return Catalog(cache) if (cache / "chains" / "_delta_log").is_dir() else None


def max_model_len_of(plan: BuildPlan, config: RunConfig) -> int | None:
    """Tokens that a chain may take: as configured, or as the endpoints tell; None where only the model knows."""
    told = [look.max_model_len for look in plan.endpoints if look.max_model_len is not None]
    return config.engine.max_model_len or min(told, default=None)


def plan_lines(plan: BuildPlan) -> list[str]:
    """The plan for a person."""
    lines = [_source_line("source", "prompts", "chains", "done", "failed", "left", "tokens a chain")]
    for one in plan.sources:
        length = "?" if one.mean_num_tokens is None else f"{one.mean_num_tokens:.0f}"
        counts = (one.num_prompts, one.num_chains, one.num_done, one.num_failed, one.num_left)
        lines.append(_source_line(one.source, *(f"{count:,}" for count in counts), length))
    counts = (plan.num_prompts, plan.num_chains, plan.num_done, plan.num_failed, plan.num_left)
    lines += [_source_line("all", *(f"{count:,}" for count in counts), ""), ""]
    heldout = f" ({plan.num_heldout:,} held out)" if plan.num_heldout else ""
    lines.append(f"prompts  {plan.num_prompts:,}{heldout}; {_left_out(plan)}")
    lines += [f"         {example}" for example in plan.examples]
    lines += _cost_lines(plan) if plan.num_left else ["nothing is left to do"]
    return [*lines, *(f"server   {look.url} {look.told}" for look in plan.endpoints)]


def _cost_lines(plan: BuildPlan) -> list[str]:
    """Tokens, disk and time of what is left."""
    bound = "" if plan.tokens_left_measured else "at most, by max_tokens: "
    lines = [f"tokens   {bound}{format_count(plan.tokens_left)}"]
    known = "as in this cache" if plan.bytes_per_token_measured else "assumed"
    lines.append(f"disk     {format_bytes(1e9 * plan.gb_left)} ({plan.bytes_per_token:.0f} B/token, {known})")
    if plan.disk_free_gb is not None:
        lines.append(f"         {format_bytes(1e9 * plan.disk_free_gb)} free at {plan.cache}")
    if plan.hours_left is None:
        lines.append(
            "time     unknown until a build of this run has generated something: start it, stop it, plan again"
        )
    else:
        speed = f"{plan.tokens_per_s:.0f} tok/s, as the last build"
        lines.append(f"time     {format_duration(3600 * plan.hours_left)} at {speed}")
    return lines


def disk_warning(plan: BuildPlan) -> str | None:
    """What to say where the disk is too small."""
    if plan.fits or plan.disk_free_gb is None:
        return None
    bound = "" if plan.tokens_left_measured else "up to "
    return (
        f"{plan.cache} has {format_bytes(1e9 * plan.disk_free_gb)} free and the build needs {bound}"
        f"{format_bytes(1e9 * plan.gb_left)}: choose a larger disk, fewer samples or a smaller capture.max_support"
    )


def _count_prompts(plan: BuildPlan, sources: Mapping[str, SourcePlan], loaded: LoadedPrompts) -> None:
    for prompt in loaded.prompts:
        sources[prompt.source].num_prompts += 1
        plan.num_heldout += prompt.split == "heldout"
    plan.num_prompts = len(loaded.prompts)
    plan.num_malformed = len(loaded.failures)
    plan.num_duplicates = len(loaded.duplicates)
    plan.num_contaminated = len(loaded.contaminated)
    plan.examples = [
        *examples("malformed", [failure.message for failure in loaded.failures]),
        *examples("duplicate", [f"{one.where} is {one.kept}" for one in loaded.duplicates]),
        *examples("contaminated", [f"{one.where} overlaps {one.against}" for one in loaded.contaminated]),
    ]


def examples(kind: str, rows: Sequence[str]) -> list[str]:
    """The first few of the rows that were left out for one reason, and how many more there are."""
    more = [f"{kind}: and {len(rows) - NUM_SHOWN:,} more"] if len(rows) > NUM_SHOWN else []
    return [*(f"{kind}: {row}" for row in rows[:NUM_SHOWN]), *more]


def measure(plan: BuildPlan, sources: Mapping[str, SourcePlan], catalog: Catalog, teacher: str) -> None:
    """Lengths by source and bytes a token, from this run's chains, or else from those of the same teacher."""
    query = (
        "SELECT c.source, c.run_id = '{run}' AS own, avg(c.num_tokens) AS mean FROM chains c JOIN runs r USING (run_id)"
        " WHERE r.teacher_fingerprint = '{teacher}' GROUP BY ALL ORDER BY own"
    )
    with open_cache(catalog) as session:
        # Rows of this run come last and win.
        for row in session.arrow(query.format(run=plan.run_id, teacher=teacher)).to_pylist():
            if row["source"] in sources:
                sources[row["source"]].mean_num_tokens = row["mean"]
        tokens = session.arrow(f"SELECT sum(num_tokens)::BIGINT AS n FROM chains WHERE run_id = '{plan.run_id}'")
    num_tokens = tokens.column("n").to_pylist()[0]
    if num_tokens:
        own = [file for file in catalog.chains.files() if file.path.startswith(f"{plan.run_id}/")]
        plan.bytes_per_token = sum(file.size_bytes for file in own) / num_tokens
        plan.bytes_per_token_measured = True


def _count_requests(
    plan: BuildPlan,
    sources: Mapping[str, SourcePlan],
    config: BuildConfig,
    loaded: LoadedPrompts,
    teacher: IdentifiedTeacher,
    catalog: Catalog | None,
) -> None:
    visible, failed = (visible_samples(catalog, name) for name in ("chains", "failures"))
    by_name = {source.name: source for source in config.prompts.sources}
    max_model_len = max_model_len_of(plan, config)
    total = num_requests(config, loaded.prompts)
    with Progress("plan", total, "chains") as progress:
        stream = requests(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint)
        for number, request in enumerate(stream, start=1):
            name = request.source if isinstance(request, LoadFailure) else request.prompt.source
            one = sources[name]
            one.num_chains += 1
            progress.update(number, 0)
            if request.sample_id in visible:
                one.num_done += 1
            elif request.sample_id in failed:
                one.num_failed += 1
            elif isinstance(request, LoadFailure) or _room(max_model_len, request) < 1:
                one.num_unusable += 1
            else:
                one.num_left += 1
                limit = sampling_of(config.sampling, by_name[name])["max_tokens"]
                longest = min(limit, _room(max_model_len, request))
                one.tokens_left += longest if one.mean_num_tokens is None else min(longest, one.mean_num_tokens)
    add_up(plan)


def add_up(plan: BuildPlan) -> None:
    """Sums of the sources."""
    for one in plan.sources:
        plan.num_chains += one.num_chains
        plan.num_done += one.num_done
        plan.num_failed += one.num_failed
        plan.num_unusable += one.num_unusable
        plan.num_left += one.num_left
        plan.tokens_left += one.tokens_left
        plan.tokens_left_measured &= one.mean_num_tokens is not None or not one.num_left


def _room(max_model_len: int | None, request: Request) -> float:
    return float("inf") if max_model_len is None else max_model_len - len(request.prompt_token_ids)


def visible_samples(catalog: Catalog | None, name: str) -> VisibleSamples | frozenset[str]:
    """Ids of the samples of a table, `chains` or `failures`; none where there is no cache yet."""
    if catalog is None:
        return frozenset()
    samples = VisibleSamples(catalog.chains if name == "chains" else catalog.failures)
    samples.refresh()
    return samples


def predict(plan: BuildPlan, config: RunConfig, catalog: Catalog | None) -> None:
    """Bytes, hours, and whether the disk is large enough."""
    capture = config.capture
    if not plan.bytes_per_token_measured:
        num_entries = capture.max_support + capture.draws
        plan.bytes_per_token = BYTES_PER_TOKEN + BYTES_PER_ENTRY[capture.codec] * num_entries
        plan.bytes_per_token += BYTES_PER_TEMPERATURE * len(capture.temperatures)
    plan.gb_left = plan.tokens_left * plan.bytes_per_token / 1e9
    if isinstance(config.cache, Path):
        plan.disk_free_gb = shutil.disk_usage(_existing(config.cache)).free / 1e9
        plan.fits = plan.gb_left < plan.disk_free_gb
    plan.tokens_per_s = None if catalog is None else _last_speed(config.cache, plan.run_id)
    if plan.tokens_per_s:
        plan.hours_left = plan.tokens_left / plan.tokens_per_s / 3600


def _last_speed(cache: Location, run_id: str) -> float | None:
    """Tokens a second of all workers of the run that were last at work together."""
    paths = matching(cache / "runs", f"{run_id}.*.metrics.jsonl")
    lasts = [last for path in paths if (last := last_metrics(path)) is not None]
    if not lasts:
        return None
    newest_s = max(last["time"] for last in lasts)
    together = [last["tokens_per_s"] for last in lasts if newest_s - last["time"] < METRICS_FRESH_S]
    return float(sum(together)) or None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _left_out(plan: BuildPlan) -> str:
    parts = [
        f"{plan.num_malformed:,} malformed",
        format_plural(plan.num_duplicates, "duplicate"),
        f"{plan.num_contaminated:,} contaminated",
        f"{format_plural(plan.num_unusable, 'chain')} that cannot be generated",
    ]
    return ", ".join(parts)


def _source_line(source: str, *cells: str) -> str:
    return f"{source:<24}" + "".join(f"{cell:>{max(10, len(cell) + 2)}}" for cell in cells)


def plan_score(config: ScoreConfig) -> BuildPlan:
    """Reads and tokenises every completion. Raises DataError or ConfigError as `score` would before it loads the
    model.
    """
    teacher = identify_teacher(config.teacher, config.engine)
    plan = begin_plan(config, teacher)
    plan.sources = [SourcePlan(source.name) for source in config.completions.sources]
    catalog = existing_catalog(config.cache)
    sources = {one.source: one for one in plan.sources}
    if catalog is not None:
        measure(plan, sources, catalog, teacher.record.fingerprint)
    with Completions(config, teacher) as completions:
        _count(plan, sources, config, completions)
    plan.num_contaminated = len(completions.contaminated)
    overlaps = [f"{one.where} overlaps {one.against}" for one in completions.contaminated]
    plan.examples += examples("contaminated", overlaps)
    add_up(plan)
    plan.num_prompts = sum(one.num_prompts for one in plan.sources)
    plan.tokens_left_measured = True
    predict(plan, config, catalog)
    return plan


def _count(plan: BuildPlan, sources: dict[str, SourcePlan], config: ScoreConfig, completions: Completions) -> None:
    catalog = existing_catalog(config.cache)
    visible, failed = (visible_samples(catalog, name) for name in ("chains", "failures"))
    max_model_len = max_model_len_of(plan, config)
    seen: set[str] = set()
    prompts: set[str] = set()
    malformed: list[str] = []
    with Progress("plan", completions.count(), "chains") as progress:
        for number, request in enumerate(completions.requests(), start=1):
            progress.update(number, 0)
            if isinstance(request, LoadFailure):
                malformed += [request.message] if request.reason == "malformed" else []
            one = sources[request.source if isinstance(request, LoadFailure) else request.prompt.source]
            if request.sample_id in seen:
                plan.num_duplicates += 1
                continue
            seen.add(request.sample_id)
            if isinstance(request, Request) and request.prompt.prompt_id not in prompts:
                prompts.add(request.prompt.prompt_id)
                one.num_prompts += 1
                plan.num_heldout += request.prompt.split == "heldout"
            one.num_chains += 1
            if request.sample_id in visible:
                one.num_done += 1
            elif request.sample_id in failed:
                one.num_failed += 1
            elif isinstance(request, LoadFailure) or not _fits(request, max_model_len):
                one.num_unusable += 1
            else:
                one.num_left += 1
                one.tokens_left += request.max_tokens
    plan.num_malformed = len(malformed)
    plan.examples += examples("malformed", malformed)


def _fits(request: Request, max_model_len: int | None) -> bool:
    num_tokens = len(request.prompt_token_ids) + request.max_tokens
    return request.max_tokens > 0 and (max_model_len is None or num_tokens <= max_model_len)
