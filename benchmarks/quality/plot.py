"""Held-out divergence against bytes a token, one point a kind of target."""

from pathlib import Path

from matplotlib.figure import Figure

from shared.config import Json

FAMILIES = (
    ("renormalised", "#b5651d", "s"),
    ("tail bucket", "#4c72b0", "o"),
    ("hybrid", "#2a8f5b", "D"),
    ("cross-entropy", "#777777", "x"),
)
LABEL_OFFSET_POINTS = (5, 4)


def write_plot(results: list[Json], path: Path) -> None:
    """One panel a result, side by side; SVG by the file's name."""
    figure = Figure(figsize=(5.2 * len(results), 4.4), layout="constrained")
    for number, result in enumerate(results):
        axes = figure.add_subplot(1, len(results), number + 1)
        rows = result["summary"]
        dense = next(row["heldout_kl"] for row in rows if row["targets"] == "dense")
        axes.axhline(dense, color="#444444", linewidth=1, linestyle="--")
        axes.annotate(
            "the whole distribution", (0.98, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
        for family, colour, marker in FAMILIES:
            for row in rows:
                if not row["targets"].startswith(family):
                    continue
                x, y, spread = row["bytes_per_token"], row["heldout_kl"], row["kl_over_dense_sd"]
                axes.errorbar(x, y, yerr=spread, color=colour, marker=marker, markersize=5, linewidth=1)
                name = row["targets"].removeprefix(family).strip() or family
                axes.annotate(name, (x, y), xytext=LABEL_OFFSET_POINTS, textcoords="offset points", fontsize=8)
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=family)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes a token stored")
        axes.set_ylabel("held-out KL to the teacher (nats a token)")
        epochs = "one epoch" if result["epochs"] == 1 else f"{result['epochs']} epochs on the same targets"
        student = {"scratch": "student from scratch", "cut": "student cut from its teacher"}[result["student"]]
        axes.set_title(f"{student}, {epochs}", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
