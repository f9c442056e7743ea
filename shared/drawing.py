"""SVG text that matplotlib draws, for HTML reports: the page's colours and font, narrow or wide.

Colours are those of the page: every stroke and fill is a CSS variable, so that a chart follows light and dark. Text
stays text, in the page's font. A narrow drawing is for a phone or half a row and scales up; a wide one takes a row.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
