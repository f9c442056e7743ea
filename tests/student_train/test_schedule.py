"""Learning rates and loss weights by step."""

import pytest

from stillroom.config import Json, validate_config
from stillroom.errors import ConfigError
from student_train.config.stage import StageConfig
from student_train.schedule import check_mixes, learning_rate, mix_at, scheduled, temperature_steps


def stage_of(**fields: object) -> StageConfig:
    return validate_config({"learning_rate": 1.0, **fields}, StageConfig, "test")


def schedule_of(schedule: Json) -> StageConfig:
    return stage_of(losses={"cross_entropy": {"weight": schedule}})


def weight_at(stage: StageConfig, step: int, num_steps: int) -> float:
    return scheduled(stage.losses["cross_entropy"].weight, step, num_steps)


def test_rate_rises_to_its_peak_and_falls_to_its_minimum() -> None:
    stage = stage_of(warmup_frac=0.1, min_lr_frac=0.2)
    rates = [learning_rate(stage, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0 == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[99] == pytest.approx(0.2)
    assert learning_rate(stage, 54, 100) == pytest.approx(0.6)


def test_linear_and_constant_rates() -> None:
    linear = stage_of(warmup_frac=0, min_lr_frac=0, lr_schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(4)] == [0.75, 0.5, 0.25, 0.0]
    constant = stage_of(warmup_frac=0.5, lr_schedule="constant")
    assert [learning_rate(constant, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_one_step_has_a_rate() -> None:
    assert learning_rate(stage_of(min_lr_frac=0.1), 0, 1) == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "linear", "start": 1.0, "end": 0.0}, [1.0, 0.5, 0.0]),
        ({"kind": "cosine", "start": 5.0, "end": 1.0}, [5.0, 3.0, 1.0]),
        ({"kind": "exponential", "start": 4.0, "end": 1.0}, [4.0, 2.0, 1.0]),
        ({"kind": "exponential", "start": 2.0, "factor": 0.98}, [2.0, 1.96, 1.9208]),
    ],
)
def test_weights_by_step(schedule: Json, expected: list[float]) -> None:
    stage = schedule_of(schedule)
    assert [weight_at(stage, step, 3) for step in range(3)] == pytest.approx(expected)
    assert mix_at(stage, 1, 3).terms[0].weight == pytest.approx(expected[1])


def test_elastic_weights_follow_what_remains() -> None:
    stage = schedule_of({"kind": "elastic", "start": 0.9, "end": 0.5})
    weights = [mix_at(stage, step, 10, remaining).terms[0].weight for step, remaining in ((0, 1.0), (7, 0.25), (9, 0))]
    assert weights == pytest.approx([0.9, 0.6, 0.5])
    with pytest.raises(ConfigError, match="no loss has a weight above 0"):
        check_mixes(schedule_of({"kind": "elastic", "start": 1.0, "end": 0.0}), 10)
    with pytest.raises(ConfigError, match="temperature cannot be elastic"):
        stage_of(temperature={"kind": "elastic", "start": 2.0, "end": 1.0})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "linear", "start": 1.0}, "exactly one of end and factor"),
        ({"kind": "linear", "start": 1.0, "factor": 0.9}, "factor has no effect on a linear schedule"),
        ({"kind": "exponential", "start": 1.0, "end": 0.0}, "never reaches 0"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(schedule: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_of(schedule)


def test_factors_go_as_far_as_numbers_do() -> None:
    """0.98^37000 is 0 in float64, and 1.5^2000 is above all of it."""
    with pytest.raises(ConfigError, match="weight=inf must be a finite number"):
        check_mixes(schedule_of({"kind": "exponential", "start": 2.0, "factor": 1.5}), 2001)
    for factor, last in ((0.98, 1.0), (1.5, 4.0)):
        stage = stage_of(temperature={"kind": "exponential", "start": 2.0, "factor": factor})
        assert temperature_steps(stage, [2.0, 4.0], 40_000)[-1][1] == last


def test_mixes_that_teach_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="'forward' is unknown"):
        check_mixes(stage_of(losses={"forward": 1}), 10)
    with pytest.raises(ConfigError, match="takes no beta"):
        check_mixes(stage_of(losses={"cross_entropy": {"beta": 0.5}}), 10)
    with pytest.raises(ConfigError, match="no loss has a weight above 0"):
        check_mixes(schedule_of({"kind": "linear", "start": 1.0, "end": 0.0}), 10)
