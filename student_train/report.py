"""`student-train report`: one run in charts, or several compared, as sections of a self-contained HTML page.

In: run folders, finished or not. Out: numbers, charts and tables. Loads no model. Parts of a loss are shown before
their weights; their sum only where one set of weights makes it the same sum at every step. No run is called best:
numbers of different chains, losses or weights do not rank.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.html.charts import Line, line_chart
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, Text, format_span, write_report
from stillroom.log import format_count, format_plural, format_price
from student_train.assess.page import eval_sections, read_result, titles
from student_train.config.run import meaning_of
from student_train.data.terms import read_found
from student_train.run_curves import (
    MEASURES,
    NUM_WINDOWS,
    Run,
    Stage,
    curve,
    eval_table,
    loss_unit,
    loss_words,
    not_comparable,
    part_curve,
    read_runs,
    token_axis,
)
from student_train.runtime.cost import cost_of, read_sessions
from student_train.runtime.run_folder import before_and_after

NO_STAGE = "no such stage"
SHOWN_TERMS = 30
_STAGE_KEY = re.compile(r"stages\.(\d+)\.")


def write_student_report(
    folders: Sequence[Path], out: Path, price_per_hour: float | None = None, results: Sequence[Path] = ()
) -> Json:
    """Writes the page, with `results` of `student-train eval --json`; returns where, and what each run cost.

    Raises ConfigError, DataError as `student_sections` does.
    """
    names = ", ".join(folder.resolve().name for folder in folders)
    title = f"Student {names}" if len(folders) == 1 else f"Students {names}"
    evaluated = [read_result(path) for path in results]
    sections = student_sections(*folders, price_per_hour=price_per_hour)
    for result, named in zip(evaluated, titles(evaluated), strict=True):
        sections += eval_sections(result, named)
    write_report(out, title, sections)
    runs = read_runs(folders)
    costs = run_costs(runs, price_per_hour)
    return {"page": str(out), "costs": {run.name: found for run, found in zip(runs, costs, strict=True)}}


def student_sections(*folders: Path, price_per_hour: float | None = None) -> list[Section]:
    """The report's sections, to stand alone or beside others; the price is of a device's hour.

    Raises DataError for a folder that holds no run, ConfigError for a price where no run has recorded its time.
    """
    runs = read_runs(folders)
    costs = run_costs(runs, price_per_hour)
    if len(runs) == 1:
        first = Section("The student", [_overview(runs[0]), *_heldout_change(runs[0]), *_costs(runs, costs)])
        training = [*_stage_table(runs[0]), *_terms(runs[0]), *_losses(runs)]
        training += [*_rise(runs[0]), *_learning_rate(runs[0]), *_speed(runs)]
    else:
        first = Section("What differs", [_differing_keys(runs), _progress_table(runs), *_costs(runs, costs)])
        training = [*_losses(runs), *_speed(runs)]
    return [
        first,
        Section("Held-out evaluations", [*eval_table(runs), *_heldout_curves(runs)]),
        Section("Training", training),
    ]


def run_costs(runs: Sequence[Run], price_per_hour: float | None) -> list[Json | None]:
    """What each run took, and at the price of a device's hour cost: cost_of(). Raises ConfigError where none knows."""
    costs = [cost_of(read_sessions(run.folder.sessions_path), price_per_hour) for run in runs]
    if price_per_hour is not None and not any(costs):
        raise ConfigError("--price-per-hour: these runs are of an earlier version that recorded no times: remove it")
    return costs


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted keys that differ between the runs' configurations, and the value of each run; None is not set.

    Keys of a stage are compared between the runs that have the stage, NO_STAGE stands for the others.
    """
    configs = [_keys(run) for run in runs]
    num_stages = [len(run.config().stages) for run in runs]
    found = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        # A run with fewer stages differs in their number, not in every key of those that it lacks.
        stage = _STAGE_KEY.match(key)
        having = [
            config for config, num in zip(configs, num_stages, strict=True) if stage is None or int(stage[1]) < num
        ]
        # As JSON, because values may be lists, which a set cannot hold.
        if len({json.dumps(config.get(key)) for config in having}) > 1:
            found[key] = [config.get(key) if config in having else NO_STAGE for config in configs]
    return found


def _keys(run: Run) -> Json:
    """What decides what is learnt, and what it is evaluated on."""
    config = run.config()
    judged = {} if config.eval is None else {"eval.where": config.eval.where, "eval.max_chains": config.eval.max_chains}
    return {**meaning_of(config), **judged}


def _differing_keys(runs: Sequence[Run]) -> Piece:
    different = differences(runs)
    if not different:
        return Text("The configurations agree in everything that affects training and evaluation.")
    rows = [[key, *map(_value, values)] for key, values in different.items()]
    title = f"The configurations differ in {format_plural(len(different), 'key')}"
    return Table(title, ["key", *(run.name for run in runs)], rows)


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def _progress_table(runs: Sequence[Run]) -> Piece:
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("stages", lambda run: ", ".join(stage.name for stage in run.stages()) or "-"),
        ("losses", _loss_texts),
        ("optimizer steps", lambda run: f"{len(run.steps):,}"),
        ("tokens read", lambda run: format_count(run.num_tokens)),
        ("time in steps", lambda run: format_span(run.seconds)),
        ("speed", lambda run: "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f} tok/s"),
        ("waiting for data", lambda run: f"{run.stall_frac:.1%}"),
    ]
    rows = [[name, *(text_of(run) for run in runs)] for name, text_of in facts]
    return Table("Progress of each run", ["", *(run.name for run in runs)], rows)


def _costs(runs: Sequence[Run], costs: Sequence[Json | None]) -> list[Piece]:
    """What each run took of which devices, lost steps included; nothing for runs of earlier versions."""
    rows = []
    for run, found in zip(runs, costs, strict=True):
        if found is not None:
            devices = ", ".join(
                f"{format_span(3600 * hours)} of {kind}" for kind, hours in found["device_hours"].items()
            )
            cost = [] if found["cost"] is None else [format_price(found["cost"])]
            tokens = format_count(found["num_tokens"])
            rows.append([run.name, devices, format_plural(found["num_calls"], "call"), tokens, *cost])
    if not rows:
        return []
    priced = [f"cost at {one['price_per_hour']:g} an hour" for one in costs if one and one["cost"] is not None][:1]
    note = "Each call from start to end, including loading, evaluations and repeated steps."
    return [Table("Cost", ["run", "device time", "calls", "tokens", *priced], rows, note, right=frozenset({3, 4}))]


def _loss_texts(run: Run) -> str:
    texts = [
        " + ".join(f"{stage.weight_words(part)} {loss_words(part)}" for part in stage.parts()) for stage in run.stages()
    ]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{stage.name}: {text}" for stage, text in zip(run.stages(), texts, strict=True)) or "-"


def _overview(run: Run) -> Piece:
    stages = run.stages()
    by_stage = ", ".join(f"{stage.name} {len(stage.steps):,}" for stage in stages) if len(stages) > 1 else ""
    loss_tokens = f"{format_count(run.column('num_loss_tokens').sum())} with a loss" if run.steps else ""
    rate = run.tokens_per_s
    numbers = [
        Number("optimizer steps", f"{len(run.steps):,}", by_stage or "".join(stage.name for stage in stages)),
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
        numbers.append(Number("loss", f"{end:.3f} nats", f"in training, the weighted sum; {start:.3f} {began}"))
    return numbers


def _heldout_change(run: Run) -> list[Piece]:
    before, after = before_and_after(run.evals)
    if before is None or after is None or before is after:
        return []
    rows = []
    for measure in MEASURES:
        first, last = before.get(measure.name), after.get(measure.name)
        if first is not None and last is not None:
            # A percentage of a percentage would be read as percentage points.
            change = f"{100 * (last - first) / first:+.0f}%" if first and measure.unit != "%" else "-"
            rows.append([measure.words, measure.shown(first), measure.shown(last), change])
    note = "Means over held-out tokens. Lower is better, except for agreement."
    columns = ["", "before", "after", "change"]
    return [Table("Before and after training", columns, rows, note, right=frozenset({1, 2, 3}))] if rows else []


def _stage_table(run: Run) -> list[Piece]:
    """Parts by stage, where no single number tells how the loss went."""
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
            rows.append([f"{named}: weighted sum", "-", f"{start:.3f}", f"{end:.3f}"])
    note = (
        "Nats per token on the stage's chains. Compare within a stage: others may differ in chains, token "
        f"weights or losses. No sum is given where weights change. {_windows_note(run)}"
    )
    columns = ["loss", "weight", "at the start", "at the end"]
    return [Table("Losses by stage", columns, rows, note.strip(), right=frozenset({1, 2, 3}))]


def _terms(run: Run) -> list[Piece]:
    """Terms of data.terms that the stages' chains say."""
    pieces: list[Piece] = []
    for stage in run.stages():
        found = read_found(run.folder.root, stage.name)
        if found is not None:
            rows = [
                [one["term"], f"{one['count']:,}", f"{one['num_chains']:,}", one["example"]]
                for one in found["terms"][:SHOWN_TERMS]
            ]
            missing = f" {len(found['unmatched'])} terms never occur." if found["unmatched"] else ""
            note = f"{found['num_tokens']:,} tokens of {format_plural(found['num_chains'], 'chain')}.{missing}"
            columns = ["term", "times", "chains", "for example"]
            table = Table(
                f"Weighted terms of stage {stage.name}", columns, rows, note, frozenset({1, 2}), frozenset({3})
            )
            pieces.append(table)
    return pieces


def _losses(runs: Sequence[Run]) -> list[Piece]:
    """One chart for each part of the loss, and for one run with one loss the sum."""
    # By number, so that a run has one colour on all charts, whichever of them it is on.
    runs_by_number = {number: run for number, run in enumerate(runs) if run.steps}
    if not runs_by_number:
        return []
    axis, is_one = token_axis(runs), len(runs) == 1
    marks = runs[0].stage_marks(axis.unit) if is_one else []
    note = f"Before its weight. {_windows_note(*runs_by_number.values())}".strip()
    pieces: list[Piece] = []
    if is_one and runs[0].has_one_loss and len(runs[0].stages()[0].parts()) > 1:
        whole = curve("", runs[0].tokens() / axis.unit, runs[0].column("loss"))
        pieces.append(Figure("Loss: weighted sum of its parts", line_chart([whole], axis.label, "nats per token")))
    for part in dict.fromkeys(
        part for run in runs_by_number.values() for stage in run.stages() for part in stage.parts()
    ):
        lines = [
            part_curve(run, part, axis.unit, "" if is_one else run.name, number)
            for number, run in runs_by_number.items()
            if any(part in stage.parts() for stage in run.stages())
        ]
        chart = line_chart(lines, axis.label, f"{loss_unit(part)} per token", marks=marks)
        words = loss_words(part)
        pieces.append(Figure(f"{words[:1].upper()}{words[1:]} in training", chart, note))
    return pieces


def _heldout_curves(runs: Sequence[Run]) -> list[Piece]:
    axis, is_one = token_axis(runs), len(runs) == 1
    marks = runs[0].stage_marks(axis.unit) if is_one else []
    pieces: list[Piece] = []
    for measure in MEASURES:
        curves = {number: run.eval_curve(measure.name) for number, run in enumerate(runs)}
        if measure.name == "js" or not any(len(y) > 1 for _, y in curves.values()):
            continue
        lines = [
            Line("" if is_one else runs[number].name, x / axis.unit, measure.scale * y, series=number)
            for number, (x, y) in curves.items()
            if len(y)
        ]
        label = f"{measure.words} ({measure.unit})"
        chart = line_chart(lines, axis.label, label, from_zero=measure.unit == "%", marks=marks)
        pieces.append(Figure(f"Held-out {measure.words}", chart, not_comparable(runs)))
    return pieces


def _learning_rate(run: Run) -> list[Piece]:
    if not run.steps:
        return []
    axis = token_axis([run])
    line, marks = Line("", run.tokens() / axis.unit, run.column("learning_rate")), run.stage_marks(axis.unit)
    return [Figure("Learning rate", line_chart([line], axis.label, "learning rate", from_zero=True, marks=marks))]


def _rise(run: Run) -> list[Piece]:
    # None becomes NaN.
    rises = np.array([step.get("adversarial_rise") for step in run.steps], float)
    is_disturbed = np.isfinite(rises)
    if not is_disturbed.any():
        return []
    axis = token_axis([run])
    line, marks = curve("", run.tokens()[is_disturbed] / axis.unit, rises[is_disturbed]), run.stage_marks(axis.unit)
    note = "How much disturbed prompts raise the loss. The losses of these steps are those of the disturbed prompts."
    chart = line_chart([line], axis.label, "nats per token", from_zero=True, marks=marks)
    return [Figure("Disturbed prompts", chart, note)]


def _speed(runs: Sequence[Run]) -> list[Piece]:
    timed = {number: run for number, run in enumerate(runs) if run.tokens_per_s is not None}
    if not timed:
        return []
    axis, is_one = token_axis(runs), len(runs) == 1
    marks = runs[0].stage_marks(axis.unit) if is_one else []

    def figure(title: str, column: str, scale: float, label: str) -> Figure:
        lines = [
            curve("" if is_one else run.name, run.tokens() / axis.unit, scale * run.column(column), number)
            for number, run in timed.items()
        ]
        return Figure(title, line_chart(lines, axis.label, label, from_zero=True, marks=marks))

    return [
        figure("Speed", "tokens_per_s", 1.0, "tokens per second"),
        figure("Waiting for data", "stall_frac", 100.0, "waiting (% of a step)"),
    ]


def _windows_note(*runs: Run) -> str:
    if max(len(stage.steps) for run in runs for stage in run.stages()) <= NUM_WINDOWS:
        return ""
    return f"Means of {NUM_WINDOWS} windows; bands hold the steps between the 10th and 90th percentile."
