"""What building a cache took, as pieces of its report: time, money, failed requests, bytes.

In: a session on the cache. Out: charts and numbers.
"""

import numpy as np

from shared.charts import Line, bars, line_chart
from shared.log import format_bytes, format_plural
from shared.report import Figure, Number, Numbers, Piece, Table, format_span
from shared.sql import Session
from teacher_cache.ask.stats import SIGNAL_COLUMNS, CacheStats

NUM_TIME_BINS = 60

PAUSE_S = 600
"""A worker that finished no chain for longer was not running."""


def throughput(session: Session) -> list[Piece]:
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
    svg = line_chart(
        [Line("", centers, rates)], f"{unit} since the first chain", "completion tokens a second", from_zero=True
    )
    title = f"{rates.mean():,.0f} tokens a second over {format_span(seconds)}"
    return [Figure(title, svg, f"Tokens of the chains that finished in each {bin_s:,.3g} s, from {span['began']}.")]


def cost(session: Session, stats: CacheStats, price_per_hour: float | None) -> list[Piece]:
    """Worker time so far, and what a million more tokens would take."""
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
        Number(
            "worker time so far",
            format_span(busy["seconds"]),
            f"of {format_plural(busy['n'], 'worker')}, without pauses",
        ),
        Number("a worker's rate", f"{rate:,.0f} tok/s", "completion tokens"),
        Number("time for a million more tokens", format_span(per_million), "with one worker at this rate"),
        Number(
            "space for a million more tokens",
            format_bytes(1e6 * (stats.bytes_per_token or 0)),
            f"at {stats.bytes_per_token or 0:.1f} B a token",
        ),
    ]
    if price_per_hour is not None:
        numbers += [
            Number("cost so far", f"{hours * price_per_hour:,.2f}", f"at {price_per_hour:g} a worker-hour"),
            Number(
                "price of a million more tokens",
                f"{per_million / 3600 * price_per_hour:,.2f}",
                "at this rate and price",
            ),
        ]
    return [Numbers(numbers)]


def failures(session: Session, stats: CacheStats) -> list[Piece]:
    """Reasons of requests that have no answer, with an example of each."""
    if not stats.failures:
        return []
    told = session.arrow("SELECT reason, min(message) AS message FROM failures GROUP BY reason").to_pylist()
    messages = {row["reason"]: row["message"] for row in told}
    rows = [[reason, f"{num:,}", one_line_of(messages[reason])] for reason, num in stats.failures.items()]
    return [Table("Requests that failed", ["reason", "samples", "for example"], rows, right=frozenset({1}))]


def storage(session: Session, stats: CacheStats) -> list[Piece]:
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
    texts = [f"{each:.2f} B, {_small_percent(size / total)}" for each, size in zip(per_token, sizes, strict=True)]
    signals = sum(row["bytes"] for row in rows if row["column_name"] in SIGNAL_COLUMNS)
    largest = f"“{top[0]['column_name']}” takes {100 * top[0]['bytes'] / total:.0f}% of the bytes"
    title = f"{largest}, all columns of distributions together {100 * signals / total:.0f}%"
    note = "Compressed size in the shards over completion tokens; what Parquet adds around the columns is left out."
    return [Figure(title, bars(names, per_token, texts, "bytes a completion token"), note, is_tall=True)]


def one_line_of(text: str | None) -> str:
    """The beginning of a text, in one line."""
    line = " ".join((text or "").split())
    return line[:90] + ("…" if len(line) > 90 else "")


def _small_percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"
