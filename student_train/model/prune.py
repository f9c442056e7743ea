"""Cuts a student from a teacher by depth: evenly spaced layers, including the first and the last.

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


def kept_layers(num_teacher: int, num_student: int) -> list[int]:
    """Evenly spaced layer numbers, first and last included: 30 layers to 4 keeps 0, 10, 19, 29; to 1 keeps 0."""
    if not 1 <= num_student <= num_teacher:
        raise ConfigError(f"layers={num_student} must lie in 1..{num_teacher}, the layers of the teacher")
    if num_student == 1:
        return [0]
    return [round(number * (num_teacher - 1) / (num_student - 1)) for number in range(num_student)]


def init_student(teacher: str, num_layers: int, out: Path) -> Json:
    """Writes the student's folder and returns its record; reuses a folder that the same call wrote before.

    Raises ConfigError if `out` holds something else or the teacher has no list of decoder layers, DataError if the
    teacher cannot be loaded.
    """
    from student_train.model.student import load_causal

    fingerprint, revision = fingerprint_weights(teacher)
    asked = {"teacher": teacher, "teacher_weights_fingerprint": fingerprint, "num_layers": num_layers}
    if (out / RECORD).exists():
        record: Json = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if {key: record.get(key) for key in asked} == asked:
            note(f"{out} already holds this student: reusing it")
            return record
    refuse_existing(out)
    model = load_causal(teacher, StudentConfig(model=teacher), None)
    config = model.config.to_dict()
    kept = keep_layers(model, num_layers)
    record = {
        **asked,
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
    found, wanted = (record["teacher"], record["num_layers"]), (asked.teacher, asked.layers)
    if found != wanted:
        raise ConfigError(
            f"student.init asks for {wanted[1]} layers of {wanted[0]}, but {folder} holds {found[1]} layers of "
            f"{found[0]}: choose another student.model, or remove the folder and run `student-train init`"
        )


def keep_layers(model: Any, num_layers: int) -> list[int]:
    """Cuts a decoder in place, per-layer settings included, and returns the numbers of the layers kept.

    Raises ConfigError if the decoder has no list of layers.
    """
    import torch

    decoder = model.get_decoder()
    config = model.config
    num_teacher = config.to_dict().get("num_hidden_layers")
    layers = dict(decoder.named_children()).get("layers")
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != num_teacher:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut: init needs a decoder with model.layers (Llama, Qwen2, Qwen3, ...)"
        )
    kept = kept_layers(num_teacher, num_layers)
    decoder.layers = torch.nn.ModuleList([layers[number] for number in kept])
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_teacher:
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    return kept
