"""What stops a stage: numbers that are not finite, or steps that learn nothing; and how to go on from there."""

import math
import shlex

from stillroom.errors import StillroomError
from student_train.config.run import TrainConfig
from student_train.config.stage import stage_key
from student_train.planning.plan import StagePlan
from student_train.runtime import checkpoint
from student_train.runtime.engine import Engine
from student_train.runtime.metrics_log import why_skipped
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder

MAX_SKIPPED_IN_A_ROW = 100
"""float16 needs about twenty to find its loss scale."""


class Health:
    """Watches one stage. All ranks call every method together, and all of them stop."""

    def __init__(self, config: TrainConfig, stage: StagePlan, ranks: Ranks, num_skipped: int) -> None:
        self.num_skipped = num_skipped
        """Steps of the stage whose gradient was not finite."""
        self._num_skipped_in_a_row = 0
        self._config, self._stage, self._ranks = config, stage, ranks
        self._folder = RunFolder(config.run)
        self._key = stage_key(stage.index, stage.config.name)

    def require_weight(self, total: float, step: int) -> None:
        """Raises StillroomError where the tokens of a batch have no weight, or too much."""
        if not math.isfinite(total):
            raise StillroomError(
                f"{self._key}: the weights of the tokens of step {step} add up to {total}: make "
                "token_weights or data.weight less steep"
            )
        if total == 0:
            raise StillroomError(
                f"{self._key}: every token of step {step} has weight 0: lower token_weights.tail, or raise batch_tokens"
            )

    def require_loss(self, name: str, loss: float, step: int, when: str = "at") -> None:
        """Raises StillroomError for a loss of all ranks that is not finite."""
        if not math.isfinite(loss):
            raise StillroomError(f"{self._key}: the {name} is {loss} {when} step {step}: {self._how_to_go_on(step)}")

    def require_learning(self, is_applied: bool, step: int) -> None:
        """Raises StillroomError if all steps of the stage were skipped, or too many in a row."""
        self.num_skipped += not is_applied
        self._num_skipped_in_a_row = 0 if is_applied else self._num_skipped_in_a_row + 1
        learnt_nothing = step >= self._stage.num_steps and self.num_skipped == step
        if learnt_nothing or self._num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            count = f"all {step}" if learnt_nothing else f"the last {self._num_skipped_in_a_row}"
            precision = self._config.engine.precision
            instead = "bfloat16 or float32" if precision == "float16" else "float32"
            remedy = (
                f"set engine.precision to {instead}" if precision != "float32" else "check the student and the data"
            )
            raise StillroomError(
                f"{self._key}: {count} steps were skipped because {why_skipped(precision)}, and nothing was learned: "
                f"{remedy} and choose another run folder"
            )

    def require_finite(self, engine: Engine, step: int) -> None:
        """Raises StillroomError, on all ranks, if weights or moments of any of them are not finite."""
        (num_broken,) = self._ranks.sum([float(not engine.is_finite())])
        if num_broken:
            raise StillroomError(
                f"{self._key}: weights or moments are not finite after step {step}, so it is not saved: "
                f"{self._how_to_go_on(step)}"
            )

    def _how_to_go_on(self, step: int) -> str:
        """What to do about numbers that are not finite, as a command where there are checkpoints to go back to."""
        key, rate = f"stages.{self._stage.index}.learning_rate", self._stage.config.learning_rate
        states = checkpoint.states_of_last_stage(self._folder.checkpoints)
        steps = [state.step for state in states if state.place < (self._stage.index, step)]
        if not steps:
            return f"lower {key} (now {rate:g}) and run again, or raise engine.precision"
        command = f"student-train run {shlex.quote(str(self._folder.config_path))} --from-step {steps[-1]}"
        return (
            f"go back with a lower rate: {command} --set {key}={rate / 2:g} "
            f"({'checkpoints' if len(steps) > 1 else 'the checkpoint'} of step {', '.join(map(str, steps))} "
            f"{'are' if len(steps) > 1 else 'is'} intact)"
        )
