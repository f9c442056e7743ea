"""Charts for HTML reports: matplotlib SVG in the page's colours and font, narrow or wide.

Every stroke and fill is a CSS variable of the page, so a chart follows light and dark without a script. Text stays
text, in the page's font. A narrow drawing suits a phone or half a row and scales up; a wide one takes a row.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]
Numbers = Sequence[float] | Array

WIDTH_IN, WIDE_IN, HEIGHT_IN = 5.3, 11.0, 3.1
"""At 72 units an inch a phone of 390 pixels shows the labels of a narrow drawing at about 10 pixels."""
MAX_CHARS = 22
CHAR_IN = 0.1
MAX_MARKED = 12
"""Lines of at most this many points show each of them."""
MAX_BANDS = 3

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
"""CSS variables of the lines, in order; the seventh line starts over."""
INK, MUTED, GRID, CARD = "--ink", "--muted", "--grid", "--card"

# Plotly's script alone is 4.5 MB a page and needs JavaScript to follow a dark theme: these pages take 100 kB.
# matplotlib needs colours: each variable is drawn in a colour that nothing else has, and replaced in the SVG.
_SENTINELS = {name: f"#fe{number:02x}ef" for number, name in enumerate((*SERIES, INK, MUTED, GRID, CARD))}
_SETTINGS: dict[Any, Any] = {
    # Text stays text, in the page's font.
    "svg.fonttype": "none",
    # With this and no date, the same numbers give the same bytes.
    "svg.hashsalt": "stillroom",
    # A $ in a name begins no formula.
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
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Drawing:
    """A chart that is not drawn yet: `draw` fills the axes of a figure of `height_in` inches."""

    draw: "Callable[[Axes], None]"
    height_in: float = HEIGHT_IN

    def svg(self, *, wide: bool = False) -> str:
        """The SVG element."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            # A glyph that the measuring font lacks is still drawn by the browser's.
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            # Not pyplot, which keeps every figure and looks for a display.
            figure = Figure(figsize=(WIDE_IN if wide else WIDTH_IN, self.height_in))
            self.draw(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue())


@dataclass(frozen=True)
class Line:
    """A named line: y over x, and a band between low and high where given. Lines with one `series` share a colour on
    all charts; None means the line's place on this one.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    series: int | None = None


@dataclass(frozen=True)
class Mark:
    """A named place on the x axis."""

    name: str
    x: float


@dataclass(frozen=True)
class Group:
    """A named set of values for a histogram."""

    name: str
    values: Numbers


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
) -> Drawing:
    """Lines with bands; a legend where they have names, and the names of places on the x axis above the plot."""

    def draw(axes: "Axes") -> None:
        for place, line in enumerate(lines):
            color = _series_color(place if line.series is None else line.series)
            marker = "o" if len(line.x) <= MAX_MARKED else ""
            axes.plot(line.x, line.y, color=color, marker=marker, markersize=4.5, label=shortened(line.name))
            # Bands of many lines would hide one another.
            if len(lines) <= MAX_BANDS and line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        _label(axes, x_label, y_label)
        _plain_ticks(axes.yaxis)
        if marks:
            for mark in marks:
                axes.axvline(mark.x, color=_SENTINELS[MUTED], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            above = axes.secondary_xaxis("top")
            above.set_xticks([mark.x for mark in marks], [shortened(mark.name) for mark in marks], ha="left")
        if any(line.name for line in lines):
            _legend(axes, len(lines))

    return Drawing(draw)


def histogram(groups: Sequence[Group], x_label: str, y_label: str = "share (%)", *, num_bins: int = 40) -> Drawing:
    """Shares of each group's values by bin, each group's median as a dashed line and in the legend."""
    everything = np.concatenate([np.asarray(group.values, float) for group in groups])
    # The last half percent falls into the last bin: a few outliers would squeeze all other bins.
    low, high = float(everything.min()), float(np.quantile(everything, 0.995))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = _edges(everything, low, high, num_bins)

    def draw(axes: "Axes") -> None:
        for number, group in enumerate(groups):
            values, color = np.asarray(group.values, float), _series_color(number)
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            shares, median = 100 * counts / max(len(values), 1), float(np.median(values))
            shown = f"{median:,.0f}" if abs(median) >= 100 else f"{median:.3g}"
            name = f"{shortened(group.name)}: median {shown}" if group.name else f"median {shown}"
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.28)
            axes.stairs(shares, edges, color=color, linewidth=1.6)
            axes.axvline(median, color=color, linewidth=1.2, linestyle=(0, (3, 2)), label=name)
        axes.margins(x=0.01)
        _label(axes, x_label, y_label)
        _legend(axes, len(groups))

    return Drawing(draw)


def bars(
    names: Sequence[str], values: Numbers, texts: Sequence[str], x_label: str, *, limit: float | None = None
) -> Drawing:
    """Horizontal bars, the first on top, each with its text at the end. `limit` fixes the end of the scale."""

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(names))
        drawn = axes.barh(rows, values, height=0.62, color=_series_color(0), alpha=0.85)
        end = limit if limit is not None else max([*map(float, values), 1e-12])
        axes.bar_label(drawn, texts, padding=4)
        axes.set_yticks(rows, [shortened(name) for name in names])
        axes.tick_params(axis="y", labelcolor=_SENTINELS[INK])
        axes.invert_yaxis()
        figure = axes.get_figure(root=True)
        assert figure is not None
        # Room for the texts right of the bars, of the width that the names leave.
        width_in = figure.get_figwidth() - CHAR_IN * max(len(shortened(name)) for name in names)
        text_in = CHAR_IN * max(map(len, texts), default=0)
        axes.set_xlim(0, end / (1 - min(0.6, text_in / width_in)))
        _label(axes, x_label, "")
        axes.grid(visible=False)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end * 1.001])

    return Drawing(draw, height_in=0.95 + 0.36 * len(names))


def shortened(name: str) -> str:
    """The name in as many characters as a chart has room for."""
    return name if len(name) <= MAX_CHARS else name[: MAX_CHARS - 1] + "…"


def plain_number(value: float) -> str:
    """0.0006 rather than 6e-04, 12k rather than 12000."""
    for limit, scale, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / scale:g}{suffix}"
    # `g` removes the noise of binary fractions, and writes small numbers with an exponent.
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def _series_color(number: int) -> str:
    return _SENTINELS[SERIES[number % len(SERIES)]]


def _label(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _plain_ticks(axes.xaxis)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def _legend(axes: "Axes", num_lines: int) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    columns = min(num_lines, 4 if figure.get_figwidth() > WIDTH_IN else 2)
    figure.legend(loc="outside upper left", ncols=columns, labelcolor="linecolor")


def _edges(values: Array, low: float, high: float, num_bins: int) -> Array:
    if np.array_equal(values, np.round(values)):
        # Whole numbers: bins as wide as whole numbers, or every second bin would hold one number more.
        step = max(1, int(np.ceil((high - low + 1) / num_bins)))
        return np.arange(np.floor(low), np.ceil(high) + step + 1, step) - 0.5
    return np.linspace(low, high, num_bins + 1)


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
