"""What `teacher-cache build` and `score` do before and after the build itself: prompts or completions, teacher, engine,
and the result.
"""

import functools
import itertools

from schemas.records import Prompt
from shared.config import Json
from shared.log import format_bytes, format_count, format_duration, format_plural, note
from teacher_cache.build import Build, BuildResult
from teacher_cache.config import BuildConfig
from teacher_cache.engine_config import ServerConfig
from teacher_cache.intake.completions import Completions
from teacher_cache.intake.prompts import LoadedPrompts, WorkerShare, load_prompts, num_requests, requests
from teacher_cache.judging import require_judges
from teacher_cache.requests import Engine
from teacher_cache.score_config import ScoreConfig
from teacher_cache.teacher import IdentifiedTeacher, identify_teacher


def build_cache(config: BuildConfig, share: WorkerShare, *, retry_failures: bool) -> BuildResult:
    """Fills the cache with what is missing of this worker's share. Raises StillroomError for all that a user can
    mend.
    """
    loaded = load_prompts(config.prompts)
    _say_loaded(loaded)
    require_judges(loaded.prompts)
    teacher = identify_teacher(config.teacher, config.engine)
    build = Build(config, teacher, worker_name(share))
    start_engine = functools.partial(_start_engine, config, teacher)
    try:
        # Malformed rows are nobody's share: the first worker records them.
        failures = loaded.failures if share.index == 0 else []
        wanted = requests(config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint, share)
        num_total = num_requests(config, loaded.prompts, share) + len(failures)
        return build.run(itertools.chain(failures, wanted), num_total, start_engine, retry_failures=retry_failures)
    finally:
        build.close()


def score_cache(config: ScoreConfig, share: WorkerShare, *, retry_failures: bool) -> BuildResult:
    """Fills the cache with the completions of this share that are not scored yet. Raises StillroomError for all that a
    user can mend.
    """
    teacher = identify_teacher(config.teacher, config.engine)
    with Completions(config, teacher) as completions:
        num_total = completions.count(share)
        note(f"{num_total} completions")
        require_judges(Prompt(kind, (), "", "", metadata={"judge": kind}) for kind in completions.judges())
        build = Build(config, teacher, worker_name(share))
        start_engine = functools.partial(_start_engine, config, teacher)
        try:
            result = build.run(completions.requests(share), num_total, start_engine, retry_failures=retry_failures)
        finally:
            build.close()
        if completions.contaminated:
            note(f"{len(completions.contaminated)} completions left out whose prompts resemble the evaluation set")
        return result


def _start_engine(config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher) -> Engine:
    engine = config.engine
    if isinstance(engine, ServerConfig):
        from teacher_cache.http_engine.server import ServerEngine

        note(f"asking {', '.join(engine.endpoints)}")
        return ServerEngine(engine, teacher.record, teacher.tokenizer, config.capture)
    from teacher_cache.vllm_engine.engine import EmbeddedEngine

    note(f"loading {config.teacher.model}")
    # The commit that was identified, should a branch have moved on meanwhile.
    pinned = config.teacher.updated(revision=teacher.record.revision)
    return EmbeddedEngine(pinned, engine, config.capture, scores=isinstance(config, ScoreConfig))


def worker_name(share: WorkerShare) -> str:
    """`w0` for a whole build, `w<I>of<N>` for a share: other N, other names, so that two layouts never share files."""
    return "w0" if share.count == 1 else f"w{share.index}of{share.count}"


def result_json(config: BuildConfig | ScoreConfig, result: BuildResult) -> Json:
    """The result for programs. Totals are of the whole cache, rates of this process."""
    from shared.catalog import Catalog
    from teacher_cache.ask.stats import cache_stats

    stats = cache_stats(Catalog(config.cache))
    return {
        "run_id": result.run_id,
        "worker": result.worker,
        "num_wanted": result.num_total,
        "num_done_before": result.num_done_before,
        "num_adopted": result.num_adopted,
        "num_new_chains": result.recorded.num_chains,
        "num_new_tokens": result.recorded.num_tokens,
        "num_failures": result.recorded.num_failures,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
        "num_chains": stats.num_chains,
        "num_tokens": stats.num_tokens,
        "bytes_per_token": stats.bytes_per_token,
        "signal_bytes_per_token": stats.signal_bytes_per_token,
        "pass_rate": stats.pass_rate,
        "chains_version": stats.chains_version,
        "stopped": result.stopped,
    }


def result_lines(result: Json, cache: str) -> list[str]:
    """The result for a person."""
    rate = "" if result["tokens_per_s"] is None else f" at {result['tokens_per_s']:.0f} tok/s"
    took = f"{format_count(result['num_new_tokens'])} tokens in {format_duration(result['seconds'])}{rate}"
    others = f"{result['num_failures']} failed, {result['num_done_before']} were there"
    size = "" if result["bytes_per_token"] is None else f", {result['bytes_per_token']:.1f} B/token"
    total = format_bytes((result["bytes_per_token"] or 0.0) * result["num_tokens"])
    counts = f"{format_plural(result['num_chains'], 'chain')}, {format_count(result['num_tokens'])} tokens"
    return [
        f"new     {format_plural(result['num_new_chains'], 'chain')}, {took}; {others}",
        f"cache   {cache}: {counts}, {total}{size}",
    ]


def _say_loaded(loaded: LoadedPrompts) -> None:
    note(format_plural(len(loaded.prompts), "prompt"))
    if loaded.failures:
        first = loaded.failures[0]
        note(f"{len(loaded.failures)} rows are no prompts and will be recorded as failures; the first: {first.message}")
    if loaded.duplicates:
        first_twin = loaded.duplicates[0]
        note(f"{len(loaded.duplicates)} duplicates left out; the first: {first_twin.where} repeats {first_twin.kept}")
    if loaded.contaminated:
        note(f"{len(loaded.contaminated)} prompts left out that resemble the evaluation set")
