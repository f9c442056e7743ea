"""Identifies the teacher without loading the model: its tokenizer, and fingerprints of weights and template."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from stillroom.cache.tensors import read_header
from stillroom.config import nearest_name
from stillroom.errors import ConfigError, CorruptError, DataError, naming
from stillroom.models import (
    fingerprint_served,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprint_weights,
    has_weights,
    load_tokenizer,
    resolve_revision,
    vocab_size_of,
)
from stillroom.schema.manifest import Teacher
from stillroom.schema.records import stable_hash
from teacher_cache.config import EmbeddedConfig, EngineConfig, OpenAIConfig, ServerConfig, TeacherConfig
from teacher_cache.engine.adapter import identify_adapter

SET_HERE = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
"""What apply_chat_template takes besides variables of the template."""
OF_TRANSFORMERS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Tags that only transformers' own templates know."""


@dataclass(frozen=True, slots=True)
class IdentifiedTeacher:
    """`tokenizer` is a transformers tokenizer; `record.revision` is the commit to load, None for a folder."""

    record: Teacher
    tokenizer: Any


def identify_teacher(config: TeacherConfig, engine: EngineConfig = EmbeddedConfig()) -> IdentifiedTeacher:  # noqa: B008
    """Raises DataError if the folder or hub id lacks a tokenizer, config.json, or weights that are loaded here;
    ConfigError for arguments that the chat template does not mention, or an adapter that does not fit.

    With a server engine the weights may be elsewhere. If they are in the folder or on the hub all the same, the
    identity is that of the embedded engine, so that both may fill one cache; otherwise the name under which the model
    is served replaces the weights.
    """
    with naming("teacher.model"):
        weights, revision = _weights(config, engine)
        # At the resolved commit, as all that follows: a branch that moves meanwhile would mix two models.
        tokenizer = load_tokenizer(config.model, revision, config.trust_remote_code)
        vocab_size = vocab_size_of(config.model, revision, config.trust_remote_code)
    check_template_kwargs(str(tokenizer.chat_template or ""), config.chat_template_kwargs)
    tokenizer_fingerprint = fingerprint_tokenizer(tokenizer)
    template = fingerprint_template(tokenizer)
    adapter = None if config.adapter is None else identify_adapter(config.adapter, config.model, tokenizer)
    # Nothing in its place where there is none: teachers without one keep their fingerprints.
    adapters = [] if adapter is None else [adapter]
    record = Teacher(
        model=config.model,
        revision=revision,
        fingerprint=stable_hash("teacher", weights, tokenizer_fingerprint, template, *adapters),
        weights_fingerprint=weights,
        tokenizer_fingerprint=tokenizer_fingerprint,
        template_fingerprint=template,
        vocab_size=vocab_size,
        adapter=config.adapter,
        adapter_fingerprint=adapter,
    )
    return IdentifiedTeacher(record, tokenizer)


def require_whole_weights(model: str) -> None:
    """Raises DataError for a file in a folder that is damaged or cut short, which those who load the model do not
    name.
    """
    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            read_header(path)
        except CorruptError as error:
            raise DataError(f"{path} is damaged or cut short: copy it again") from error


def check_template_kwargs(template: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is not a variable of the chat template, which would ignore it."""
    wanted = set(names)
    if not wanted:
        return
    key = "teacher.chat_template_kwargs"
    if set_here := sorted(wanted & {*SET_HERE}):
        raise ConfigError(f"{key}.{set_here[0]} is set by teacher-cache: remove it")
    try:
        known = meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(OF_TRANSFORMERS.sub("", template))
        )
    except TemplateError as error:
        raise ConfigError(f"{key}: the chat template cannot be parsed: {error}") from error
    for name in sorted(wanted - known):
        hint = nearest_name(name, sorted(known - {*SET_HERE}), "its variables are")
        raise ConfigError(f"{key}.{name} has no effect: the chat template does not mention it{hint}")


def _weights(config: TeacherConfig, engine: EngineConfig) -> tuple[str, str | None]:
    folder = Path(config.model)
    if isinstance(engine, OpenAIConfig):
        # What an API runs cannot be compared with weights that lie here.
        name = f"openai {engine.model}"
        if folder.is_dir():
            return fingerprint_served(folder, name), None
        return stable_hash("served", config.model, name), resolve_revision(config.model, config.revision)
    if not isinstance(engine, ServerConfig) or not folder.is_dir() or has_weights(folder):
        return fingerprint_weights(config.model, config.revision)
    if engine.model is None:
        raise ConfigError(
            f"{config.model} holds no weights: set engine.model, the name under which they are served, to identify "
            "this teacher"
        )
    return fingerprint_served(folder, engine.model), None
