"""Memory of a planned run, as DeepSpeed's tensors were counted at each ZeRO stage."""

import pytest

from student_train.config.run import EngineConfig
from student_train.planning.estimate import optimizer_bytes


@pytest.mark.parametrize(
    ("precision", "zero_stage", "num_ranks", "is_cpu", "kept", "step"),
    [
        # AdamW on the weights themselves.
        ("float32", 0, 2, True, 8, 0),
        # A float32 copy, of a float32 model too.
        ("float32", 1, 1, False, 12, 0),
        # But not where ZeRO would shard nothing.
        ("float32", 2, 1, True, 8, 0),
        ("bfloat16", 0, 2, True, 12, 4),
        ("bfloat16", 2, 1, True, 12, 2),
        ("bfloat16", 1, 2, True, 6, 0),
        ("bfloat16", 3, 4, True, 3, 0.5),
    ],
)
def test_bytes_of_the_optimizer_per_weight(
    precision: str, zero_stage: int, num_ranks: int, is_cpu: bool, kept: float, step: float
) -> None:
    engine = EngineConfig.model_validate({"precision": precision, "zero_stage": zero_stage})
    assert optimizer_bytes(engine, 100, num_ranks, is_cpu=is_cpu) == (100 * kept, 100 * step)
