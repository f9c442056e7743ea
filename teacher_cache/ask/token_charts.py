"""Charts of single tokens: how sure the teacher was along the chain, how many candidates that took, where it hesitates.

In: a sample of decoded signals. Out: figures. Everything is computed over arrays of tokens.

Shape legend: T sampled tokens, B bins of positions.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.catalog import Catalog
from shared.charts import Group, Line, bars, histogram, line_chart
from shared.report import Figure
from shared.storage import open_parquet
from teacher_cache.ask.signal_sample import SignalSample

Array = npt.NDArray[Any]

NUM_POSITION_BINS = 48
MIN_TOKENS_IN_BIN = 20
"""A bin with fewer tokens is left out: its quantiles would be noise."""

MIN_OCCURRENCES = 20
NUM_PIECES = 14


def token_figures(catalog: Catalog, sample: SignalSample) -> Iterator[Figure]:
    """The charts that the sample has enough tokens for."""
    bins_T, centers_B = _position_bins(sample)
    yield from _entropy_along(sample, bins_T, centers_B)
    yield from _tail_along(sample, bins_T, centers_B)
    yield _top1(sample)
    yield _supports(sample)
    yield from _hesitations(catalog, sample)


def _entropy_along(sample: SignalSample, bins_T: Array, centers_B: Array) -> Iterator[Figure]:
    kept_B, quantiles = _by_bin(sample.entropy_T, bins_T, len(centers_B))
    if len(kept_B) < 2:
        return
    x = centers_B[kept_B]
    lines = [
        Line("mean", x, quantiles["mean"], quantiles["p10"], quantiles["p90"]),
        Line("median", x, quantiles["p50"]),
    ]
    start, later = quantiles["mean"][0], float(np.mean(quantiles["mean"][1:]))
    if start > 1.15 * later:
        title = f"The teacher is least sure at the start: {start:.2f} nats there, {later:.2f} later"
    elif start < later / 1.15:
        title = f"The teacher gets less sure as it goes: {start:.2f} nats at the start, {later:.2f} later"
    else:
        title = f"The teacher is about as sure all along: {float(np.mean(sample.entropy_T)):.2f} nats a token"
    svg = line_chart(lines, "position in the chain (tokens)", "entropy (nats)", from_zero=True)
    yield Figure(title, svg, "The band holds the tokens between the 10th and 90th percentile.")


def _tail_along(sample: SignalSample, bins_T: Array, centers_B: Array) -> Iterator[Figure]:
    kept_B, quantiles = _by_bin(sample.tail_mass_T, bins_T, len(centers_B))
    if len(kept_B) < 2:
        return
    x = centers_B[kept_B]
    mean = float(np.mean(sample.tail_mass_T))
    lines = [Line("mean", x, 100 * quantiles["mean"]), Line("90th percentile", x, 100 * quantiles["p90"])]
    svg = line_chart(lines, "position in the chain (tokens)", "outside the candidates (%)", from_zero=True)
    note = "What the cache keeps only as a sum."
    if len(draws_T := sample.draws_T[sample.draws_T > 0]):
        share = len(draws_T) / len(sample.draws_T)
        note = f"What the cache keeps as a sum; on {share:.0%} of the tokens also {draws_T.mean():.0f} draws from it."
    yield Figure(f"The stored candidates hold {1 - mean:.2%} of the probability", svg, note)


def _top1(sample: SignalSample) -> Figure:
    sure = float(np.mean(sample.top1_prob_T >= 0.9))
    svg = histogram(
        [Group("", 100 * sample.top1_prob_T)], "probability of the first choice (%)", "share of tokens (%)", num_bins=25
    )
    return Figure(f"On {sure:.0%} of the tokens the first choice has at least 90%", svg)


def _supports(sample: SignalSample) -> Figure:
    mean, full = float(np.mean(sample.support_T)), float(np.mean(sample.support_T >= sample.max_support))
    svg = histogram([Group("", sample.support_T)], "stored candidates", "share of tokens (%)", num_bins=64)
    title = f"For each token {mean:.1f} candidates are stored on average"
    return Figure(
        title,
        svg,
        f"The likeliest tokens at that place, with their probabilities. {full:.0%} of the places have the most, "
        f"{sample.max_support}.",
    )


def _hesitations(catalog: Catalog, sample: SignalSample) -> Iterator[Figure]:
    """Tokens before which the distribution was widest, on average over their occurrences."""
    ids, inverse_T, counts = np.unique(sample.token_ids_T, return_inverse=True, return_counts=True)
    means = np.bincount(inverse_T, weights=sample.entropy_T) / counts
    common = np.flatnonzero(counts >= MIN_OCCURRENCES)
    pieces = _pieces(catalog)
    if len(common) < NUM_PIECES or not pieces:
        return
    top = common[np.argsort(-means[common], kind="stable")][:NUM_PIECES]
    names = [f"“{visible(pieces.get(int(ids[index]), str(ids[index])))}”" for index in top]
    texts = [f"{means[index]:.2f} nats, {counts[index]:,}×" for index in top]
    svg = bars(names, means[top], texts, "mean entropy of the choice (nats)")
    yield Figure(
        f"The teacher hesitates most where it goes on with {names[0]}",
        svg,
        f"How unsure it was before the token, and how often that occurs: {MIN_OCCURRENCES} times or more.",
        is_tall=True,
    )


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
    with open_parquet(paths[0]) as file:
        table = file.read(columns=["token_id", "piece"])
    return dict(zip(table.column("token_id").to_pylist(), table.column("piece").to_pylist(), strict=True))


def visible(piece: str) -> str:
    """The piece with its blanks and line breaks to be seen."""
    for blank, sign in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("\r", "␍")):
        piece = piece.replace(blank, sign)
    return piece
