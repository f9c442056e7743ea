"""The HTML page of a comparison: numbers, latencies, wins by source, and answers side by side."""

from collections.abc import Sequence
from pathlib import Path

from stillroom.config import Json
from stillroom.html.charts import Group, bars, histogram
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, Text, write_report
from student_train.answers import AskedPrompt
from student_train.compare.comparing import ALL, BEST, Answered
from student_train.compare.sides import Reply
from student_train.compare.statistics import Interval

MAX_SHOWN = 100
MAX_CHARS = 2000
SIGNIFICANT = 0.05
AGAINST = {BEST: "the most accurate side", ALL: "each other"}


def write_page(result: Json, answered: Sequence[Answered], prompts: Sequence[AskedPrompt], out: Path) -> None:
    """Writes the page whole."""
    names = " and ".join(one.side.name for one in answered)
    sections = [
        Section("Outcome", [_numbers(result), *(_difference(pair) for pair in result["pairs"]), _accuracies(result)]),
        Section("By source", [*_all_sources(result), *(_by_source(pair) for pair in result["pairs"])]),
        Section("Latency, tokens and cost", [*_latencies(answered), _costs(result)]),
        Section("Answers side by side", _answers(answered, prompts)),
    ]
    subtitle = (
        f"{result['num_prompts']} held-out prompts, temperature {result['temperature']:g}, measured against "
        f"{AGAINST.get(result['against'], result['against'])}"
    )
    write_report(out, f"Comparison of {names}", sections, subtitle)


def percent(value: float | None) -> str:
    """41.3%, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def interval_words(found: Json, form: str = "+.1%") -> str:
    """`95% interval -3.9% to +1.5%`, with where it comes from if not from the bootstrap."""
    if found["low"] is None:
        return "interval unknown: all values are equal"
    which = "every" if found["mean"] else "no"
    why = f", exact: {which} prompt differs" if found["method"] == "exact" else ""
    return f"95% interval {found['low']:{form}} to {found['high']:{form}}{why}"


def difference_words(pair: Json) -> str:
    """`int8 - float: -1.2% (95% interval -3.9% to +1.5%), 3 wins to 6 on 251 pairs, p = 0.51`, of percentage points."""
    found = pair["accuracy_difference"]
    if found is None:
        return f"{pair['b']} - {pair['a']}: no prompt was judged for both"
    several = f" ({pair['p_adjusted']:.3g} among all pairs)" if pair["p_adjusted"] != pair["p_value"] else ""
    return (
        f"{pair['b']} - {pair['a']}: {found['mean']:+.1%} ({interval_words(found)}), "
        f"{pair['wins_b']} wins to {pair['wins_a']} on {pair['num_pairs']} pairs, p = {pair['p_value']:.3g}{several}"
    )


def verdict_words(pair: Json) -> str:
    """What the pair shows: an interval and a test that both exclude chance, or nothing."""
    found = pair["accuracy_difference"]
    if found is None or Interval(**found).holds_zero:
        return "The interval includes 0: no significant difference on these prompts."
    if pair["p_adjusted"] >= SIGNIFICANT:
        # With few pairs that differ the bootstrap is too narrow: 4 wins to 0 exclude 0, and have p = 0.125.
        return f"Too few prompts differ to call it significant (p = {pair['p_adjusted']:.3g})."
    return f"{pair['b'] if found['mean'] > 0 else pair['a']} is better on these prompts."


def _numbers(result: Json) -> Piece:
    numbers = [
        Number(side["name"], percent(side["accuracy"] and side["accuracy"]["mean"]), _detail(side))
        for side in result["sides"]
    ]
    return Numbers([*numbers, Number("cached teacher", percent(result["teacher_accuracy"]), "on the same prompts")])


def _detail(side: Json) -> str:
    parts = [f"{side['num_answered']} answered", f"{side['num_undecided']} undecided"]
    return ", ".join([*parts, *([f"{side['num_failed']} failed"] if side["num_failed"] else [])])


def _difference(pair: Json) -> Piece:
    return Text(f"Correct answers, {difference_words(pair)}. {verdict_words(pair)}")


def _accuracies(result: Json) -> Piece:
    known = [side for side in result["sides"] if side["accuracy"] is not None]
    values = [side["accuracy"]["mean"] for side in known]
    texts = [f"{one['accuracy']['low']:.1%} to {one['accuracy']['high']:.1%}" for one in known]
    return Figure(
        "Share of correct answers",
        bars([side["name"] for side in known], [100 * value for value in values], texts, "correct (%)", limit=100),
        "With 95% intervals. Paired differences (above) are more precise than comparing these intervals.",
    )


def _all_sources(result: Json) -> list[Piece]:
    """One table for three and more sides, whose pairs would be hard to combine by eye."""
    sides = result["sides"]
    if len(sides) < 3:
        return []
    known = [{one["source"]: one for one in side["by_source"]} for side in sides]
    rows = [
        [source, *(percent(found[source]["accuracy"]) if source in found else "-" for found in known)]
        for source in sorted(set().union(*known))
    ]
    columns = ["source", *(side["name"] for side in sides)]
    return [Table("Correct answers of each side", columns, rows, right=frozenset(range(1, len(columns))))]


def _by_source(pair: Json) -> Piece:
    rows = [
        [
            one["source"],
            str(one["num_pairs"]),
            percent(one["accuracy_a"]),
            percent(one["accuracy_b"]),
            str(one["wins_a"]),
            str(one["wins_b"]),
            str(one["ties"]),
            f"{one['p_value']:.3g}",
        ]
        for one in pair["by_source"]
    ]
    a, b = pair["a"], pair["b"]
    columns = ["source", "pairs", a, b, f"{a} wins", f"{b} wins", "ties", "p"]
    note = "p is McNemar's exact test; with many sources some are small by chance."
    return Table(f"{a} against {b}", columns, rows, note, right=frozenset(range(1, 8)))


def _latencies(answered: Sequence[Answered]) -> list[Piece]:
    groups = [
        Group(one.side.name, [reply.latency_s for reply in one.replies if reply.error is None]) for one in answered
    ]
    return [Figure("Time of an answer", histogram(groups, "seconds"), "From the request to the last token.")]


def _costs(result: Json) -> Piece:
    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for side in result["sides"]:
        latency, first = side["latency_s"] or {}, side["first_token_s"] or {}
        rows.append(
            [
                side["name"],
                *(number(latency.get(name)) for name in ("p50", "p90", "p99")),
                *(number(first.get(name)) for name in ("p50", "p99")),
                number(side["tokens_per_answer"], ".0f"),
                str(side["num_cut"]),
                number(side["wall_s"], ".1f"),
                number(side["cost"], ".4f"),
                number(side["cost_per_correct"], ".6f"),
                side["device"] or "-",
            ]
        )
    columns = ["side", "p50 (s)", "p90", "p99", "first token p50 (s)", "p99", "tokens", "cut", "all (s)", "cost"]
    columns += ["per correct", "device"]
    note = f"{result['concurrency']} requests at a time to servers, one to folders. Cost from the prices given."
    return Table("Each side", columns, rows, note, right=frozenset(range(1, 11)))


def _answers(answered: Sequence[Answered], prompts: Sequence[AskedPrompt]) -> list[Piece]:
    def order(number: int) -> tuple[bool, int]:
        # What they disagree on comes first.
        return len({one.score(number) for one in answered}) == 1, number

    shown = sorted(range(len(prompts)), key=order)[:MAX_SHOWN]
    rows = [
        [
            prompts[number].source,
            _short("\n".join(str(one["content"]) for one in prompts[number].messages)),
            prompts[number].reference or "-",
            *(_judged(one.replies[number], one.score(number)) for one in answered),
        ]
        for number in shown
    ]
    columns = ["source", "prompt", "reference", *(one.side.name for one in answered)]
    note = f"{len(rows)} of {len(prompts)} prompts, those first where the verdicts differ."
    long = frozenset([1, *range(3, 3 + len(answered))])
    return [Table("Replies with their verdicts", columns, rows, note, long=long)]


def _judged(reply: Reply, score: float | None) -> str:
    if reply.error is not None:
        return f"failed: {_short(reply.error)}"
    verdict = "undecided" if score is None else ("right" if score else "wrong")
    return f"{verdict}{' (cut at the limit)' if reply.is_cut else ''}: {_short(reply.text)}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS // 2]} […] {text[-MAX_CHARS // 2 :]}"
