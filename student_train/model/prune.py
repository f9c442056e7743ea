"""Cuts a student from a larger model: by depth, by width, or both; before a run (`student-train init`) or a stage.

In: a Hugging Face decoder, what to keep, cached chains where ranking runs them. Out: a Hugging Face folder of the same
family. Such a student starts far closer to the teacher than random weights (DistilBERT, arXiv 1910.01108; Minitron,
2407.14679), and is of little use before it has been trained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.models import fingerprint_weights, load_tokenizer
from stillroom.storage.paths import write_text_atomic
from student_train.config.data import DataConfig
from student_train.config.run import InitConfig, StudentConfig
from student_train.config.stage import PRUNED_AXES, PruneConfig
from student_train.data.kept_ids import KeptIds, read_kept_ids
from student_train.model.folder import atomic_folder, refuse_existing, save_model

if TYPE_CHECKING:
    from student_train.config.stage import Axis
    from student_train.model.importance import Calibration, WidthScores
    from student_train.model.narrow import Kept, Sizes

RECORD = "init.json"
ASKED_KEYS = tuple(PruneConfig.model_fields)

Calibrate = Callable[[], "Calibration"]
"""Reads the calibration chains; called only where ranking needs them."""


def kept_layers(num_teacher: int, layers: int | list[int]) -> list[int]:
    """Numbers of the layers to keep: those listed, or that many evenly spaced ones with the first and the last.

    30 layers to 4 keeps 0, 10, 19, 29; to 1 keeps 0. Raises ConfigError for layers that the teacher does not have.
    """
    if isinstance(layers, list):
        if sorted(set(layers)) != layers or layers[-1] >= num_teacher:
            raise ConfigError(f"layers={layers} must be ascending numbers in 0..{num_teacher - 1}, each once")
        return layers
    if not 1 <= layers <= num_teacher:
        raise ConfigError(f"layers={layers} must lie in 1..{num_teacher}, the layers of the teacher")
    if layers == 1:
        return [0]
    return [round(number * (num_teacher - 1) / (layers - 1)) for number in range(layers)]


def init_student(
    asked: InitConfig, out: Path, calibrate: Calibrate | None = None, data: DataConfig | None = None
) -> Json:
    """Writes the student's folder and returns its record; reuses a folder that the same call wrote before.

    Ranking reads chains by `calibrate`, cutting the vocabulary those of `data`. Raises ConfigError if `out` holds
    something else, the teacher cannot be cut so, or what is needed of these is None; DataError if the teacher cannot
    be loaded.
    """
    from student_train.model.student import load_causal

    fingerprint, revision = fingerprint_weights(asked.teacher)
    if (out / RECORD).exists():
        record: Json = json.loads((out / RECORD).read_text(encoding="utf-8"))
        is_same_teacher = (record.get("teacher"), record.get("teacher_weights_fingerprint")) == (
            asked.teacher,
            fingerprint,
        )
        if is_same_teacher and difference(record, asked) is None:
            note(f"{out} already holds this student: reusing it")
            return record
    # Before the teacher is loaded, which may take minutes.
    refuse_existing(out)
    model = load_causal(asked.teacher, StudentConfig(model=asked.teacher), None)
    tokenizer, kept = load_tokenizer(asked.teacher), read_kept_ids(asked.teacher)
    pruned = prune(model, asked, calibrate)
    if asked.vocabulary is not None:
        if kept is not None:
            raise ConfigError(f"student.init.vocabulary: the vocabulary of {asked.teacher} has already been cut")
        if data is None:
            raise ConfigError("student.init.vocabulary reads the caches: pass a CONFIG with data")
        from student_train.model.cut_vocabulary import cut_vocabulary

        tokenizer, kept = cut_vocabulary(model, tokenizer, data, asked.vocabulary)
    record = {
        "teacher": asked.teacher,
        "teacher_weights_fingerprint": fingerprint,
        "teacher_revision": revision,
        **pruned,
        "vocabulary": asked.vocabulary,
        "num_ids": int(model.get_input_embeddings().weight.shape[0]),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "folder": str(out),
    }
    _write(model, tokenizer, record, out, kept)
    return record


def prune_folder(folder: Path, out: Path, asked: PruneConfig, student: StudentConfig, calibrate: Calibrate) -> None:
    """Writes the pruned model of a folder to `out`, once. Raises ConfigError, DataError as `init_student` does."""
    from student_train.model.student import load_causal

    # Folders appear whole, so one that exists is finished.
    if out.exists():
        return
    model = load_causal(str(folder), student, None)
    record = prune(model, asked, calibrate)
    note(f"pruned {folder} to {held_words(record)}")
    _write(model, None, record, out)


def _write(model: Any, tokenizer: Any | None, record: Json, out: Path, kept: KeptIds | None = None) -> None:
    with atomic_folder(out) as temp:
        save_model(model, tokenizer, temp)
        if kept is not None:
            kept.write(temp)
        write_text_atomic(temp / RECORD, json.dumps(record, indent=2) + "\n")


def prune(model: Any, asked: PruneConfig, calibrate: Calibrate | None) -> Json:
    """Cuts a model in place, layers first, and returns what was kept. Raises ConfigError, DataError."""
    from student_train.model.importance import least_needed_layers, scores_by_activations, scores_by_weights
    from student_train.model.narrow import layout_of, narrow, planned_sizes

    if asked.needs_chains and calibrate is None:
        ranked = "rank_layers: importance" if asked.rank_layers == "importance" else "rank_width: activations"
        raise ConfigError(f"{ranked} runs cached chains: pass a CONFIG with data")
    num_teacher = int(model.config.to_dict().get("num_hidden_layers", 0))
    calibration = calibrate() if calibrate is not None and asked.needs_chains else None
    is_wide = bool(set(asked.axes) - {"layers"}) or asked.parameters is not None
    layout, before = layout_of(model) if is_wide else (None, None)
    # Before any layer is cut: ratios and limits are those of the whole model.
    planned = None if layout is None or before is None else planned_sizes(layout, before, asked)
    layers: int | list[int] = asked.layers if asked.layers is not None else num_teacher
    if planned is not None and not isinstance(layers, list):
        layers = planned.layers
    course: list[float] | None = None
    if asked.rank_layers == "importance":
        assert calibration is not None
        require_layers(model)
        # Checks the number of layers, too.
        kept = kept_layers(num_teacher, layers)
        if len(kept) < num_teacher:
            removed, course = least_needed_layers(model, calibration, len(kept))
            kept = [number for number in range(num_teacher) if number not in removed]
        keep_layers(model, kept)
    else:
        kept = keep_layers(model, layers)
    if layout is not None and planned is not None and before is not None:
        scores = (
            scores_by_weights(model, layout)
            if calibration is None or asked.rank_width == "weights"
            else scores_by_activations(model, layout, calibration)
        )
        narrow(model, layout, _chosen(scores, before, planned))
    return {
        "asked": {key: value for key, value in asked.model_dump(mode="json").items() if key in ASKED_KEYS},
        "num_layers": len(kept),
        "teacher_layers": num_teacher,
        "kept_layers": kept,
        "kl_by_removal": course,
        "sizes": None if planned is None else {axis: planned.of(axis) for axis in PRUNED_AXES},
        "sizes_before": None if before is None else {axis: before.of(axis) for axis in PRUNED_AXES},
        "calibration_tokens": None if calibration is None else calibration.num_tokens,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _chosen(scores: "WidthScores", before: "Sizes", planned: "Sizes") -> "Kept":
    from student_train.model.importance import best_of
    from student_train.model.narrow import Kept

    def cuts(axis: "Axis") -> bool:
        return planned.of(axis) < before.of(axis)

    hidden = best_of(scores.hidden, planned.hidden_size)
    return Kept(
        mlp=[best_of(one, planned.mlp_channels) for one in scores.mlp] if cuts("mlp_channels") else None,
        groups=[best_of(one, planned.kv_groups) for one in scores.groups] if cuts("kv_groups") else None,
        hidden=hidden if cuts("hidden_size") else None,
        norm_scales=scores.norm_scales(hidden),
    )


def held_words(record: Json) -> str:
    """What a record says was kept: `layers [0, 2], mlp_channels 48`."""
    sizes, before = record.get("sizes") or {}, record.get("sizes_before") or {}
    cut = [f"{axis} {sizes[axis]}" for axis in PRUNED_AXES[1:] if sizes.get(axis) != before.get(axis)]
    return ", ".join([f"layers {record['kept_layers']}", *cut])


def require_cut(student: StudentConfig) -> None:
    """Raises ConfigError if the student's folder does not match `student.init`."""
    if student.init is None:
        return
    folder, asked = Path(student.model), student.init
    if not folder.exists():
        raise ConfigError(
            f"student.model: {folder} does not exist yet: create it with `student-train init` and this file"
        )
    if not (folder / RECORD).exists():
        return
    record: Json = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    different = difference(record, asked)
    if record["teacher"] != asked.teacher or different is not None:
        raise ConfigError(
            f"student.init asks for {different or cut_words(asked)} of {asked.teacher}, but {folder} holds "
            f"{held_words(record)} of {record['teacher']}: choose another student.model, or remove the folder and run "
            "`student-train init`"
        )


def difference(record: Json, asked: PruneConfig) -> str | None:
    """What is asked for and not recorded, in words. Equal layers are the same cut however they were named."""
    wanted = {key: value for key, value in asked.model_dump(mode="json").items() if key in ASKED_KEYS}
    # Folders written before there was anything but layers to cut.
    held = record.get("asked") or {**PruneConfig(layers=1).model_dump(mode="json"), "layers": record["kept_layers"]}
    others = [key for key in ASKED_KEYS if key != "layers" and wanted[key] != held[key]]
    if isinstance(asked, InitConfig) and asked.vocabulary != record.get("vocabulary"):
        return f"vocabulary={asked.vocabulary}"
    if others:
        return ", ".join(f"{key}={wanted[key]}" for key in others)
    if asked.layers is None or asked.rank_layers == "importance":
        return None if wanted["layers"] == held["layers"] else cut_words(asked)
    return None if record["kept_layers"] == kept_layers(record["teacher_layers"], asked.layers) else cut_words(asked)


def cut_words(asked: PruneConfig) -> str:
    """What a configuration asks for: `layers 12 evenly spaced, mlp_channels 768`."""
    words = []
    if asked.layers is not None:
        how = "by importance" if asked.rank_layers == "importance" else "evenly spaced"
        words.append(f"layers {asked.layers}" if isinstance(asked.layers, list) else f"layers {asked.layers} {how}")
    words += [f"{axis} {number}" for axis in PRUNED_AXES[1:] if (number := asked.number_of(axis)) is not None]
    if asked.parameters is not None:
        size = f"{asked.parameters:.0%}" if asked.parameters < 1 else f"{asked.parameters:,.0f}"
        words.append(f"{size} of the parameters along {', '.join(asked.along_axes)}")
    if isinstance(asked, InitConfig) and asked.vocabulary is not None:
        words.append(f"the {asked.vocabulary} ids")
    return ", ".join(words)


def require_layers(model: Any) -> None:
    """Raises ConfigError if the decoder has no list of layers."""
    import torch

    modules = dict(model.get_decoder().named_children()).get("layers")
    num_layers = model.config.to_dict().get("num_hidden_layers")
    if not isinstance(modules, torch.nn.ModuleList) or len(modules) != num_layers:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut: init needs a decoder with model.layers (Llama, Qwen2, Qwen3, ...)"
        )


def keep_layers(model: Any, layers: int | list[int]) -> list[int]:
    """Cuts a decoder in place, per-layer settings included, and returns the numbers of the layers kept.

    Raises ConfigError if the decoder has no list of layers.
    """
    import torch

    require_layers(model)
    decoder, config = model.get_decoder(), model.config
    num_teacher = len(decoder.layers)
    kept = kept_layers(num_teacher, layers)
    decoder.layers = torch.nn.ModuleList([decoder.layers[number] for number in kept])
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_teacher:
            # Lists as long as the model are settings per layer (layer_types): the kept layers keep theirs.
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    return kept
