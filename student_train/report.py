"""`student-train report`: one run told in charts, or several compared, as sections of a self-contained HTML page.

In: run folders, finished or not. Out: numbers, charts and tables whose titles say what they show. Loads no model.
"""

from collections.abc import Sequence
from pathlib import Path

from shared.chart_labels import plain_number
from shared.charts import Change, Line, before_after, line_chart
from shared.config import Json
from shared.log import format_count, format_plural
from shared.report import Figure, Number, Numbers, Piece, Section, Table, format_span, write_report
from student_train.comparison import comparison_sections
from student_train.eval_tables import MEASURES, eval_table
from student_train.run_curves import (
    NUM_WINDOWS,
    Run,
    Stage,
    capital,
    curve,
    loss_unit,
    loss_words,
    part_curve,
    read_runs,
    token_axis,
)
from student_train.streaming.heldout import before_and_after

MAX_STAGES_IN_TITLE = 3


def write_student_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the page. Raises ConfigError, DataError as `student_sections` does."""
    names = ", ".join(folder.resolve().name for folder in folders)
    write_report(out, f"Student {names}" if len(folders) == 1 else f"Students {names}", student_sections(*folders))


def student_sections(*folders: Path) -> list[Section]:
    """The report's sections, to stand alone or beside others. Raises DataError for a folder that holds no run."""
    runs = read_runs(folders)
    if len(runs) > 1:
        return comparison_sections(runs)
    (run,) = runs
    return [
        Section("The student", [_overview(run), *_heldout_change(run)]),
        Section(
            "Training", [*_stage_table(run), *_losses(run), *_heldout_curves(run), *_learning_rate(run), *_speed(run)]
        ),
        Section("Evaluations", eval_table(runs)),
    ]


def _overview(run: Run) -> Piece:
    stages = run.stages()
    told = ", ".join(f"{stage.name} {len(stage.steps):,}" for stage in stages) if len(stages) > 1 else ""
    loss_tokens = f"{format_count(run.column('num_loss_tokens').sum())} with a loss" if run.steps else ""
    rate = run.tokens_per_s
    numbers = [
        Number("optimizer steps", f"{len(run.steps):,}", told or "".join(stage.name for stage in stages)),
        Number("tokens read", format_count(run.num_tokens), loss_tokens),
        Number("time in steps", format_span(run.seconds), f"{run.stall_frac:.1%} waiting for data"),
        Number("speed", "-" if rate is None else f"{rate:,.0f} tok/s", "over all steps and ranks"),
    ]
    if stages:
        numbers += _loss_numbers(run, stages)
        peak = max(step["memory_gib"] for step in run.steps)
        numbers.append(Number("memory", f"{peak:.1f} GiB", "largest on any rank"))
    if run.evals:
        last = run.evals[-1]
        numbers.append(
            Number("held-out chains", f"{last['num_chains']:,}", f"{format_count(last['num_tokens'])} tokens")
        )
    return Numbers(numbers)


def _loss_numbers(run: Run, stages: Sequence[Stage]) -> list[Number]:
    """The parts of the last stage's loss, and their sum where it means the same at every step."""
    last = stages[-1]
    began = "at the start" if len(stages) == 1 else f"when {last.name} began"
    numbers = []
    for part in last.parts():
        start, end = last.ends(part)
        numbers.append(Number(loss_words(part), f"{end:.3f} {loss_unit(part)}", f"in training; {start:.3f} {began}"))
    if run.has_one_loss and len(numbers) > 1:
        start, end = last.ends(None)
        numbers.append(Number("loss", f"{end:.3f} nats", f"in training, the sum by weights; {start:.3f} {began}"))
    return numbers


def _heldout_change(run: Run) -> list[Piece]:
    if len(run.evals) < 2:
        return []
    before, after = before_and_after(run.evals)
    if before is None or after is None:
        return []
    changes = []
    for measure in MEASURES:
        first, last = before.get(measure.name), after.get(measure.name)
        if first is None or last is None:
            continue
        text = f"{measure.shown(first).removesuffix(' nats')} → {measure.shown(last)}"
        if measure.unit == "%":
            changes.append(Change(measure.words, first, last, text, limit=1.0))
        else:
            change = f" ({100 * (last - first) / first:+.0f}%)" if first else ""
            changes.append(Change(measure.words, first, last, f"{text}{change}"))
    if not changes:
        return []
    note = (
        "Means over held-out tokens. Lower is better, but for agreement, whose frame is 0 to 100%; the other scales go "
        "from 0 to the larger of the two."
    )
    return [Figure(_change_title(before, after), before_after(changes), note)]


def _change_title(before: Json, after: Json) -> str:
    if not before.get("forward_kl"):
        return "The student before and after, on chains it never saw"
    less = 100 * (1 - after["forward_kl"] / before["forward_kl"])
    return f"Held-out KL to the teacher is {abs(less):.0f}% {'lower' if less >= 0 else 'higher'} than before training"


def _stage_table(run: Run) -> list[Piece]:
    """Parts by stage, where no one number tells how the loss went."""
    if not run.steps or run.has_one_loss:
        return []
    rows = []
    for stage in run.stages():
        named = f"{stage.name}, {format_plural(len(stage.steps), 'step')}"
        for part in stage.parts():
            start, end = stage.ends(part)
            rows.append([f"{named}: {loss_words(part)}", stage.weight_words(part), f"{start:.3f}", f"{end:.3f}"])
        if stage.has_one_loss and len(stage.parts()) > 1:
            start, end = stage.ends(None)
            rows.append([f"{named}: sum by weights", "-", f"{start:.3f}", f"{end:.3f}"])
    note = (
        "Nats a token on the chains that the stage learns from. Compare within a stage: another one may have other "
        f"chains, weights of tokens or losses. No sum is given where weights change. {_windows_note(run)}"
    )
    columns = ["loss", "weight", "at the start", "at the end"]
    return [Table("The parts of the loss, stage by stage", columns, rows, note.strip(), right=frozenset({1, 2, 3}))]


def _losses(run: Run) -> list[Piece]:
    if not run.steps:
        return []
    axis, stages = token_axis([run]), run.stages()
    parts = list(dict.fromkeys(part for stage in stages for part in stage.parts()))
    if run.has_one_loss:
        first, last = stages[0].ends(None)
        lines = [part_curve(run, part, axis.unit, name) for part, name in _line_names(parts).items()]
        if len(parts) > 1:
            lines.append(curve("loss", run.tokens() / axis.unit, run.column("loss")))
        title = f"The loss {_went(first, last)} from {first:.2f} to {last:.2f} nats a token"
        note = "The loss is the sum of its parts by their weights." if len(parts) > 1 else ""
        return [Figure(title, line_chart(lines, axis.label, "nats a token"), f"{note} {_windows_note(run)}".strip())]
    marks = run.stage_marks(axis.unit)
    return [
        Figure(
            _part_title(part, stages),
            line_chart([part_curve(run, part, axis.unit, "")], axis.label, f"{loss_unit(part)} a token", marks=marks),
            f"Before its weight. {_windows_note(run)}".strip(),
        )
        for part in parts
    ]


def _line_names(parts: Sequence[str]) -> dict[str, str]:
    """Short ones for a chart, where they tell the parts apart."""
    short = {part: loss_words(part).partition(" (")[0] for part in parts}
    return short if len(set(short.values())) == len(parts) else {part: loss_words(part) for part in parts}


def _part_title(part: str, stages: Sequence[Stage]) -> str:
    told = [(stage.name, *stage.ends(part)) for stage in stages if part in stage.parts()]
    words = capital(loss_words(part))
    if len(told) > MAX_STAGES_IN_TITLE:
        return f"{words} in each of {len(told)} stages"
    return f"{words}: " + ", ".join(f"{first:.3f} → {last:.3f} in {name}" for name, first, last in told)


def _went(first: float, last: float) -> str:
    return "falls" if last < first else "rises" if last > first else "goes"


def _windows_note(run: Run) -> str:
    if max(len(stage.steps) for stage in run.stages()) <= NUM_WINDOWS:
        return ""
    return f"Means of {NUM_WINDOWS} windows; bands hold the steps between the 10th and 90th percentile."


def _heldout_curves(run: Run) -> list[Piece]:
    axis = token_axis([run])
    pieces: list[Piece] = []
    for measure in MEASURES:
        x, y = run.eval_curve(measure.name)
        if len(y) < 2 or measure.name == "js":
            continue
        chart = line_chart(
            [Line("", x / axis.unit, measure.scale * y)],
            axis.label,
            f"{measure.words} ({measure.unit})",
            from_zero=measure.unit == "%",
            marks=run.stage_marks(axis.unit),
        )
        pieces.append(Figure(f"Held-out {measure.words}: {measure.shown(y[-1])} at the last evaluation", chart))
    return pieces


def _learning_rate(run: Run) -> list[Piece]:
    if not run.steps:
        return []
    axis, rates = token_axis([run]), run.column("learning_rate")
    line, marks = Line("", run.tokens() / axis.unit, rates), run.stage_marks(axis.unit)
    chart = line_chart([line], axis.label, "learning rate", from_zero=True, marks=marks)
    return [Figure(f"The learning rate peaks at {plain_number(float(f'{rates.max():.2g}'))}", chart)]


def _speed(run: Run) -> list[Piece]:
    if not run.steps or run.tokens_per_s is None:
        return []
    axis = token_axis([run])
    x, marks = run.tokens() / axis.unit, run.stage_marks(axis.unit)
    rates, waits = curve("", x, run.column("tokens_per_s")), curve("", x, 100 * run.column("stall_frac"))
    return [
        Figure(
            f"{run.tokens_per_s:,.0f} tokens a second over all steps",
            line_chart([rates], axis.label, "tokens a second", from_zero=True, marks=marks),
        ),
        Figure(
            f"{run.stall_frac:.1%} of the time in steps was waiting for data",
            line_chart([waits], axis.label, "waiting (% of a step)", from_zero=True, marks=marks),
        ),
    ]
