"""`student-train`: a student cut from a teacher, trained from a cache, evaluated, exported.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.program import AsJson, new_program, print_result, run_program
from student_train.commands.compare import compare_sides
from student_train.commands.evaluate import evaluate
from student_train.commands.export import bench_formats, export
from student_train.commands.train import HOST_VARIABLE, init, plan, rounds, run

STUDENT_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "huggingface_hub")
"""Not in the base install: who only reads caches has none of them."""

app = new_program("student-train", "Train students from a cache of a teacher's token distributions.")
# In the order in which --help lists them.
app.command()(init)
app.command()(plan)
app.command()(run)
app.command()(rounds)
app.command("eval")(evaluate)
app.command()(export)
app.command("bench")(bench_formats)
app.command("compare")(compare_sides)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; several are compared.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of a device's hour, to show what training cost.")
    ] = None,
    evals: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Result of `eval --json` to show as well. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an HTML report of one run, or compare several."""
    from stillroom.storage.paths import check_out
    from student_train.report import write_student_report

    check_out("--out", out)
    print_result(write_student_report(runs, out, price_per_hour, evals or ()), [str(out)], as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what is installed. Lists what is missing and the command that installs it."""
    from stillroom.doctor import report_lines
    from student_train.doctor import diagnose

    result = diagnose()
    print_result(result, report_lines(result), as_json)
    if not result["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: what the base install lacks is one line as well."""
    try:
        # A rank's launcher says how to go on; of several tasks of srun, the first.
        is_part = {"RANK", HOST_VARIABLE} & os.environ.keys() or os.environ.get("SLURM_NODEID", "0") != "0"
        run_program(app, "student-train", () if is_part else ("run", "rounds"))
    except ModuleNotFoundError as error:
        if (package := str(error.name).partition(".")[0]) not in STUDENT_PACKAGES:
            raise
        note(f"student-train: this needs the package {package}: pip install 'stillroom[student]'")
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
