"""`teacher-cache rounds`: the student's chains and the teacher's scores of them. Checks and estimates of this side."""

from collections.abc import Mapping
from dataclasses import asdict

from stillroom.cache.catalog import Catalog
from stillroom.config import Json, validate_config
from stillroom.errors import ConfigError
from stillroom.log import format_count, format_duration, format_plural
from stillroom.rounds.config import RoundsConfig, generate_config, off_policy_caches, score_config
from stillroom.rounds.provenance import refuse_other_teacher
from stillroom.rounds.state import TEACHER_CACHE, RoundsFolder
from stillroom.rounds.turns import seconds_of, state_lines
from stillroom.storage.paths import Location
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.plan import plan_build


def plan_rounds(config: RoundsConfig) -> Json:
    """What this side does in a round, and how long what is left takes; makes the checks of both commands.

    Raises ConfigError or DataError as `build` and `score` would, where the teacher is not that of the caches in
    train.data.caches or of earlier rounds, and where training would find no held-out chains.
    """
    state = RoundsFolder(config).read()
    part = state.next_part(config.rounds)
    # The student of a later round may not exist yet.
    number = 1 if part is None else part.round
    build = validate_config(generate_config(config, number), BuildConfig, "generate")
    score = validate_config(score_config(config, number), ScoreConfig, "score")
    teacher = identify_teacher(score.teacher, score.engine).record
    refuse_other_teacher(config, teacher)
    student = identify_teacher(build.teacher, build.engine).record
    planned = plan_build(build)
    require_heldout(config, planned.num_heldout)
    seconds, left = seconds_of(state, TEACHER_CACHE), 0 if part is None else config.rounds - part.round + 1
    return {
        "rounds": config.rounds,
        "rounds_left": left,
        "teacher": teacher.model,
        "same_tokenizer": teacher.tokenizer_fingerprint == student.tokenizer_fingerprint,
        "num_prompts": planned.num_prompts,
        "num_chains": planned.num_chains,
        "tokens_per_round": _tokens(planned.num_done, planned.tokens_left, build.cache),
        "tokens_measured": planned.tokens_left_measured,
        "hours_left": None if seconds is None else seconds * left / 3600,
        "state": state.model_dump(mode="json"),
        "build": {key: value for key, value in asdict(planned).items() if key in ("num_left", "gb_left", "fits")},
    }


def plan_lines(config: RoundsConfig, planned: Json) -> list[str]:
    """For people."""
    about = "" if planned["tokens_measured"] else "at most "
    hours = planned["hours_left"]
    took = "known after the first round" if hours is None else f"about {format_duration(3600 * hours)} on this side"
    prompts, chains = format_plural(planned["num_prompts"], "prompt"), format_plural(planned["num_chains"], "chain")
    work = f"{prompts}, {chains}, {about}{format_count(planned['tokens_per_round'])} tokens to generate and to score"
    lines = [
        f"rounds     {planned['rounds_left']} of {planned['rounds']} left; each {work}",
        f"time       {took}",
    ]
    if not planned["same_tokenizer"]:
        lines.append(
            "warning    student and teacher have different tokenizers: the student's tokens mean other text there"
        )
    return [*lines, *state_lines(config, RoundsFolder(config).read())]


def require_heldout(config: RoundsConfig, num_heldout: int) -> None:
    """Raises ConfigError without held-out chains: training would be refused, after hours of generation."""
    asked = config.train.get("eval", {})
    # Other caches may have some, and other conditions select others.
    is_sure = not off_policy_caches(config) and isinstance(asked, Mapping) and "where" not in asked
    if is_sure and not num_heldout:
        raise ConfigError(
            "generate.prompts holds out no prompt, and the student is evaluated on held-out ones: set "
            "generate.prompts.heldout_frac, or train.eval: null and answers: null"
        )


def _tokens(num_done: int, tokens_left: float, cache: Location) -> float:
    """Tokens of a whole round, from what is there and what is left of it."""
    if not num_done:
        return tokens_left
    from teacher_cache.inspect.stats import cache_stats

    return float(cache_stats(Catalog(cache)).num_tokens) + tokens_left
