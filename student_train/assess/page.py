"""Results of `student-train eval` as sections of an HTML page, alone or in the report of a run.

In: the object that `eval --json` prints. Every number shown is one of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from stillroom.config import Json
from stillroom.errors import DataError
from stillroom.html.charts import Line, bars, line_chart
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, Text, format_span, write_report
from stillroom.log import format_count, format_price

GROUPS = {
    "source": "source",
    "prompt_tokens": "length of the prompt (tokens)",
    "tokens": "length of the chain (tokens)",
    "position": "position in the chain (tokens)",
    "part": "part of the chain",
    "teacher_tokens": "length of the teacher's chains (tokens)",
}
CHANGES = {
    "typing": "typing noise",
    "distractor": "an irrelevant sentence",
    "options": "options in another order",
}
PARTS = {
    "generation": "answers",
    "robustness": "robustness",
    "forgetting": "forgetting",
    "lm_eval": "public tasks (lm-eval)",
}
CHARTED = ("tokens", "position", "part")
TOKENS, ANSWERS = 0, 1
"""Colours of the two kinds of calibration."""


def write_eval_page(result: Json, out: Path) -> None:
    """Writes the page whole."""
    rounded = f", rounded to {result['quantise']}" if result["quantise"] else ""
    write_report(out, f"Evaluation of {result['model']}", eval_sections(result), f"{result['where']}{rounded}")


def read_result(path: Path) -> Json:
    """What `student-train eval --json` printed into a file. Raises DataError for another file."""
    try:
        result: object = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and {"model", "by", "calibration", "generation"} <= result.keys():
            return result
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    raise DataError(f"{path} is not a result of `student-train eval --json`")


def eval_sections(result: Json, named: str = "") -> list[Section]:
    """Sections of one evaluation; `named` stands in front of their titles."""
    answers = result["generation"]
    sections = [
        Section("Evaluation", [_overview(result)], f"{result['model']} on {result['where']}."),
        Section("Knowledge retention", [*_retention_charts(result), *_group_tables(result)], RETENTION_NOTE),
        Section("Calibration", _calibration(result), CALIBRATION_NOTE),
        Section("Answers", [] if answers is None else _answers(answers)),
        Section("Robustness", [] if answers is None else _robustness(answers["robustness"])),
        Section("Forgetting", _forgetting(result["forgetting"])),
        Section("Public tasks", _tasks(result["lm_eval"], result["quantise"])),
        Section("Not measured", _not_measured(result)),
    ]
    return [Section(f"{named}{one.title}", one.pieces, one.intro) for one in sections]


RETENTION_NOTE = (
    "1 - JS / log 2, JS being the Jensen-Shannon divergence between the student's distribution and its teacher's: 100% "
    "for a student that predicts every token as its teacher does."
)
CALIBRATION_NOTE = (
    "Of predictions made with a confidence of 80%, 80% should be right: points below the diagonal are overconfident. "
    "ECE is the mean distance to it. A token is right where the student's most likely token is the one that the "
    "teacher sampled; the confidence of an answer is the geometric mean of its tokens' probabilities."
)


def percent(value: float | None) -> str:
    """41.3%, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _overview(result: Json) -> Piece:
    count = f"{format_count(result['num_tokens'])} tokens of {result['num_chains']:,} chains"
    numbers = [Number("cross-entropy", f"{result['cross_entropy']:.4f} nats", count)]
    if result["retention"] is not None:
        numbers = [
            Number("knowledge retention", percent(result["retention"]), f"JS {result['js']:.4f} nats"),
            Number(
                "KL to the teacher", f"{result['forward_kl']:.4f} nats", f"top-1 {percent(result['top1_agreement'])}"
            ),
            *numbers,
        ]
    if result["calibration"] is not None:
        detail = f"confidence - accuracy {result['confidence_minus_accuracy']:+.3f}"
        numbers.append(Number("calibration error", percent(result["calibration"]["ece"]), detail))
    answers = result["generation"]
    if answers is not None:
        teacher = f"teacher {percent(answers['teacher_accuracy'])}; {answers['num_prompts']} prompts"
        numbers.append(Number("answers correct", percent(answers["accuracy"]), teacher))
        if answers["cost"] is not None:
            each = (
                "-"
                if answers["cost_per_correct"] is None
                else f"{format_price(answers['cost_per_correct'])} per right answer"
            )
            numbers.append(Number("cost of answers", format_price(answers["cost"]), each))
    return Numbers(numbers)


def _retention_charts(result: Json) -> list[Piece]:
    pieces: list[Piece] = []
    for by in CHARTED:
        rows = [row for row in result["by"].get(by, []) if row["retention"] is not None]
        if len(rows) > 1:
            values = [100 * row["retention"] for row in rows]
            texts = [f"{value:.1f}%" for value in values]
            chart = bars([row["group"] for row in rows], values, texts, "retention (%)", limit=100)
            pieces.append(Figure(f"By {GROUPS[by]}", chart))
    return pieces


def _group_tables(result: Json) -> list[Piece]:
    columns = ["tokens", "retention", "JS (nats)", "KL (nats)", "top-1 agreement", "cross-entropy", "accuracy"]
    columns.append("overconfidence")
    return [
        Table(
            f"By {GROUPS[by]}",
            [GROUPS[by].partition(" (")[0], *columns],
            [
                [
                    row["group"],
                    f"{row['num_tokens']:,}",
                    percent(row["retention"]),
                    _number(row["js"]),
                    _number(row["forward_kl"]),
                    percent(row["top1_agreement"]),
                    _number(row["cross_entropy"]),
                    percent(row["accuracy"]),
                    _number(row["confidence_minus_accuracy"], "+.3f"),
                ]
                for row in rows
            ],
            right=frozenset(range(1, 9)),
        )
        for by, rows in result["by"].items()
    ]


def _calibration(result: Json) -> list[Piece]:
    answers = result["generation"]
    known = [
        (name, number, found)
        for name, number, found in (
            ("tokens", TOKENS, result["calibration"]),
            ("answers", ANSWERS, None if answers is None else answers["calibration"]),
        )
        if found is not None
    ]
    if not known:
        return []
    lines = [Line("perfectly calibrated", [0, 100], [0, 100], series=2)]
    rows = []
    for name, number, found in known:
        filled = [one for one in found["bins"] if one["num"]]
        label = f"{name}, ECE {found['ece']:.1%}"
        x, y = ([100 * one[key] for one in filled] for key in ("confidence", "accuracy"))
        lines.append(Line(label, x, y, series=number))
        rows += [
            [
                name,
                f"{one['low']:.0%} to {one['high']:.0%}",
                f"{one['num']:,}",
                percent(one["confidence"]),
                percent(one["accuracy"]),
            ]
            for one in filled
        ]
    columns = ["of", "confidence", "predictions", "mean confidence", "right"]
    return [
        Figure("Confidence against accuracy", line_chart(lines, "confidence (%)", "right (%)")),
        Table("Bins of confidence", columns, rows, right=frozenset({2, 3, 4})),
    ]


def _answers(answers: Json) -> list[Piece]:
    tables: list[Piece] = [
        Table(
            f"Correct answers by {GROUPS[by]}",
            [GROUPS[by].partition(" (")[0], "prompts", "judged", "correct", "95% interval", "teacher"],
            [
                [
                    row["group"],
                    str(row["num_prompts"]),
                    str(row["num_judged"]),
                    *_interval(row["accuracy"]),
                    percent(row["teacher_accuracy"]),
                ]
                for row in rows
            ],
            right=frozenset(range(1, 6)),
        )
        for by, rows in answers["by"].items()
        if rows
    ]
    how = (
        f"{answers['num_correct']} right, {answers['num_wrong']} wrong, {answers['num_undecided']} undecided; "
        f"{percent(answers['truncated_frac'])} cut off at the limit; {answers['mean_tokens']:.0f} tokens per answer, "
        f"{answers['tokens_per_s']:.0f} tok/s, {format_span(answers['seconds'])}."
    )
    return [Text(how), *tables]


def _interval(found: Json | None) -> list[str]:
    """A mean and its interval as two cells."""
    if found is None:
        return ["-", "-"]
    known = found["low"] is not None
    return [percent(found["mean"]), f"{found['low']:.1%} to {found['high']:.1%}" if known else "-"]


def _robustness(found: Json | None) -> list[Piece]:
    if found is None:
        return []
    rows = []
    for kind, one in found.items():
        mean, interval = _interval(one["accuracy_difference"])
        rows.append(
            [
                CHANGES[kind],
                str(one["num_prompts"]),
                percent(one["accuracy_clean"]),
                percent(one["accuracy"]),
                mean,
                interval,
                "-" if one["p_value"] is None else f"{one['p_value']:.3g}",
                percent(one["agreement"]),
                _shortened(one["example"]) if one["num_prompts"] else "applies to none of these prompts",
            ]
        )
    columns = ["change", "prompts", "clean", "changed", "difference", "95% interval", "p", "same answer", "example"]
    note = (
        "The same held-out prompts, changed. Same answer: how often the answer stays what it was, right or wrong; an "
        "option counts as the same wherever it moved. p is McNemar's exact test."
    )
    return [Table("Changed prompts", columns, rows, note, right=frozenset(range(1, 8)), long=frozenset({8}))]


def _shortened(text: str | None) -> str:
    return "-" if text is None else text if len(text) <= 500 else f"{text[:499]}…"


def _forgetting(found: Json | None) -> list[Piece]:
    if found is None:
        return []
    words = {
        "cross_entropy": "cross-entropy (nats)",
        "bits_per_byte": "bits per byte",
        "forward_kl": "KL (nats)",
        "js": "JS (nats)",
        "retention": "retention",
        "top1_agreement": "top-1 agreement",
    }
    rows = []
    for name, change in found["change"].items():
        form = ".1%" if name in ("retention", "top1_agreement") else ".4f"
        before, after = (_number(found[when][name], form) for when in ("before", "after"))
        rows.append([words[name], before, after, format(change, f"+{form}")])
    what = "held-out chains of another cache" if found["kind"] == "cache" else "a text"
    note = f"{found['path']}: {what}, {found['after']['num_tokens']:,} tokens; before: {found['before_model']}."
    if not found.get("same_tokens", True):
        note += " The two read it by different vocabularies, so only bits per byte of text can be compared."
    columns = ["", "before the run", "after", "change"]
    return [Table("A second held-out set", columns, rows, note, right=frozenset({1, 2, 3}))]


def _tasks(found: Json | None, quantise: str | None) -> list[Piece]:
    if found is None:
        return []
    rows = [
        [
            task,
            row["metric"],
            row["filter"],
            _number(row["value"]),
            "-" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}",
            str(found["num_samples"].get(task, "-")),
        ]
        for task, metrics in found["tasks"].items()
        for row in metrics
    ]
    note = f"lm-eval {found['version']}, in {format_span(found['seconds'])}"
    note += "" if quantise is None else f", of the float weights (not rounded to {quantise})"
    # Results of earlier versions do not say.
    if "chat_template" in found:
        note += f", prompts {'written by the chat template' if found['chat_template'] else 'as plain text'}"
    note += "." if found["limit"] is None else f", the first {found['limit']} documents of each task."
    columns = ["task", "metric", "filter", "value", "95% interval", "documents"]
    return [Table("lm-eval", columns, rows, note, right=frozenset({3, 4, 5}))]


def _not_measured(result: Json) -> list[Piece]:
    """Parts that failed or are still to come; results of earlier versions name none."""
    rows = [[PARTS[one["part"]], one["reason"]] for one in result.get("failed", ())]
    rows += [[PARTS[part], "not finished when this page was written"] for part in result.get("pending", ())]
    return [Table("Parts without a result", ["part", "why"], rows, long=frozenset({1}))] if rows else []


def titles(results: Sequence[Json]) -> list[str]:
    """What stands in front of the sections of each of several evaluations."""
    return [""] if len(results) == 1 else [f"{result['model']}: " for result in results]
