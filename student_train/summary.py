"""What a run came to, out of its own files: the result that `student-train run` prints."""

from shared.config import Json
from student_train.checkpoint import latest_state
from student_train.config import TrainConfig
from student_train.runfolder import RunFolder
from student_train.streaming.heldout import before_and_after


def summarise(run: RunFolder, config: TrainConfig) -> Json:
    """Counts, speed, losses, and held-out numbers before and after."""
    records, evals, state = run.read_metrics(), run.read_evals(), latest_state(run.checkpoints)
    assert state is not None
    before, after = before_and_after(evals)
    train_s = sum(record["step_s"] for record in records)
    num_tokens = sum(record["num_tokens"] for record in records)
    return {
        "run": str(run.root),
        "checkpoint": state.tag,
        "best_checkpoint": None if state.best is None else state.best.tag,
        "stages": [_stage(records, stage.name) for stage in config.stages],
        "num_steps": len(records),
        "num_skipped_steps": sum(record["skipped"] for record in records),
        "num_tokens": num_tokens,
        "num_loss_tokens": sum(record["num_loss_tokens"] for record in records),
        "train_s": train_s,
        "tokens_per_s": num_tokens / train_s if train_s else 0.0,
        "stall_frac": sum(one["stall_frac"] * one["step_s"] for one in records) / train_s if train_s else 0.0,
        "memory_gib": max((record["memory_gib"] for record in records), default=0.0),
        "heldout_before": before,
        "heldout_after": after,
    }


def _stage(records: list[Json], name: str) -> Json:
    own = [record for record in records if record["stage"] == name]
    first, last = (own[0], own[-1]) if own else (None, None)
    return {
        "name": name,
        "num_steps": len(own),
        "first_loss": first and first["loss"],
        "last_loss": last and last["loss"],
        "first_parts": first and first["parts"],
        "last_parts": last and last["parts"],
        # Where weights or temperature change, the losses of two steps are of two kinds.
        "is_comparable": all(
            (one["weights"], one["temperature"]) == (own[0]["weights"], own[0]["temperature"]) for one in own
        ),
    }
