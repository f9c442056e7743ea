"""Who the teacher is: its tokenizer and the record of its fingerprints, known without loading the model."""

from dataclasses import dataclass
from typing import Any

from schemas.manifest import Teacher
from schemas.records import stable_hash
from shared.tokens import fingerprint_template, fingerprint_tokenizer, load_tokenizer, vocab_size_of
from shared.weights import fingerprint_weights
from teacher_cache.config import TeacherConfig


@dataclass(frozen=True, slots=True)
class IdentifiedTeacher:
    """`tokenizer` is a transformers tokenizer; `record.revision` the commit to load, None for a folder."""

    record: Teacher
    tokenizer: Any


def identify_teacher(config: TeacherConfig) -> IdentifiedTeacher:
    """Raises DataError where the folder or hub id lacks a tokenizer, config.json or weights."""
    weights, revision = fingerprint_weights(config.model, config.revision)
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
