"""`student-train report`: one run told in charts, or several compared, as sections of a self-contained HTML page.

In: run folders, finished or not. Out: numbers, charts and tables whose titles say what they show. Reads metrics.jsonl
and eval.json alone; loads no model and needs no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.charts import Change, Line, before_after, line_chart
from shared.config import Json
from shared.errors import ConfigError, DataError
from shared.log import format_count, format_duration
from shared.report import Figure, Number, Numbers, Piece, Section, Table, write_report
from student_train.runfolder import RunFolder
from student_train.streaming.heldout import before_and_after

Array = npt.NDArray[Any]

NUM_WINDOWS = 60
"""A curve of more steps is drawn as means over so many windows, and the spread in each."""

MEASURES = (
    ("forward_kl", "KL to the teacher", "nats", -1),
    ("js", "JSD to the teacher", "nats", -1),
    ("cross_entropy", "cross-entropy", "nats", -1),
    ("top1_agreement", "top-1 agreement", "%", +1),
)
"""Name in eval.json, in words, unit, and whether more (+1) or less (-1) is better."""


@dataclass(frozen=True)
class _Run:
    name: str
    steps: Sequence[Json]
    evals: Sequence[Json]

    def column(self, name: str) -> Array:
        return np.array([step[name] for step in self.steps], float)

    def tokens_m(self) -> Array:
        """Millions of tokens read up to the end of each step."""
        return np.cumsum(self.column("num_tokens")) / 1e6

    def eval_curve(self, name: str) -> tuple[Array, Array]:
        """Millions of tokens read, and the measure, at every evaluation that has it and is of the same chains as the
        last.
        """
        done = {
            (step["stage_number"], step["step"]): tokens
            for step, tokens in zip(self.steps, self.tokens_m(), strict=True)
        }
        before, points = 0.0, []
        for one in self.evals:
            before = done.get((one["stage_number"], one["step"]), before)
            if one.get(name) is not None and one.get("selection") == self.evals[-1].get("selection"):
                points.append((before, one[name]))
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.array(x, float), np.array(y, float)


def write_student_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the page. Raises ConfigError, DataError as `student_sections` does."""
    names = ", ".join(folder.resolve().name for folder in folders)
    write_report(out, f"Student {names}" if len(folders) == 1 else f"Students {names}", student_sections(*folders))


def student_sections(*folders: Path) -> list[Section]:
    """The report's sections, to stand alone or beside others. Raises DataError for a folder that holds no run."""
    runs = _read(folders)
    if len(runs) == 1:
        (run,) = runs
        return [
            Section("The student", [_overview(run), *_heldout_change(run)]),
            Section("Training", [*_losses(run), *_heldout_curves([run]), *_learning_rate(run), *_speed([run])]),
            Section("Numbers", [*_eval_table(runs)]),
        ]
    return [
        Section("The students", [*_eval_table(runs)]),
        Section("Training", [*_heldout_curves(runs), *_total_losses(runs), *_speed(runs)]),
    ]


def _read(folders: Sequence[Path]) -> list[_Run]:
    if not folders:
        raise ConfigError("no run is named: give the folder of at least one")
    runs = []
    for folder in folders:
        run = RunFolder(folder)
        steps, evals = run.read_metrics(), run.read_evals()
        if not steps and not evals:
            raise DataError(f"{folder} holds no metrics.jsonl with a step in it: name the folder of a run")
        name = folder.resolve().name
        if sum(other.resolve().name == name for other in folders) > 1:
            name = f"{folder.resolve().parent.name}/{name}"
        runs.append(_Run(name, steps, evals))
    return runs


def _overview(run: _Run) -> Piece:
    seconds = float(run.column("step_s").sum())
    num_tokens = int(run.column("num_tokens").sum())
    stall = float((run.column("stall_frac") * run.column("step_s")).sum()) / seconds if seconds else 0.0
    numbers = [
        Number("optimizer steps", f"{len(run.steps):,}", ", ".join(dict.fromkeys(step["stage"] for step in run.steps))),
        Number(
            "tokens read", format_count(num_tokens), f"{format_count(run.column('num_loss_tokens').sum())} with a loss"
        ),
        Number("time in steps", format_duration(seconds), f"{100 * stall:.1f}% waiting for data"),
        Number("speed", f"{num_tokens / seconds:,.0f} tok/s" if seconds else "-", "over all ranks"),
    ]
    if run.steps:
        first, last = run.steps[0]["loss"], run.steps[-1]["loss"]
        numbers.append(Number("loss", f"{last:.3f} nats", f"from {first:.3f} at the first step"))
        peak = max(step["memory_gib"] for step in run.steps)
        numbers.append(Number("memory", f"{peak:.1f} GiB", "largest on any rank"))
    if run.evals:
        numbers.append(Number("held-out chains", f"{run.evals[-1]['num_chains']:,}", _tokens(run.evals[-1])))
    return Numbers(numbers)


def _tokens(one: Json) -> str:
    return f"{format_count(one['num_tokens'])} tokens"


def _heldout_change(run: _Run) -> list[Piece]:
    if len(run.evals) < 2:
        return []
    before, after = before_and_after(run.evals)
    if before is None or after is None:
        return []
    changes = []
    for name, words, unit, _ in MEASURES:
        first, last = before.get(name), after.get(name)
        if first is None or last is None:
            continue
        if unit == "%":
            text = f"{100 * first:.1f}% → {100 * last:.1f}%"
        else:
            text = (
                f"{first:.3f} → {last:.3f} {unit} ({100 * (last - first) / first:+.0f}%)"
                if first
                else f"{last:.3f} {unit}"
            )
        changes.append(Change(words, first, last, text))
    if not changes:
        return []
    title = "The student before and after, on chains it never saw"
    if before.get("forward_kl"):
        less = 100 * (1 - after["forward_kl"] / before["forward_kl"])
        title = (
            f"Held-out KL to the teacher is {abs(less):.0f}% {'lower' if less >= 0 else 'higher'} than before training"
        )
    note = "Lower is better, but for agreement. Means over held-out tokens; each pair of bars has a scale of its own."
    return [Figure(title, before_after(changes), note)]


def _losses(run: _Run) -> list[Piece]:
    if not run.steps:
        return []
    x = run.tokens_m()
    names = list(dict.fromkeys(name for step in run.steps for name in step["parts"]))
    lines = [] if len(names) == 1 else [_curve("loss", x, run.column("loss"))]
    for name in names:
        values = np.array([step["parts"].get(name, np.nan) for step in run.steps], float)
        seen = np.isfinite(values)
        lines.append(_curve(name.replace("_", " "), x[seen], values[seen]))
    first, last = lines[0].y[0], lines[0].y[-1]
    title = f"The loss {'falls' if last < first else 'rises'} from {first:.2f} to {last:.2f} nats a token"
    note = "Parts before their weights." if len(names) > 1 else ""
    if len(run.steps) > NUM_WINDOWS:
        note = (
            f"{note} Means of {NUM_WINDOWS} windows; bands hold the steps between the 10th and 90th percentile.".strip()
        )
    return [Figure(title, line_chart(lines, "tokens read (millions)", "nats a token"), note)]


def _total_losses(runs: Sequence[_Run]) -> list[Piece]:
    lines = [_curve(run.name, run.tokens_m(), run.column("loss")) for run in runs if run.steps]
    if not lines:
        return []
    best = min(lines, key=lambda line: float(line.y[-1]))
    svg = line_chart(lines, "tokens read (millions)", "loss (nats a token)")
    note = "Comparable only where the losses and their weights are the same."
    return [Figure(f"{best.name} ends at the lowest training loss: {best.y[-1]:.3f}", svg, note)]


def _heldout_curves(runs: Sequence[_Run]) -> list[Piece]:
    pieces: list[Piece] = []
    for name, words, unit, sign in MEASURES:
        if name == "js":
            continue
        scale = 100.0 if unit == "%" else 1.0
        curves = [(run, *run.eval_curve(name)) for run in runs]
        drawn = [Line(run.name if len(runs) > 1 else "", x, scale * y) for run, x, y in curves if len(y) > 1]
        if not drawn:
            continue
        best = max(drawn, key=lambda line: sign * float(line.y[-1]))
        shown = f"{best.y[-1]:.1f}%" if unit == "%" else f"{best.y[-1]:.3f} {unit}"
        title = (
            f"Held-out {words}: {shown} at the end"
            if len(runs) == 1
            else f"Held-out {words}: best is {best.name}, {shown}"
        )
        svg = line_chart(drawn, "tokens read (millions)", f"{words} ({unit})")
        pieces.append(Figure(title, svg, _not_comparable(runs)))
    return pieces


def _learning_rate(run: _Run) -> list[Piece]:
    if not run.steps:
        return []
    rates = run.column("learning_rate")
    svg = line_chart(
        [Line("", run.tokens_m(), 1e6 * rates)], "tokens read (millions)", "learning rate (×10⁻⁶)", from_zero=True
    )
    return [Figure(f"The learning rate peaks at {rates.max():.2g}", svg)]


def _speed(runs: Sequence[_Run]) -> list[Piece]:
    drawn = [run for run in runs if run.steps]
    if not drawn:
        return []
    several = len(runs) > 1
    rates = [_curve(run.name if several else "", run.tokens_m(), run.column("tokens_per_s")) for run in drawn]
    stalls = [_curve(run.name if several else "", run.tokens_m(), 100 * run.column("stall_frac")) for run in drawn]
    medians = [float(np.median(run.column("tokens_per_s"))) for run in drawn]
    waits = [float(np.mean(run.column("stall_frac"))) for run in drawn]
    fastest = drawn[int(np.argmax(medians))].name
    speed_title = (
        f"{fastest} is fastest: {max(medians):,.0f} tokens a second"
        if several
        else f"{medians[0]:,.0f} tokens a second at the median"
    )
    stall_title = f"Steps wait {100 * max(waits):.1f}% of their time for data" + (" at most" if several else "")
    return [
        Figure(speed_title, line_chart(rates, "tokens read (millions)", "tokens a second", from_zero=True)),
        Figure(stall_title, line_chart(stalls, "tokens read (millions)", "waiting for data (%)", from_zero=True)),
    ]


def _eval_table(runs: Sequence[_Run]) -> list[Piece]:
    """A row a run where several are compared, a row an evaluation where there is one."""
    several = len(runs) > 1
    rows = [
        [run.name if several else f"{one['stage']}, step {one['step']:,}", *_cells(one)]
        for run in runs
        for one in (run.evals[-1:] if several else run.evals)
    ]
    if not rows:
        return []
    names = [
        "KL (nats)",
        "reverse KL (nats)",
        "JSD (nats)",
        "cross-entropy (nats)",
        "agreement",
        "accuracy",
        "conf − acc",
    ]
    title = "The last evaluation of each run" if several else "Every evaluation on held-out chains"
    note = (
        "KL and JSD are estimates where the cache holds draws from the teacher's tail, else lower bounds with the tail "
        f"in one bucket, as reverse KL is. {_not_comparable(runs)}"
    )
    columns = ["run" if several else "after", *names]
    return [Table(title, columns, rows, note, right=frozenset(range(1, len(columns))))]


def _not_comparable(runs: Sequence[_Run]) -> str:
    """A warning where runs were last evaluated on different chains; nothing where on the same."""
    if len({run.evals[-1].get("selection") for run in runs if run.evals}) < 2:
        return ""
    return "The runs were evaluated on different selections of chains: their numbers compare only roughly."


def _cells(one: Json) -> list[str]:
    plain: Callable[[float], str] = "{:.4f}".format
    share: Callable[[float], str] = "{:.1%}".format
    wanted = (
        ("forward_kl", plain),
        ("reverse_kl", plain),
        ("js", plain),
        ("cross_entropy", plain),
        ("top1_agreement", share),
        ("accuracy", share),
        ("confidence_minus_accuracy", "{:+.3f}".format),
    )
    return ["-" if one.get(name) is None else write(one[name]) for name, write in wanted]


def _curve(name: str, x: Array, y: Array) -> Line:
    """The values as they are, or as means over windows with their spread where there are many."""
    if len(y) <= NUM_WINDOWS:
        return Line(name, x, y)
    windows = np.array_split(np.arange(len(y)), NUM_WINDOWS)
    low, high = (np.array([np.quantile(y[window], q) for window in windows]) for q in (0.1, 0.9))
    means = np.array([y[window].mean() for window in windows])
    # The last step of each window: the curve ends where the run does.
    return Line(name, np.array([x[window[-1]] for window in windows]), means, low, high)
