"""`teacher-cache stats`: the numbers of a cache, for eyes and for programs.

In: a cache. Out: counts, bytes and shares, by source, split and run. Reads scalars, Parquet footers and token ids (of a
sample of the chains, if there are many tokens), never a distribution.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from stillroom.cache.catalog import Catalog
from stillroom.log import (
    format_bytes,
    format_count,
    format_duration,
    format_plural,
    format_price,
    one_line,
    pad,
    width_of,
)
from stillroom.schema.tables import SIGNAL_FIELDS, TOKEN_FIELDS
from stillroom.sql.session import Session, open_session
from stillroom.sql.views import quote
from teacher_cache.scrub.counts import counted, sample_of
from teacher_cache.workers.leases import workers_of

SIGNAL_COLUMNS = tuple(
    dict.fromkeys(field.name for fields in (TOKEN_FIELDS, *SIGNAL_FIELDS.values()) for field in fields)
)
"""Columns that exist for the distributions: what a cache of plain text would not have."""

_MEASURED = "FILTER (mean_support > 1 OR mean_entropy > 0 OR mean_logprob < 0)"
"""Chains of text alone have one candidate a token, which is certain: they say nothing of a distribution."""
_MEANS = ", ".join(
    f"sum({name} * num_tokens) {_MEASURED} / sum(num_tokens) {_MEASURED} AS {name}"
    for name in ("mean_entropy", "mean_tail_mass", "mean_support")
)
_COUNTS = f"""
    count(*) AS num_chains, count(DISTINCT prompt_id) AS num_prompts,
    coalesce(sum(num_tokens), 0)::BIGINT AS num_tokens,
    coalesce(sum(num_prompt_tokens), 0)::BIGINT AS num_prompt_tokens,
    coalesce(sum(num_reasoning_tokens), 0)::BIGINT AS num_reasoning_tokens,
    avg(num_tokens) AS mean_num_tokens, count(*) FILTER (truncated) AS num_truncated, count(correct) AS num_judged,
    count(*) FILTER (correct IS NULL AND judge IS NOT NULL) AS num_undecided,
    avg(correct::INTEGER) AS pass_rate, {_MEANS}
"""

WAS_SCRUBBED = """contains(metadata, '"scrubbed":') AND json_type(metadata, '$.scrubbed') = 'OBJECT'"""
"""The text first: JSON is parsed for what remains. A row may have a field of this name itself."""
BILLED = "coalesce(json_extract(metadata, '$.api_usage.{}')::BIGINT, {})"
"""Tokens as the API counted them, where it said so: with the reasoning that it hides."""
LOOP_FRAC = 0.5
"""A chain with more than this `repeated_frac` is a loop: most of its windows of 16 tokens occurred before in it."""
LOOP_TOKENS = 50_000_000
"""Loops are counted in about this many tokens, which takes ten CPU seconds."""

PAUSE_S = 600
"""A worker that finished no chain for longer was not running."""

MAX_EXAMPLE = 200
UNDECIDED = "no reference, or the check timed out: `teacher-cache judge` tries again, `--judge` another check"
"""What an undecided chain may lack, and what helps."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Counts(_Record):
    """Of a set of chains. Means of signals are over tokens; None where the set is empty or nothing is judged."""

    num_chains: int
    num_prompts: int
    num_tokens: int
    num_prompt_tokens: int
    num_reasoning_tokens: int
    mean_num_tokens: float | None
    num_truncated: int
    num_judged: int
    num_undecided: int = Field(description="chains whose latest verdict is that their judge could not tell")
    pass_rate: float | None
    mean_entropy: float | None
    mean_tail_mass: float | None
    mean_support: float | None
    loop_frac: float | None = Field(description="share of chains that mostly repeat themselves (repeated_frac > 0.5)")


class FeatureCounts(_Record):
    """Of one feature set. `size_bytes` are those of its files, without scales, bases and head."""

    num_chains: int
    num_tokens: int = Field(description="completion tokens with features")
    size_bytes: int


class WorkerCounts(_Record):
    """A worker that is building now. Rates are of its engine since it started."""

    worker: str
    host: str
    num_tokens: int
    tokens_per_s: float


class Usage(_Record):
    """What the chains took: time of all workers between one chain and the next, without pauses and loading."""

    worker_seconds: float
    num_workers: int
    devices: list[str] = Field(description="kinds of devices that the runs' manifests name")


class Cost(_Record):
    """In the price's currency; None where nothing is judged right."""

    price_per_hour: float = Field(description="of one worker's machine")
    cost: float
    per_million_tokens: float | None
    per_right_answer: float | None


class CacheStats(Counts):
    """A whole cache. `bytes_per_token`: bytes of the shard files over the completion tokens in them."""

    num_chains_read: int = Field(description="chains of which loop_frac is: all, or a sample of a large cache")
    num_shards: int
    shard_bytes: int
    signal_bytes: int = Field(description="bytes of the columns that hold distributions and per-token scalars")
    bytes_per_token: float | None
    signal_bytes_per_token: float | None
    num_failed: int = Field(description="samples that failed and have not succeeded since")
    failures: dict[str, int] = Field(description="the same by reason")
    failure_example: str | None = Field(description="a message of the most frequent reason")
    scrubbed: dict[str, int] = Field(description="personal data replaced in prompts, by kind")
    scrubbed_sample: str | None = Field(description="what a prompt has in its place")
    adapters: dict[str, str] = Field(description="LoRA adapter of the teacher, by run that has one")
    features: dict[str, FeatureCounts] = Field(description="by feature set")
    usage: Usage
    cost: Cost | None = Field(default=None, description="at the price that was given")
    api_cost: float | None = Field(
        default=None, description="of chains of APIs, by engine.price and the tokens that they counted"
    )
    workers: list[WorkerCounts] = Field(description="workers with --join that are alive")
    by_source: dict[str, Counts]
    by_split: dict[str, Counts]
    by_run: dict[str, Counts]
    chains_version: int
    verdicts_version: int
    failures_version: int


def cache_stats(catalog: Catalog, price_per_hour: float | None = None) -> CacheStats:
    """Counts everything at the catalog's versions; `price_per_hour` is what one worker costs, in any currency."""
    with open_session(catalog) as session:
        return session_stats(session, catalog, price_per_hour)


def session_stats(session: Session, catalog: Catalog, price_per_hour: float | None = None) -> CacheStats:
    """The same in a session that is open already."""
    (whole,) = session.arrow(f"SELECT {_COUNTS} FROM chains").to_pylist()
    files = catalog.chains.files()
    shard_bytes = sum(file.size_bytes for file in files)
    # From the footers, as written: compressed sizes of columns are not in the log.
    listed = ", ".join(quote(name) for name in SIGNAL_COLUMNS)
    (signals,) = session.arrow(
        f"SELECT coalesce(sum(bytes), 0)::BIGINT AS bytes FROM storage WHERE column_name IN ({listed})"
    ).to_pylist()
    failures = session.arrow(
        "SELECT reason, count(DISTINCT sample_id) AS num, arg_max(message, failed_at) AS message FROM failures"
        " WHERE sample_id NOT IN (SELECT sample_id FROM chains) GROUP BY reason ORDER BY num DESC, reason"
    ).to_pylist()
    num_tokens = whole["num_tokens"]
    usage = _usage(session, catalog)
    scrubbed = session.arrow(
        # Once a prompt: every chain of it carries the same counts.
        "SELECT key AS kind, sum(try_cast(value AS BIGINT))::BIGINT AS num, any_value(prompt) AS prompt FROM"
        " (SELECT DISTINCT ON (prompt_id) prompt_id, prompt, json_extract(metadata, '$.scrubbed') AS counts"
        f"  FROM chains WHERE {WAS_SCRUBBED}), json_each(counts)"
        " GROUP BY kind HAVING num IS NOT NULL ORDER BY num DESC, kind"
    ).to_pylist()
    loops = _loops(session, num_tokens)
    return CacheStats(
        **whole,
        loop_frac=_loop_frac(loops),
        num_chains_read=sum(row["num"] for row in loops),
        num_shards=len(files),
        shard_bytes=shard_bytes,
        signal_bytes=signals["bytes"],
        bytes_per_token=shard_bytes / num_tokens if num_tokens else None,
        signal_bytes_per_token=signals["bytes"] / num_tokens if num_tokens else None,
        num_failed=sum(row["num"] for row in failures),
        failures={row["reason"]: row["num"] for row in failures},
        failure_example=failures[0]["message"] if failures else None,
        scrubbed={row["kind"]: row["num"] for row in scrubbed},
        scrubbed_sample=sample_of(row["prompt"] for row in scrubbed),
        adapters={
            run_id: shown for run_id, run in catalog.runs().items() if (shown := run.teacher.shown_adapter) is not None
        },
        features=_features(session, catalog),
        usage=usage,
        cost=None if price_per_hour is None else _cost(usage, whole, price_per_hour),
        api_cost=_api_cost(session, catalog),
        workers=[
            WorkerCounts(worker=one.worker, host=one.host, num_tokens=one.num_tokens, tokens_per_s=one.tokens_per_s)
            for one in workers_of(catalog.root)
        ],
        by_source=_grouped(session, "source", loops),
        by_split=_grouped(session, "split", loops),
        by_run=_grouped(session, "run_id", loops),
        chains_version=catalog.chains.version,
        verdicts_version=catalog.verdicts.version,
        failures_version=catalog.failures.version,
    )


def failures_text(num_of_reason: Mapping[str, int], example: str | None) -> str:
    """Reasons with their counts, a message, and what to do about them."""
    reasons = ", ".join(f"{one_line(reason)} {num:,}" for reason, num in num_of_reason.items())
    return f"{reasons} ({one_line(example or '')[:MAX_EXAMPLE]}); --retry-failures asks again"


def stats_text(stats: CacheStats) -> str:
    """The numbers as lines for a terminal."""
    reasoning = _share(stats.num_reasoning_tokens, stats.num_tokens)
    chains, prompts = format_plural(stats.num_chains, "chain"), format_plural(stats.num_prompts, "prompt")
    lines = [
        f"{chains} of {prompts} in {format_plural(stats.num_shards, 'shard')}",
        f"{stats.num_tokens:,} completion tokens ({reasoning} reasoning), {stats.num_prompt_tokens:,} prompt tokens",
    ]
    if stats.bytes_per_token is not None and stats.signal_bytes_per_token is not None:
        lines.append(
            f"{format_bytes(stats.shard_bytes)}: {stats.bytes_per_token:.1f} B/token, "
            f"{stats.signal_bytes_per_token:.1f} of them signals"
        )
    lines.append(f"{stats.num_truncated:,} truncated ({_share(stats.num_truncated, stats.num_chains)})")
    if stats.loop_frac is not None:
        sample = f" of a sample of {stats.num_chains_read:,}" if stats.num_chains_read < stats.num_chains else ""
        lines.append(f"{stats.loop_frac:.1%} loops{sample} (repeated_frac > {LOOP_FRAC})")
    right = f", {stats.pass_rate:.1%} right" if stats.num_judged else ""
    undecided = f", {stats.num_undecided:,} undecided ({UNDECIDED})" if stats.num_undecided else ""
    lines.append(f"{stats.num_judged:,} judged{right}{undecided}")
    reasons = f": {failures_text(stats.failures, stats.failure_example)}" if stats.num_failed else ""
    lines.append(f"{stats.num_failed:,} failed{reasons}")
    if stats.usage.worker_seconds >= 1:
        named = f" ({', '.join(map(one_line, stats.usage.devices))})" if stats.usage.devices else ""
        took, workers = format_duration(stats.usage.worker_seconds), format_plural(stats.usage.num_workers, "worker")
        lines.append(f"worker time {took}, {workers}{named}; loading and pauses over {PAUSE_S // 60} minutes excluded")
    if stats.cost is not None:
        each = stats.cost.per_right_answer
        right = "" if each is None else f", {format_price(each)} per right answer"
        lines.append(f"cost {format_price(stats.cost.cost)} at {stats.cost.price_per_hour:g} a worker-hour{right}")
    if stats.api_cost is not None:
        lines.append(f"cost {format_price(stats.api_cost)} of APIs at engine.price, in the tokens that they counted")
    if stats.scrubbed:
        sample = "" if stats.scrubbed_sample is None else f", as in: {one_line(stats.scrubbed_sample)}"
        lines.append(f"replaced in prompts: {counted(stats.scrubbed)}{sample}")
    lines += [f"run {run_id}: LoRA adapter {one_line(adapter)}" for run_id, adapter in stats.adapters.items()]
    for name, counts in stats.features.items():
        size = format_bytes(counts.size_bytes)
        per_token = counts.size_bytes / max(counts.num_tokens, 1)
        chains = format_plural(counts.num_chains, "chain")
        lines.append(f"features {name}: {chains}, {counts.num_tokens:,} tokens, {size} ({per_token:.1f} B/token)")
    if stats.workers:
        rate = sum(one.tokens_per_s for one in stats.workers)
        named = ", ".join(f"{one.worker} on {one.host} {one.tokens_per_s:.0f} tok/s" for one in stats.workers)
        lines.append(
            f"building now: {format_plural(len(stats.workers), 'worker')}, {rate:.0f} tok/s ({one_line(named)})"
        )
    lines.append(
        f"versions: chains {stats.chains_version}, verdicts {stats.verdicts_version}, failures {stats.failures_version}"
    )
    for title, groups in (("source", stats.by_source), ("split", stats.by_split), ("run", stats.by_run)):
        lines += ["", *_aligned(title, groups)]
    return "\n".join(lines) + "\n"


def _usage(session: Session, catalog: Catalog) -> Usage:
    (busy,) = session.arrow(
        f"""SELECT coalesce(sum(gap) FILTER (gap <= {PAUSE_S}), 0)::DOUBLE AS seconds,
          count(DISTINCT run_id || '/' || worker) AS num
        FROM (SELECT run_id, worker, epoch(created_at) - epoch(lag(created_at) OVER (PARTITION BY run_id, worker
          ORDER BY created_at)) AS gap FROM chains)"""
    ).to_pylist()
    devices = {run.engine.get("device") for run in catalog.runs().values()}
    return Usage(
        worker_seconds=busy["seconds"], num_workers=busy["num"], devices=sorted(str(one) for one in devices if one)
    )


def _cost(usage: Usage, whole: dict[str, Any], price_per_hour: float) -> Cost:
    cost = usage.worker_seconds / 3600 * price_per_hour
    # The average of judged chains times their number: whole again but for rounding.
    num_right = round((whole["pass_rate"] or 0) * whole["num_judged"])
    return Cost(
        price_per_hour=price_per_hour,
        cost=cost,
        per_million_tokens=1e6 * cost / whole["num_tokens"] if whole["num_tokens"] else None,
        per_right_answer=cost / num_right if num_right else None,
    )


def _api_cost(session: Session, catalog: Catalog) -> float | None:
    priced = {run_id: run.engine["price"] for run_id, run in catalog.runs().items() if run.engine.get("price")}
    if not priced:
        return None
    rows = session.arrow(
        f"SELECT run_id, sum({BILLED.format('prompt_tokens', 'num_prompt_tokens')})::BIGINT AS given,"
        f" sum({BILLED.format('completion_tokens', 'num_tokens')})::BIGINT AS made FROM chains GROUP BY 1"
    ).to_pylist()
    costs = [
        row["given"] * priced[row["run_id"]]["input"] + row["made"] * priced[row["run_id"]]["output"]
        for row in rows
        if row["run_id"] in priced
    ]
    return float(sum(costs) / 1e6)


def _features(session: Session, catalog: Catalog) -> dict[str, FeatureCounts]:
    rows = session.arrow(
        "SELECT set_id, count(*) AS num_chains, sum(num_stored)::BIGINT AS num_tokens FROM features"
        " GROUP BY set_id ORDER BY set_id"
    ).to_pylist()
    sizes: Counter[str] = Counter()
    for file in catalog.features.files() if catalog.features is not None else []:
        sizes[file.owner] += file.size_bytes
    return {set_id: FeatureCounts(size_bytes=sizes[set_id], **row) for row in rows if (set_id := row.pop("set_id"))}


def _loops(session: Session, num_tokens: int) -> list[dict[str, Any]]:
    """Numbers of chains read, and of loops among them, by source, split and run."""
    # Chosen by hash: the same chains each time, spread over all sources.
    every = max(1, num_tokens // LOOP_TOKENS)
    rows: list[dict[str, Any]] = session.arrow(
        f"SELECT source, split, run_id, count(*) AS num, count(*) FILTER (repeated_frac > {LOOP_FRAC}) AS num_loops"
        f" FROM chains WHERE hash(sample_id) % {every} = 0 GROUP BY ALL"
    ).to_pylist()
    return rows


def _loop_frac(loops: Sequence[dict[str, Any]]) -> float | None:
    num = sum(row["num"] for row in loops)
    return sum(row["num_loops"] for row in loops) / num if num else None


def _grouped(session: Session, column: str, loops: Sequence[dict[str, Any]]) -> dict[str, Counts]:
    table: pa.Table = session.arrow(
        f"SELECT {column} AS name, {_COUNTS} FROM chains GROUP BY {column} ORDER BY {column}"
    )
    groups = {row.pop("name"): row for row in table.to_pylist()}
    own = {name: [row for row in loops if row[column] == name] for name in groups}
    return {name: Counts(**row, loop_frac=_loop_frac(own[name])) for name, row in groups.items()}


def _aligned(title: str, groups: dict[str, Counts]) -> list[str]:
    rows = [[title, "chains", "tokens", "mean length", "truncated", "loops", "right", "entropy (nats)"]]
    for name, counts in groups.items():
        rows.append(
            [
                one_line(name),
                f"{counts.num_chains:,}",
                format_count(counts.num_tokens),
                f"{counts.mean_num_tokens:.0f}",
                _share(counts.num_truncated, counts.num_chains),
                "-" if counts.loop_frac is None else f"{counts.loop_frac:.1%}",
                "-" if counts.pass_rate is None else f"{counts.pass_rate:.1%}",
                "-" if counts.mean_entropy is None else f"{counts.mean_entropy:.3f}",
            ]
        )
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            pad(cell, size, right=number > 0) for number, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
