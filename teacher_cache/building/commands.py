"""`teacher-cache build` and `score`: a configuration becomes requests, an engine and one worker's build."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from stillroom.cache.features import SETS_FOLDER
from stillroom.errors import ConfigError
from stillroom.log import format_plural, note, warn
from stillroom.schema.records import Prompt
from stillroom.storage.paths import Location, matching
from teacher_cache.building.build import Build
from teacher_cache.building.result import BuildResult
from teacher_cache.building.until import JoinedPrompts, require_judged
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.api import Engine, Failure, Request
from teacher_cache.engine.shared import SharedEngine
from teacher_cache.engine.start import check_values, start_engine
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.judging.queue import require_judges
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.prompts import (
    WHOLE,
    LoadedPrompts,
    Part,
    RequestMaker,
    WorkerShare,
    heldout_problem,
    load_prompts,
    num_requests,
    part_name,
    requests,
    samples_by_source,
)
from teacher_cache.scrub.counts import counted, total_of
from teacher_cache.scrub.rows import Scrubber
from teacher_cache.scrub.settings import scrubber_of, warn_of_unscrubbed
from teacher_cache.workers.joining import PART_CHAINS, Wait, of_prompts, of_sources, worker_name
from teacher_cache.workers.leases import workers_of

TYPICAL_LENGTH_FRAC = 0.5
"""Typical length of a chain as a fraction of max_tokens; the demo's chains have 0.48. Decides whether to compile."""


def build_cache(config: BuildConfig, share: WorkerShare | None, *, retry_failures: bool) -> BuildResult:
    """Generates the missing chains of this worker's share; None joins all workers that have none, by lease.

    Raises StillroomError for everything a user can fix.
    """
    check_values(config)
    scrubber = scrubber_of(config)
    loaded = load_prompts(config.prompts, scrubber)
    _note_loaded(loaded)
    if (problem := heldout_problem(config.prompts, loaded.prompts)) is not None:
        note(problem)
    if loaded.unanswered:
        raise ConfigError(
            f"{format_plural(loaded.unanswered.total(), 'variant')} of prompts.augment still need the teacher: run "
            "teacher-cache augment with this configuration first"
        )
    warn_of_unscrubbed(config)
    return build_loaded(config, loaded, share, scrubber, retry_failures=retry_failures)


def build_loaded(
    config: BuildConfig,
    loaded: LoadedPrompts,
    share: WorkerShare | None,
    scrubber: Scrubber | None,
    *,
    retry_failures: bool,
    shared: SharedEngine | None = None,
) -> BuildResult:
    """`build_cache` for prompts that are read already; config.prompts says how they are sampled. Builds in a row with
    equal settings may share an engine.
    """
    require_judges(loaded.prompts)
    if config.sampling.until is not None:
        require_judged(loaded.prompts)
    teacher = identify_teacher(config.teacher, config.engine)
    with contextlib.closing(Build(config, teacher, worker_name(share), scrubber)) as build:
        # Malformed rows belong to no share: the first worker records them.
        failures = loaded.failures if share is None or share.index == 0 else []
        num_total = num_requests(config, loaded.prompts, share or WHOLE) + len(failures)

        # A function, because an engine is loaded only if something is left to do.
        def start() -> Engine:
            longest = min(config.sampling.max_tokens, config.engine.max_model_len or config.sampling.max_tokens)
            tokens_left = build.num_left(num_total) * longest * TYPICAL_LENGTH_FRAC
            loading = functools.partial(start_engine, config, teacher, tokens_left)
            return loading() if shared is None else shared.start(loading)

        if share is None:
            return _join(build, config, loaded.prompts, failures, num_total, start, retry_failures=retry_failures)
        warn_of_joined(config.cache)
        until = None
        wanted: Iterable[Request | Failure | Wait]
        if config.sampling.until is None:
            wanted = requests(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint, share)
        else:
            until = build.until(loaded.prompts, share, retry_failures=retry_failures)
            wanted, num_total = until.requests(), until.num_total + len(failures)
        stream = itertools.chain(failures, wanted)
        return build.run(stream, num_total, start, retry_failures=retry_failures, until=until)


def _join(
    build: Build,
    config: BuildConfig,
    prompts: Sequence[Prompt],
    failures: Sequence[Failure],
    num_total: int,
    start: Callable[[], Engine],
    *,
    retry_failures: bool,
) -> BuildResult:
    if config.sampling.until is not None:
        joined = JoinedPrompts(config, build.catalog, prompts, failures, build.teacher)
        return build.join_prompts(joined, start, retry_failures=retry_failures)
    maker = RequestMaker(config, prompts, build.teacher.tokenizer, build.teacher.record.fingerprint)
    samples = samples_by_source(config)
    wanted = of_prompts({prompt.prompt_id: samples[prompt.source] for prompt in prompts})
    parts = functools.partial(_parts, maker, failures)
    return build.join(parts, num_total, start, wanted, retry_failures=retry_failures)


def score_cache(config: ScoreConfig, share: WorkerShare | None, *, retry_failures: bool) -> BuildResult:
    """Scores the remaining completions of this share; None joins. Raises StillroomError for everything a user can
    fix.
    """
    check_values(config)
    teacher, scrubber = identify_teacher(config.teacher, config.engine), scrubber_of(config)
    warn_of_unscrubbed(config)
    with Completions(config, teacher, scrubber) as completions:
        num_total = completions.count(share or WHOLE)
        note(format_plural(num_total, "completion"))
        require_judges(Prompt(kind, (), "", "", metadata={"judge": kind}) for kind in completions.judges())
        with contextlib.closing(Build(config, teacher, worker_name(share), scrubber)) as build:
            start = functools.partial(start_engine, config, teacher)
            if share is None:
                parts = functools.partial(completions.parts, PART_CHAINS)
                wanted = of_sources(one.name for one in config.completions.sources)
                result = build.join(parts, num_total, start, wanted, retry_failures=retry_failures)
            else:
                warn_of_joined(config.cache)
                result = build.run(completions.requests(share), num_total, start, retry_failures=retry_failures)
        if completions.contaminated:
            num = format_plural(len(completions.contaminated), "completion")
            note(f"{num} skipped: their prompts overlap the evaluation set")
        return result


def _parts(maker: RequestMaker, failures: Sequence[Failure]) -> Iterator[Part]:
    """All of a build in the order in which one worker would do it."""
    if failures:
        yield part_name(0, (one.sample_id for one in failures)), lambda: failures
    for sample_index, batch in maker.batches(PART_CHAINS):
        name = part_name(sample_index, (prompt.prompt_id for prompt in batch))
        yield name, lambda sample_index=sample_index, batch=batch: [*maker.requests(sample_index, batch)]  # type: ignore[misc]


def _note_loaded(loaded: LoadedPrompts) -> None:
    note(format_plural(len(loaded.prompts), "prompt"))
    if loaded.failures:
        rows, first = format_plural(len(loaded.failures), "malformed row"), loaded.failures[0].message
        note(f"{rows} will be recorded as failures; the first: {first}")
    if scrubbed := total_of(one.metadata for one in loaded.prompts):
        note(f"replaced personal data in prompts: {counted(scrubbed)}")
    if loaded.duplicates:
        twins, twin = format_plural(len(loaded.duplicates), "duplicate"), loaded.duplicates[0]
        note(f"{twins} skipped; the first: {twin}")
    if loaded.near_duplicates:
        alike, near = format_plural(len(loaded.near_duplicates), "near-duplicate"), loaded.near_duplicates[0]
        note(f"{alike} skipped; the first: {near}")
    if loaded.variants:
        kinds = ", ".join(f"{num:,} {kind}" for kind, num in sorted(loaded.variants.items()))
        note(f"including {format_plural(loaded.variants.total(), 'variant')}: {kinds}")
    if loaded.without_variant:
        reasons = ", ".join(f"{reason} ({num:,})" for reason, num in loaded.without_variant.most_common())
        note(f"{format_plural(loaded.without_variant.total(), 'variant')} could not be made: {reasons}")
    if loaded.contaminated:
        note(f"{format_plural(len(loaded.contaminated), 'prompt')} skipped that overlap the evaluation set")
    for source, num in loaded.judgeless():
        note(f"{format_plural(num, 'prompt')} of {source} with a reference but no judge: the answers get no verdict")


def warn_of_joined(cache: Location) -> None:
    """Says that a build without --join shares no work with workers that have it."""
    # Workers that add features to chains generate none.
    if alive := workers_of(cache, but={one.name for one in matching(cache / SETS_FOLDER, "*")}):
        others = format_plural(len(alive), "worker")
        warn(f"{others} with --join may generate the same chains for this cache now: add --join to share the work")
