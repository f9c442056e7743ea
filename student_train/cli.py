"""`student-train`: a student cut from a teacher, trained from a cache, evaluated, exported.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.command_line import AsJson, new_program, print_result, run_program
from shared.errors import ConfigError
from shared.log import note

if TYPE_CHECKING:
    from student_train.config import TrainConfig

STUDENT_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "huggingface_hub")
"""Not in the base install: who only reads caches has none of them."""

app = new_program("student-train", "Train students from the distributions that a teacher left in a cache.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
OptionalConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. stages.0.epochs=2; may be given again."),
]
WhichCheckpoint = Annotated[str, typer.Option(help="last, best, or the name of a checkpoint.")]


@app.command()
def init(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help="Hugging Face folder or hub id to cut from.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to keep, evenly spaced.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a student from a teacher by depth."""
    from student_train.init import init_student

    if config_path is not None:
        if (teacher, layers, out) != (None, None, None):
            raise ConfigError("CONFIG and --teacher, --layers, --out exclude each other: the file says it all")
        student = _config(config_path, overrides).student
        if student.init is None:
            raise ConfigError(f"{config_path}: student.init is not set: it names the teacher and the layers to keep")
        record = init_student(student.init.teacher, student.init.layers, Path(student.model))
    else:
        if teacher is None or layers is None or out is None:
            raise ConfigError("name a CONFIG with student.init, or all of --teacher, --layers and --out")
        if overrides:
            raise ConfigError("--set has no effect without CONFIG")
        record = init_student(teacher, layers, out)
    from student_train.show import init_lines

    print_result(record, init_lines(record), as_json)


@app.command()
def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a run would read and cost. Refuses what the run would refuse; loads no model."""
    from student_train.plan import plan_run
    from student_train.show import plan_lines

    planned = plan_run(_config(config_path, overrides), nproc)
    print_result(planned, plan_lines(planned), as_json)


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train, or go on from the last checkpoint of the same run."""
    from shared.interrupt import StopRequest
    from student_train.launch import end_with_parent, launch

    if nproc > 1:
        rank = [sys.executable, "-m", "student_train.cli", *_arguments_of_a_rank(sys.argv[1:])]
        raise typer.Exit(launch(nproc, rank))
    end_with_parent()
    # From here on, before seconds of imports: Ctrl-C ends at once until there are steps to save.
    with StopRequest(at_once=True) as stop:
        config = _config(config_path, overrides)
        from student_train.ranks import joined_ranks
        from student_train.show import run_lines
        from student_train.train import train

        with joined_ranks() as ranks:
            summary = train(config, ranks, stop)
    if ranks.is_first:
        print_result(summary, run_lines(summary), as_json)


@app.command("eval")
def evaluate(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or hub id to evaluate.")] = None,
    cache: Annotated[list[Path] | None, typer.Option(help="Cache to evaluate on; may be given again.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over chains; default: split = 'heldout'.")] = None,
    initial: Annotated[bool, typer.Option("--initial", help="The student before its training.")] = False,
    checkpoint: WhichCheckpoint = "last",
    max_chains: Annotated[int | None, typer.Option(min=1, help="With --model: chains at most; default 512.")] = None,
    pack_tokens: Annotated[int | None, typer.Option(min=16, help="With --model: tokens a pack; default 4096.")] = None,
    generate: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also generate answers to N held-out prompts and judge them.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --generate: tokens of an answer at most; default 1024.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="With --generate: of sampling; default 0, the most likely token.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a student with its teacher. On held-out chains; with --generate its answers with the truth, too."""
    from student_train.eval_command import DEFAULT_CHAINS, DEFAULT_PACK_TOKENS, evaluate_config, evaluate_model
    from student_train.generate import DEFAULT_NEW_TOKENS, GenerateConfig
    from student_train.show import eval_lines

    answers = None
    if generate is not None:
        answers = GenerateConfig(generate, max_new_tokens or DEFAULT_NEW_TOKENS, temperature or 0.0)
    elif (max_new_tokens, temperature) != (None, None):
        raise ConfigError("--max-new-tokens and --temperature have no effect without --generate")
    if config_path is not None:
        if (model, cache) != (None, None):
            raise ConfigError("CONFIG and --model, --cache exclude each other")
        if (max_chains, pack_tokens) != (None, None):
            raise ConfigError("--max-chains and --pack-tokens need --model: --set eval.max_chains=N with a CONFIG")
        config = _config(config_path, overrides)
        result = evaluate_config(config, where, "initial" if initial else checkpoint, answers)
    else:
        if model is None or not cache:
            raise ConfigError("name a CONFIG, or --model and --cache")
        if initial or checkpoint != "last" or overrides:
            raise ConfigError("--initial, --checkpoint and --set need a CONFIG")
        result = evaluate_model(
            model,
            cache,
            where,
            max_chains=max_chains or DEFAULT_CHAINS,
            pack_tokens=pack_tokens or DEFAULT_PACK_TOKENS,
            generate=answers,
        )
    print_result(result, eval_lines(result), as_json)


@app.command()
def export(
    config_path: ConfigPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Overrides = None,
    checkpoint: WhichCheckpoint = "last",
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write a LoRA adapter unmerged.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the cache's tokenizer is, if student and teacher do not have it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from student_train.checkpoint import find_state
    from student_train.export import export as export_checkpoint
    from student_train.runfolder import RunFolder
    from student_train.show import export_lines

    config = _config(config_path, overrides)
    state = find_state(RunFolder(config.run).checkpoints, checkpoint)
    result = export_checkpoint(config, state, out, adapter_only=adapter_only, tokenizer=tokenizer)
    print_result(result, export_lines(result), as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs; several are compared.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one page with the curves of runs. Self-contained HTML; several runs are compared."""
    from shared.files import check_out
    from student_train.report import write_student_report

    check_out("--out", out)
    write_student_report(runs, out)
    print(out)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and what is missing. With what it can do here, and the command that mends it."""
    from shared.doctor import diagnosis_lines
    from student_train.doctor import diagnose

    found = diagnose()
    print_result(found, diagnosis_lines(found), as_json)
    if not found["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: what the base install lacks is one line as well."""
    try:
        # A rank's launcher says how to go on.
        run_program(app, "student-train", () if "RANK" in os.environ else ("run",))
    except ModuleNotFoundError as error:
        if (package := str(error.name).partition(".")[0]) not in STUDENT_PACKAGES:
            raise
        note(f"student-train: this needs the package {package}: pip install 'stillroom[student]'")
        sys.exit(ConfigError.exit_code)


def _config(path: Path, overrides: list[str] | None) -> "TrainConfig":
    from shared.config import load_config
    from student_train.config import TrainConfig

    return load_config(path, overrides or [], TrainConfig)


def _arguments_of_a_rank(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--nproc":
            skip = not skip
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
