"""`teacher-cache report`: what a cache holds, as sections of a self-contained HTML page.

In: a cache. Out: numbers, charts and tables whose titles say what they show. Chains are read by their scalars; only the
charts of single tokens decode distributions, of a sample where the cache is large, and say so.
"""

from pathlib import Path
from typing import Any

import numpy as np

from shared.catalog import Catalog
from shared.charts import Group, Line, bars, histogram, line_chart
from shared.log import format_bytes, format_count, format_duration, format_plural
from shared.report import Figure, Number, Numbers, Piece, Section, Table, write_report
from shared.sql import Session, open_cache
from teacher_cache.ask.signal_sample import SignalSample, sample_signals
from teacher_cache.ask.stats import SIGNAL_COLUMNS, CacheStats, session_stats
from teacher_cache.ask.token_charts import token_figures

MAX_VALUES = 50_000
"""Histograms of chains draw so many at most; their shares do not change for that."""

MIN_COMPARED = 20
"""Right and wrong chains are compared from so many of each on: fewer say little of the rest."""

MAX_BARS = 20
NUM_TIME_BINS = 60
SHOWN_ID = 12
"""Characters of a sample's id: `show` takes how one begins."""

PAUSE_S = 600
"""A worker that finished no chain for longer was not running."""


def write_cache_report(catalog: Catalog, out: Path, price_per_hour: float | None = None) -> None:
    """Writes the page. `price_per_hour` is what one worker costs an hour, in any currency."""
    write_report(out, f"Teacher cache {catalog.root.resolve().name}", cache_sections(catalog, price_per_hour))


def cache_sections(catalog: Catalog, price_per_hour: float | None = None) -> list[Section]:
    """The report's sections, to stand alone or beside others."""
    with open_cache(catalog) as session:
        stats = session_stats(session, catalog)
        sample = sample_signals(catalog)
        pieces: dict[str, list[Piece]] = {
            "The cache": [_overview(stats), *_runs(session)],
            "Chains": [*_lengths(session, stats), *pass_rate_figures(stats), *_truncation(stats)],
            "How sure the teacher was": _certainty(catalog, sample),
            "Building it": [*_throughput(session), *_cost(session, stats, price_per_hour), *_failures(session, stats)],
            "Where the bytes are": _storage(session, stats),
            "Chains to look at": _examples(session, catalog),
        }
    intros = {"How sure the teacher was": _sample_note(sample, stats)}
    return [Section(title, parts, intros.get(title, "")) for title, parts in pieces.items() if parts]


def _overview(stats: CacheStats) -> Piece:
    judged = f"of {stats.num_judged:,} judged" if stats.num_judged else "nothing is judged yet"
    signals = "" if stats.signal_bytes_per_token is None else f"{stats.signal_bytes_per_token:.1f} of them signals"
    return Numbers(
        [
            Number("chains", f"{stats.num_chains:,}", f"of {format_plural(stats.num_prompts, 'prompt')}"),
            Number("tokens", format_count(stats.num_tokens), f"of completions{_mean_length(stats)}"),
            Number("answers right", _percent(stats.pass_rate), judged),
            Number(
                "truncated",
                _percent(_ratio(stats.num_truncated, stats.num_chains)),
                format_plural(stats.num_truncated, "chain"),
            ),
            Number("mean entropy", _unit(stats.mean_entropy, "", 2), "nats a token"),
            Number("mean tail mass", _percent(stats.mean_tail_mass, 2), "outside the stored support"),
            Number("bytes a token", _unit(stats.bytes_per_token, "B", 1), signals),
            Number("on disk", format_bytes(stats.shard_bytes), format_plural(stats.num_shards, "shard")),
            Number("failed requests", f"{stats.num_failed:,}", "not answered since"),
        ]
    )


def _runs(session: Session) -> list[Piece]:
    rows = session.arrow(
        "SELECT r.run_id, r.teacher, r.codec, r.kind, strftime(r.created_at, '%d %b %Y %H:%M') AS began,"
        " count(c.sample_id) AS chains, coalesce(sum(c.num_tokens), 0)::BIGINT AS tokens"
        " FROM runs r LEFT JOIN chains c USING (run_id) GROUP BY ALL ORDER BY began, r.run_id"
    ).to_pylist()
    cells = [
        [row["run_id"], row["teacher"], row["kind"], row["codec"] or "", row["began"], f"{row['chains']:,}",
         format_count(row["tokens"])]
        for row in rows
    ]  # fmt: skip
    columns = ["run", "teacher", "kind", "codec", "began (UTC)", "chains", "tokens"]
    return [Table("Runs that wrote it", columns, cells, right=frozenset({5, 6}))] if cells else []


def _lengths(session: Session, stats: CacheStats) -> list[Piece]:
    if not stats.num_chains:
        return []
    lengths = {
        verdict: session.arrow(
            f"SELECT num_tokens FROM chains WHERE {condition} ORDER BY hash(sample_id) LIMIT {MAX_VALUES}"
        )
        .column(0)
        .to_numpy()
        for verdict, condition in (("right", "correct"), ("wrong", "NOT correct"), ("", "true"))
    }
    groups = [Group(name, values) for name, values in lengths.items() if name and len(values) >= MIN_COMPARED]
    if len(groups) == 2:
        right, wrong = (float(np.median(group.values)) for group in groups)
        title = f"Right chains are {_compared(right, wrong)}: median {right:,.0f} tokens against {wrong:,.0f}"
    else:
        groups = [Group("", lengths[""])]
        title = f"Half of the chains have {np.median(lengths['']):,.0f} tokens or more"
    svg = histogram(groups, "completion tokens of a chain", "share of chains (%)")
    return [Figure(title, svg, "The longest 0.5% of chains stand in the last bin.")]


def _compared(right: float, wrong: float) -> str:
    if right < 0.95 * wrong:
        return "shorter"
    return "longer" if right > 1.05 * wrong else "about as long as wrong ones"


def pass_rate_figures(stats: CacheStats) -> list[Figure]:
    """Pass rates by source, the best first; nothing where nothing is judged."""
    rates = {name: counts for name, counts in stats.by_source.items() if counts.pass_rate is not None}
    ordered = sorted(rates.items(), key=lambda item: -(item[1].pass_rate or 0))
    if not ordered:
        return []
    (best, top), (worst, bottom) = ordered[0], ordered[-1]
    num_last = sum(counts.pass_rate == bottom.pass_rate for _, counts in ordered)
    title = f"{best}: {_percent(top.pass_rate)} right"
    if num_last == len(ordered) > 1:
        title = f"All {num_last} sources have {_percent(top.pass_rate)} right"
    elif num_last > 1:
        title = (
            f"{best} is easiest ({_percent(top.pass_rate)} right), {num_last} sources have {_percent(bottom.pass_rate)}"
        )
    elif len(ordered) > 1:
        title = f"{best} is easiest ({_percent(top.pass_rate)} right), {worst} hardest ({_percent(bottom.pass_rate)})"
    shown = ordered if len(ordered) <= MAX_BARS else [*ordered[: MAX_BARS // 2], *ordered[-MAX_BARS // 2 :]]
    note = "" if shown is ordered else f"The best and worst {MAX_BARS // 2} of {len(ordered)} sources."
    svg = bars(
        [name for name, _ in shown],
        [100 * (counts.pass_rate or 0) for _, counts in shown],
        [f"{_percent(counts.pass_rate)} of {counts.num_judged:,}" for _, counts in shown],
        "chains judged right (%)",
        limit=100,
    )
    return [Figure(title, svg, note)]


def _truncation(stats: CacheStats) -> list[Piece]:
    cut = {name: counts for name, counts in stats.by_source.items() if counts.num_truncated}
    ordered = sorted(cut.items(), key=lambda item: -item[1].num_truncated / item[1].num_chains)[:MAX_BARS]
    if not ordered:
        return []
    shares = [100 * counts.num_truncated / counts.num_chains for _, counts in ordered]
    texts = [f"{share:.1f}% of {counts.num_chains:,}" for share, (_, counts) in zip(shares, ordered, strict=True)]
    title = f"{ordered[0][0]} runs into the token limit most often: {shares[0]:.0f}% of its chains"
    return [Figure(title, bars([name for name, _ in ordered], shares, texts, "chains cut by the token limit (%)"))]


def _certainty(catalog: Catalog, sample: SignalSample | None) -> list[Piece]:
    return list(token_figures(catalog, sample)) if sample is not None else []


def _sample_note(sample: SignalSample | None, stats: CacheStats) -> str:
    if sample is None:
        return ""
    of = (
        ""
        if sample.entropy == "exact"
        else " Entropy is of the captured candidates, the rest counted as one: a lower bound."
    )
    if sample.is_whole:
        return f"From all {format_count(stats.num_tokens)} tokens.{of}"
    return (
        f"From a sample of {format_count(len(sample.token_ids_T))} of {format_count(stats.num_tokens)} tokens, in row "
        f"groups spread over the shards.{of}"
    )


def _throughput(session: Session) -> list[Piece]:
    (span,) = session.arrow(
        "SELECT epoch(min(created_at)) AS first, epoch(max(created_at)) AS last,"
        " strftime(min(created_at), '%d %b %Y %H:%M UTC') AS began FROM chains"
    ).to_pylist()
    if span["first"] is None or span["last"] - span["first"] < 1:
        return []
    seconds = span["last"] - span["first"]
    unit_s, unit = (3600.0, "hours") if seconds > 2 * 3600 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")
    bin_s = seconds / NUM_TIME_BINS
    rows = session.arrow(
        f"SELECT least(floor((epoch(created_at) - {span['first']}) / {bin_s}), {NUM_TIME_BINS - 1})::INTEGER AS bin,"
        " sum(num_tokens)::BIGINT AS tokens FROM chains GROUP BY bin"
    ).to_pylist()
    rates = np.zeros(NUM_TIME_BINS)
    for row in rows:
        rates[row["bin"]] = row["tokens"] / bin_s
    centers = (np.arange(NUM_TIME_BINS) + 0.5) * bin_s / unit_s
    svg = line_chart(
        [Line("", centers, rates)], f"{unit} since the first chain", "completion tokens a second", from_zero=True
    )
    title = f"{rates.mean():,.0f} tokens a second over {format_duration(seconds)}"
    return [Figure(title, svg, f"Tokens of the chains that finished in each {bin_s:,.3g} s, from {span['began']}.")]


def _cost(session: Session, stats: CacheStats, price_per_hour: float | None) -> list[Piece]:
    (busy,) = session.arrow(
        f"""SELECT coalesce(sum(gap) FILTER (gap <= {PAUSE_S}), 0) AS seconds,
          count(DISTINCT run_id || '/' || worker) AS n
        FROM (SELECT run_id, worker, epoch(created_at) - epoch(lag(created_at) OVER (PARTITION BY run_id, worker
          ORDER BY created_at)) AS gap FROM chains)"""
    ).to_pylist()
    if busy["seconds"] < 1:
        return []
    hours = busy["seconds"] / 3600
    rate = stats.num_tokens / busy["seconds"]
    per_million = 1e6 / rate
    numbers = [
        Number("worker time so far", format_duration(busy["seconds"]), f"{busy['n']} workers, pauses left out"),
        Number("a worker's rate", f"{rate:,.0f} tok/s", "completion tokens"),
        Number("a million tokens more", format_duration(per_million), "of one worker, at this rate"),
        Number("and on disk", format_bytes(1e6 * (stats.bytes_per_token or 0)), "at this many bytes a token"),
    ]
    if price_per_hour is not None:
        numbers += [
            Number("cost so far", f"{hours * price_per_hour:,.2f}", f"at {price_per_hour:g} a worker-hour"),
            Number("a million tokens cost", f"{per_million / 3600 * price_per_hour:,.2f}", "at this rate and price"),
        ]
    return [Numbers(numbers)]


def _failures(session: Session, stats: CacheStats) -> list[Piece]:
    if not stats.failures:
        return []
    told = session.arrow("SELECT reason, min(message) AS message FROM failures GROUP BY reason").to_pylist()
    messages = {row["reason"]: row["message"] for row in told}
    rows = [[reason, f"{num:,}", _shortened(messages[reason])] for reason, num in stats.failures.items()]
    return [Table("Requests that failed", ["reason", "samples", "for example"], rows, right=frozenset({1}))]


def _storage(session: Session, stats: CacheStats) -> list[Piece]:
    rows = session.arrow(
        "SELECT column_name, sum(bytes)::BIGINT AS bytes FROM storage GROUP BY column_name ORDER BY bytes DESC"
    ).to_pylist()
    if not rows or not stats.num_tokens:
        return []
    total = sum(row["bytes"] for row in rows)
    top = rows[:14]
    rest = sum(row["bytes"] for row in rows[14:])
    names = [row["column_name"] for row in top] + (["all others"] if rest else [])
    sizes = [row["bytes"] for row in top] + ([rest] if rest else [])
    per_token = [size / stats.num_tokens for size in sizes]
    texts = [f"{each:.2f} B, {_small_percent(size / total)}" for each, size in zip(per_token, sizes, strict=True)]
    signals = sum(row["bytes"] for row in rows if row["column_name"] in SIGNAL_COLUMNS)
    largest = f"{top[0]['column_name']} takes {100 * top[0]['bytes'] / total:.0f}% of the bytes"
    title = f"{largest}, all signals together {100 * signals / total:.0f}%"
    note = "Compressed size in the shards over completion tokens; what Parquet adds around the columns is left out."
    return [Figure(title, bars(names, per_token, texts, "bytes a completion token"), note)]


def _examples(session: Session, catalog: Catalog) -> list[Piece]:
    wanted = (
        ("the longest", "num_tokens DESC"),
        ("the least sure", "mean_entropy DESC"),
        ("the surest", "mean_entropy"),
        ("the most surprised by itself", "mean_logprob"),
        ("wrong, and the surest of itself", "correct NULLS LAST, mean_entropy"),
    )
    rows = []
    for words, order in wanted:
        condition = "WHERE NOT correct" if words.startswith("wrong") else ""
        found: list[dict[str, Any]] = session.arrow(
            "SELECT sample_id, source, num_tokens, mean_entropy, correct, prompt FROM chains"
            f" {condition} ORDER BY {order}, sample_id LIMIT 1"
        ).to_pylist()
        for row in found:
            verdict = {True: "right", False: "wrong", None: "not judged"}[row["correct"]]
            rows.append(
                [words, row["source"], f"{row['num_tokens']:,}", f"{row['mean_entropy']:.3f}", verdict,
                 _shortened(row["prompt"]), row["sample_id"][:SHOWN_ID]]
            )  # fmt: skip
    columns = ["", "source", "tokens", "entropy (nats)", "verdict", "prompt", "sample"]
    note = f"teacher-cache show {catalog.root} SAMPLE shows one token by token."
    return [Table("By their scalars", columns, rows, note, right=frozenset({2, 3}))] if rows else []


def _shortened(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line[:90] + ("…" if len(line) > 90 else "")


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _small_percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _unit(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}".rstrip()


def _mean_length(stats: CacheStats) -> str:
    return "" if stats.mean_num_tokens is None else f", {stats.mean_num_tokens:,.0f} a chain"
