"""`teacher-cache report`: what a cache holds, as sections of a self-contained HTML page.

In: a cache. Out: numbers, charts and tables. Chains are read by their scalars. Only the charts of single tokens decode
distributions, in whole row groups spread over the shards, up to two million tokens, and the page says so.

Shape legend: T sampled tokens, R sampled chains, B bins of positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard, read_signals
from stillroom.html.charts import Group, Line, bars, histogram, line_chart
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, format_span, write_report
from stillroom.log import format_bytes, format_count, format_plural
from stillroom.models import cached_pieces
from stillroom.schema.records import Float32, Int32, Int64
from stillroom.sql.session import Session, open_session
from teacher_cache.inspect.stats import SIGNAL_COLUMNS, CacheStats, session_stats

Array = npt.NDArray[Any]

MAX_VALUES = 50_000
"""Chains in a histogram; more would not change its shares."""
MIN_COMPARED = 20
"""Right and wrong chains are drawn apart from this many of each on."""
MAX_BARS = 20
SHOWN_ID = 12
"""Characters of a sample's id: `show` accepts a prefix."""
NUM_TIME_BINS = 60
MAX_SHARDS = 24
MAX_TOKENS = 2_000_000
NUM_POSITION_BINS = 48
MIN_TOKENS_IN_BIN = 20
"""A bin with fewer tokens is left out: its quantiles would be noise."""
MIN_OCCURRENCES = 20
NUM_PIECES = 14


@dataclass(frozen=True)
class SignalSample:
    """Arrays over the sampled tokens, and what part of the cache they are of.

    token_ids_T, position_T (0 is the first token of its chain), entropy_T in nats, top1_prob_T, tail_mass_T, support_T,
    draws_T (tokens drawn from the tail); num_tokens_R the lengths of the chains. `entropy` is the shards' word on what
    it is of: `exact` or `support`.
    """

    token_ids_T: Int32
    position_T: Int64
    entropy_T: Float32
    top1_prob_T: Float32
    tail_mass_T: Float32
    support_T: Int32
    draws_T: Int32
    num_tokens_R: Int64
    max_support: int
    entropy: str
    is_whole: bool


def sample_signals(catalog: Catalog, max_tokens: int = MAX_TOKENS) -> SignalSample | None:
    """Decodes row groups until `max_tokens`. None where the cache holds no chain. Raises CorruptError."""
    files = catalog.chains.files()
    if not files:
        return None
    step = max(1, -(-len(files) // MAX_SHARDS))
    # Files are in the order of their paths, so every nth one spreads the sample over runs and workers.
    chosen = files[::step]
    parts: list[dict[str, np.ndarray]] = []
    num_tokens, max_support, entropy, is_whole = 0, 0, "exact", len(chosen) == len(files)
    for number, data_file in enumerate(chosen):
        path = catalog.chains.path_of(data_file)
        shard, header = open_shard(path)
        max_support = max(max_support, header.max_support)
        entropy = header.entropy if header.entropy != "exact" else entropy
        # A share for each shard, so that the first ones do not use up all of it.
        budget = max_tokens * (number + 1) // len(chosen)
        with shard:
            for group in range(shard.num_row_groups):
                if num_tokens >= budget:
                    is_whole = False
                    break
                table, signals, offsets = read_signals(shard, header, group, ["token_ids"], str(path))
                starts_T = np.cumsum(signals.topk_n_T, dtype=np.int64) - signals.topk_n_T
                lengths_R = np.diff(offsets)
                parts.append(
                    {
                        "token_ids_T": table.column("token_ids").combine_chunks().flatten().to_numpy(),
                        "position_T": np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths_R),
                        "entropy_T": signals.entropy_T,
                        "top1_prob_T": np.exp(signals.topk_logprobs_N[starts_T]),
                        "tail_mass_T": np.exp(signals.tail_logmass_T),
                        "support_T": signals.topk_n_T,
                        "draws_T": np.zeros_like(signals.topk_n_T) if signals.draws is None else signals.draws.n_T,
                        "num_tokens_R": lengths_R,
                    }
                )
                num_tokens += int(offsets[-1])
    if not parts:
        return None
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return SignalSample(**arrays, max_support=max_support, entropy=entropy, is_whole=is_whole)


def write_cache_report(catalog: Catalog, out: Path, price_per_hour: float | None = None) -> None:
    """Writes the page. `price_per_hour` is what one worker costs an hour, in any currency."""
    write_report(out, f"Teacher cache {catalog.root.resolve().name}", cache_sections(catalog, price_per_hour))


def cache_sections(catalog: Catalog, price_per_hour: float | None = None) -> list[Section]:
    """The report's sections, to stand alone or beside others."""
    with open_session(catalog) as session:
        stats = session_stats(session, catalog, price_per_hour)
        sample = sample_signals(catalog)
        pieces: dict[str, list[Piece]] = {
            "The cache": [_overview(stats), *_runs(session)],
            "Chains": [*_lengths(session, stats), *_pass_rates(stats), *_truncation(stats)],
            "Certainty": [] if sample is None else list(_token_figures(catalog, sample)),
            "Building": [*_throughput(session), *_cost(stats), *_failures(session, stats), *_scrubbed(stats)],
            "Storage": _storage(session, stats),
            "Chains to look at": _examples(session, catalog),
        }
    intros = {"Certainty": "" if sample is None else _sample_note(sample, stats)}
    return [Section(title, parts, intros.get(title, "")) for title, parts in pieces.items() if parts]


def _overview(stats: CacheStats) -> Piece:
    judged = f"of {stats.num_judged:,} judged" if stats.num_judged else "nothing judged yet"
    signals = (
        "" if stats.signal_bytes_per_token is None else f"{stats.signal_bytes_per_token:.1f} of them distributions"
    )
    mean = "" if stats.mean_num_tokens is None else f", {stats.mean_num_tokens:,.0f} a chain"
    return Numbers(
        [
            Number("chains", f"{stats.num_chains:,}", f"of {format_plural(stats.num_prompts, 'prompt')}"),
            Number("tokens", format_count(stats.num_tokens), f"of completions{mean}"),
            Number("answers right", _percent(stats.pass_rate), judged),
            Number(
                "truncated",
                _percent(stats.num_truncated / stats.num_chains if stats.num_chains else None),
                format_plural(stats.num_truncated, "chain"),
            ),
            Number("mean entropy", _unit(stats.mean_entropy, "", 2), "nats per token"),
            Number("mean tail mass", _percent(stats.mean_tail_mass, 2), "outside the stored candidates"),
            Number("bytes per token", _unit(stats.bytes_per_token, "B", 1), signals),
            Number("on disk", format_bytes(stats.shard_bytes), format_plural(stats.num_shards, "shard")),
            Number("unanswered", f"{stats.num_failed:,}", "failed requests"),
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
    return [Table("Runs", columns, cells, right=frozenset({5, 6}), long=frozenset({1}))] if cells else []


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
    chart = histogram(
        groups if len(groups) == 2 else [Group("", lengths[""])], "completion tokens", "share of chains (%)"
    )
    return [Figure("Length of chains", chart, "The last bin holds the longest 0.5% of chains.")]


def _pass_rates(stats: CacheStats) -> list[Piece]:
    rates = {name: counts for name, counts in stats.by_source.items() if counts.pass_rate is not None}
    ordered = sorted(rates.items(), key=lambda item: -(item[1].pass_rate or 0))
    if not ordered:
        return []
    shown = ordered if len(ordered) <= MAX_BARS else [*ordered[: MAX_BARS // 2], *ordered[-MAX_BARS // 2 :]]
    note = "" if shown is ordered else f"The best and worst {MAX_BARS // 2} of {len(ordered)} sources."
    chart = bars(
        [name for name, _ in shown],
        [100 * (counts.pass_rate or 0) for _, counts in shown],
        [f"{_percent(counts.pass_rate)} of {counts.num_judged:,}" for _, counts in shown],
        "chains judged correct (%)",
        limit=100,
    )
    return [Figure("Pass rate by source", chart, note)]


def _truncation(stats: CacheStats) -> list[Piece]:
    cut = {name: counts for name, counts in stats.by_source.items() if counts.num_truncated}
    ordered = sorted(cut.items(), key=lambda item: -item[1].num_truncated / item[1].num_chains)[:MAX_BARS]
    if not ordered:
        return []
    shares = [100 * counts.num_truncated / counts.num_chains for _, counts in ordered]
    texts = [f"{share:.1f}% of {counts.num_chains:,}" for share, (_, counts) in zip(shares, ordered, strict=True)]
    chart = bars([name for name, _ in ordered], shares, texts, "chains cut by the token limit (%)", limit=100)
    return [Figure("Truncation by source", chart)]


def _sample_note(sample: SignalSample, stats: CacheStats) -> str:
    total = format_count(stats.num_tokens)
    of = (
        f"all {total} tokens"
        if sample.is_whole
        else f"a sample of {format_count(len(sample.token_ids_T))} of {total} tokens"
    )
    kind = "" if sample.entropy == "exact" else " Here it covers the captured candidates, a lower bound."
    return f"From {of}. An entropy of 0.69 nats (log 2) means a choice between two equally likely tokens.{kind}"


def _token_figures(catalog: Catalog, sample: SignalSample) -> Iterator[Figure]:
    """The charts that the sample has enough tokens for."""
    bins_T, centers_B = _position_bins(sample)
    x_label = "position in the chain (tokens)"
    kept_B, quantiles = _by_bin(sample.entropy_T, bins_T, len(centers_B))
    if len(kept_B) > 1:
        x = centers_B[kept_B]
        mean = Line("mean", x, quantiles["mean"], quantiles["p10"], quantiles["p90"])
        chart = line_chart([mean, Line("median", x, quantiles["p50"])], x_label, "entropy (nats)", from_zero=True)
        title = f"Entropy along the chain: {np.mean(sample.entropy_T):.2f} nats on average"
        yield Figure(title, chart, "The band holds the tokens between the 10th and 90th percentile.")
    kept_B, quantiles = _by_bin(sample.tail_mass_T, bins_T, len(centers_B))
    if len(kept_B) > 1:
        x = centers_B[kept_B]
        lines = [Line("mean", x, 100 * quantiles["mean"]), Line("90th percentile", x, 100 * quantiles["p90"])]
        chart = line_chart(lines, x_label, "tail mass (%)", from_zero=True)
        note = "Probability outside the stored candidates, kept as one number per token."
        if len(draws_T := sample.draws_T[sample.draws_T > 0]):
            share = len(draws_T) / len(sample.draws_T)
            note += f" {share:.0%} of the tokens also have {draws_T.mean():.0f} draws from it."
        yield Figure(f"Tail mass along the chain: {np.mean(sample.tail_mass_T):.2%} on average", chart, note)
    chart = histogram(
        [Group("", 100 * sample.top1_prob_T)], "probability of the first choice (%)", "share of tokens (%)", num_bins=25
    )
    sure = float(np.mean(sample.top1_prob_T >= 0.9))
    yield Figure(f"First choice: at least 90% probability on {sure:.0%} of the tokens", chart)
    full = float(np.mean(sample.support_T >= sample.max_support))
    chart = histogram([Group("", sample.support_T)], "stored candidates", "share of tokens (%)", num_bins=64)
    note = f"{full:.0%} of the tokens have the maximum of {sample.max_support}."
    yield Figure(f"Support: {np.mean(sample.support_T):.1f} candidates per token", chart, note)
    yield from _hesitations(catalog, sample)


def _hesitations(catalog: Catalog, sample: SignalSample) -> Iterator[Figure]:
    """Tokens with the highest mean entropy of the choice that produced them."""
    ids, inverse_T, counts = np.unique(sample.token_ids_T, return_inverse=True, return_counts=True)
    means = np.bincount(inverse_T, weights=sample.entropy_T) / counts
    common = np.flatnonzero(counts >= MIN_OCCURRENCES)
    pieces = _pieces(catalog)
    if len(common) < NUM_PIECES or not pieces:
        return
    top = common[np.argsort(-means[common], kind="stable")][:NUM_PIECES]
    names = [f"“{visible(pieces.get(int(ids[index]), str(ids[index])))}”" for index in top]
    texts = [f"{means[index]:.2f} nats, {counts[index]:,}×" for index in top]
    chart = bars(names, means[top], texts, "mean entropy (nats)")
    note = f"Mean entropy of the choice that produced the token, and its count ({MIN_OCCURRENCES} or more)."
    yield Figure("Least certain tokens", chart, note, is_tall=True)


def _position_bins(sample: SignalSample) -> tuple[Array, Array]:
    """Bin of each token (-1 past the last) and the bins' centres; the last ends where one chain in ten is left."""
    end = max(int(np.quantile(sample.num_tokens_R, 0.9)), 2)
    width = max(1, -(-end // NUM_POSITION_BINS))
    num_bins = -(-end // width)
    bins_T = sample.position_T // width
    centers_B = (np.arange(num_bins) + 0.5) * width
    return np.where(bins_T < num_bins, bins_T, -1), centers_B


def _by_bin(values_T: Array, bins_T: Array, num_bins: int) -> tuple[Array, dict[str, Array]]:
    """Bins with enough tokens, and the mean and quantiles of each."""
    order = np.argsort(bins_T, kind="stable")
    bounds = np.searchsorted(bins_T[order], np.arange(num_bins + 1))
    kept, rows = [], []
    for index in range(num_bins):
        inside = values_T[order[bounds[index] : bounds[index + 1]]]
        if len(inside) >= MIN_TOKENS_IN_BIN:
            kept.append(index)
            rows.append([float(inside.mean(dtype=np.float64)), *np.quantile(inside, (0.1, 0.5, 0.9))])
    columns = np.array(rows, float).reshape(len(rows), 4)
    return np.array(kept, int), {name: columns[:, i] for i, name in enumerate(("mean", "p10", "p50", "p90"))}


def _pieces(catalog: Catalog) -> dict[int, str]:
    paths = catalog.vocab_paths()
    if len(paths) != 1:
        # Ids of several tokenizers mean several things: no one name would be right.
        return {}
    return cached_pieces(paths[0])[0]


def visible(piece: str) -> str:
    """The piece with its blanks and line breaks to be seen."""
    for blank, sign in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("\r", "␍")):
        piece = piece.replace(blank, sign)
    return piece


def _throughput(session: Session) -> list[Piece]:
    """Tokens a second over the time that the cache was built."""
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
    chart = line_chart(
        [Line("", centers, rates)], f"{unit} since the first chain", "completion tokens per second", from_zero=True
    )
    title = f"Throughput: {rates.mean():,.0f} tokens per second over {format_span(seconds)}"
    return [Figure(title, chart, f"Tokens of chains finished in each {bin_s:,.3g} s, from {span['began']}.")]


def _cost(stats: CacheStats) -> list[Piece]:
    """Worker time so far, and what a million more tokens would take."""
    busy_s = stats.usage.worker_seconds
    if busy_s < 1:
        return []
    rate = stats.num_tokens / busy_s
    numbers = [
        Number(
            "worker time so far",
            format_span(busy_s),
            f"of {format_plural(stats.usage.num_workers, 'worker')}; loading and long pauses excluded",
        ),
        Number("a worker's rate", f"{rate:,.0f} tok/s", "completion tokens"),
        Number("time for a million more tokens", format_span(1e6 / rate), "with one worker at this rate"),
        Number(
            "space for a million more tokens",
            format_bytes(1e6 * (stats.bytes_per_token or 0)),
            f"at {stats.bytes_per_token or 0:.1f} B per token",
        ),
    ]
    if stats.cost is not None:
        price, each = stats.cost.per_million_tokens or 0, stats.cost.per_right_answer
        numbers += [
            Number("cost so far", f"{stats.cost.cost:,.2f}", f"at {stats.cost.price_per_hour:g} a worker-hour"),
            Number("price of a million more tokens", f"{price:,.2f}", "at this rate and price"),
            Number("cost of a right answer", "-" if each is None else f"{each:.6f}", "of the teacher's"),
        ]
    return [Numbers(numbers)]


def _failures(session: Session, stats: CacheStats) -> list[Piece]:
    """Reasons of failed requests, with an example of each."""
    if not stats.failures:
        return []
    found = session.arrow("SELECT reason, min(message) AS message FROM failures GROUP BY reason").to_pylist()
    messages = {row["reason"]: row["message"] for row in found}
    rows = [[reason, f"{num:,}", _first_line(messages[reason])] for reason, num in stats.failures.items()]
    return [Table("Failed requests", ["reason", "samples", "for example"], rows, right=frozenset({1}))]


def _scrubbed(stats: CacheStats) -> list[Piece]:
    """Personal data in prompts, by kind."""
    if not stats.scrubbed:
        return []
    rows = [[kind, f"{num:,}"] for kind, num in stats.scrubbed.items()]
    note = "" if stats.scrubbed_sample is None else f"As in: {_first_line(stats.scrubbed_sample)}"
    return [Table("Personal data replaced in prompts", ["kind", "times"], rows, note, right=frozenset({1}))]


def _storage(session: Session, stats: CacheStats) -> list[Piece]:
    """Bytes a token by column."""
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
    shares = [f"{size / total:.0%}" if size >= 0.01 * total else "<1%" for size in sizes]
    texts = [f"{each:.2f} B, {share}" for each, share in zip(per_token, shares, strict=True)]
    signals = sum(row["bytes"] for row in rows if row["column_name"] in SIGNAL_COLUMNS)
    title = f"Bytes by column: distributions take {100 * signals / total:.0f}%"
    note = "Compressed size of the columns over completion tokens, without Parquet's own overhead."
    return [Figure(title, bars(names, per_token, texts, "bytes per completion token"), note, is_tall=True)]


def _first_line(text: str | None) -> str:
    """The beginning of a text, in one line."""
    line = " ".join((text or "").split())
    return line[:90] + ("…" if len(line) > 90 else "")


def _examples(session: Session, catalog: Catalog) -> list[Piece]:
    wanted = (
        ("Longest", "num_tokens DESC"),
        ("Least certain: highest mean entropy", "mean_entropy DESC"),
        ("Most certain: lowest mean entropy", "mean_entropy"),
        ("Least likely: lowest mean log probability", "mean_logprob"),
        ("Wrong and most certain", "mean_entropy"),
    )
    rows = []
    for label, order in wanted:
        condition = "WHERE NOT correct" if label.startswith("Wrong") else ""
        found: list[dict[str, Any]] = session.arrow(
            "SELECT sample_id, source, num_tokens, mean_entropy, correct, prompt FROM chains"
            f" {condition} ORDER BY {order}, sample_id LIMIT 1"
        ).to_pylist()
        for row in found:
            verdict = {True: "right", False: "wrong", None: "not judged"}[row["correct"]]
            rows.append(
                [label, row["sample_id"][:SHOWN_ID], row["source"], verdict, f"{row['num_tokens']:,}",
                 f"{row['mean_entropy']:.3f}", _first_line(row["prompt"])]
            )  # fmt: skip
    if not rows:
        return []
    columns = ["chain", "sample", "source", "verdict", "tokens", "entropy (nats)", "prompt"]
    note = f"Read one token by token: teacher-cache show {catalog.root} {rows[0][1]} --html chain.html"
    return [Table("Extremes", columns, rows, note, right=frozenset({4, 5}), long=frozenset({6}))]


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _unit(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}".rstrip()
