"""Several runs side by side, as sections of a report: what differs between them, and what came of it.

In: runs that were read. Out: tables and charts. Numbers are ranked only where they measure the same: held-out ones on
the same chains, training losses of the same sums on the same data.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from shared.chart_labels import Mark
from shared.charts import Line, line_chart
from shared.config import Json
from shared.drawing import Drawing
from shared.log import format_count, format_plural
from shared.report import Figure, Piece, Section, Table, Text, format_span
from student_train.config import meaning_of
from student_train.eval_tables import MEASURES, Measure, eval_table, not_comparable
from student_train.run_curves import Run, capital, curve, loss_unit, loss_words, part_curve, token_axis

DECIDES_LOSS = re.compile(r"data\.|stages\.\d+(\.(losses|temperature|focal_gamma|token_weights|where)|$)")
"""Keys that decide what the training loss is a mean of."""

NO_STAGE = "no such stage"

_STAGE_KEY = re.compile(r"stages\.(\d+)\.")


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """Sections on two runs or more. Raises ConfigError, DataError where a configuration cannot be read."""
    different = differences(runs)
    return [
        Section("What differs", [_configs(runs, different), *_doings(runs)]),
        Section("Held-out results", [*eval_table(runs), *_heldout_curves(runs)]),
        Section("Training", [*_training_losses(runs, different), *_speed(runs)]),
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


def _heldout_curves(runs: Sequence[Run]) -> list[Piece]:
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


def _speed(runs: Sequence[Run]) -> list[Piece]:
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
