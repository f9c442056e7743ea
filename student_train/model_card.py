"""The README of an exported student: what it is, what it learnt from whom, by which losses, and how close it came."""

import html
from collections.abc import Mapping, Sequence

import yaml

from schemas.manifest import RunManifest
from shared.config import Json, plain
from student_train.checkpoint import CheckpointState
from student_train.config import DataConfig, TrainConfig
from student_train.runfolder import RunFolder
from student_train.stage_config import LossConfig, ScheduleConfig, StageConfig
from student_train.streaming.heldout import before_and_after
from student_train.streaming.selection import Selection

EVAL_ROWS = {
    "cross_entropy": "cross-entropy (nats a token)",
    "forward_kl": "KL(teacher, student) (nats a token)",
    "js": "Jensen-Shannon divergence (nats a token)",
    "top1_agreement": "top-1 agreement",
    "confidence_minus_accuracy": "confidence - accuracy",
}


def model_card(
    config: TrainConfig,
    state: CheckpointState,
    selections: Mapping[str, Selection],
    manifests: Sequence[RunManifest],
    adapter_of: str | None = None,
) -> str:
    """Markdown with the YAML head that model hubs read.

    `selections` are those of the checkpoint's stage and of all before it, by name; `adapter_of` is the model that an
    adapter alone belongs to.
    """
    # The name comes out of a cache: it stays text, on one line.
    teachers = sorted({html.escape(" ".join(manifest.teacher.model.split())) for manifest in manifests})
    base = config.student.init.teacher if config.student.init is not None else config.student.model
    head = {
        "library_name": "transformers" if adapter_of is None else "peft",
        "pipeline_tag": "text-generation",
        "base_model": base if adapter_of is None else adapter_of,
        "tags": ["distillation"],
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {config.run.name}\n\nA student trained with stillroom on the cached token distributions of its teacher.",
        _provenance(config, state, selections, teachers),
        _evaluation(config, state),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(sections) + "\n"


def _provenance(
    config: TrainConfig, state: CheckpointState, selections: Mapping[str, Selection], teachers: Sequence[str]
) -> str:
    header = selections[state.stage_name].header
    stages = [_stage_line(stage, selections[stage.name], config.data) for stage in config.stages[: state.stage + 1]]
    cut = config.student.init
    lines = [
        f"Teacher: {', '.join(teachers) or 'unknown'} (fingerprint {', '.join(header.teacher_fingerprints)})",
        f"Student before training: {config.student.model}"
        + (f", {cut.layers} layers of {cut.teacher}" if cut is not None else ""),
        "Caches: " + "; ".join(f"{one.root}, version {one.chains_version} of its chains" for one in header.caches),
        f"Checkpoint: {state.tag}, after {state.num_loss_tokens} loss tokens",
    ]
    return "## Where it comes from\n\n" + "\n".join(f"- {line}" for line in [*lines, *stages])


def _stage_line(stage: StageConfig, selection: Selection, data: DataConfig) -> str:
    header = selection.header
    size = f"{header.num_chains} chains, {header.num_tokens} completion tokens"
    parts = [
        f"trains {stage.trainable} on `{header.where or 'all'}` ({size})",
        "losses " + ", ".join(_loss(name, loss) for name, loss in stage.losses.items()),
        f"peak rate {stage.learning_rate:g}",
    ]
    if stage.temperature != 1.0:
        parts.append(f"temperature {_value(stage.temperature)}")
    if stage.token_weights is not None:
        parts.append("token_weights " + _settings(plain(stage.token_weights)))
    if stage.focal_gamma is not None:
        parts.append(f"focal_gamma {stage.focal_gamma:g}")
    if data.weight is not None:
        parts.append(f"chains weighted by `{data.weight}`")
    return f"Stage {stage.name}: " + "; ".join(parts)


def _loss(name: str, loss: LossConfig) -> str:
    shares = _settings({"beta": loss.beta, "alpha": loss.alpha})
    return f"{name} x {_value(loss.weight)}" + (f" ({shares})" if shares else "")


def _value(value: float | ScheduleConfig) -> str:
    """0.9, or a schedule as `linear from 1 to 0.5`."""
    if not isinstance(value, ScheduleConfig):
        return f"{value:g}"
    end = f"by {value.factor:g} a step" if value.factor is not None else f"to {value.end:g}"
    return f"{value.kind} from {value.start:g} {end}"


def _settings(values: Json) -> str:
    """Those that are set: `beta 0.3, alpha 0.1`."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)


def _evaluation(config: TrainConfig, state: CheckpointState) -> str:
    reached = (state.stage, state.step)
    entries = [one for one in RunFolder(config.run).read_evals() if (one["stage_number"], one["step"]) <= reached]
    if not entries:
        return "## Evaluation\n\nNot evaluated."
    before, after = before_and_after(entries)
    assert after is not None
    rows = [
        f"| {label} | {'-' if before is None else format(before[name], '.4f')} | {after[name]:.4f} |"
        for name, label in EVAL_ROWS.items()
        if after[name] is not None
    ]
    table = "\n".join(["| | before | after |", "|---|---|---|", *rows])
    return f"## Evaluation\n\n{after['num_tokens']} held-out tokens (`{after['where']}`):\n\n{table}"
