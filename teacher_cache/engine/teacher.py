"""Who the teacher is: its tokenizer and the record of its fingerprints, known without loading the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError, naming
from stillroom.models import (
    fingerprint_served,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprint_weights,
    has_weights,
    load_tokenizer,
    vocab_size_of,
)
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import stable_hash
from teacher_cache.config import EmbeddedConfig, EngineConfig, ServerConfig, TeacherConfig


@dataclass(frozen=True, slots=True)
class IdentifiedTeacher:
    """`tokenizer` is a transformers tokenizer; `record.revision` the commit to load, None for a folder."""

    record: Teacher
    tokenizer: Any


@naming("teacher.model")
def identify_teacher(config: TeacherConfig, engine: EngineConfig = EmbeddedConfig()) -> IdentifiedTeacher:  # noqa: B008
    """Raises DataError where the folder or hub id lacks a tokenizer or config.json, or weights to be loaded here.

    With a server the weights are elsewhere. Where the folder holds them all the same, or the hub has the model, the
    identity is the same as for the embedded engine, so that one cache may be filled by both; else the name under which
    the model is served stands in for the weights.
    """
    weights, revision = _weights(config, engine)
    tokenizer = load_tokenizer(config.model, revision, config.trust_remote_code)
    tokenizer_fingerprint = fingerprint_tokenizer(tokenizer)
    template = fingerprint_template(tokenizer)
    record = Teacher(
        model=config.model,
        revision=revision,
        fingerprint=stable_hash("teacher", weights, tokenizer_fingerprint, template),
        weights_fingerprint=weights,
        tokenizer_fingerprint=tokenizer_fingerprint,
        template_fingerprint=template,
        vocab_size=vocab_size_of(config.model, revision, config.trust_remote_code),
    )
    return IdentifiedTeacher(record, tokenizer)


def _weights(config: TeacherConfig, engine: EngineConfig) -> tuple[str, str | None]:
    folder = Path(config.model)
    if not isinstance(engine, ServerConfig) or not folder.is_dir() or has_weights(folder):
        return fingerprint_weights(config.model, config.revision)
    if engine.model is None:
        raise ConfigError(
            f"{config.model} holds no weights: set engine.model, the name under which they are served, to tell this "
            "teacher from others"
        )
    return fingerprint_served(folder, engine.model), None
