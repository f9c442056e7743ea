"""The page of `student-train bench`: speed against agreement, and every figure."""

from pathlib import Path

from stillroom.config import Json
from stillroom.html.charts import Drawing, Line, line_chart
from stillroom.html.report import Figure, Section, Table, write_report
from stillroom.log import format_bytes
from student_train.export.bench import top1_agreement

COLUMNS = ("", "prefill tok/s", "decode tok/s", "first token ms", "request ms", "J/token", "prefill ×", "decode ×")


def write_bench_page(path: Path, result: Json) -> None:
    """Writes the page whole."""
    formats = result["formats"]
    charts = [
        Figure(f"Speed against agreement, batch {batch}", _chart(formats, batch), "Top right is best.")
        for batch in ("1", "8")
    ]
    tables = [
        Table(
            f"Batch {batch}",
            COLUMNS,
            [_row(one, one["batches"][batch]) for one in formats],
            f"Medians with quartiles. × is a median speed divided by that of {formats[0]['name']}; above 1 is faster.",
            right=frozenset(range(1, len(COLUMNS))),
        )
        for batch in ("1", "8")
    ]
    sizes = Table(
        "Folders",
        ("", "runtime", "size", "peak memory", "load s", "top-1 agreement", "KL (nats)"),
        [_folder(one) for one in formats],
        right=frozenset(range(2, 7)),
    )
    threads = result["threads"] or f"each runtime's own number of {result['num_cores']}"
    write_report(
        path,
        "Formats side by side",
        [Section("Speed and agreement", charts), Section("Figures", [*tables, sizes])],
        f"{result['prompt_tokens']} prompt tokens, {result['new_tokens']} new ones, {result['rounds']} rounds in "
        f"turns; threads: {threads}" + ("; vLLM without compiling" if result["is_eager"] else ""),
    )


def _chart(formats: list[Json], batch: str) -> Drawing:
    lines = [
        Line(one["name"], [one["batches"][batch]["decode_tokens_per_s"]["median"]], [100 * found])
        for one in formats
        if (found := top1_agreement(one)) is not None
    ]
    return line_chart(lines, "decode (tokens per second)", "top-1 agreement (%)")


def _row(one: Json, batch: Json) -> list[str]:
    return [
        one["name"],
        _spread(batch["prefill_tokens_per_s"], ".0f"),
        _spread(batch["decode_tokens_per_s"], ".1f"),
        _spread(batch["first_token_ms"], ".0f"),
        _spread(batch["request_ms"], ".0f"),
        _spread(batch["energy_j_per_token"], ".2f"),
        f"{batch['prefill_ratio']:.2f}",
        f"{batch['decode_ratio']:.2f}",
    ]


def _folder(one: Json) -> list[str]:
    found, memory = one["agreement"], one["peak_memory_bytes"]
    return [
        one["name"],
        one["runtime"],
        format_bytes(one["size_bytes"]),
        "-" if memory is None else format_bytes(memory),
        f"{one['load_s']:.1f}",
        "-" if found is None else f"{found['top1_agreement']:.1%}",
        "-" if found is None else f"{found['kl']:.4f}",
    ]


def _spread(found: Json | None, digits: str) -> str:
    if found is None:
        return "-"
    return f"{found['median']:{digits}} ({found['low']:{digits}}–{found['high']:{digits}})"
