"""Generates docs/configuration.md from the configuration models: `python -m tools.config_reference [FILE]`.

In: the pydantic models of both programs, whose docstrings are the text. Out: Markdown, one table per block: key, type,
default, meaning. tests/repository/test_config_reference.py fails if the page in docs/ is out of date.
"""

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillroom.config import StrictModel
from stillroom.rounds.config import RoundsConfig
from student_train.config.run import TrainConfig
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.judging.config import LlmJudgeConfig
from teacher_cache.states.config import FeaturesConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
PROGRAMS: tuple[tuple[str, type[StrictModel]], ...] = (
    ("`teacher-cache plan`, `build`", BuildConfig),
    ("`teacher-cache plan`, `score`", ScoreConfig),
    ("`teacher-cache plan`, `features`", FeaturesConfig),
    ("`teacher-cache judge --llm`", LlmJudgeConfig),
    ("`student-train`", TrainConfig),
    ("`teacher-cache rounds`, `student-train rounds`", RoundsConfig),
)
HEAD = """\
# Configuration

Every configuration key, generated from the models that read them (`python -m tools.config_reference`). A file is
YAML. Unknown keys and settings without effect are errors. `--set a.b=c` overrides a key (`--set sampling.samples=4`,
list items by number: `--set stages.0.epochs=2`) and can be repeated. Relative paths start at the current directory,
not at the file. Environment variables and `~` are not expanded, so that a configuration means the same on every
machine. Passwords and tokens are refused, because configurations are copied into manifests and reports.

**Required** keys have no default; `null` turns a setting off unless the text says otherwise.
"""
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
SIZES = {"min_length": "at least {} items", "max_length": "at most {} items"}


def main() -> None:
    """Writes the page."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    out.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole page."""
    parts, seen = [HEAD], set[type[BaseModel]]()
    for commands, root in PROGRAMS:
        parts.append(f"## {commands}\n")
        for path, model in _blocks(root):
            # A block of several programs is described once; a root always has its section.
            if path and model in seen:
                continue
            seen.add(model)
            parts.append(_section(path, model))
    return "\n".join(parts)


def fields_without_text() -> list[str]:
    """`Model.field` of every key whose docstring is missing and whose value is not a block of its own."""
    return [
        f"{model.__name__}.{name}"
        for _, root in PROGRAMS
        for _, model in _blocks(root)
        for name, field in model.model_fields.items()
        # The only value of `kind` is in its type.
        if not field.description and name != "kind" and not _models(field.annotation)
    ]


def _section(path: str, model: type[BaseModel]) -> str:
    title = f"### `{path}`\n\n" if path else ""
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    about = _one_line(model.__doc__ or "")
    return "\n".join([f"{title}{about}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    text = _one_line(field.description or "")
    if not text:
        models = _models(field.annotation)
        text = _one_line(models[0].__doc__ or "") if len(models) == 1 else ""
    return f"| `{name}` | {_type(field)} | {_default(field)} | {text} |"


def _blocks(root: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Path and model of the root and of every block below it, in the order of the keys."""
    yield path, root
    for name, field in root.model_fields.items():
        models = _models(field.annotation)
        for model in models:
            kind = model.model_fields.get("kind")
            suffix = "[]" if _origin_is(field.annotation, list) else "{}" if _origin_is(field.annotation, dict) else ""
            tag = f" (kind: {typing.get_args(kind.annotation)[0]})" if kind is not None and len(models) > 1 else ""
            yield from _blocks(model, f"{path}.{name}{suffix}{tag}".lstrip("."))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Models anywhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _origin_is(annotation: Any, kind: type) -> bool:
    return typing.get_origin(annotation) is kind or any(
        _origin_is(part, kind) for part in typing.get_args(annotation) if typing.get_origin(annotation) is not Literal
    )


def _type(field: FieldInfo) -> str:
    rules = []
    for rule in field.metadata:
        for names in (BOUNDS, SIZES):
            rules += [words.format(_number(getattr(rule, name))) for name, words in names.items() if name in dir(rule)]
    return ", ".join([_type_words(field.annotation), *rules])


def _type_words(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_words(parts[0])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_words(part) for part in parts))
    if origin is list:
        return f"list of {_type_words(parts[0])}"
    if origin is dict:
        # Any as value: whatever another library understands, such as options of vLLM.
        keys = "numbers" if parts[0] is int else "names"
        return "mapping" if parts[1] is Any else f"mapping of {keys} to {_type_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    words = {type(None): "null", str: "text", int: "whole number", float: "number", bool: "true or false"}
    return words.get(annotation, "path")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    # A block's defaults are in its own table.
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict):
        shown = {name: one.model_dump(exclude_defaults=True) if isinstance(one, BaseModel) else one
                 for name, one in value.items()}  # fmt: skip
        return f"`{shown}`".replace("'", "")
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value]}`" if value is None or isinstance(value, bool) else f"`{_number(value)}`"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("|", "\\|")


if __name__ == "__main__":
    main()
