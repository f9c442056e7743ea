"""`teacher-cache report`: what a cache holds, as sections of a self-contained HTML page.

In: a cache. Out: numbers, charts and tables whose titles say what they show. Chains are read by their scalars; only the
charts of single tokens decode distributions, of a sample where the cache is large, and say so.
"""

from pathlib import Path
from typing import Any

import numpy as np

from shared.catalog import Catalog
from shared.charts import Group, bars, histogram
from shared.log import format_bytes, format_count, format_plural
from shared.report import Figure, Number, Numbers, Piece, Section, Table, write_report
from shared.sql import Session, open_cache
from teacher_cache.ask.report_building import cost, failures, one_line_of, storage, throughput
from teacher_cache.ask.signal_sample import SignalSample, sample_signals
from teacher_cache.ask.stats import CacheStats, session_stats
from teacher_cache.ask.token_charts import token_figures

MAX_VALUES = 50_000
"""Histograms of chains draw so many at most; their shares do not change for that."""

MIN_COMPARED = 20
"""Right and wrong chains are compared from so many of each on: fewer say little of the rest."""

MAX_BARS = 20
SHOWN_ID = 12
"""Characters of a sample's id: `show` takes how one begins."""


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
            "Building it": [*throughput(session), *cost(session, stats, price_per_hour), *failures(session, stats)],
            "Where the bytes are": storage(session, stats),
            "Chains to look at": _examples(session, catalog),
        }
    intros = {"How sure the teacher was": _sample_note(sample, stats)}
    return [Section(title, parts, intros.get(title, "")) for title, parts in pieces.items() if parts]


def _overview(stats: CacheStats) -> Piece:
    judged = f"of {stats.num_judged:,} judged" if stats.num_judged else "nothing is judged yet"
    signals = (
        "" if stats.signal_bytes_per_token is None else f"{stats.signal_bytes_per_token:.1f} of them distributions"
    )
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
            Number("mean tail mass", _percent(stats.mean_tail_mass, 2), "probability outside the stored candidates"),
            Number("bytes a token", _unit(stats.bytes_per_token, "B", 1), signals),
            Number("on disk", format_bytes(stats.shard_bytes), format_plural(stats.num_shards, "shard")),
            Number("unanswered", f"{stats.num_failed:,}", "requests that failed and were not answered since"),
        ]
    )


def _runs(session: Session) -> list[Piece]:
    rows = session.arrow(
        "SELECT r.run_id, r.teacher, r.codec, r.kind, strftime(r.created_at, '%d %b %Y %H:%M') AS began,"
        " count(c.sample_id) AS chains, coalesce(sum(c.num_tokens), 0)::BIGINT AS tokens"
        " FROM runs r LEFT JOIN chains c USING (run_id) GROUP BY ALL ORDER BY began, r.run_id"
    ).to_pylist()
    cells = [
        [row["run_id"], row["teacher"], row["kind"], row["codec"] or "-", row["began"], f"{row['chains']:,}",
         format_count(row["tokens"])]
        for row in rows
    ]  # fmt: skip
    columns = ["run", "teacher", "kind", "codec", "began (UTC)", "chains", "tokens"]
    return [Table("Runs that wrote it", columns, cells, right=frozenset({5, 6}), long=frozenset({1}))] if cells else []


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
    title = f"“{best}”: {_percent(top.pass_rate)} right"
    if num_last == len(ordered) > 1:
        title = f"All {num_last} sources have {_percent(top.pass_rate)} right"
    elif num_last > 1:
        title = (
            f"“{best}” is easiest ({_percent(top.pass_rate)} right), {num_last} sources have "
            f"{_percent(bottom.pass_rate)}"
        )
    elif len(ordered) > 1:
        title = (
            f"“{best}” is easiest ({_percent(top.pass_rate)} right), “{worst}” hardest ({_percent(bottom.pass_rate)})"
        )
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
    title = f"“{ordered[0][0]}” runs into the token limit most often: {shares[0]:.0f}% of its chains"
    chart = bars([name for name, _ in ordered], shares, texts, "chains cut by the token limit (%)", limit=100)
    return [Figure(title, chart)]


def _certainty(catalog: Catalog, sample: SignalSample | None) -> list[Piece]:
    return list(token_figures(catalog, sample)) if sample is not None else []


def _sample_note(sample: SignalSample | None, stats: CacheStats) -> str:
    if sample is None:
        return ""
    nats = " Entropy counts what the teacher wavered between: log 2 = 0.69 nats are two tokens, each as likely."
    of = (
        nats
        if sample.entropy == "exact"
        else f"{nats} Here it is of the captured candidates, the rest counted as one: a lower bound."
    )
    if sample.is_whole:
        return f"From all {format_count(stats.num_tokens)} tokens.{of}"
    return (
        f"From a sample of {format_count(len(sample.token_ids_T))} of {format_count(stats.num_tokens)} tokens, in row "
        f"groups spread over the shards.{of}"
    )


def _examples(session: Session, catalog: Catalog) -> list[Piece]:
    wanted = (
        ("The longest", "num_tokens DESC"),
        ("The least sure: highest mean entropy", "mean_entropy DESC"),
        ("The surest: lowest mean entropy", "mean_entropy"),
        ("The least likely: lowest mean log-probability", "mean_logprob"),
        ("Wrong, and the surest of those", "mean_entropy"),
    )
    rows = []
    for words, order in wanted:
        condition = "WHERE NOT correct" if words.startswith("Wrong") else ""
        found: list[dict[str, Any]] = session.arrow(
            "SELECT sample_id, source, num_tokens, mean_entropy, correct, prompt FROM chains"
            f" {condition} ORDER BY {order}, sample_id LIMIT 1"
        ).to_pylist()
        for row in found:
            verdict = {True: "right", False: "wrong", None: "not judged"}[row["correct"]]
            rows.append(
                [words, row["sample_id"][:SHOWN_ID], row["source"], verdict, f"{row['num_tokens']:,}",
                 f"{row['mean_entropy']:.3f}", one_line_of(row["prompt"])]
            )  # fmt: skip
    if not rows:
        return []
    columns = ["chain", "sample", "source", "verdict", "tokens", "entropy (nats)", "prompt"]
    note = (
        f"To read one token by token, here the first: teacher-cache show {catalog.root} {rows[0][1]} --html chain.html"
    )
    return [Table("The extremes", columns, rows, note, right=frozenset({4, 5}), long=frozenset({6}))]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _unit(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}".rstrip()


def _mean_length(stats: CacheStats) -> str:
    return "" if stats.mean_num_tokens is None else f", {stats.mean_num_tokens:,.0f} a chain"
