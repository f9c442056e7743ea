"""`teacher-cache plan` of completions that are scored: what is left, exactly, for every token is there already."""

from shared.log import Progress
from teacher_cache.intake.completions import Completions
from teacher_cache.intake.sources import LoadFailure
from teacher_cache.plan import (
    BuildPlan,
    SourcePlan,
    add_up,
    begin_plan,
    examples,
    existing_catalog,
    max_model_len_of,
    measure,
    predict,
    visible_samples,
)
from teacher_cache.requests import Request
from teacher_cache.score_config import ScoreConfig
from teacher_cache.teacher import identify_teacher


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
