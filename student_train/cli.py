"""`student-train`: a student cut from a teacher, trained from a cache, evaluated, exported.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3 stored
bytes are damaged, 130 interrupted (and the command that resumes is printed).

result_lines has the results as lines for a person; `--json` prints the same as one JSON object.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.children import follow_parent
from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.program import AsJson, StopRequest, new_program, print_result, run_program
from student_train.command_options import (
    ConfigPath,
    OptionalConfigPath,
    Overrides,
    WhichCheckpoint,
    load_train_config,
)
from student_train.eval_command import evaluate
from student_train.result_lines import (
    bench_lines,
    compare_lines,
    export_lines,
    format_lines,
    init_lines,
    plan_lines,
    run_lines,
)

if TYPE_CHECKING:
    from student_train.compare.comparing import Price
    from student_train.model.importance import Calibration


HOST_VARIABLE = "STUDENT_TRAIN_MEETING"
"""In the one process on each host of `--hosts FILE` that starts its ranks."""
STUDENT_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "huggingface_hub")
"""Not in the base install: who only reads caches has none of them."""

app = new_program("student-train", "Train students from a cache of a teacher's token distributions.")


@app.command()
def init(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    teacher: Annotated[str | None, typer.Option(help="Hugging Face folder or hub id to cut from.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to keep, evenly spaced.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="Parameters to keep, below 1 as a share: cuts layers and MLP channels.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a student by cutting a larger model. CONFIG can also cut heads and hidden size, and rank what it cuts."""
    from stillroom.config import validate_config
    from student_train.config.run import InitConfig
    from student_train.model.prune import init_student

    if config_path is not None:
        if (teacher, layers, parameters, out) != (None, None, None, None):
            raise ConfigError(
                "CONFIG already sets teacher, sizes and folder: remove it, or --teacher, --layers, --parameters and "
                "--out"
            )
        config = load_train_config(config_path, overrides)
        asked = config.student.init
        if asked is None:
            raise ConfigError(f"{config_path}: student.init is not set: it names the teacher and what to keep")

        def calibrate() -> "Calibration":
            from student_train.model.importance import init_calibration

            assert asked is not None
            return init_calibration(config, asked)

        with StopRequest(at_once=True):
            record = init_student(asked, Path(config.student.model), calibrate, config.data)
    else:
        if teacher is None or (layers is None) == (parameters is None) or out is None:
            raise ConfigError(
                "pass a CONFIG with student.init, or all of --teacher, --out and one of --layers and --parameters"
            )
        if overrides:
            raise ConfigError("--set has no effect without CONFIG")
        given = {"teacher": teacher, "layers": layers, "parameters": parameters}
        with StopRequest(at_once=True):
            record = init_student(validate_config(given, InitConfig, "init"), out)

    print_result(record, init_lines(record), as_json)


@app.command()
def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show data, steps and memory of a run. Makes the run's checks without loading weights."""
    from student_train.planning.estimate import plan_run

    planned = plan_run(load_train_config(config_path, overrides), nproc)
    print_result(planned, plan_lines(planned), as_json)


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Ranks to start on this machine; with --hosts slurm, on each."),
    ] = None,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|slurm",
            help="Run on several machines: over ssh, with lines HOST slots=N in FILE, or as one srun task per node "
            "(slurm).",
        ),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Resume from the checkpoint after this step of the last stage and discard later ones. Learning rate, "
            "its schedule and clip_norm may change.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, or resume from the run's last checkpoint."""
    from student_train.runtime.run_folder import summary_if_finished

    if hosts is not None or HOST_VARIABLE in os.environ:
        raise typer.Exit(_run_on_hosts(hosts, nproc))
    if nproc is not None and nproc > 1:
        from student_train.runtime.launching import launch

        raise typer.Exit(launch(nproc, _command_of_a_rank()))
    is_rank = "RANK" in os.environ
    if is_rank:
        from student_train.runtime.launching import PARENT_VARIABLE

        if (parent := os.environ.get(PARENT_VARIABLE)) is not None:
            follow_parent(int(parent))
    # From here on, before seconds of imports: Ctrl-C ends at once until there are steps to save.
    with StopRequest(at_once=True) as stop:
        config = load_train_config(config_path, overrides)
        summary = None if is_rank or from_step is not None else summary_if_finished(config)
        is_first = True
        if summary is None:
            from student_train.runtime.ranks import joined_ranks
            from student_train.training import train

            with joined_ranks() as ranks:
                summary, is_first = train(config, ranks, stop, from_step), ranks.is_first
    if is_first:
        print_result(summary, run_lines(summary), as_json)


@app.command()
def rounds(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 1,
    both: Annotated[
        bool, typer.Option("--both", help="Also run the teacher's parts on this machine, one after the other.")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only show rounds, tokens and time, and check the configuration.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """On-policy rounds: train on the student's own chains, scored by the teacher, whenever it is this side's turn.

    `teacher-cache rounds` on the same file generates and scores, here or on a machine that sees the same folder.
    """
    from stillroom.config import load_config
    from stillroom.rounds.config import RoundsConfig
    from stillroom.rounds.turns import check_other, state_lines, take_turns
    from student_train.rounds import plan_lines as rounds_plan_lines
    from student_train.rounds import plan_rounds

    config = load_config(config_path, overrides or [], RoundsConfig)
    planned = plan_rounds(config)
    if only_plan:
        print_result(planned, rounds_plan_lines(config, planned), as_json)
        return
    if both:
        given = [part for one in overrides or () for part in ("--set", one)]
        check_other("teacher-cache", ["rounds", str(config_path), *given])
    state = take_turns(config, {"student-train", *(["teacher-cache"] if both else [])}, num_ranks=nproc)
    print_result(state.model_dump(mode="json"), state_lines(config, state), as_json)


app.command("eval")(evaluate)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    checkpoint: WhichCheckpoint = "last",
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf, onnx-int8, onnx-fp32, gguf-q8_0, gguf-f16, openvino-int8, w8a8, gptq or awq. All but hf are "
            "compared with the float student on held-out chains.",
        ),
    ] = "hf",
    model: Annotated[Path | None, typer.Option(help="Export this Hugging Face folder instead of a run's.")] = None,
    cache: Annotated[list[Path] | None, typer.Option(help="With --model: cache to check on. Repeatable.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="With --model: SQL condition of the chains to check on; default: split = 'heldout'."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Minimum top-1 agreement with the float student. Default: 0.9."),
    ] = None,
    allow_disagreement: Annotated[
        bool, typer.Option("--allow-disagreement", help="Keep an export below --min-agreement.")
    ] = False,
    check_chains: Annotated[int | None, typer.Option(min=1, help="Held-out chains to check on. Default: 64.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the LoRA adapter without merging it.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the cache's tokenizer, if neither student nor teacher has it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or in another format that is checked against it."""
    from student_train.export.writing import Check, export_folder, export_run
    from student_train.exporting import export as export_checkpoint
    from student_train.runtime.checkpoint import find_state
    from student_train.runtime.run_folder import RunFolder

    if format_name == "hf":
        if (model, cache, where, min_agreement, check_chains) != (None,) * 5 or allow_disagreement:
            raise ConfigError("--model, --cache, --where and the options of the check need a --format other than hf")
    elif adapter_only:
        raise ConfigError("--adapter-only writes --format hf only")
    check = Check(check_chains or Check.max_chains, Check.min_agreement, allow_disagreement)
    if min_agreement is not None:
        check = replace(check, min_agreement=min_agreement)
    # A signal would end Python in the middle: this way temporary folders are removed and foreign tools end too.
    with StopRequest(at_once=True):
        if config_path is None:
            if model is None or not cache:
                raise ConfigError("pass a CONFIG, or --model, --cache and --format")
            if checkpoint != "last" or overrides or tokenizer is not None:
                raise ConfigError("--checkpoint, --set and --tokenizer need a CONFIG")
            result = export_folder(model, cache, where, out, format_name, check)
        else:
            if (model, cache, where) != (None, None, None):
                raise ConfigError("CONFIG already names model and caches: remove it, or --model, --cache and --where")
            config = load_train_config(config_path, overrides)
            state = find_state(RunFolder(config.run).checkpoints, checkpoint)
            if format_name == "hf":
                result = export_checkpoint(config, state, out, adapter_only=adapter_only, tokenizer=tokenizer)
            else:
                result = export_run(config, state, out, format_name, check, tokenizer)
    print_result(result, export_lines(result) if format_name == "hf" else format_lines(result), as_json)


@app.command("bench")
def bench_formats(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER", help="Exports of one student; RUNTIME:FOLDER runs one in another runtime."),
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times each folder is measured, in turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per runtime. Default: its own.")] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="vLLM without compiling, which takes minutes on a CPU.")
    ] = False,
    max_ms: Annotated[
        float | None, typer.Option(min=0, help="Choose the format that answers one such request within this time.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --max-ms: minimum top-1 agreement. Default: 0.9.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the speed of one student's formats: prefill, decoding, first token, memory, size, energy."""
    from stillroom.storage.paths import check_out
    from student_train.export.bench import Load, bench, choose, contestant
    from student_train.export.bench_page import write_bench_page

    if out is not None:
        check_out("--out", out)
    if min_agreement is not None and max_ms is None:
        raise ConfigError("--min-agreement has no effect without --max-ms")
    with StopRequest(at_once=True):
        result = bench([contestant(one) for one in folders], Load(prompt_tokens, new_tokens, rounds, threads, eager))
    if max_ms is not None:
        least = 0.9 if min_agreement is None else min_agreement
        result |= {"max_ms": max_ms, "chosen": choose(result, max_ms, least)}
    if out is not None:
        write_bench_page(out, result)
    print_result(result, bench_lines(result), as_json)
    if max_ms is not None and result["chosen"] is None:
        raise typer.Exit(1)


@app.command("compare")
def compare_sides(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="SIDE...", help="Two or more of [NAME=]URL[#MODEL] (OpenAI-compatible servers) and [NAME=]FOLDER."
        ),
    ],
    cache: Annotated[list[Path], typer.Option(help="Cache with the prompts. Repeatable.")],
    where: Annotated[str, typer.Option(help="SQL condition on chains.")] = "split = 'heldout'",
    prompts: Annotated[int, typer.Option(min=1, help="Maximum prompts; only those that name a judge.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests per server.")] = 4,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Maximum wait for a server's next bytes, in seconds.")
    ] = 120.0,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IN/OUT", help="Price of a million prompt and answer tokens. Repeatable."),
    ] = None,
    price_per_hour: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PRICE", help="Price of an hour of the machine that answers. Repeatable."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Side that the others are compared with: a name, best or all. Default: the first."),
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the servers' key.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Compare served students on the same held-out prompts: accuracy in pairs, latency, tokens, cost."""
    from stillroom.storage.paths import check_out
    from student_train.answers import GenerateConfig
    from student_train.compare.comparing import compare, prompts_of
    from student_train.compare.page import write_page
    from student_train.compare.sides import open_sides

    check_out("--out", out)
    if api_key_env is not None and api_key_env not in os.environ:
        raise ConfigError(f"--api-key-env {api_key_env}: this environment variable is not set")
    api_key = None if api_key_env is None else os.environ[api_key_env]
    prices = _prices(price or [], price_per_hour or [])
    config = GenerateConfig(prompts, max_new_tokens, temperature)
    asked = prompts_of(cache, where, prompts)
    opened = open_sides(sides, api_key, timeout_s)
    result, answered = compare(opened, asked, config, concurrency, prices, against)
    write_page(result, answered, asked, out)
    print_result({**result, "page": str(out)}, compare_lines({**result, "page": str(out)}), as_json)


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


def _prices(of_tokens: list[str], of_hours: list[str]) -> "dict[str, Price]":
    """Raises ConfigError for anything but NAME=IN/OUT and NAME=PRICE."""
    from student_train.compare.comparing import Price

    prices: dict[str, Price] = {}
    for option, given in [*(("--price", one) for one in of_tokens), *(("--price-per-hour", one) for one in of_hours)]:
        name, _, numbers = given.partition("=")
        try:
            found = dict(zip(_PRICE_PARTS[option], map(float, numbers.split("/")), strict=True))
            if not all(0 <= one < math.inf for one in found.values()):
                raise ValueError
        except ValueError:
            raise ConfigError(f"{option} {given}: {_PRICE_HELP[option]}") from None
        prices[name] = replace(prices.get(name, Price()), **found)
    return prices


_PRICE_PARTS = {"--price": ("prompt", "completion"), "--price-per-hour": ("hour",)}
_PRICE_HELP = {
    "--price": "write NAME=IN/OUT, prices of a million tokens, e.g. int8=0.1/0.4",
    "--price-per-hour": "write NAME=PRICE, e.g. int8=2.5",
}


def _run_on_hosts(hosts: str | None, nproc: int | None) -> int:
    """Starts an agent on every host, or is the agent of this one; returns the exit code."""
    from student_train.runtime.hosts import be_agent, given_meeting, run_on_hosts, slurm_meeting

    if "RANK" in os.environ:
        raise ConfigError("--hosts has no effect under a launcher (RANK is set): leave it out")
    if hosts == "slurm":
        return be_agent(slurm_meeting(os.environ, nproc), _command_of_a_rank(), by_ssh=False)
    if (meeting := given_meeting()) is not None:
        return be_agent(meeting, _command_of_a_rank(), by_ssh=True)
    if nproc is not None:
        raise ConfigError("--hosts FILE says how many ranks each host gets (slots): remove --nproc")
    assert hosts is not None
    return run_on_hosts(Path(hosts), _command_of_a_rank()[1:])


def _command_of_a_rank() -> list[str]:
    return [sys.executable, "-P", "-m", "student_train.cli", *_arguments_of_a_rank(sys.argv[1:])]


def _arguments_of_a_rank(arguments: list[str]) -> list[str]:
    """Without what is for launchers."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument in ("--nproc", "--hosts"):
            skip = not skip
        elif not argument.startswith(("--nproc=", "--hosts=")):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
