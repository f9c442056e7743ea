"""YAML files and `--set a.b=c` overrides to validated, frozen models. Mistakes become one ConfigError line.

Environment variables and `~` in values are not expanded, so an experiment means the same on every machine.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from stillroom.errors import ConfigError, one_line

Json = dict[str, Any]

SECRETS = {
    "an address with a password": re.compile(r"[a-z][a-z0-9+.\-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE),
    "an address with a token": re.compile(r"https?://[^/\s:@]+@", re.IGNORECASE),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_\-]{20,}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
}
"""Must not be in a configuration: it is copied into manifests, run folders, reports and model cards."""

_PLAIN_KINDS = ("float", "int", "str", "bool")
_KIND = re.compile(rf"^({'|'.join(_PLAIN_KINDS)}|function-.*|[A-Z]\w*Config)$")
"""Parts of pydantic's error locations that are names of types, not keys."""

_PATTERN_WORDS = {
    r"^[A-Za-z0-9_]+$": "must be letters, digits and underscores",
    r"^[A-Za-z0-9_\-]+$": "must be letters, digits, underscores and hyphens",
    r"^[A-Za-z0-9_.\-]+$": "must be letters, digits, underscores, dots and hyphens",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "must be letters, digits and underscores, no digit first",
}
"""The patterns of names in words."""


class StrictModel(BaseModel):
    """Base of every configuration block: frozen; unknown keys are refused with the nearest known name."""

    # Namespaces: pydantic reserves names that begin with `model_`, which are ordinary words here.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        # pydantic's own refusal of extra keys has no suggestion.
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    hint = nearest_name(str(key), list(cls.model_fields), "known keys are")
                    owner = cls._block_with(key)
                    raise ValueError(f"unknown key {key!r}{hint if owner is None else f': it belongs in {owner}'}")
        return data

    @classmethod
    def _block_with(cls, key: Any) -> str | None:
        """The block of this one that has the key, such as `sampling` for `samples`."""
        for name, field in cls.model_fields.items():
            # The annotation itself, or what a list or an optional block is of.
            for block in (field.annotation, *get_args(field.annotation)):
                # Blocks of blocks are not searched: a key so far away is more likely a typo.
                if isinstance(block, type) and issubclass(block, StrictModel) and key in block.model_fields:
                    return name
        return None

    def updated(self, **changes: Any) -> Self:
        """A validated copy with some fields replaced."""
        return type(self).model_validate({**self.model_dump(), **changes})


Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys in a mapping: YAML forbids them, PyYAML silently takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        scalars = [key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)]
        for key in scalars:
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"key {name!r} appears twice, in lines {lines[name]} and {line}: keep one")
            lines[name] = line
        return mapping


def load_config(path: Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Reads `path`, applies `a.b=c` overrides (values parsed as YAML) and validates.

    Raises ConfigError naming the file, the key, the value and the rule.
    """
    # Before validation, so that an override may also supply what the file lacks.
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    return validate_config(data, model, str(path))


def read_yaml(path: Path) -> Json:
    """The mapping in a YAML file. Raises ConfigError if it is missing, not YAML, or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: use a YAML configuration file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder: use a YAML configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error)}") from error
    # An empty file: the model then names what is required.
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a {type(data).__name__}, but a configuration must be a mapping of keys to values"
        )
    return data


def apply_override(data: Json, override: str) -> None:
    """Sets one dotted key in place; list items are numbered (`stages.0.epochs=2`)."""
    # The first =, because SQL conditions hold further ones.
    dotted, equals, raw = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override!r} is not of the form key=value, for example sampling.temperature=0.6")
    try:
        value = yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {_yaml_problem(error)}") from error
    *parents, last = dotted.split(".")
    node: Any = data
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parents)} holds a plain value without keys")


def validate_config(data: Mapping[str, Any], model: type[Model], where: str) -> Model:
    """Validates `data`. Raises ConfigError with the first problems and the number of others."""
    # Refused on reading: masking them on writing would have to be remembered everywhere.
    for key, text in _texts(data):
        for name, pattern in SECRETS.items():
            if pattern.search(text):
                raise ConfigError(
                    f"{where}: {key} holds {name}, and a configuration is copied into manifests and reports: move it "
                    "to the environment (HF_TOKEN, AWS_..., engine.api_key_env, ~/.netrc)"
                )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = _of_the_meant_kind(error.errors())
        text = "; ".join(_problem(one, data) for one in problems[:3])
        # One mistake often makes several: the first lines name its cause.
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(f"{where}: {text}{more}") from error


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of all strings inside."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _texts(one, f"{key}.{number}")
    elif isinstance(value, str | Path):
        yield key, str(value)


def _yaml_problem(error: Exception) -> str:
    """The problem and its place, without the excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return one_line(error)


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override!r}: the part before {part!r} holds a plain value without keys")
    # `--set eval.where=...` makes the block that the file left out or set to null.
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override!r}: {part!r} is not an item of a list of {len(node)} (numbered from 0)")
    return int(part)


def _problem(error: Any, data: Mapping[str, Any]) -> str:
    key = _dotted(error, data)
    named = f"{key}: " if key else ""
    message = _rule(error)
    if error["type"] == "union_tag_invalid":
        # pydantic's message lists the kinds without saying which one is near.
        context = error["ctx"]
        tag, name = context["tag"], context["discriminator"].strip("'")
        known = context["expected_tags"].replace("'", "").split(", ")
        return f"{named}{name} {tag!r} is unknown{nearest_name(tag, known, 'choose one of')}"
    given = error.get("input")
    plain = given is None or isinstance(given, (str, int, float, bool))
    is_said = error["type"] == "missing" or repr(given) in message
    shown = f" (got {'null' if given is None else repr(given)})" if plain and not is_said else ""
    return f"{named}{message[0].lower()}{message[1:]}{shown}"


def _dotted(error: Any, data: Any) -> str:
    """The key as written in the file: pydantic's location also contains names of types, which the file does not."""
    parts: list[str] = []
    node, num_left = data, len(error["loc"])
    for part in error["loc"]:
        num_left -= 1
        is_absent_key = error["type"] == "missing" and not num_left
        is_there = part in node if isinstance(node, Mapping) else isinstance(node, list | tuple)
        if _KIND.match(str(part)) or not (is_there or is_absent_key):
            continue
        parts.append(str(part))
        node = node[part] if is_there else None
    return ".".join(parts)


def _of_the_meant_kind(problems: Sequence[Any]) -> Sequence[Any]:
    """If a key takes a number or a mapping, keeps the problems of the kind that was given."""

    def is_meant(problem: Any) -> bool:
        kind = str(problem["loc"][-1]) if problem["loc"] else ""
        return not _KIND.match(kind) or isinstance(problem["input"], Mapping) == (kind not in _PLAIN_KINDS)

    return [one for one in problems if is_meant(one)] or problems


def _rule(error: Any) -> str:
    """The broken rule in terms of YAML instead of Python."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "must be a mapping of keys to values"
    if kind == "list_type":
        return "must be a list, for example [a, b]"
    if kind == "too_short" and not context["actual_length"]:
        return "is empty: it needs at least 1 item"
    if kind == "string_pattern_mismatch" and context["pattern"] in _PATTERN_WORDS:
        return _PATTERN_WORDS[context["pattern"]]
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be", 1)
    # What follows is about pydantic's parser.
    return message.partition(", unable to ")[0]


def nearest_name(name: str, known: Sequence[str], intro: str = "there are") -> str:
    """`: did you mean 'x'?` or the list of known names after `intro`, to end a refusal with."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": {intro} {', '.join(sorted(known)) or 'none'}"


def plain(model: BaseModel) -> Json:
    """The model as JSON-ready values, for manifests and hashes."""
    dumped: Json = model.model_dump(mode="json")
    return dumped


def flat(value: Any, prefix: str = "") -> Json:
    """Dotted keys and values of everything inside; items of lists by number."""
    # An empty mapping or list is a value of its own, and would otherwise vanish.
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = ((str(number), item) for number, item in enumerate(value))  # type: ignore[assignment]
    else:
        return {prefix: value}
    return {key: one for name, item in items for key, one in flat(item, f"{prefix}.{name}".lstrip(".")).items()}
