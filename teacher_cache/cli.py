"""`teacher-cache`: a teacher's chains and distributions, generated once, kept, and asked about.

stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed at run time, 2 usage or configuration, 3
something in the cache is damaged, 130 interrupted (and the command that resumes is printed).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.command_line import FAILED, INTERRUPTED, AsJson, new_program, print_result, run_program
from shared.errors import ConfigError
from shared.log import warn
from teacher_cache.ask import commands as ask
from teacher_cache.care import commands as care
from teacher_cache.command_line import CachePath, ConfigPath, Overrides, Worker

if TYPE_CHECKING:
    from teacher_cache.build import BuildResult
    from teacher_cache.config import BuildConfig
    from teacher_cache.score_config import ScoreConfig

app = new_program(
    "teacher-cache", "Run a teacher once and keep what it said: chains, and the distribution of every token."
)


@app.command()
def plan(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a build, or a score, has left to do. What it will take, too; loads no model."""
    from dataclasses import asdict

    from teacher_cache.config import BuildConfig
    from teacher_cache.plan import disk_warning, plan_build, plan_lines
    from teacher_cache.score_plan import plan_score

    config = _any_config(config_path, overrides)
    planned = plan_build(config) if isinstance(config, BuildConfig) else plan_score(config)
    print_result(asdict(planned), plan_lines(planned), as_json)
    warning = disk_warning(planned)
    if warning is not None:
        warn(warning)


@app.command()
def build(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    retry_failures: Annotated[bool, typer.Option("--retry-failures", help="Ask failed prompts again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate what is missing, and capture it. The same command resumes."""
    from shared.interrupt import StopRequest
    from teacher_cache.build_command import build_cache
    from teacher_cache.intake.prompts import parse_worker

    config = _config(config_path, overrides)
    with StopRequest(at_once=True):
        result = build_cache(config, parse_worker(worker), retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    retry_failures: Annotated[bool, typer.Option("--retry-failures", help="Score failed completions again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Capture signals of completions that exist already. The same command resumes."""
    from shared.interrupt import StopRequest
    from teacher_cache.build_command import score_cache
    from teacher_cache.intake.prompts import parse_worker

    config = _score_config(config_path, overrides)
    with StopRequest(at_once=True):
        result = score_cache(config, parse_worker(worker), retry_failures=retry_failures)
    _print_build(config, result, as_json)


@app.command()
def judge(
    cache: CachePath,
    kind: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="Judge every chain by this kind: math, exact, regex, reasoning_gym or code; default: as its prompt "
            "says.",
        ),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over chains.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also chains that were judged before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Checks at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check answers; verdicts are added beside the shards.

    A chain's newest verdict, whichever judge gave it, is what `correct` shows; one that is undecided replaces none.
    """
    from dataclasses import asdict

    from shared.interrupt import StopRequest
    from shared.storage import location
    from teacher_cache.judging import judge_cache

    with StopRequest(at_once=True):
        report = judge_cache(location(cache), kind, where, again, processes)
    for warning in report.warnings():
        warn(warning)
    lines = [
        f"{name}: {one.num_chains} judged, {one.num_correct} right, {one.num_wrong} wrong, "
        f"{one.num_undecided} undecided"
        + (f", {one.num_kept} of them keep the verdict they had" if one.num_kept else "")
        for name, one in report.by_judge.items()
    ]
    if report.num_without_judge:
        lines.append(f"{report.num_without_judge} chains name no judge: choose one with --judge")
    print_result(asdict(report), lines or ["nothing to judge"], as_json)


@app.command()
def doctor(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Look also at this configuration's teacher and servers.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed and what is missing. With what it can do here, and the command that mends it."""
    from shared.doctor import diagnosis_lines
    from teacher_cache.doctor import diagnose

    if config_path is None and overrides:
        raise ConfigError("--set has no effect without a CONFIG: name one, or leave it out")
    found = diagnose(None if config_path is None else _any_config(config_path, overrides))
    print_result(found, diagnosis_lines(found), as_json)
    if not found["ok"]:
        raise typer.Exit(FAILED)


app.add_typer(care.app)
app.add_typer(ask.app)


def main() -> None:
    """Entry point."""
    # Read when torch is loaded, which tokenizers do long before the engine.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_program(app, "teacher-cache", ("build", "score", "copy", "recode"))


def _print_build(config: "BuildConfig | ScoreConfig", result: "BuildResult", as_json: bool) -> None:
    from teacher_cache.build_command import result_json, result_lines

    printed = result_json(config, result)
    print_result(printed, result_lines(printed, str(config.cache)), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def _any_config(path: Path, overrides: list[str] | None) -> "BuildConfig | ScoreConfig":
    from shared.config import read_yaml

    return _score_config(path, overrides) if "completions" in read_yaml(path) else _config(path, overrides)


def _config(path: Path, overrides: list[str] | None) -> "BuildConfig":
    from shared.config import load_config, read_yaml
    from teacher_cache.config import BuildConfig

    if "completions" in read_yaml(path):
        raise ConfigError(f"{path} names completions that exist already: teacher-cache score {path}")
    return load_config(path, overrides or [], BuildConfig)


def _score_config(path: Path, overrides: list[str] | None) -> "ScoreConfig":
    from shared.config import load_config, read_yaml
    from teacher_cache.score_config import ScoreConfig

    if "prompts" in read_yaml(path):
        raise ConfigError(f"{path} names prompts for which chains are generated: teacher-cache build {path}")
    return load_config(path, overrides or [], ScoreConfig)


if __name__ == "__main__":
    main()
