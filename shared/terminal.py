"""Text from a cache on a terminal: what a model wrote must not move the cursor, recolour the screen or hide itself."""

import re

from rich.cells import cell_len, set_cell_size

# C0 and C1 controls without tab and newline, and the marks that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_BREAK = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def harmless(text: str) -> str:
    """The text with control characters written out, `\\x1b` for an escape; tabs and newlines stay."""
    return _CONTROL.sub(lambda match: _written_out(match[0]), text)


def one_line(text: str) -> str:
    """`harmless`, with tabs and line breaks written out too."""
    return harmless("".join(_BREAK.get(character, character) for character in text))


def width_of(text: str) -> int:
    """Columns that the text takes on a terminal (two for a wide character)."""
    return cell_len(text)


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns, an ellipsis for what was cut off."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def pad(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly `width` columns or more, to the left or the right of them."""
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
