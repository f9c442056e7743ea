"""Cuts a student from a teacher by depth: evenly spaced layers, or those that the configuration lists.

In: a Hugging Face decoder. Out: a Hugging Face folder with fewer layers and otherwise the same weights. Such a student
starts far closer to the teacher than random weights (DistilBERT, arXiv 1910.01108; Minitron, 2407.14679).
"""

import json
from pathlib import Path
from typing import Any

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import note
from stillroom.models import fingerprint_weights, load_tokenizer
from stillroom.storage.paths import write_text_atomic
from student_train.config import StudentConfig
from student_train.model.folder import atomic_folder, refuse_existing, save_model

RECORD = "init.json"


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


def init_student(teacher: str, layers: int | list[int], out: Path) -> Json:
    """Writes the student's folder and returns its record; reuses a folder that the same call wrote before.

    Raises ConfigError if `out` holds something else or the teacher has no list of decoder layers, DataError if the
    teacher cannot be loaded.
    """
    from student_train.model.student import load_causal

    fingerprint, revision = fingerprint_weights(teacher)
    asked = {"teacher": teacher, "teacher_weights_fingerprint": fingerprint}
    if (out / RECORD).exists():
        record: Json = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if {key: record.get(key) for key in asked} == asked and _is_cut_to(record, layers):
            note(f"{out} already holds this student: reusing it")
            return record
    refuse_existing(out)
    model = load_causal(teacher, StudentConfig(model=teacher), None)
    config = model.config.to_dict()
    kept = keep_layers(model, layers)
    record = {
        **asked,
        "num_layers": len(kept),
        "teacher_revision": revision,
        "teacher_layers": int(config["num_hidden_layers"]),
        "kept_layers": kept,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "folder": str(out),
    }
    with atomic_folder(out) as temp:
        save_model(model, load_tokenizer(teacher), temp)
        write_text_atomic(temp / RECORD, json.dumps(record, indent=2) + "\n")
    return record


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
    if record["teacher"] != asked.teacher or not _is_cut_to(record, asked.layers):
        wanted = asked.layers if isinstance(asked.layers, list) else f"{asked.layers} evenly spaced"
        raise ConfigError(
            f"student.init asks for layers {wanted} of {asked.teacher}, but {folder} holds layers "
            f"{record['kept_layers']} of {record['teacher']}: choose another student.model, or remove the folder and "
            "run `student-train init`"
        )


def _is_cut_to(record: Json, layers: int | list[int]) -> bool:
    return bool(record["kept_layers"] == kept_layers(record["teacher_layers"], layers))


def keep_layers(model: Any, layers: int | list[int]) -> list[int]:
    """Cuts a decoder in place, per-layer settings included, and returns the numbers of the layers kept.

    Raises ConfigError if the decoder has no list of layers.
    """
    import torch

    decoder = model.get_decoder()
    config = model.config
    num_teacher = config.to_dict().get("num_hidden_layers")
    modules = dict(decoder.named_children()).get("layers")
    if not isinstance(modules, torch.nn.ModuleList) or len(modules) != num_teacher:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut: init needs a decoder with model.layers (Llama, Qwen2, Qwen3, ...)"
        )
    kept = kept_layers(num_teacher, layers)
    decoder.layers = torch.nn.ModuleList([modules[number] for number in kept])
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_teacher:
            # Lists as long as the model are settings per layer (layer_types): the kept layers keep theirs.
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    return kept
