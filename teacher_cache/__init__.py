"""Runs the teacher once through vLLM and stores every chain with its token distributions.

    import teacher_cache

    result = teacher_cache.build("teacher.yaml", overrides=["sampling.samples=4"])
    print(result.recorded.num_chains, result.tokens_per_s)

Errors are types of `stillroom.errors`. Importing this package loads nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacher_cache.building.result import BuildResult
    from teacher_cache.config import BuildConfig, ScoreConfig
    from teacher_cache.judging.chains import JudgeReport
    from teacher_cache.judging.config import LlmJudgeConfig
    from teacher_cache.states.config import FeaturesConfig
    from teacher_cache.states.passes import FeaturesResult

__all__ = ["build", "features", "judge", "score"]


def build(
    config: "str | Path | BuildConfig",
    *,
    overrides: Sequence[str] = (),
    worker: str = "0/1",
    join: bool = False,
    retry_failures: bool = False,
) -> "BuildResult":
    """Generates the chains that a cache still lacks, as `teacher-cache build` does; the same call resumes.

    `config` is a YAML file or a validated BuildConfig. `overrides` change keys of the file, such as
    "sampling.samples=4". `worker` is this process's share I/N of the prompts; with `join` it takes parts by lease,
    beside any number of others that do. Returns the counts of this process; `stopped` is not None if a signal ended it
    early. Raises ConfigError or DataError for a mistake in the configuration or its inputs, CacheConflict if another
    process runs as this worker, StillroomError if the engine fails.
    """
    from teacher_cache.building.commands import build_cache
    from teacher_cache.config import BuildConfig, load_run_config
    from teacher_cache.prompts.prompts import own_share

    loaded = config if isinstance(config, BuildConfig) else load_run_config(Path(config), overrides, "build")
    assert isinstance(loaded, BuildConfig)
    return build_cache(loaded, own_share(worker, join=join), retry_failures=retry_failures)


def score(
    config: "str | Path | ScoreConfig",
    *,
    overrides: Sequence[str] = (),
    worker: str = "0/1",
    join: bool = False,
    retry_failures: bool = False,
) -> "BuildResult":
    """Captures the teacher's distributions on existing completions, as `teacher-cache score` does.

    Arguments, result and errors are those of `build`.
    """
    from teacher_cache.building.commands import score_cache
    from teacher_cache.config import ScoreConfig, load_run_config
    from teacher_cache.prompts.prompts import own_share

    loaded = config if isinstance(config, ScoreConfig) else load_run_config(Path(config), overrides, "score")
    assert isinstance(loaded, ScoreConfig)
    return score_cache(loaded, own_share(worker, join=join), retry_failures=retry_failures)


def features(
    config: "str | Path | FeaturesConfig", *, overrides: Sequence[str] = (), worker: str = "0/1", join: bool = False
) -> "FeaturesResult":
    """Stores the teacher's states at existing chains, as `teacher-cache features` does; the same call resumes.

    `worker` is this process's share I/N of the chains; with `join` it takes row groups by lease. Errors are those of
    `build`. Read them with stillroom.cache.features.FeatureSet.
    """
    from teacher_cache.prompts.prompts import own_share
    from teacher_cache.states.config import FeaturesConfig, load_features_config
    from teacher_cache.states.passes import features_of_cache

    loaded = config if isinstance(config, FeaturesConfig) else load_features_config(Path(config), overrides)
    return features_of_cache(loaded, own_share(worker, join=join))


def judge(
    cache: str | Path,
    *,
    kind: str | None = None,
    where: str | None = None,
    again: bool = False,
    processes: int = 1,
    llm: "str | Path | LlmJudgeConfig | None" = None,
) -> "JudgeReport":
    """Checks answers of a cache and adds verdicts, as `teacher-cache judge` does.

    `kind` is math, exact, regex, reasoning_gym or code; None takes each prompt's own. `where` is a SQL condition on
    `chains`; `again` includes chains that have a verdict. `llm`, a YAML file or a validated LlmJudgeConfig, asks a
    language model about the undecided chains instead. Returns counts by judge. Raises DataError if there is no cache,
    ConfigError for an unknown kind or a wrong condition, StillroomError if the model cannot be asked.
    """
    from stillroom.storage.paths import location
    from teacher_cache.judging.chains import ask_about_cache, judge_cache

    if llm is not None:
        from teacher_cache.judging.config import LlmJudgeConfig
        from teacher_cache.judging.llm import load_llm_judge

        config = llm if isinstance(llm, LlmJudgeConfig) else load_llm_judge(Path(llm))
        return ask_about_cache(location(str(cache)), config, where, again)
    return judge_cache(location(str(cache)), kind, where, again, processes)
