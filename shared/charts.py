"""Charts as SVG text for HTML reports, drawn by matplotlib: titles and legends are left to the page, lines carry their
own names, axes their units.

Colours are those of the page: every stroke and fill is a CSS variable, so that a chart follows light and dark. Text
stays text, in the page's font. A chart is drawn narrow, for a phone, and scales up.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Numbers = Sequence[float] | Array

WIDTH_IN, HEIGHT_IN = 5.3, 3.1
"""At 72 units an inch a phone of 390 pixels shows the labels at about 10 pixels."""

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
"""CSS variables of the lines, in order; the seventh line begins again."""

MAX_MARKED = 12
"""A line of so few points shows each of them."""

MAX_BANDS = 3

INK, MUTED, GRID = "--ink", "--muted", "--grid"

# matplotlib wants colours: each variable is drawn in a colour that nothing else has, and replaced in the SVG.
_SENTINELS = {name: f"#fe{number:02x}ef" for number, name in enumerate((*SERIES, INK, MUTED, GRID))}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stillroom",
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": _SENTINELS[GRID],
    "axes.labelcolor": _SENTINELS[MUTED],
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _SENTINELS[GRID],
    "grid.linewidth": 0.8,
    "xtick.color": _SENTINELS[GRID],
    "ytick.color": _SENTINELS[GRID],
    "xtick.labelcolor": _SENTINELS[MUTED],
    "ytick.labelcolor": _SENTINELS[MUTED],
    "ytick.major.size": 0,
    "text.color": _SENTINELS[INK],
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Line:
    """A named line: y over x, and a band between low and high where given."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Group:
    """A named set of values for a histogram."""

    name: str
    values: Numbers


@dataclass(frozen=True)
class Change:
    """One measure before and after; `text` says both with their unit."""

    name: str
    before: float
    after: float
    text: str


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, *, log_y: bool = False, from_zero: bool = False
) -> str:
    """Lines with bands, each named at its right end."""

    def draw(axes: "Axes") -> None:
        for number, line in enumerate(lines):
            color = _color(number)
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
        _thousands(axes.xaxis)
        if not log_y:
            _thousands(axes.yaxis)
        if len(lines) > 1 or lines[0].name:
            _name_lines(axes, lines)

    return _render(draw)


def histogram(groups: Sequence[Group], x_label: str, y_label: str = "share (%)", *, num_bins: int = 40) -> str:
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
            axes.stairs(shares, edges, fill=True, color=_color(number), alpha=0.28)
            axes.stairs(shares, edges, color=_color(number), linewidth=1.6)
        axes.set_ylim(0, axes.get_ylim()[1] * (1.12 + 0.1 * len(groups)))
        axes.margins(x=0.01)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _thousands(axes.xaxis)
        _name_medians(axes, groups, edges)

    return _render(draw)


def bars(
    names: Sequence[str], values: Numbers, texts: Sequence[str], x_label: str, *, limit: float | None = None
) -> str:
    """Horizontal bars, the first on top, each with its text at the end. `limit` fixes the end of the axis."""

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(names))
        axes.barh(rows, values, height=0.62, color=_color(0), alpha=0.85)
        end = limit if limit is not None else max([*map(float, values), 1e-12])
        for row, value, text in zip(rows, values, texts, strict=True):
            axes.annotate(text, (min(float(value), end), row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [_short(name) for name in names])
        axes.tick_params(axis="y", labelcolor=_SENTINELS[INK])
        axes.invert_yaxis()
        # Room for the texts, which stand right of the bars.
        axes.set_xlim(0, end * (1.12 + 0.026 * max(map(len, texts), default=0)))
        axes.set_xlabel(x_label)
        axes.grid(visible=False)
        _thousands(axes.xaxis)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end * 1.001])

    return _render(draw, height_in=0.95 + 0.36 * len(names))


def before_after(changes: Sequence[Change]) -> str:
    """Each measure on its own scale from zero: a light bar before, a full bar after, and what that was in words."""

    def draw(axes: "Axes") -> None:
        for row, change in enumerate(changes):
            largest = max(abs(change.before), abs(change.after), 1e-12)
            axes.barh(row + 0.14, change.before / largest, height=0.2, color=_SENTINELS[MUTED], alpha=0.55)
            axes.barh(row + 0.36, change.after / largest, height=0.2, color=_color(0))
            axes.text(0, row - 0.06, change.name, va="bottom", fontweight="bold")
            axes.text(1.18, row - 0.06, change.text, va="bottom", ha="right")
            for offset, value, word in ((0.14, change.before, "before"), (0.36, change.after, "after")):
                axes.annotate(
                    word, (value / largest, row + offset), (4, 0), textcoords="offset points", va="center",
                    color=_SENTINELS[MUTED], fontsize=10,
                )  # fmt: skip
        axes.set_xlim(0, 1.18)
        axes.set_ylim(len(changes) - 0.4, -0.45)
        axes.set_axis_off()

    return _render(draw, height_in=0.3 + 0.78 * len(changes))


def _render(draw: Callable[["Axes"], None], height_in: float = HEIGHT_IN) -> str:
    with _figure(height_in) as figure:
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


@contextmanager
def _figure(height_in: float) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that the measuring font lacks is still drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield Figure(figsize=(WIDTH_IN, height_in))


def _inline(svg: str) -> str:
    """The SVG element alone, scaling with its box, in the page's colours and font, without ids that could clash."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" class="chart">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([0-9.]+px|bold [0-9.]+px|[0-9]+ [0-9.]+px) [^;\"]*", _font, svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, color in _SENTINELS.items():
        svg = svg.replace(color, f"var({name})")
    return svg


def _font(match: re.Match[str]) -> str:
    *weight, size = match[1].split()
    return f"font-size: {size}" + (f"; font-weight: {weight[0]}" if weight else "")


def _color(number: int) -> str:
    return _SENTINELS[SERIES[number % len(SERIES)]]


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"


def _short(name: str, max_chars: int = 22) -> str:
    return name if len(name) <= max_chars else name[: max_chars - 1] + "…"


def _edges(values: Array, low: float, high: float, num_bins: int) -> Array:
    if np.array_equal(values, np.round(values)):
        # Whole numbers: bins as wide as whole numbers, or every second bin would hold one number more.
        step = max(1, int(np.ceil((high - low + 1) / num_bins)))
        return np.arange(np.floor(low), np.ceil(high) + step + 1, step) - 0.5
    return np.linspace(low, high, num_bins + 1)


def _name_lines(axes: "Axes", lines: Sequence[Line]) -> None:
    """Names right of the lines' ends, pushed apart where they would overlap."""
    transform = axes.transData
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    ends = [(float(line.x[-1]), float(line.y[-1])) for line in lines]
    heights = [transform.transform(end)[1] for end in ends]
    order = np.argsort(heights)
    gap = 14.0 * figure.get_dpi() / 72
    placed = -np.inf
    x_end = max(end[0] for end in ends)
    for index in order:
        height = max(heights[index], placed + gap)
        placed = height
        offset = (height - heights[index]) * 72 / figure.get_dpi()
        axes.annotate(
            _short(lines[index].name),
            (x_end, ends[index][1]),
            (5, offset),
            textcoords="offset points",
            va="center",
            color=_color(int(index)),
            annotation_clip=False,
        )


def _name_medians(axes: "Axes", groups: Sequence[Group], edges: Array) -> None:
    top = axes.get_ylim()[1]
    for number, group in enumerate(groups):
        median = float(np.median(np.asarray(group.values, float)))
        height = top * (0.98 - 0.1 * number)
        axes.plot([median, median], [0, height], color=_color(number), linewidth=1.2, linestyle=(0, (3, 2)))
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
            color=_color(number),
        )
