"""Progress on stderr: a live bar on a terminal, one plain line every ten seconds in a log file. Results go to stdout.

    build  412/4000 chains  10%  1.2M tok  183 tok/s now  179 tok/s  106 B/token  0 failed  eta 1:22:10

Text from a cache must not control the terminal: what a model wrote may not move the cursor, change colours or hide.
"""

import contextlib
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from typing import IO, Any, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

# C0 and C1 controls except tab and newline, and marks that change the writing direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_BREAK = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
PLAIN_INTERVAL_S = 10.0
RATE_WINDOW_S = 30.0
REPORT_INTERVAL_S = 1.0
console = Console(stderr=True, highlight=False)
"""For people; results never go here."""
_reports: list[IO[bytes]] = []


class Progress:
    """Progress of one long loop, as a context manager.

    Counts are absolute: `update(done, num_tokens, notes)`. Rates are over the last RATE_WINDOW_S seconds and since the
    start. What earlier processes did (`done_before`) counts for the bar but not for tokens and rates. The clock of a
    finished loop stops at its last update.
    """

    def __init__(self, label: str, total: int, unit: str, done_before: int = 0) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done_before = self._done = done_before
        self._num_tokens = 0
        self._notes = ""
        self._started_s = time.monotonic()
        self._printed_s = self._updated_s = self._started_s
        self._printed = ""
        self._reported_s = 0.0
        self._window: deque[tuple[float, int]] = deque([(self._started_s, 0)])
        self._live = console.is_terminal
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            console=console,
            transient=False,
            # A log file gets whole lines from print_now instead of a bar that redraws itself.
            disable=not self._live,
            refresh_per_second=4,
        )
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=max(self._total, 1), completed=self._done, line="")
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._bar.stop()
        self.print_now()
        self._report()

    def update(self, done: int, num_tokens: int, notes: Mapping[str, str] | None = None) -> None:
        """Sets absolute counts; `notes` follow the rates as `name value`, without the name if it is empty."""
        now_s = self._updated_s = time.monotonic()
        self._done, self._num_tokens = done, num_tokens
        self._notes = "  ".join(f"{name} {value}".strip() for name, value in (notes or {}).items())
        self._window.append((now_s, num_tokens))
        # The oldest entry is the base of the rate, so two always stay.
        while len(self._window) > 2 and now_s - self._window[0][0] > RATE_WINDOW_S:
            self._window.popleft()
        self._show()
        # The last line is printed once, by `print_now` or at the end.
        if done < self._total and now_s - self._printed_s >= PLAIN_INTERVAL_S:
            self.print_now()
        if now_s - self._reported_s >= REPORT_INTERVAL_S:
            self._report()
            self._reported_s = now_s

    def print_now(self) -> None:
        """Prints the current line to a log file unless it was just printed; on a terminal the bar shows it."""
        line = f"{self._label}  {self._line()}"
        if self._live or line == self._printed:
            return
        console.print(line, markup=False, soft_wrap=True)
        self._printed, self._printed_s = line, time.monotonic()

    def _report(self) -> None:
        counts = {"done": self._done, "done_before": self._done_before, "num_tokens": self._num_tokens}
        report(progress={"label": self._label, "total": self._total, "unit": self._unit, **counts})

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._done, line=self._line())

    def _line(self) -> str:
        left = self._total - self._done
        elapsed_s = (time.monotonic() if left > 0 else self._updated_s) - self._started_s
        first_s, first_tokens = self._window[0]
        last_s, last_tokens = self._window[-1]
        now_rate = (last_tokens - first_tokens) / (last_s - first_s) if last_s > first_s else 0.0
        # By this process's own work: what was there at the start took no time now.
        new = self._done - self._done_before
        eta = format_duration(elapsed_s / new * left) if new > 0 else "?"
        share = f"{100 * self._done / self._total:.0f}%" if self._total else "100%"
        tokens = [
            f"{format_count(self._num_tokens)} {'new tok' if self._done_before else 'tok'}",
            *([f"{now_rate:.0f} tok/s now"] if left > 0 else []),
            f"{self._num_tokens / max(elapsed_s, 1e-9):.0f} tok/s",
        ]
        parts = [
            f"{self._done}/{self._total} {self._unit}",
            share,
            # Some loops have no tokens, others none yet.
            *(tokens if self._num_tokens else []),
            self._notes,
            f"eta {eta}" if left > 0 else f"in {format_duration(elapsed_s)}",
        ]
        return "  ".join(part for part in parts if part)


def report_to(descriptor: int) -> None:
    """From now on progress, notes and the result also go there, for the program that started this one."""
    # Otherwise a process that outlives this one would hide its end.
    os.set_inheritable(descriptor, False)
    _reports.append(os.fdopen(descriptor, "wb"))


def report(**what: Any) -> None:
    """One JSON line for the program that started this one, if it wants reports."""
    for stream in _reports:
        # Who asked for it may be gone.
        with contextlib.suppress(OSError):
            stream.write(json.dumps(what).encode() + b"\n")
            stream.flush()


def warn(message: str) -> None:
    """Prints a warning line on stderr."""
    note(f"warning: {message}")


def note(message: str) -> None:
    """Prints one line on stderr, with control characters escaped: it may contain text from a cache."""
    report(note=message)
    console.print(harmless(message), markup=False, soft_wrap=True)


def format_count(number: float) -> str:
    """1234567 as 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def format_plural(number: int, noun: str) -> str:
    """1 and "pack" as 1 pack, 2000 as 2,000 packs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_price(price: float) -> str:
    """12.345 as 12.35, 0.0006071 as 0.00061: a small price keeps two digits."""
    decimals = 2 if price == 0 else max(2, 1 - math.floor(math.log10(abs(price))))
    return f"{price:,.{decimals}f}"


def format_bytes(size_bytes: float) -> str:
    """1234567 as 1.2 MB."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size_bytes) >= limit:
            return f"{size_bytes / limit:.1f} {suffix}"
    return f"{size_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """4930 as 1:22:10, 75 as 1:15."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"


def harmless(text: str) -> str:
    """The text with control characters escaped, such as `\\x1b`; tabs and newlines are kept."""
    return _CONTROL.sub(lambda match: _written_out(match[0]), text)


def one_line(text: str) -> str:
    """`harmless`, with tabs and line breaks escaped too."""
    return harmless("".join(_BREAK.get(character, character) for character in text))


def width_of(text: str) -> int:
    """Width of the text on a terminal, where some characters take two columns."""
    return cell_len(text)


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns, with an ellipsis if it was cut."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def pad(text: str, width: int, *, right: bool = False) -> str:
    """The text padded to `width` columns, left-aligned or right-aligned."""
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
