"""The held-out loss while a run trains: measured, logged, compared with the best checkpoint and the stage's start."""

from stillroom.log import note, warn
from student_train.config.run import TrainConfig
from student_train.data.open import eval_spec
from student_train.evaluation import evaluate
from student_train.planning.plan import RunPlan, StagePlan
from student_train.runtime.checkpoint import Best, CheckpointState, HeldoutProgress
from student_train.runtime.engine import Engine
from student_train.runtime.metrics_log import MetricsLog
from student_train.runtime.ranks import Ranks
from student_train.runtime.run_folder import RunFolder
from student_train.training.health import Health

RIGHT_TOLERANCE_NATS = 1e-4
"""Smaller rises may come from the order of a sum."""


class Heldout:
    """The held-out loss of one stage, and of the run before it."""

    def __init__(
        self, config: TrainConfig, plan: RunPlan, stage: StagePlan, state: CheckpointState | None, ranks: Ranks
    ) -> None:
        """`state` is the run's last one."""
        self._config, self._plan, self._stage, self._ranks = config, plan, stage, ranks
        self._folder = RunFolder(config.run)
        self.best = self._comparable(state.best) if state is not None else None
        self.progress = self._before(state)

    @property
    def remaining(self) -> float:
        """Ratio of the loss now to the loss at the stage's start, which elastic weights follow."""
        return self.progress.remaining if self.progress is not None else 1.0

    def evaluate(self, engine: Engine, step: int, health: Health, log: MetricsLog | None) -> None:
        """Measures the held-out loss; the first rank has a log."""
        assert self._plan.heldout is not None
        header = self._plan.heldout.header
        health.require_finite(engine, step)
        result = evaluate(engine.metrics, self._plan.heldout, eval_spec(self._config.data), self._ranks)
        health.require_loss("held-out loss", result.loss, step, "after")
        start = self.progress.start if self.progress is not None else result.loss
        self.progress = HeldoutProgress(selection=header.hash, start=start, now=result.loss)
        right = self._evaluate_right(engine)
        if log is not None:
            values, name = {**result.model_dump(), **right}, self._stage.config.name
            where = {"stage": name, "stage_number": self._stage.index, "step": step, "where": header.where}
            self._folder.add_eval({**where, "selection": header.hash, **values})
            log.write_eval(step, values)
            note(f"held-out after step {step} of {name}: {result.line()}")
            self._warn_of_right(right)

    def keep_best(self, tag: str) -> None:
        """Marks this checkpoint as the best one, if its held-out loss is the lowest."""
        assert self.progress is not None
        if self.best is None or self.progress.now < self.best.loss:
            self.best = Best(tag=tag, loss=self.progress.now, selection=self.progress.selection)

    def _evaluate_right(self, engine: Engine) -> dict[str, float]:
        """Cross-entropy on held-out right chains, in a stage that moves away from wrong ones."""
        right = self._stage.right
        if right is None:
            return {}
        found = evaluate(engine.metrics, right, eval_spec(self._config.data), self._ranks)
        return {"right_cross_entropy": found.cross_entropy}

    def _warn_of_right(self, right: dict[str, float]) -> None:
        """Says when moving away from wrong chains has made right ones less likely than at the stage's start."""
        if not right:
            return
        assert self._plan.heldout is not None
        place = self._stage.index, self._plan.heldout.header.hash
        # `eval` may select other chains since the stage began; their likelihood cannot be compared.
        own = [one for one in self._folder.read_evals() if (one["stage_number"], one["selection"]) == place]
        before, now = own[0].get("right_cross_entropy"), right["right_cross_entropy"]
        note(f"held-out right chains: cross-entropy {now:.4f}" + (f" (at the start {before:.4f})" if before else ""))
        if before is not None and now > before + RIGHT_TOLERANCE_NATS:
            warn(
                f"right chains have become less likely since stage {self._stage.config.name} began: cross-entropy "
                f"{before:.4f} -> {now:.4f} nats: lower the weight of the losses on wrong chains (or their alpha), "
                "raise cross_entropy or start_kl, or choose unlikelihood"
            )

    def _comparable(self, best: Best | None) -> Best | None:
        """The best so far, unless `eval` selects other chains since."""
        heldout = self._plan.heldout
        return best if best is None or heldout is None or best.selection == heldout.header.hash else None

    def _before(self, state: CheckpointState | None) -> HeldoutProgress | None:
        """The stage's held-out progress so far: it starts where the stage before ended."""
        known, heldout = state.heldout if state is not None else None, self._plan.heldout
        if state is None or known is None or heldout is None or known.selection != heldout.header.hash:
            return None
        return known if state.stage == self._stage.index else known.model_copy(update={"start": known.now})
