"""`engine.vllm` and `sampling.vllm` as vLLM's own types see them, before weights are loaded."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams

from stillroom.config import nearest_name
from stillroom.errors import ConfigError

PROMPT_DRAFTS = ("ngram", "ngram_gpu", "suffix")
"""Methods of speculation without a draft model."""


def typed(block: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values as vLLM's types: a mapping becomes a ReasoningConfig where one is wanted.

    Raises ConfigError for a value, or a key in a mapping, that the type does not take.
    """
    if block == "engine":
        types = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    else:
        types = typing.get_type_hints(SamplingParams, include_extras=True)
    return {name: _typed(f"{block}.vllm.{name}", types[name], value) for name, value in given.items()}


def _typed(key: str, wanted: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            for known in _mappings(wanted):
                # vLLM ignores unknown keys of some of its classes: the setting would be off without a word.
                if name not in known:
                    raise ConfigError(f"{key}: unknown key {name!r}{nearest_name(str(name), known, 'known keys are')}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(wanted)
    except PydanticUserError:
        # Types like torch.dtype: vLLM judges the value itself.
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        rules = dict.fromkeys(one["msg"].replace("Input should be", "must be", 1) for one in error.errors())
        raise ConfigError(f"{key}: {' or '.join(rules)} (got {value!r})") from error


def _mappings(wanted: Any) -> Iterator[Sequence[str]]:
    """The keys of each class with fields that a type allows; none where it allows any mapping."""
    for one in typing.get_args(wanted) or (wanted,):
        if dataclasses.is_dataclass(one):
            yield [field.name for field in dataclasses.fields(one) if field.init and not field.name.startswith("_")]


def cpu_problem(engine: Mapping[str, Any], *, scores: bool, is_random: bool) -> str | None:
    """Why these arguments cannot be used on a CPU, or None."""
    if not scores and engine.get("enable_chunked_prefill"):
        return "enable_chunked_prefill: on a CPU, vLLM cannot give chains their own seeds while it splits prompts"
    method = (engine.get("speculative_config") or {}).get("method") or engine.get("spec_method")
    if method in PROMPT_DRAFTS and is_random:
        return f"{method} speculation ignores the temperature on a CPU: use temperature: 0, or a GPU"
    return None
