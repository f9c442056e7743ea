"""Words on charts: ticks in plain numbers, lines named at their ends, marks named above the plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.drawing import CARD, MUTED, color_of, series_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
