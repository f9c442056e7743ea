"""A checkpoint to a Hugging Face folder: safetensors, tokenizer, chat template, generation config and a model card.

The student learnt the cache's ids and the cache's chat template, so the folder carries the cache's tokenizer: the
student's own where it is the same, else that of the teacher that the cache names.

The README of an exported student: what it is, what it learnt from whom, by which losses, and how close it came.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from stillroom.cache.catalog import Catalog
from stillroom.config import Json, plain
from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.models import end_id_of, fingerprint_template, fingerprint_tokenizer, load_tokenizer, public_name
from stillroom.schema.manifest import RunManifest
from stillroom.storage.paths import location, write_text_atomic
from student_train.config.data import DataConfig
from student_train.config.run import StudentConfig, TrainConfig
from student_train.config.stage import LoraConfig, LossConfig, ScheduleConfig, StageConfig
from student_train.data.kept_ids import read_kept_ids
from student_train.data.selection import Selection, load_selection
from student_train.data.tokenizer_check import check_vocabulary
from student_train.model.folder import atomic_folder, save_model
from student_train.model.prune import cut_words
from student_train.model.student import add_lora, load_causal, widen_vocab
from student_train.runtime.checkpoint import CheckpointState
from student_train.runtime.engine import saved_weights
from student_train.runtime.run_folder import RunFolder, before_and_after

EVAL_ROWS = {
    "cross_entropy": "cross-entropy (nats per token)",
    "forward_kl": "KL(teacher, student) (nats per token)",
    "js": "Jensen-Shannon divergence (nats per token)",
    "top1_agreement": "top-1 agreement",
    "confidence_minus_accuracy": "confidence - accuracy",
}
MODEL_KEYS, PATH_KEYS = ("model", "teacher"), ("run", "path", "file", "behaviour")
"""Settings that a card shows without their folders."""


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
    names = {" ".join(public_name(manifest.teacher.model).split()) for manifest in manifests}
    teachers = sorted(html.escape(name) for name in names)
    base = config.student.init.teacher if config.student.init is not None else config.student.model
    set_here = yaml.safe_dump(
        _without_folders(config.model_dump(mode="json", exclude_defaults=True)), sort_keys=False, allow_unicode=True
    )
    head = {
        "library_name": "transformers" if adapter_of is None else "peft",
        "pipeline_tag": "text-generation",
        "base_model": public_name(base if adapter_of is None else adapter_of),
        "tags": ["distillation"],
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {config.run.name}\n\nA student trained with stillroom on the cached token distributions of its teacher.",
        _provenance(config, state, selections, teachers),
        _evaluation(config, state),
        f"## Configuration\n\nSettings that differ from their defaults:\n\n```yaml\n{set_here}```",
    ]
    return "\n\n".join(sections) + "\n"


def _without_folders(value: Any, key: str = "") -> Any:
    """Settings to publish: a model or path by its last name."""
    if isinstance(value, dict):
        return {name: _without_folders(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one, key) for one in value]
    if not isinstance(value, str) or key not in MODEL_KEYS + PATH_KEYS:
        return value
    return public_name(value) if key in MODEL_KEYS else Path(value).name


def _provenance(
    config: TrainConfig, state: CheckpointState, selections: Mapping[str, Selection], teachers: Sequence[str]
) -> str:
    header = selections[state.stage_name].header
    stages = [_stage_line(stage, selections[stage.name], config.data) for stage in config.stages[: state.stage + 1]]
    cut = config.student.init
    lines = [
        f"Teacher: {', '.join(teachers) or 'unknown'} (fingerprint {', '.join(header.teacher_fingerprints)})",
        f"Student before training: {public_name(config.student.model)}"
        + (f", cut to {cut_words(cut)} of {public_name(cut.teacher)}" if cut is not None else ""),
        "Caches: "
        + "; ".join(f"{Path(one.root).name}, version {one.chains_version} of its chains" for one in header.caches),
        f"Checkpoint: {state.tag}, after {state.num_loss_tokens} loss tokens",
    ]
    lines += [
        f"After step {one['step']} of stage {one['stage']}: "
        + ", ".join(f"{key} {before} -> {after}" for key, (before, after) in one["keys"].items())
        for one in RunFolder(config.run).read_changes()
        if (one["stage_number"], one["step"]) < state.place
    ]
    return "## Provenance\n\n" + "\n".join(f"- {line}" for line in [*lines, *stages])


def _stage_line(stage: StageConfig, selection: Selection, data: DataConfig) -> str:
    header = selection.header
    size = f"{header.num_chains} chains, {header.num_tokens} completion tokens"
    pruned = [f"prunes to {cut_words(stage.prune)}"] if stage.prune is not None else []
    parts = [
        *pruned,
        f"trains {stage.trainable} on `{header.where or 'all'}` ({size})",
        "losses " + ", ".join(_loss(name, loss) for name, loss in stage.losses.items()),
        f"peak rate {stage.learning_rate:g}",
    ]
    if stage.quantise is not None:
        size = f", groups of {stage.quantise.weights_per_scale}" if stage.quantise.format == "w4a16" else ""
        parts.append(
            f"rounds its forward pass to {stage.quantise.format}{size}: weights here are float; rounding them to the "
            "nearest gives what was evaluated"
        )
    if stage.temperature != 1.0:
        parts.append(f"temperature {_value(stage.temperature)}")
    if stage.token_weights is not None:
        parts.append("token_weights " + _settings(plain(stage.token_weights)))
    if stage.focal_gamma is not None:
        parts.append(f"focal_gamma {stage.focal_gamma:g}")
    if stage.adversarial is not None:
        parts.append("prompts disturbed with " + _settings(plain(stage.adversarial)))
    if stage.negatives is not None:
        parts.append(f"wrong chains `{stage.negatives.where}`")
    if data.mixture is not None:
        parts.append("teachers mixed with " + ", ".join(one.path.name for one in data.mixture.teachers))
    if data.prompt is not None:
        parts.append("prompts changed: " + ", ".join(key for key, value in plain(data.prompt).items() if value))
    if data.weight is not None:
        parts.append(f"chains weighted by `{data.weight}`")
    if data.steps is not None:
        parts.append("chains split at their steps")
    if data.terms is not None:
        parts.append(f"terms weighted {data.terms.weight:g} times")
    return f"Stage {stage.name}: " + "; ".join(parts)


def _loss(name: str, loss: LossConfig) -> str:
    names = ("tail", "beta", "alpha", "temperature", "clip", "max_ratio", "max_advantage")
    given = {key: value for key, value in plain(loss).items() if key in names}
    if loss.interpolation is not None:
        given["interpolation"] = _value(loss.interpolation)
    settings = _settings(given)
    layers = None if loss.layers is None else "layers " + ", ".join(f"{a} to {b}" for a, b in loss.layers.items())
    settings = ", ".join(one for one in (settings, layers) if one)
    return f"{name} x {_value(loss.weight)}" + (f" ({settings})" if settings else "")


def _value(value: float | ScheduleConfig) -> str:
    """0.9, or a schedule as `linear from 1 to 0.5`."""
    if not isinstance(value, ScheduleConfig):
        return f"{value:g}"
    end = f"by {value.factor:g} a step" if value.factor is not None else f"to {value.end:g}"
    return f"{value.kind} from {value.start:g} {end}"


def _settings(values: Json) -> str:
    """Those that are set: `beta 0.3, alpha 0.1`."""
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in values.items()
        if value is not None
    )


def _evaluation(config: TrainConfig, state: CheckpointState) -> str:
    evals = RunFolder(config.run).read_evals()
    entries = [one for one in evals if (one["stage_number"], one["step"]) <= state.place]
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


def export(
    config: TrainConfig, state: CheckpointState, out: Path, *, adapter_only: bool, tokenizer: str | None
) -> Json:
    """Writes the model of a checkpoint to `out`, whole or not at all.

    `adapter_only` leaves a LoRA adapter unmerged and writes it alone; `tokenizer` names the folder or hub id of the
    cache's tokenizer where neither student nor teacher can give it. Raises ConfigError, DataError.
    """
    run = RunFolder(config.run)
    stage = config.stages[state.stage]
    if adapter_only and stage.trainable != "lora":
        raise ConfigError(f"--adapter-only needs a LoRA checkpoint: {state.tag} trained {stage.trainable}")
    selection = load_selection(run.selection_path(stage.name))
    with atomic_folder(out) as temp:
        found = cache_tokenizer(config.student, selection, tokenizer)
        model = trained_model(config, state, merged=not adapter_only)
        if not adapter_only:
            adopt_tokens(model, found)
        adapter_of = _base_of(config, state.stage) if adapter_only else None
        if adapter_of is not None:
            # peft writes them into adapter_config.json, which is then opened from any directory.
            model.peft_config["default"].base_model_name_or_path = adapter_of
            model.peft_config["default"].revision = _revision_of(config.student, adapter_of)
        is_widened = adapter_of is not None and _is_widened(model, adapter_of, config.student)
        save_model(model, found, temp, with_embeddings=is_widened)
        # What reads a cache with this folder, and what is pruned from it, needs the ids too.
        kept = read_kept_ids(config.student.model)
        if kept is not None and not selection.is_retokenised:
            kept.write(temp)
        selections = {
            one.name: load_selection(run.selection_path(one.name)) for one in config.stages[: state.stage + 1]
        }
        write_text_atomic(
            temp / "README.md", model_card(config, state, selections, manifests_of(selection), adapter_of)
        )
    return {
        "folder": str(out),
        "checkpoint": state.tag,
        "adapter_only": adapter_only,
        "adapter_of": adapter_of,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def export_stage(config: TrainConfig, state: CheckpointState) -> Path:
    """The model at the end of a stage, as the folder from which the next one begins; made once."""
    assert state.stage_is_done
    folder = RunFolder(config.run).model_after(state.stage_name)
    # Folders appear whole, so one that exists is finished.
    if not folder.exists():
        with atomic_folder(folder) as temp:
            save_model(trained_model(config, state, merged=True), None, temp)
    return folder


def initial_folder(config: TrainConfig, stage: int) -> str:
    """The model from which a stage begins."""
    run = RunFolder(config.run)
    if stage == 0:
        return config.student.model
    if config.stages[stage].prune is not None:
        return str(run.pruned_for(config.stages[stage].name))
    return str(run.model_after(config.stages[stage - 1].name))


def _is_widened(model: Any, base: str, student: StudentConfig) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        base, revision=_revision_of(student, base), trust_remote_code=student.trust_remote_code
    )
    return bool(model.config.vocab_size != config.get_text_config().vocab_size)


def _revision_of(student: StudentConfig, base: str) -> str | None:
    """Folders have none."""
    return student.revision if base == student.model else None


def _base_of(config: TrainConfig, stage: int) -> str:
    """What an adapter of the stage belongs to: a folder by its absolute path, or a hub id."""
    base = initial_folder(config, stage)
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def trained_model(config: TrainConfig, state: CheckpointState, *, merged: bool) -> Any:
    """The Hugging Face model of a checkpoint in the training's precision, on the CPU; a LoRA adapter merged or not."""
    stage = config.stages[state.stage]
    run = RunFolder(config.run)
    model = load_causal(initial_folder(config, state.stage), config.student, config.engine.precision)
    # What the run trained on: the vocabulary of its first stage, which is that of all of them.
    selection = load_selection(run.selection_path(config.stages[0].name))
    caches = [cache.path for cache in config.data.caches]
    # As training did, or the checkpoint's embeddings would have other rows.
    widen_vocab(model, check_vocabulary(config.student, selection, caches).num_ids)
    if stage.trainable == "lora":
        model = add_lora(model, stage.lora or LoraConfig())
    weights = saved_weights(run.checkpoints, state.tag, state.zero_stage)
    # Not strict: checkpoints leave out frozen weights, which the initial folder has; trained ones are checked below.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lost = set(missing) & set(_trained_names(model, stage.trainable))
    if unexpected or lost:
        raise CorruptError(f"checkpoint {state.tag} does not fit the student: {sorted([*unexpected, *lost])[:3]}")
    if stage.trainable == "lora" and merged:
        # Before the merge, which writes into the shared weight.
        _untie_adapted(model.get_base_model())
        model = model.merge_and_unload()
    return model.eval()


def cache_tokenizer(config: StudentConfig, selection: Selection, named: str | None) -> Any:
    """The tokenizer that the student learnt: of `named`, else the student's or the teacher's, whichever is the cache's.

    Raises DataError where none of them is, ConfigError where `named` is not it or of no use.
    """
    if named is not None and selection.is_retokenised:
        kind = "text alone" if selection.is_text else "projected distributions"
        raise ConfigError(f"--tokenizer has no effect after training on {kind}: the student has its own")
    if named is not None and selection.header.kept_ids is not None:
        raise ConfigError("--tokenizer has no effect for a student whose vocabulary is cut: it has its own")
    if named is not None:
        tokenizer = load_tokenizer(named)
        if not _is_cached(tokenizer, selection):
            raise ConfigError(f"--tokenizer {named} is not the cache's: its tokenizer or chat template differs")
        return tokenizer
    student = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    if selection.is_retokenised or selection.header.kept_ids is not None or _is_cached(student, selection):
        return student
    teachers = {manifest.teacher.model for manifest in manifests_of(selection)}
    for teacher in sorted(teachers):
        try:
            tokenizer = load_tokenizer(teacher)
        except DataError:
            continue
        if _is_cached(tokenizer, selection):
            return tokenizer
    raise DataError(
        f"the cache's tokenizer differs from the student's and cannot be loaded from {', '.join(sorted(teachers))}: "
        "pass the folder that has it with --tokenizer"
    )


def adopt_tokens(model: Any, tokenizer: Any) -> None:
    """Lets generation begin and end with the adopted tokenizer's special tokens where they are not the model's own.

    Answers also end with what the chat template writes behind them, which may be another token than eos.
    """
    eos, known = tokenizer.eos_token_id, model.generation_config.eos_token_id
    ends = list(known) if isinstance(known, list) else [known]
    if eos is not None and eos not in ends:
        model.config.eos_token_id, ends = eos, [eos]
    learnt = end_id_of(tokenizer, {})
    ends += [learnt] if learnt is not None and learnt not in ends else []
    ends = [one for one in ends if one is not None]
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if tokenizer.bos_token_id is not None:
        model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def manifests_of(selection: Selection) -> list[RunManifest]:
    """Manifests of the runs in the selection's caches; none where the caches lie elsewhere by now."""
    roots = [location(cache.root) for cache in selection.header.caches]
    found = [manifest for root in roots if root.is_dir() for manifest in Catalog(root).runs().values()]
    return [one for one in found if one.teacher.fingerprint in selection.header.teacher_fingerprints]


def _is_cached(tokenizer: Any, selection: Selection) -> bool:
    header = selection.header
    return (
        header.tokenizer_fingerprints == [fingerprint_tokenizer(tokenizer)]
        and fingerprint_template(tokenizer) in header.template_fingerprints
    )


def _untie_adapted(model: Any) -> None:
    """Gives a head that shares its weight with the embeddings its own, where one of both has an adapter: merged into
    the shared weight it would change the other too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    plain: list[Any] = [one.get_base_layer() if isinstance(one, BaseTunerLayer) else one for one in layers]
    embeddings, head = plain
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _trained_names(model: torch.nn.Module, trainable: str) -> list[str]:
    if trainable == "all":
        return [name for name, _ in model.named_parameters()]
    if trainable == "body":
        ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        kept = [parameter for layer in ends for parameter in layer.parameters()]
        # By identity: == between tensors compares their elements.
        return [name for name, parameter in model.named_parameters() if not any(parameter is one for one in kept)]
    if trainable == "lora":
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, parameter in model.named_parameters() if any(parameter is one for one in head.parameters())]
