"""The demo's page: the whole pipeline in the order it was run, from the teacher to the cache to the student.

In: the demo's folder and its summary. Out: one self-contained HTML file.
"""

from pathlib import Path
from typing import Any

from stillroom.cache.catalog import Catalog
from stillroom.html.report import Number, Numbers, Section, Table, Text, format_span, write_report
from stillroom.log import format_bytes
from stillroom.sql.session import open_session
from student_train.report import student_sections
from teacher_cache.inspect.report import cache_sections

INTRO = (
    "A teacher, the language model SmolLM2-135M-Instruct, answered {num_chains} prompts. For each of the "
    "{num_tokens:,} tokens of its answers the cache keeps the most likely tokens and their probabilities. A student, "
    "cut from the teacher's own layers, learned from the correct answers in that cache alone."
)


def write_demo_report(out: Path, folder: Path, summary: dict[str, Any]) -> None:
    """Writes the page about the demo in `folder`."""
    catalog = Catalog(folder / "cache")
    sections = [
        _line(summary),
        *cache_sections(catalog),
        *student_sections(folder / "run"),
        _next(catalog, folder),
    ]
    write_report(out, "stillroom demo", sections, "From a teacher's answers to a student, on this machine")


def _line(summary: dict[str, Any]) -> Section:
    kl_before, kl_after = summary["heldout_kl_before"], summary["heldout_kl_after"]
    teacher, before, after = (summary[f"heldout_pass_rate_{who}"] for who in ("teacher", "before", "after"))
    numbers = [
        Number("1. the teacher", f"{summary['pass_rate']:.0%} correct", "SmolLM2-135M-Instruct, 30 layers"),
        Number(
            "2. the cache",
            f"{summary['num_chains']:,} chains",
            f"{summary['num_tokens']:,} tokens at {summary['bytes_per_token']:.0f} B",
        ),
        Number(
            "3. the student",
            f"KL {kl_before:.2f} → {kl_after:.2f}",
            "nats from the teacher's predictions, on held-out prompts",
        ),
        Number(
            "4. its answers",
            f"{before:.0%} → {after:.0%} correct",
            f"on {summary['num_answers']} held-out prompts; the teacher {teacher:.0%}",
        ),
        *_int8(summary),
        Number("in all", format_span(summary["seconds"]), "from prompts to student"),
    ]
    return Section("The pipeline", [Text(INTRO.format(**summary)), Numbers(numbers)])


def _int8(summary: dict[str, Any]) -> list[Number]:
    if "int8_top1_agreement" not in summary:
        return []
    ratio = summary["int8_tokens_per_s"] / summary["float_tokens_per_s"]
    detail = (
        f"top-1 agreement with its float self; {ratio:.1f} times as fast, {format_bytes(summary['int8_size_bytes'])}"
    )
    return [Number("5. in 8 bits", f"{summary['int8_top1_agreement']:.1%}", detail)]


def _next(catalog: Catalog, folder: Path) -> Section:
    """Commands to try next, in the demo's environment."""
    with open_session(catalog) as session:
        (chain,) = session.arrow("SELECT sample_id FROM chains ORDER BY num_tokens, sample_id LIMIT 1").to_pylist()
    cache, run, second = folder / "cache", folder / "run", folder / "second"
    student = "benchmarks/demo/student.yaml"
    another_loss = f"--set run={second} --set 'stages.0.losses={{jsd: 1}}'"
    rows = [
        ["Read a chain token by token", f"teacher-cache show {cache} {chain['sample_id'][:12]} --html chain.html"],
        ["Query the cache in SQL", f"teacher-cache sql {cache}"],
        ["Judge the student's answers beside its teacher's", f"student-train eval {student} --generate 20"],
        ["Train again with another loss", f"student-train run {student} {another_loss}"],
        ["Compare the two students", f"student-train report {run} {second} --out compare.html"],
        ["Run a teacher of your own", "teacher-cache plan my-teacher.yaml, a copy of benchmarks/demo/teacher.yaml"],
    ]
    note = "In the demo's environment: . .venv/bin/activate. README.md continues from there."
    return Section("What to type next", [Table("From here", ["to", "type"], rows, note, long=frozenset({1}))])
