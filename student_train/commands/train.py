"""`student-train init`, `plan`, `run` and `rounds`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.children import follow_parent
from stillroom.errors import ConfigError
from stillroom.program import AsJson, StopRequest, print_result
from student_train.commands.options import ConfigPath, OptionalConfigPath, Overrides, load_train_config
from student_train.commands.result_lines import init_lines, plan_lines, run_lines

if TYPE_CHECKING:
    from student_train.model.importance import Calibration


HOST_VARIABLE = "STUDENT_TRAIN_MEETING"
"""In the one process on each host of `--hosts FILE` that starts its ranks."""


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
            from student_train.training.loop import train

            with joined_ranks() as ranks:
                summary, is_first = train(config, ranks, stop, from_step), ranks.is_first
    if is_first:
        print_result(summary, run_lines(summary), as_json)


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
