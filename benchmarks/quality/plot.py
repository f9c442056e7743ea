"""Held-out divergence against bytes per token, one point per kind of target."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from stillroom.config import Json

FAMILIES = (
    ("renormalised", "#b5651d", "s"),
    ("tail bucket", "#4c72b0", "o"),
    ("hybrid", "#2a8f5b", "D"),
    ("cross-entropy", "#777777", "x"),
)
BYTE_TICKS = (8, 16, 32, 64, 128)
KL_TICKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
LABELS = {
    "renormalised 64": (6, 3, "left"),
    "tail bucket 64": (6, -8, "left"),
    "tail bucket nucleus 64": (-6, 4, "right"),
    "hybrid 1+8": (7, 2, "left"),
    "hybrid 4+4": (-7, -3, "right"),
    "hybrid 8+8": (2, -13, "left"),
    "hybrid 16+16": (0, 8, "center"),
}
"""Where a name stands beside its point: points right and up, and the side that it ends on."""


def write_plot(results: list[Json], path: Path) -> None:
    """One panel per result, side by side; the suffix of `path` chooses the format."""
    figure = Figure(figsize=(4.9 * len(results), 4.2), layout="constrained")
    for number, result in enumerate(results):
        _panel(figure.add_subplot(1, len(results), number + 1), result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Any, result: Json) -> None:
    dense = next(row["heldout_kl"] for row in result["summary"] if row["targets"] == "dense")
    axes.axhline(dense, color="#444444", linewidth=1, linestyle="--")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
    axes.annotate("whole distribution", (0.02, dense), xytext=(0, -10), **place)
    for family, colour, marker in FAMILIES:
        own = [row for row in result["summary"] if row["targets"].startswith(family)]
        for row in own:
            x, y = row["bytes_per_token"], row["heldout_kl"]
            axes.errorbar(x, y, yerr=row["kl_over_dense_sd"], color=colour, marker=marker, markersize=5, linewidth=1)
            right, up, side = LABELS.get(row["targets"], (7, 2, "left"))
            name = row["targets"].removeprefix(family).strip() or family
            axes.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", fontsize=8, ha=side)
        if own:
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=family)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(5, 180)
    axes.set_ylim(dense * 0.9, max(row["heldout_kl"] for row in result["summary"]) * 1.15)
    axes.set_xticks(BYTE_TICKS)
    axes.set_yticks([tick for tick in KL_TICKS if axes.get_ylim()[0] < tick < axes.get_ylim()[1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("stored bytes per token")
    axes.set_ylabel("held-out KL to the teacher (nats per token)")
    epochs = "one epoch" if result["epochs"] == 1 else f"{result['epochs']} epochs on the same targets"
    student = {"scratch": "student from scratch", "cut": "student cut from its teacher"}[result["student"]]
    axes.set_title(f"{student}, {epochs}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
