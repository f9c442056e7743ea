"""`teacher-cache plan`, `build`, `augment`, `score`, `features` and `rounds`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.log import warn
from stillroom.program import INTERRUPTED, AsJson, StopRequest, print_result
from teacher_cache.commands.options import ConfigPath, Join, NumCpus, NumWorkers, On, Overrides, RetryFailures, Worker

if TYPE_CHECKING:
    from teacher_cache.config import BuildConfig, ScoreConfig
    from teacher_cache.states.config import FeaturesConfig


def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    num_shown: Annotated[
        int,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            show_default=False,
            help="Also print N prompts as the teacher reads them, special tokens included, from all sources in turn.",
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a build, score or features pass has left to do: tokens, disk space, time. Loads no model."""
    from dataclasses import asdict

    from teacher_cache.config import BuildConfig, load_run_config
    from teacher_cache.plan import disk_warning, plan_build, plan_lines, plan_score, shown_lines
    from teacher_cache.states.config import is_features_file, load_features_config

    if is_features_file(config_path):
        if num_shown:
            raise ConfigError("--show prints prompts, which a features configuration does not have: remove it")
        _plan_features(load_features_config(config_path, overrides or ()), as_json)
        return
    config = load_run_config(config_path, overrides or ())
    planned = plan_build(config, num_shown) if isinstance(config, BuildConfig) else plan_score(config, num_shown)
    print_result(asdict(planned), [*shown_lines(planned), *plan_lines(planned)], as_json)
    warning = disk_warning(planned)
    if warning is not None:
        warn(warning)


def build(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    retry_failures: RetryFailures = False,
    as_json: AsJson = False,
) -> None:
    """Generate and store the missing chains. The same command resumes."""
    cluster = _Cluster(on, num_workers, num_cpus)
    _build_or_score("build", config_path, overrides or (), worker, join, cluster, retry_failures, as_json)


def augment(
    config_path: ConfigPath,
    overrides: Overrides = None,
    retry_failures: RetryFailures = False,
    as_json: AsJson = False,
) -> None:
    """Ask the teacher for paraphrases, translations and solutions of prompt variants. The same command resumes."""
    from teacher_cache.augmenting import augment as ask
    from teacher_cache.config import BuildConfig, load_run_config

    config = load_run_config(config_path, overrides or (), "build")
    assert isinstance(config, BuildConfig)
    with StopRequest(at_once=True):
        done = ask(config, retry_failures=retry_failures)
    print_result(done.as_json(), done.lines(), as_json)
    if done.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def score(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    retry_failures: RetryFailures = False,
    as_json: AsJson = False,
) -> None:
    """Store the teacher's distributions on existing completions. The same command resumes."""
    cluster = _Cluster(on, num_workers, num_cpus)
    _build_or_score("score", config_path, overrides or (), worker, join, cluster, retry_failures, as_json)


def features(
    config_path: ConfigPath,
    overrides: Overrides = None,
    worker: Worker = "0/1",
    join: Join = False,
    on: On = None,
    num_workers: NumWorkers = None,
    num_cpus: NumCpus = None,
    as_json: AsJson = False,
) -> None:
    """Store the teacher's hidden states or attention at existing chains. The same command resumes."""
    import teacher_cache
    from teacher_cache.states.config import load_features_config
    from teacher_cache.states.passes import result_json, result_lines

    config = load_features_config(config_path, overrides or ())
    cluster = _Cluster(on, num_workers, num_cpus)
    if cluster.runs({"--join": join, "--worker": worker != "0/1"}):
        _run_on(cluster, "features", config_path, overrides or (), config, as_json)
        return
    with StopRequest(at_once=True):
        result = teacher_cache.features(config, worker=worker, join=join)
    print_result(result_json(result), result_lines(result, config.cache), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def rounds(
    config_path: ConfigPath,
    overrides: Overrides = None,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only show rounds, tokens and time, and check the configuration.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """On-policy rounds: generate with the student, score with the teacher, whenever it is this side's turn.

    `student-train rounds` on the same file does the training, on a machine that sees the same folder; with --both it
    does all parts on one.
    """
    from stillroom.config import load_config
    from stillroom.rounds.config import RoundsConfig
    from stillroom.rounds.turns import state_lines, take_turns
    from teacher_cache.rounds import plan_lines, plan_rounds

    config = load_config(config_path, overrides or (), RoundsConfig)
    planned = plan_rounds(config)
    if only_plan:
        print_result(planned, plan_lines(config, planned), as_json)
        return
    state = take_turns(config, {"teacher-cache"})
    print_result(state.model_dump(mode="json"), state_lines(config, state), as_json)


def _plan_features(config: "FeaturesConfig", as_json: bool) -> None:
    from dataclasses import asdict

    from teacher_cache.states.plan import plan_features, plan_lines, plan_warning

    planned = plan_features(config)
    print_result({**asdict(planned), "fits": planned.fits}, plan_lines(planned), as_json)
    warning = plan_warning(planned)
    if warning is not None:
        warn(warning)


@dataclass(frozen=True)
class _Cluster:
    """The options that start workers elsewhere."""

    on: str | None
    num_workers: int | None
    num_cpus: int | None

    def runs(self, own: Mapping[str, bool]) -> bool:
        """Whether workers run there. Raises ConfigError for options that have no effect; `own` are given ones of this
        process.
        """
        if self.on is None and (self.num_workers, self.num_cpus) != (None, None):
            raise ConfigError("--workers and --cpus have no effect without --on")
        if self.on is not None and any(own.values()):
            names = " and ".join(name for name, is_given in own.items() if is_given)
            raise ConfigError(f"--on starts workers with --join: remove {names}")
        return self.on is not None


def _build_or_score(
    command: str,
    path: Path,
    overrides: Sequence[str],
    worker: str,
    join: bool,
    cluster: _Cluster,
    retry_failures: bool,
    as_json: bool,
) -> None:
    from teacher_cache.building.commands import build_cache, score_cache
    from teacher_cache.building.result import result_json, result_lines
    from teacher_cache.config import BuildConfig, load_run_config
    from teacher_cache.prompts.prompts import own_share

    config = load_run_config(path, overrides, command)
    if cluster.runs({"--join": join, "--worker": worker != "0/1", "--retry-failures": retry_failures}):
        _run_on(cluster, command, path, overrides, config, as_json)
        return
    with StopRequest(at_once=True):
        share = own_share(worker, join=join)
        if isinstance(config, BuildConfig):
            result = build_cache(config, share, retry_failures=retry_failures)
        else:
            result = score_cache(config, share, retry_failures=retry_failures)
    printed = result_json(config, result)
    print_result(printed, result_lines(printed, str(config.cache)), as_json)
    if result.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def _run_on(
    cluster: _Cluster,
    command: str,
    path: Path,
    overrides: Sequence[str],
    config: "BuildConfig | ScoreConfig | FeaturesConfig",
    as_json: bool,
) -> None:
    from teacher_cache.building.result import result_lines
    from teacher_cache.workers.on_ray import joining_job, replica_size, run_on_ray

    assert cluster.on is not None
    with StopRequest(at_once=True):
        job = joining_job(command, path, overrides, config)
        result = run_on_ray(cluster.on, job, replica_size(config, cluster.num_cpus), cluster.num_workers)
    if result is not None and command == "features":
        from teacher_cache.states.passes import FeaturesResult
        from teacher_cache.states.passes import result_lines as feature_lines

        print_result(result, feature_lines(FeaturesResult.of(result), config.cache), as_json)
    elif result is not None:
        print_result(result, result_lines(result, str(config.cache)), as_json)
    if result is None or result["stopped"] is not None:
        raise typer.Exit(INTERRUPTED)
