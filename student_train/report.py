"""`student-train report`: one run told in charts, or several compared, as sections of a self-contained HTML page.

In: run folders, finished or not. Out: numbers, charts and tables whose titles say what they show. Loads no model.

Several runs side by side, as sections of a report: what differs between them, and what came of it.

In: runs that were read. Out: tables and charts. Numbers are ranked only where they measure the same: held-out ones on
the same chains, training losses of the same sums on the same data.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stillroom.config import Json
from stillroom.html.charts import Change, Drawing, Line, Mark, before_after, line_chart, plain_number
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, Text, format_span, write_report
from stillroom.log import format_count, format_plural
from student_train.config import meaning_of
from student_train.data.open import before_and_after
from student_train.run_curves import (
    MEASURES,
    NUM_WINDOWS,
    Measure,
    Run,
    Stage,
    capital,
    curve,
    eval_table,
    loss_unit,
    loss_words,
    not_comparable,
    part_curve,
    read_runs,
    token_axis,
)

DECIDES_LOSS = re.compile(r"data\.|stages\.\d+(\.(losses|temperature|focal_gamma|token_weights|where)|$)")
"""Keys that decide what the training loss is a mean of."""

NO_STAGE = "no such stage"

_STAGE_KEY = re.compile(r"stages\.(\d+)\.")


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """Sections on two runs or more. Raises ConfigError, DataError where a configuration cannot be read."""
    different = differences(runs)
    return [
        Section("What differs", [_configs(runs, different), *_doings(runs)]),
        Section("Held-out results", [*eval_table(runs), *_compared_heldout(runs)]),
        Section("Training", [*_training_losses(runs, different), *_compared_speed(runs)]),
    ]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted keys that differ between the runs' configurations, and the value of each run; None is not set.

    Keys of a stage are compared between the runs that have the stage, NO_STAGE stands for the others.
    """
    configs = [_keys(run) for run in runs]
    num_stages = [len(run.config().stages) for run in runs]
    found = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        stage = _STAGE_KEY.match(key)
        having = [
            config for config, num in zip(configs, num_stages, strict=True) if stage is None or int(stage[1]) < num
        ]
        if len({json.dumps(config.get(key)) for config in having}) > 1:
            found[key] = [config.get(key) if config in having else NO_STAGE for config in configs]
    return found


def _keys(run: Run) -> Json:
    """What decides what is learnt, and what it is judged on."""
    config = run.config()
    judged = {} if config.eval is None else {"eval.where": config.eval.where, "eval.max_chains": config.eval.max_chains}
    return {**meaning_of(config), **judged}


def _configs(runs: Sequence[Run], different: dict[str, list[Any]]) -> Piece:
    if not different:
        return Text("The configurations are the same in all that decides what is learnt and judged.")
    rows = [[key, *map(_value, values)] for key, values in different.items()]
    title = f"The configurations differ in {format_plural(len(different), 'key')}"
    note = "Keys of a stage that one run alone has are left out: the table below names its stages and losses."
    stages = {len(run.config().stages) for run in runs}
    return Table(title, ["key", *(run.name for run in runs)], rows, note if len(stages) > 1 else "")


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def _doings(runs: Sequence[Run]) -> list[Piece]:
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("stages", lambda run: ", ".join(stage.name for stage in run.stages()) or "-"),
        ("losses", _loss_texts),
        ("optimizer steps", lambda run: f"{len(run.steps):,}"),
        ("tokens read", lambda run: format_count(run.num_tokens)),
        ("time in steps", lambda run: format_span(run.seconds)),
        ("speed", lambda run: "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f} tok/s"),
        ("waiting for data", lambda run: f"{run.stall_frac:.1%}"),
    ]
    rows = [[name, *(tell(run) for run in runs)] for name, tell in facts]
    return [Table("What each run has done so far", ["", *(run.name for run in runs)], rows)]


def _loss_texts(run: Run) -> str:
    texts = [
        " + ".join(f"{stage.weight_words(part)} {loss_words(part)}" for part in stage.parts()) for stage in run.stages()
    ]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{stage.name}: {text}" for stage, text in zip(run.stages(), texts, strict=True)) or "-"


def _compared_heldout(runs: Sequence[Run]) -> list[Piece]:
    axis = token_axis(runs)
    pieces: list[Piece] = []
    for measure in MEASURES:
        curves = {number: run.eval_curve(measure.name) for number, run in enumerate(runs)}
        drawn = {number: (x, y) for number, (x, y) in curves.items() if len(y)}
        if measure.name == "js" or not any(len(y) > 1 for _, y in drawn.values()):
            continue
        lines = [
            Line(runs[number].name, x / axis.unit, measure.scale * y, series=number) for number, (x, y) in drawn.items()
        ]
        chart = line_chart(
            lines,
            axis.label,
            f"{measure.words} ({measure.unit})",
            from_zero=measure.unit == "%",
            marks=_marks(runs, axis.unit),
        )
        last = {number: float(y[-1]) for number, (_, y) in drawn.items()}
        pieces.append(Figure(_heldout_title(runs, measure, last), chart, not_comparable([runs[one] for one in last])))
    return pieces


def _heldout_title(runs: Sequence[Run], measure: Measure, last: dict[int, float]) -> str:
    """What the last evaluations say; no run is first on chains of its own. `last`: run number to value."""
    words = f"Held-out {measure.words}"
    if len(last) == 1:
        ((number, value),) = last.items()
        return f"{words} at the last evaluation: {measure.shown(value)}, in “{runs[number].name}” alone"
    if not_comparable([runs[number] for number in last]):
        return f"{words} at the last evaluation, on different chains: {_spread(last, measure.shown)}"
    return f"{words} at the last evaluation {_ranked(runs, last, measure.shown, measure.less_is_better)}"


def _spread(last: dict[int, float], shown: Callable[[float], str]) -> str:
    return f"{shown(min(last.values()))} to {shown(max(last.values()))}"


def _ranked(runs: Sequence[Run], last: dict[int, float], shown: Callable[[float], str], less_is_better: bool) -> str:
    best = shown((min if less_is_better else max)(last.values()))
    first = [f"“{runs[number].name}”" for number, value in last.items() if shown(value) == best]
    if len(first) == len(last):
        return f"is the same in {' and '.join(first) if len(first) == 2 else f'all {len(first)} runs'}: {best}"
    return f"is {'lowest' if less_is_better else 'highest'} in {' and '.join(first)}: {best}"


def _training_losses(runs: Sequence[Run], different: dict[str, list[Any]]) -> list[Piece]:
    """The whole loss where it is one sum for all, else its parts."""
    having = {number: run for number, run in enumerate(runs) if run.steps}
    if not having:
        return []
    axis, marks = token_axis(runs), _marks(runs, token_axis(runs).unit)
    if _is_one_sum(list(having.values()), different):
        lines = [
            curve(run.name, run.tokens() / axis.unit, run.column("loss"), number) for number, run in having.items()
        ]
        last = {number: float(line.y[-1]) for number, line in zip(having, lines, strict=True)}
        title = f"The training loss at the end {_ranked(runs, last, '{:.3f} nats'.format, less_is_better=True)}"
        return [Figure(title, line_chart(lines, axis.label, "loss (nats a token)", marks=marks))]
    note = "Before its weight."
    if _sums_differ(different):
        note += " The runs' losses, weights or data differ: where a curve ends ranks no run."
    pieces: list[Piece] = []
    for part in dict.fromkeys(part for run in having.values() for stage in run.stages() for part in stage.parts()):
        lines = [
            part_curve(run, part, axis.unit, run.name, number)
            for number, run in having.items()
            if any(part in stage.parts() for stage in run.stages())
        ]
        chart = line_chart(lines, axis.label, f"{loss_unit(part)} a token", marks=marks)
        pieces.append(Figure(f"{capital(loss_words(part))} while training", chart, note))
    return pieces


def _is_one_sum(runs: Sequence[Run], different: dict[str, list[Any]]) -> bool:
    weights = [run.steps[0]["weights"] for run in runs]
    return (
        not _sums_differ(different)
        and all(run.has_one_loss for run in runs)
        and all(one == weights[0] for one in weights)
    )


def _sums_differ(different: dict[str, list[Any]]) -> bool:
    return any(DECIDES_LOSS.match(key) for key in different)


def _compared_speed(runs: Sequence[Run]) -> list[Piece]:
    having = {number: run for number, run in enumerate(runs) if run.tokens_per_s is not None}
    if not having:
        return []
    axis = token_axis(runs)

    def chart(column: str, scale: float, label: str) -> Drawing:
        lines = [
            curve(run.name, run.tokens() / axis.unit, scale * run.column(column), number)
            for number, run in having.items()
        ]
        return line_chart(lines, axis.label, label, from_zero=True, marks=_marks(runs, axis.unit))

    rates = {number: run.tokens_per_s or 0.0 for number, run in having.items()}
    waits = {number: run.stall_frac for number, run in having.items()}
    speed_title = f"Speed over all steps {_ranked(runs, rates, '{:,.0f} tokens a second'.format, less_is_better=False)}"
    stall_title = f"Waiting for data took {_spread(waits, '{:.1%}'.format)} of the time in steps"
    return [
        Figure(speed_title, chart("tokens_per_s", 1.0, "tokens a second")),
        Figure(stall_title, chart("stall_frac", 100.0, "waiting (% of a step)")),
    ]


def _marks(runs: Sequence[Run], unit: float) -> list[Mark]:
    """Where the stages of each run begin, in its colour; of all runs where they begin together."""
    marks: dict[tuple[str, float], list[int]] = {}
    for number, run in enumerate(runs):
        for mark in run.stage_marks(unit):
            marks.setdefault((mark.name, mark.x), []).append(number)
    return [Mark(name, x, of[0] if len(of) == 1 else None) for (name, x), of in marks.items()]


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
