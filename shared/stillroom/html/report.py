"""A report as one HTML file: sections of numbers, charts and tables, composed by whoever has them.

The file needs no network and no script, follows the reader's light or dark theme and fits a phone. Everything that
comes from a cache or a run is escaped; only the SVG of stillroom.html.charts goes in as it is.
"""

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.html.charts import Drawing
from stillroom.log import harmless
from stillroom.storage.paths import write_text_atomic

TEMPLATES = Path(__file__).parent / "templates"
MAX_NUMBERS_IN_ROW = 7


@dataclass(frozen=True)
class Number:
    """One figure to read at a glance; `detail` is small print below it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Numbers:
    """Figures side by side."""

    numbers: Sequence[Number]
    kind: str = "numbers"

    @property
    def num_columns(self) -> int:
        """As few rows as there is room for, all about as long."""
        num_rows = max(1, -(-len(self.numbers) // MAX_NUMBERS_IN_ROW))
        return max(1, -(-len(self.numbers) // num_rows))


@dataclass(frozen=True)
class Figure:
    """A chart. The title says what is seen, the note how to read it. A tall one takes a row: beside another it would
    leave a hole.
    """

    title: str
    drawing: Drawing
    note: str = ""
    is_tall: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """Rows of text, the first cell of each its name. Columns whose number is in `right` are aligned for numbers. On a
    phone a row is a block of named cells, where cells of the columns in `long` take the whole width.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    right: frozenset[int] = frozenset()
    long: frozenset[int] = frozenset()
    kind: str = "table"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


Piece = Numbers | Figure | Table | Text


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    pieces: Sequence[Piece]
    intro: str = ""

    def placed(self) -> list[tuple[Piece, bool]]:
        """The pieces, and whether each takes a row: figures stand in pairs, the first alone where they are odd."""
        placed: list[tuple[Piece, bool]] = []
        for pairs, group in itertools.groupby(self.pieces, lambda one: isinstance(one, Figure) and not one.is_tall):
            pieces = list(group)
            alone = len(pieces) % 2 if pairs else len(pieces)
            placed += [(piece, place < alone) for place, piece in enumerate(pieces)]
        return placed


def write_report(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Writes the page whole. Sections without pieces are left out."""
    write_text_atomic(path, render_page("report.html", title=title, subtitle=subtitle, sections=sections))


def render_page(template: str, **values: object) -> str:
    """A template of this package with every value escaped, except SVG marked as such by the template.

    Control characters and turns of the direction of writing are written out, in SVG too.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        # In the type it came in: SVG that is marked as safe must stay so.
        finalize=lambda value: type(value)(harmless(value)) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC")
    return environment.get_template(template).render(made=made, **values)


def format_span(seconds: float) -> str:
    """4930 as 1 h 22 min, 75 as 1 min 15 s, 0.4 as 0.4 s: a time that stands alone, with its units."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"
