"""`student-train rounds`: the student trains on its own scored chains. Checks and estimates of this side."""

from stillroom.config import Json, validate_config
from stillroom.errors import ConfigError, naming
from stillroom.log import format_count, format_duration
from stillroom.models import vocab_size_of
from stillroom.rounds.config import RoundsConfig, train_config
from stillroom.rounds.provenance import refuse_other_scores
from stillroom.rounds.state import STUDENT_TRAIN, RoundsFolder, RoundsState
from stillroom.rounds.turns import seconds_of, state_lines
from student_train.config.run import TrainConfig


def plan_rounds(config: RoundsConfig) -> Json:
    """What this side does in a round, and how long what is left takes; makes the checks that need no chains.

    Raises ConfigError for a training configuration that could not run, DataError for a student that is not there.
    """
    state = RoundsFolder(config).read()
    part = state.next_part(config.rounds)
    number = 1 if part is None else part.round
    train = validate_config(train_config(config, number), TrainConfig, "train")
    if config.answers is not None and train.eval is None:
        raise ConfigError("answers needs train.eval, whose held-out prompts are answered: set one, or answers: null")
    with naming("student"):
        vocab_size_of(train.student.model, train.student.revision, train.student.trust_remote_code)
    refuse_other_scores(config, number)
    seconds, left = seconds_of(state, STUDENT_TRAIN), 0 if part is None else config.rounds - part.round + 1
    return {
        "rounds": config.rounds,
        "rounds_left": left,
        "stages": [stage.name for stage in train.stages],
        "tokens_per_round": _tokens_of(state),
        "hours_left": None if seconds is None else seconds * left / 3600,
        "state": state.model_dump(mode="json"),
    }


def plan_lines(config: RoundsConfig, planned: Json) -> list[str]:
    """For people."""
    hours, tokens = planned["hours_left"], planned["tokens_per_round"]
    took = "known after the first round" if hours is None else f"about {format_duration(3600 * hours)} on this side"
    size = "" if tokens is None else f", {format_count(tokens)} loss tokens each"
    return [
        f"rounds     {planned['rounds_left']} of {planned['rounds']} left; stages {', '.join(planned['stages'])}{size}",
        f"time       {took}",
        *state_lines(config, RoundsFolder(config).read()),
    ]


def _tokens_of(state: RoundsState) -> int | None:
    """Loss tokens of the newest round that has trained."""
    trained = [one.results[0] for one in state.done if one.part == "train" and one.results]
    return trained[-1].get("num_loss_tokens") if trained else None
