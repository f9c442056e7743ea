"""`teacher-cache plan`: what a build or score has left to do and what it needs, without loading a model.

In: a configuration, and the cache if it exists. Out: prompts by source, chains done and left (by sample id, exactly
those that `build` would generate), tokens, bytes, hours, and whether the disk is large enough. Lengths and bytes are
measured where the cache has chains of a source; otherwise they are upper bounds or documented defaults, and the plan
says which. Completions to score are counted token by token.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cache.catalog import Catalog
from stillroom.judging.answers import reference_problem
from stillroom.log import (
    Progress,
    cut,
    format_bytes,
    format_count,
    format_duration,
    format_plural,
    format_price,
    harmless,
    warn,
)
from stillroom.log import one_line as flat
from stillroom.schema.records import Prompt
from stillroom.sql.session import open_session
from stillroom.storage.paths import Location, check_reachable, matching
from teacher_cache.building.run_manifest import run_id_of
from teacher_cache.building.until import UntilRight, require_judged, right_samples
from teacher_cache.config import (
    BuildConfig,
    OpenAIConfig,
    RunConfig,
    ScoreConfig,
    ServerConfig,
    extra_sampling,
)
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.start import check_values
from teacher_cache.engine.teacher import IdentifiedTeacher, identify_teacher
from teacher_cache.inspect.stats import BILLED
from teacher_cache.prompts.completions import Completions
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.prompts import (
    LoadedPrompts,
    RequestMaker,
    heldout_problem,
    load_prompts,
    num_requests,
    requests,
)
from teacher_cache.scrub.counts import counted, sample_of, total_of
from teacher_cache.scrub.settings import scrubber_of, unscrubbed_chains, unscrubbed_problem
from teacher_cache.workers.joining import Wait
from teacher_cache.writer.commit import VisibleSamples
from teacher_cache.writer.recorder import last_metrics

if TYPE_CHECKING:
    from teacher_cache.engine.http.server import EndpointStatus

BYTES_PER_TOKEN = 20.0
BYTES_PER_ENTRY = {"topk-u8": 1.8, "topk-f32": 7.0}
"""Upper bounds, measured with full supports of 16 and 64 entries and a vocabulary of 129,280; used until the cache has
chains to measure.
"""
BYTES_PER_TEMPERATURE = 4.0
"""A log-partition is a float32."""

METRICS_FRESH_S = 3600.0
"""Workers whose last metrics are older than the newest by more than this do not count as running together."""

REFERENCE_COLUMNS = 40
NUM_SHOWN = 3
"""Examples shown of each kind of skipped row."""


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt as the teacher reads it: its tokens as text, special ones included. For scored chains the completion
    too.
    """

    source: str
    prompt_id: str
    num_prompt_tokens: int
    prompt: str
    completion: str | None
    reference: str | None


@dataclass(slots=True)
class SourcePlan:
    """One source. `mean_num_tokens` is measured on the cache's chains, None if it has none."""

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
    """The plan. `tokens_left_measured` says whether lengths were measured for all sources; otherwise they are limits.

    `num_failed` samples failed before and are retried only on request; `num_unusable` will fail, because the chat
    template refuses them or they leave no room for a completion.
    """

    run_id: str
    cache: str
    adapter: str | None = None
    """LoRA adapter of the teacher, with the start of its fingerprint."""
    num_prompts: int = 0
    num_heldout: int = 0
    num_malformed: int = 0
    num_duplicates: int = 0
    num_near_duplicates: int = 0
    num_contaminated: int = 0
    scrubbed: dict[str, int] = field(default_factory=dict)
    """Personal data replaced in prompts, by kind."""
    scrubbed_samples: list[str] = field(default_factory=list)
    """What a few prompts have in its place."""
    num_unscrubbed: int = 0
    """Chains of the cache that were stored without this `scrub` setting."""
    num_variants: int = 0
    """Variants among the prompts, and those for which the teacher must be asked first."""
    num_unanswered: int = 0
    num_chains: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_unusable: int = 0
    num_left: int = 0
    is_bound: bool = False
    """Whether chains, tokens and time are the most that `sampling.until` may ask for."""
    tokens_left: float = 0.0
    tokens_left_measured: bool = True
    bytes_per_token: float = 0.0
    bytes_per_token_measured: bool = False
    gb_left: float = 0.0
    tokens_per_s: float | None = None
    hours_left: float | None = None
    billed_ratio: float = 1.0
    """Completion tokens that an API counted for each one that it returned, measured on this run's chains."""
    cost_left: float | None = None
    """In the currency of `engine.price`; None without one."""
    disk_free_gb: float | None = None
    """None for a cache in an object store."""
    fits: bool = True
    sources: list[SourcePlan] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    endpoints: "list[EndpointStatus]" = field(default_factory=list)
    shown: list[ShownPrompt] = field(default_factory=list)


def plan_build(config: BuildConfig, num_shown: int = 0) -> BuildPlan:
    """Raises DataError or ConfigError as `build` would before it starts. `num_shown` prompts are in `shown`."""
    check_values(config)
    loaded = load_prompts(config.prompts, scrubber_of(config))
    teacher = identify_teacher(config.teacher, config.engine)
    plan = _new_plan(config, teacher, [source.name for source in config.prompts.sources])
    _count_prompts(plan, loaded, config.prompts)
    if config.sampling.until is None:
        stream: Iterable[Request | Failure] = requests(
            config, loaded.prompts, teacher.tokenizer, teacher.record.fingerprint
        )
        total = num_requests(config, loaded.prompts)
    else:
        stream, total = _until_right(config, loaded.prompts, teacher)
        plan.is_bound = True
    shown = _Shown(stream, num_shown)
    _count_chains(plan, shown, total, config, teacher)
    plan.shown = shown.prompts(plan.sources, teacher.tokenizer)
    plan.tokens_left_measured = all(one.mean_num_tokens is not None or not one.num_left for one in plan.sources)
    return plan


def plan_score(config: ScoreConfig, num_shown: int = 0) -> BuildPlan:
    """Reads and tokenises every completion. Raises DataError or ConfigError as `score` would before it starts."""
    check_values(config)
    teacher = identify_teacher(config.teacher, config.engine)
    plan = _new_plan(config, teacher, [source.name for source in config.completions.sources])
    with Completions(config, teacher, scrubber_of(config)) as completions:
        shown = _Shown(_counting_prompts(plan, completions.requests()), num_shown)
        _count_chains(plan, shown, completions.count(), config, teacher)
    plan.shown = shown.prompts(plan.sources, teacher.tokenizer)
    plan.num_contaminated = len(completions.contaminated)
    overlaps = [f"{one.where} overlaps {one.against}" for one in completions.contaminated]
    plan.examples += _examples("contaminated", overlaps)
    return plan


def plan_lines(plan: BuildPlan) -> list[str]:
    """The plan for a person."""
    lines = [_source_line("source", "prompts", "chains", "done", "failed", "left", "tokens/chain")]
    for one in plan.sources:
        length = "?" if one.mean_num_tokens is None else f"{one.mean_num_tokens:.0f}"
        counts = (one.num_prompts, one.num_chains, one.num_done, one.num_failed, one.num_left)
        lines.append(_source_line(one.source, *(f"{count:,}" for count in counts), length))
    counts = (plan.num_prompts, plan.num_chains, plan.num_done, plan.num_failed, plan.num_left)
    lines += [_source_line("all", *(f"{count:,}" for count in counts), ""), ""]
    heldout = f" ({plan.num_heldout:,} held out)" if plan.num_heldout else ""
    skipped = [
        f"{plan.num_malformed:,} malformed",
        format_plural(plan.num_duplicates, "duplicate"),
        *([format_plural(plan.num_near_duplicates, "near-duplicate")] if plan.num_near_duplicates else []),
        f"{plan.num_contaminated:,} contaminated",
        f"{format_plural(plan.num_unusable, 'chain')} that cannot be generated",
    ]
    lines.append(f"prompts  {plan.num_prompts:,}{heldout}; {', '.join(skipped)}")
    lines += [f"         {example}" for example in plan.examples]
    lines += [] if plan.adapter is None else [f"adapter  {plan.adapter}"]
    lines += [f"scrubbed {counted(plan.scrubbed)}"] if plan.scrubbed else []
    lines += [f"         {flat(one)}" for one in plan.scrubbed_samples]
    if plan.num_variants or plan.num_unanswered:
        waiting = f"; {plan.num_unanswered:,} more after teacher-cache augment" if plan.num_unanswered else ""
        lines.append(f"variants {plan.num_variants:,} of the prompts{waiting}")
    if plan.is_bound:
        lines.append("until    chains, tokens and time are upper bounds: prompts with enough right chains get no more")
    lines += _cost_lines(plan) if plan.num_left else ["nothing is left to do"]
    return [*lines, *(f"server   {one.url} {one.summary}" for one in plan.endpoints)]


def shown_lines(plan: BuildPlan) -> list[str]:
    """The prompts of `shown` for a person, each below a line that names it."""
    lines = []
    for one in plan.shown:
        reference = (
            "no reference" if one.reference is None else f"reference {cut(flat(one.reference), REFERENCE_COLUMNS)}"
        )
        lines.append(f"=== {one.source} {one.prompt_id[:8]}, {one.num_prompt_tokens:,} tokens, {reference}")
        lines += [harmless(one.prompt)]
        lines += [] if one.completion is None else ["--- scored:", harmless(one.completion)]
    return [*lines, "=== end of prompts", ""] if lines else []


def disk_warning(plan: BuildPlan) -> str | None:
    """A warning if the disk is too small."""
    if plan.fits or plan.disk_free_gb is None:
        return None
    bound = "" if plan.tokens_left_measured else "up to "
    return (
        f"{plan.cache} has {format_bytes(1e9 * plan.disk_free_gb)} free and the build needs {bound}"
        f"{format_bytes(1e9 * plan.gb_left)}: choose a larger disk, fewer samples or a smaller capture.max_support"
    )


class _Shown:
    """Passes requests on and keeps the first `num` of each source."""

    def __init__(self, stream: Iterable[Request | Failure], num: int) -> None:
        self._stream, self._num = stream, num
        self._kept: dict[str, dict[str, Request]] = {}

    def __iter__(self) -> Iterator[Request | Failure]:
        for request in self._stream:
            if isinstance(request, Request):
                kept = self._kept.setdefault(request.prompt.source, {})
                if len(kept) < self._num:
                    # Further samples of a prompt show the same text.
                    kept.setdefault(request.prompt.prompt_id, request)
            yield request

    def prompts(self, sources: Sequence[SourcePlan], tokenizer: Any) -> list[ShownPrompt]:
        """At most `num`, from all sources in turn."""
        rounds = itertools.zip_longest(*(self._kept.get(one.source, {}).values() for one in sources))
        requests = [request for turn in rounds for request in turn if request is not None]
        return [_shown(request, tokenizer) for request in requests[: self._num]]


def _shown(request: Request, tokenizer: Any) -> ShownPrompt:
    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    prompt, completion_ids = request.prompt, request.completion_token_ids
    completion = None if completion_ids is None else text(completion_ids)
    ids = request.prompt_token_ids
    return ShownPrompt(prompt.source, prompt.prompt_id, len(ids), text(ids), completion, prompt.reference)


def _new_plan(config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher, sources: Sequence[str]) -> BuildPlan:
    """A plan that counts nothing yet, with the state of a server engine's endpoints."""
    plan = BuildPlan(run_id_of(config, teacher.record), str(config.cache), sources=[SourcePlan(one) for one in sources])
    plan.adapter = teacher.record.shown_adapter
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.engine.http.server import check_endpoints

        plan.endpoints = check_endpoints(config.engine, teacher, config.capture, extra_sampling(config))
    return plan


def _count_prompts(plan: BuildPlan, loaded: LoadedPrompts, config: PromptsConfig) -> None:
    sources = {one.source: one for one in plan.sources}
    for prompt in loaded.prompts:
        sources[prompt.source].num_prompts += 1
        plan.num_heldout += prompt.split == "heldout"
        _count_scrubbed(plan, prompt)
    plan.num_prompts = len(loaded.prompts)
    plan.num_malformed = len(loaded.failures)
    plan.num_duplicates = len(loaded.duplicates)
    plan.num_near_duplicates = len(loaded.near_duplicates)
    plan.num_contaminated = len(loaded.contaminated)
    plan.num_variants, plan.num_unanswered = loaded.variants.total(), loaded.unanswered.total()
    plan.examples = [
        *_examples("malformed", [failure.message for failure in loaded.failures]),
        *_examples("duplicate", [str(one) for one in loaded.duplicates]),
        *_examples("near-duplicate", [str(one) for one in loaded.near_duplicates]),
        *_examples("contaminated", [f"{one.where} overlaps {one.against}" for one in loaded.contaminated]),
        *(f"no variant: {reason} ({num:,})" for reason, num in loaded.without_variant.most_common()),
        *_without_verdict(loaded),
        *([] if (problem := heldout_problem(config, loaded.prompts)) is None else [problem]),
    ]


def _count_scrubbed(plan: BuildPlan, prompt: Prompt) -> None:
    counts = total_of([prompt.metadata])
    for kind, num in counts.items():
        plan.scrubbed[kind] = plan.scrubbed.get(kind, 0) + num
    if counts and len(plan.scrubbed_samples) < NUM_SHOWN:
        sample = sample_of(one.content for one in prompt.messages)
        plan.scrubbed_samples += [] if sample is None else [sample]


def _without_verdict(loaded: LoadedPrompts) -> list[str]:
    """How many prompts of each source have a judge and nothing that it can judge by, or a reference and no judge."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for prompt in loaded.prompts:
        kind = prompt.metadata.get("judge")
        if isinstance(kind, str) and kind != "reasoning_gym":
            problem = reference_problem(prompt.reference, kind)
            counts.update([(prompt.source, kind, problem)] if problem is not None else [])
    return [
        f"unjudged: {format_plural(num, 'prompt')} of {source} with a reference but no judge: set judge, such as math"
        for source, num in loaded.judgeless()
    ] + [
        f"undecided: the judge {kind} cannot decide {format_plural(num, 'prompt')} of {source}: {problem}"
        for (source, kind, problem), num in sorted(counts.items())
    ]


def _counting_prompts(plan: BuildPlan, stream: Iterable[Request | Failure]) -> Iterator[Request | Failure]:
    """Counts the distinct prompts and the malformed rows of completions as they pass."""
    sources = {one.source: one for one in plan.sources}
    seen: set[str] = set()
    malformed: list[str] = []
    for request in stream:
        if isinstance(request, Failure):
            malformed += [request.message] if request.reason == "malformed" else []
        elif request.prompt.prompt_id not in seen:
            seen.add(request.prompt.prompt_id)
            sources[request.prompt.source].num_prompts += 1
            plan.num_heldout += request.prompt.split == "heldout"
            _count_scrubbed(plan, request.prompt)
        yield request
    plan.num_prompts, plan.num_malformed = len(seen), len(malformed)
    plan.examples += _examples("malformed", malformed)


def _count_chains(
    plan: BuildPlan,
    stream: Iterable[Request | Failure],
    total: int,
    config: BuildConfig | ScoreConfig,
    teacher: IdentifiedTeacher,
) -> None:
    """Sorts every chain into done, failed, unusable and left, and adds up what is left."""
    catalog = _catalog_of(config)
    sources = {one.source: one for one in plan.sources}
    if catalog is not None:
        _measure(plan, sources, catalog, teacher.record.fingerprint)
        if config.scrub is not None and (old := unscrubbed_chains(catalog, config.scrub)):
            plan.num_unscrubbed = old.total()
            warn(unscrubbed_problem(old, config.cache))
    visible, failed = (_visible_samples(catalog, name) for name in ("chains", "failures"))
    # The shortest server decides, as in the build.
    limits = [one.max_model_len for one in plan.endpoints if one.max_model_len is not None]
    max_model_len = config.engine.max_model_len or min(limits, default=None)
    seen: set[str] = set()
    refused: dict[str, str] = {}
    num_prompt_tokens = 0
    with Progress("plan", total, "chains") as progress:
        for number, request in enumerate(stream, start=1):
            progress.update(number, 0)
            # As the build skips them: the plan must end at the number of chains that will exist.
            if request.sample_id in seen:
                plan.num_duplicates += 1
                continue
            seen.add(request.sample_id)
            # A template refuses a prompt for all of its samples: one example of each is enough.
            if isinstance(request, Failure) and request.reason == "chat_template":
                refused.setdefault(request.prompt_id, request.message)
            one = sources[request.source if isinstance(request, Failure) else request.prompt.source]
            one.num_chains += 1
            if request.sample_id in visible:
                one.num_done += 1
            # After `visible`: a sample that failed and succeeded on a retry is done.
            elif request.sample_id in failed:
                one.num_failed += 1
            elif (num_tokens := _tokens_of(request, one, max_model_len)) is None:
                one.num_unusable += 1
            else:
                one.num_left += 1
                one.tokens_left += num_tokens
                # Every sample pays for its prompt: APIs bill it per request.
                num_prompt_tokens += len(request.prompt_token_ids) if isinstance(request, Request) else 0
    for one in plan.sources:
        plan.num_chains += one.num_chains
        plan.num_done += one.num_done
        plan.num_failed += one.num_failed
        plan.num_unusable += one.num_unusable
        plan.num_left += one.num_left
        plan.tokens_left += one.tokens_left
    plan.examples += _examples("refused", list(refused.values()))
    if isinstance(config.engine, OpenAIConfig) and (price := config.engine.price) is not None:
        plan.cost_left = (num_prompt_tokens * price.input + plan.billed_ratio * plan.tokens_left * price.output) / 1e6
    _predict(plan, config, has_cache=catalog is not None)


def _catalog_of(config: RunConfig) -> Catalog | None:
    check_reachable(config.cache)
    return Catalog(config.cache) if (config.cache / "chains" / "_delta_log").is_dir() else None


def _until_right(
    config: BuildConfig, prompts: Sequence[Prompt], teacher: IdentifiedTeacher
) -> tuple[Iterator[Request | Failure], int]:
    """What `sampling.until` asks for if every chain to come is wrong, and its number."""
    require_judged(prompts)
    catalog = _catalog_of(config)
    right = set() if catalog is None else right_samples(config)
    maker = RequestMaker(config, prompts, teacher.tokenizer, teacher.record.fingerprint)
    chains, failures = (_visible_samples(catalog, name) for name in ("chains", "failures"))
    # The real schedule of the build with the worst luck: the bound cannot drift from what the build does.
    until = UntilRight(config, prompts, maker, chains, failures, right, assume_wrong=True)
    return (one for one in until.requests() if not isinstance(one, Wait)), until.num_total


def _tokens_of(request: Request | Failure, source: SourcePlan, max_model_len: int | None) -> float | None:
    """Completion tokens that the request will have, measured or at most; None if it will fail."""
    if isinstance(request, Failure):
        return None
    room = float("inf") if max_model_len is None else max_model_len - len(request.prompt_token_ids)
    if request.completion_token_ids is not None:
        # To score is to read exactly these tokens; there is no length to guess.
        return request.max_tokens if 0 < request.max_tokens <= room else None
    if room < 1:
        return None
    # Measured lengths of the source, but never more than fits.
    longest = min(request.max_tokens, room)
    return longest if source.mean_num_tokens is None else min(longest, source.mean_num_tokens)


def _measure(plan: BuildPlan, sources: Mapping[str, SourcePlan], catalog: Catalog, teacher: str) -> None:
    """Lengths by source and bytes per token, from this run's chains or else from those of the same teacher."""
    query = (
        "SELECT c.source, c.run_id = '{run}' AS own, avg(c.num_tokens) AS mean FROM chains c JOIN runs r USING (run_id)"
        " WHERE r.teacher_fingerprint = '{teacher}' GROUP BY ALL ORDER BY own"
    )
    with open_session(catalog) as session:
        billed = session.arrow(
            f"SELECT sum({BILLED.format('completion_tokens', 'num_tokens')}) / sum(num_tokens) AS ratio FROM chains"
            f" WHERE run_id = '{plan.run_id}'"
        )
        plan.billed_ratio = billed.column("ratio").to_pylist()[0] or 1.0
        # Rows of this run come last and win.
        for row in session.arrow(query.format(run=plan.run_id, teacher=teacher)).to_pylist():
            if row["source"] in sources:
                sources[row["source"]].mean_num_tokens = row["mean"]
        tokens = session.arrow(f"SELECT sum(num_tokens)::BIGINT AS n FROM chains WHERE run_id = '{plan.run_id}'")
    num_tokens = tokens.column("n").to_pylist()[0]
    if num_tokens:
        # Only this run's shards: another capture stores other numbers of entries per token.
        own = [file for file in catalog.chains.files() if file.path.startswith(f"{plan.run_id}/")]
        plan.bytes_per_token = sum(file.size_bytes for file in own) / num_tokens
        plan.bytes_per_token_measured = True


def _visible_samples(catalog: Catalog | None, name: str) -> VisibleSamples | frozenset[str]:
    """Ids of the samples of a table, `chains` or `failures`; none without a cache."""
    if catalog is None:
        return frozenset()
    samples = VisibleSamples(catalog.chains if name == "chains" else catalog.failures)
    samples.refresh()
    return samples


def _predict(plan: BuildPlan, config: RunConfig, *, has_cache: bool) -> None:
    """Bytes, hours, and whether the disk is large enough."""
    capture = config.capture
    if not plan.bytes_per_token_measured:
        num_entries = capture.max_support + capture.draws
        plan.bytes_per_token = BYTES_PER_TOKEN + BYTES_PER_ENTRY[capture.codec] * num_entries
        plan.bytes_per_token += BYTES_PER_TEMPERATURE * len(capture.temperatures)
    plan.gb_left = plan.tokens_left * plan.bytes_per_token / 1e9
    if isinstance(config.cache, Path):
        # The build creates the cache's folder; until then the disk is that of the nearest one that exists.
        folder = next(one for one in (config.cache.absolute(), *config.cache.absolute().parents) if one.exists())
        plan.disk_free_gb = shutil.disk_usage(folder).free / 1e9
        plan.fits = plan.gb_left < plan.disk_free_gb
    plan.tokens_per_s = _last_speed(config.cache, plan.run_id) if has_cache else None
    if plan.tokens_per_s:
        plan.hours_left = plan.tokens_left / plan.tokens_per_s / 3600


def _last_speed(cache: Location, run_id: str) -> float | None:
    """Tokens per second of all workers of the run that last ran together."""
    paths = matching(cache / "runs", f"{run_id}.*.metrics.jsonl")
    lasts = [last for path in paths if (last := last_metrics(path)) is not None]
    if not lasts:
        return None
    newest = max(lasts, key=lambda last: last["time"])
    began_s = max(newest["time"] - METRICS_FRESH_S, newest["time"] - newest["seconds"])
    # Workers run side by side, so their rates add up; those that ended before the newest one began do not count.
    return float(sum(last["tokens_per_s"] for last in lasts if last["time"] >= began_s)) or None


def _cost_lines(plan: BuildPlan) -> list[str]:
    bound = "" if plan.tokens_left_measured else "up to "
    lines = [f"tokens   {bound}{format_count(plan.tokens_left)}"]
    known = "as in this cache" if plan.bytes_per_token_measured else "assumed"
    lines.append(f"disk     {format_bytes(1e9 * plan.gb_left)} ({plan.bytes_per_token:.0f} B/token, {known})")
    if plan.disk_free_gb is not None:
        lines.append(f"         {format_bytes(1e9 * plan.disk_free_gb)} free at {plan.cache}")
    if plan.cost_left is not None:
        lines.append(f"cost     {bound}{format_price(plan.cost_left)} at engine.price")
    if plan.hours_left is None:
        lines.append("time     unknown until this run has generated chains: start the build, stop it and plan again")
    else:
        speed = f"{plan.tokens_per_s:.0f} tok/s as in the last build"
        lines.append(f"time     {format_duration(3600 * plan.hours_left)} at {speed}")
    return lines


def _examples(kind: str, rows: Sequence[str]) -> list[str]:
    """The first few rows that were skipped for one reason, and how many more there are."""
    more = [f"{kind}: and {len(rows) - NUM_SHOWN:,} more"] if len(rows) > NUM_SHOWN else []
    return [*(f"{kind}: {row}" for row in rows[:NUM_SHOWN]), *more]


def _source_line(source: str, *cells: str) -> str:
    return f"{source:<24}" + "".join(f"{cell:>{max(10, len(cell) + 2)}}" for cell in cells)
