"""A report as one HTML file: sections of numbers, charts and tables, composed by whoever has them.

The file needs no network and no script, follows the reader's light or dark theme and fits a phone. Everything that
comes from a cache or a run is escaped; only the SVG of shared.charts goes in as it is.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.files import write_text_atomic
from shared.terminal import harmless

TEMPLATES = Path(__file__).parent / "templates"


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


@dataclass(frozen=True)
class Figure:
    """A chart. The title says what is seen, the note how to read it."""

    title: str
    svg: str
    note: str = ""
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """Rows of text; columns whose number is in `right` are aligned for numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    right: frozenset[int] = frozenset()
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
        finalize=lambda value: type(value)(harmless(value)) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC")
    return environment.get_template(template).render(made=made, **values)
