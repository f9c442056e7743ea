"""Charts for HTML reports: titles and legends are left to the page, lines carry their own names, axes their units.

Words on charts: ticks in plain numbers, lines named at their ends, marks named above the plot.

SVG text that matplotlib draws, for HTML reports: the page's colours and font, narrow or wide.

Colours are those of the page: every stroke and fill is a CSS variable, so that a chart follows light and dark. Text
stays text, in the page's font. A narrow drawing is for a phone or half a row and scales up; a wide one takes a row.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WIDTH_IN, WIDE_IN, HEIGHT_IN = 5.3, 11.0, 3.1
"""At 72 units an inch a phone of 390 pixels shows the labels of a narrow drawing at about 10 pixels."""

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
"""CSS variables of the lines, in order; the seventh line begins again."""

INK, MUTED, GRID, CARD = "--ink", "--muted", "--grid", "--card"

# matplotlib wants colours: each variable is drawn in a colour that nothing else has, and replaced in the SVG.
_SENTINELS = {name: f"#fe{number:02x}ef" for number, name in enumerate((*SERIES, INK, MUTED, GRID, CARD))}
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
class Drawing:
    """A chart that is not drawn yet: `draw` fills the axes of a figure of so many inches."""

    draw: "Callable[[Axes], None]"
    height_in: float = HEIGHT_IN

    def svg(self, *, wide: bool = False) -> str:
        """The SVG element."""
        with _figure(WIDE_IN if wide else WIDTH_IN, self.height_in) as figure:
            self.draw(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue())


def color_of(variable: str) -> str:
    """The colour to draw in where the page is to show the CSS variable's."""
    return _SENTINELS[variable]


def series_color(number: int) -> str:
    """Of line `number`, from 0."""
    return _SENTINELS[SERIES[number % len(SERIES)]]


@contextmanager
def _figure(width_in: float, height_in: float) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that the measuring font lacks is still drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield Figure(figsize=(width_in, height_in))


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


MAX_CHARS = 22
CHAR_PT, LINE_PT = 7.4, 14.0
"""About what a character and a line of text take."""


@dataclass(frozen=True)
class End:
    """Where line `number` of a chart ends, in data units, and its name."""

    name: str
    number: int
    x: float
    y: float


@dataclass(frozen=True)
class Mark:
    """A named place on the x axis; of line `number`, or of all lines."""

    name: str
    x: float
    number: int | None = None


def shortened(name: str) -> str:
    """The name in as many characters as a chart has room for."""
    return name if len(name) <= MAX_CHARS else name[: MAX_CHARS - 1] + "…"


def plain_ticks(axis: Any) -> None:
    """Few ticks at round values: 0.0006, 40, 12k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def plain_number(value: float) -> str:
    """0.0006 and not 6e-04, 12k and not 12000."""
    for limit, scale, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / scale:g}{suffix}"
    # `g` takes the noise of binary fractions away, and writes small numbers with an exponent.
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def name_lines(axes: "Axes", ends: Sequence[End]) -> None:
    """Each name right of its own line's end, raised where it would stand on another."""
    per_pt, placed = pixels_per_point(axes), list[tuple[float, float, float]]()
    pixels = [axes.transData.transform((end.x, end.y)) for end in ends]
    for index in np.argsort([height for _, height in pixels], kind="stable"):
        end, (left, own_height) = ends[index], pixels[index]
        name = shortened(end.name)
        # The names take room that the plot gives up: it will be narrower than it is now.
        right = left + 1.3 * CHAR_PT * per_pt * (len(name) + 1)
        height = own_height
        for other_left, other_right, other_height in sorted(placed, key=lambda one: one[2]):
            if left < other_right and other_left < right and abs(height - other_height) < LINE_PT * per_pt:
                height = other_height + LINE_PT * per_pt
        placed.append((left, right, height))
        axes.annotate(
            name,
            (end.x, end.y),
            (6, (height - own_height) / per_pt),
            textcoords="offset points",
            va="center",
            color=series_color(end.number),
            annotation_clip=False,
            bbox={"facecolor": color_of(CARD), "edgecolor": "none", "alpha": 0.7, "pad": 0.6},
        )


def name_marks(axes: "Axes", marks: Sequence[Mark]) -> None:
    """A dashed line at each mark, its name above the plot, in a row of its own where two would overlap."""
    per_pt, rows = pixels_per_point(axes), list[float]()
    for mark in sorted(marks, key=lambda mark: mark.x):
        color = color_of(MUTED) if mark.number is None else series_color(mark.number)
        axes.axvline(mark.x, color=color, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        name = shortened(mark.name)
        left = float(axes.transData.transform((mark.x, 0.0))[0])
        row = next((row for row, taken in enumerate(rows) if taken <= left), len(rows))
        rows[row : row + 1] = [left + 1.3 * CHAR_PT * per_pt * (len(name) + 1)]
        axes.annotate(
            name,
            (mark.x, 1.0),
            (-2, 3 + LINE_PT * row),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            va="bottom",
            color=color,
            annotation_clip=False,
        )


def pixels_per_point(axes: "Axes") -> float:
    """After laying the figure out: places in pixels are known from here on."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return float(figure.get_dpi()) / 72


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
