"""Charts for HTML reports: titles and legends are left to the page, lines carry their own names, axes their units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.chart_labels import (
    CHAR_PT,
    End,
    Mark,
    name_lines,
    name_marks,
    pixels_per_point,
    plain_ticks,
    shortened,
)
from shared.drawing import GRID, INK, MUTED, Drawing, color_of, series_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]
Numbers = Sequence[float] | Array

MAX_MARKED = 12
"""A line of so few points shows each of them."""

MAX_BANDS = 3


@dataclass(frozen=True)
class Line:
    """A named line: y over x, and a band between low and high where given. Lines of one `series` have one colour on all
    charts; None takes the line's place on this one.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    series: int | None = None


@dataclass(frozen=True)
class Group:
    """A named set of values for a histogram."""

    name: str
    values: Numbers


@dataclass(frozen=True)
class Change:
    """One measure before and after; `text` says both with their unit. Bars are full at `limit`; None is the larger."""

    name: str
    before: float
    after: float
    text: str
    limit: float | None = None


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
) -> Drawing:
    """Lines with bands, each named at its own end, and places on the x axis with their names above."""

    def draw(axes: "Axes") -> None:
        numbers = [place if line.series is None else line.series for place, line in enumerate(lines)]
        for number, line in zip(numbers, lines, strict=True):
            color = series_color(number)
            axes.plot(line.x, line.y, color=color, marker="o" if len(line.x) <= MAX_MARKED else "", markersize=4.5)
            # Bands of many lines would hide one another.
            if len(lines) <= MAX_BANDS and line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        if log_y:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        plain_ticks(axes.xaxis)
        if not log_y:
            plain_ticks(axes.yaxis)
        name_marks(axes, marks)
        if len(lines) > 1 or lines[0].name:
            ends = zip(numbers, lines, strict=True)
            name_lines(axes, [End(line.name, number, float(line.x[-1]), float(line.y[-1])) for number, line in ends])

    return Drawing(draw)


def histogram(groups: Sequence[Group], x_label: str, y_label: str = "share (%)", *, num_bins: int = 40) -> Drawing:
    """Shares of each group's values by bin, each group's median marked and named."""
    everything = np.concatenate([np.asarray(group.values, float) for group in groups])
    low, high = float(everything.min()), float(np.quantile(everything, 0.995))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = _edges(everything, low, high, num_bins)

    def draw(axes: "Axes") -> None:
        for number, group in enumerate(groups):
            values = np.clip(np.asarray(group.values, float), edges[0], edges[-1])
            counts, _ = np.histogram(values, edges)
            shares = 100 * counts / max(len(values), 1)
            axes.stairs(shares, edges, fill=True, color=series_color(number), alpha=0.28)
            axes.stairs(shares, edges, color=series_color(number), linewidth=1.6)
        axes.set_ylim(0, axes.get_ylim()[1] * (1.12 + 0.1 * len(groups)))
        axes.margins(x=0.01)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        plain_ticks(axes.xaxis)
        _name_medians(axes, groups, edges)

    return Drawing(draw)


def bars(
    names: Sequence[str], values: Numbers, texts: Sequence[str], x_label: str, *, limit: float | None = None
) -> Drawing:
    """Horizontal bars, the first on top, each with its text at the end. `limit` fixes the end of the axis."""

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(names))
        axes.barh(rows, values, height=0.62, color=series_color(0), alpha=0.85)
        end = limit if limit is not None else max([*map(float, values), 1e-12])
        axes.set_yticks(rows, [shortened(name) for name in names])
        axes.tick_params(axis="y", labelcolor=color_of(INK))
        axes.invert_yaxis()
        # Room for the texts, which stand right of the bars.
        text_chars = max(map(len, texts), default=0)
        per_pt = pixels_per_point(axes)
        plot_pt = axes.get_window_extent().width / per_pt
        axes.set_xlim(0, end / (1 - min(0.6, (CHAR_PT * text_chars + 8) / plot_pt)))
        for row, value, text in zip(rows, values, texts, strict=True):
            place = (min(float(value), end), row)
            axes.annotate(text, place, (4, 0), textcoords="offset points", va="center").set_in_layout(False)
        axes.set_xlabel(x_label)
        axes.grid(visible=False)
        plain_ticks(axes.xaxis)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end * 1.001])

    return Drawing(draw, height_in=0.95 + 0.36 * len(names))


def before_after(changes: Sequence[Change]) -> Drawing:
    """Each measure on its own scale from zero: a grey bar before, a coloured one after, and what that was in words. A
    scale that is fixed is drawn as a frame.
    """

    def draw(axes: "Axes") -> None:
        for row, change in enumerate(changes):
            largest = change.limit or max(abs(change.before), abs(change.after), 1e-12)
            if change.limit is not None:
                axes.barh(row + 0.25, 1, height=0.42, fill=False, edgecolor=color_of(GRID), linewidth=1)
            axes.barh(row + 0.14, change.before / largest, height=0.2, color=color_of(MUTED), alpha=0.55)
            axes.barh(row + 0.36, change.after / largest, height=0.2, color=series_color(0))
            axes.text(0, row - 0.06, change.name, va="bottom", fontweight="bold")
            axes.text(1.18, row - 0.06, change.text, va="bottom", ha="right")
            for offset, value, word in ((0.14, change.before, "before"), (0.36, change.after, "after")):
                axes.annotate(
                    word, (value / largest, row + offset), (4, 0), textcoords="offset points", va="center",
                    color=color_of(MUTED), fontsize=10,
                )  # fmt: skip
        axes.set_xlim(0, 1.18)
        axes.set_ylim(len(changes) - 0.4, -0.45)
        axes.set_axis_off()

    return Drawing(draw, height_in=0.3 + 0.78 * len(changes))


def _edges(values: Array, low: float, high: float, num_bins: int) -> Array:
    if np.array_equal(values, np.round(values)):
        # Whole numbers: bins as wide as whole numbers, or every second bin would hold one number more.
        step = max(1, int(np.ceil((high - low + 1) / num_bins)))
        return np.arange(np.floor(low), np.ceil(high) + step + 1, step) - 0.5
    return np.linspace(low, high, num_bins + 1)


def _name_medians(axes: "Axes", groups: Sequence[Group], edges: Array) -> None:
    top = axes.get_ylim()[1]
    for number, group in enumerate(groups):
        median = float(np.median(np.asarray(group.values, float)))
        height = top * (0.98 - 0.1 * number)
        axes.plot([median, median], [0, height], color=series_color(number), linewidth=1.2, linestyle=(0, (3, 2)))
        # Left of the line where the right half of the chart would be too narrow for the words.
        on_right = (median - edges[0]) < 0.55 * (edges[-1] - edges[0])
        shown = f"{median:,.0f}" if abs(median) >= 100 else f"{median:.3g}"
        text = f"{group.name}: median {shown}" if group.name else f"median {shown}"
        axes.annotate(
            text,
            (median, height),
            (5 if on_right else -5, 0),
            textcoords="offset points",
            va="top",
            ha="left" if on_right else "right",
            color=series_color(number),
        )
