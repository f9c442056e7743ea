"""Configuration of `teacher-cache judge --llm FILE`."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from stillroom.config import StrictModel
from stillroom.judging.opinion import PROMPT, prompt_problem
from teacher_cache.config import EmbeddedConfig, api_address, require_no_lora

EMBEDDED_PARAMETERS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "chat_template_kwargs"}
)
"""Parameters of a judge that runs in this process."""


class LlmJudgeConfig(StrictModel):
    """A language model that gives a second opinion on chains that no judge could decide (`judge --llm FILE`)."""

    name: str = Field(default="llm", pattern=r"^[A-Za-z0-9_]+$")
    """Prefix of the judge's name in the verdicts; a hash of model, prompt and parameters is appended."""
    model: str
    """Name under which the endpoint serves the model; without an endpoint a model folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible API, such as https://api.openai.com/v1. None: vLLM in this process."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the endpoint's API key. The key itself is never written to disk."""
    engine: EmbeddedConfig = EmbeddedConfig()
    prompt: str | None = None
    """Prompt with {question}, {reference} and {answer}; the format of a verdict is appended. None asks whether the
    answer's result means the same as the reference."""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 4096})
    """Sampling parameters; with an endpoint any fields of its requests, such as `max_completion_tokens`. Without an
    endpoint max_tokens is required, and chat_template_kwargs may hold arguments of the chat template."""
    max_in_flight: int = Field(default=32, ge=1)
    """Concurrent requests to the endpoint."""
    max_attempts: int = Field(default=8, ge=1)
    """Attempts per question, with increasing pauses, before the command stops; verdicts so far are kept."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Retry a question after this many seconds without receiving any of its reply."""

    @property
    def asked(self) -> str:
        """The prompt, stillroom's own by default."""
        return PROMPT if self.prompt is None else self.prompt

    @field_validator("endpoint")
    @classmethod
    def _base_address(cls, value: str | None) -> str | None:
        return None if value is None else api_address(value)

    @field_validator("prompt")
    @classmethod
    def _usable_prompt(cls, value: str | None) -> str | None:
        if value is not None and (problem := prompt_problem(value)) is not None:
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Self:
        of_endpoint, of_engine = {"api_key_env", "max_in_flight", "max_attempts", "timeout_s"}, {"engine", "revision"}
        # By what was written, not by value: a setting without effect is refused even at its default.
        unused, how = (of_endpoint, "without") if self.endpoint is None else (of_engine, "with an")
        if idle := sorted(unused & self.model_fields_set):
            raise ValueError(f"{idle[0]} has no effect {how} endpoint")
        if taken := sorted({"model", "messages", "stream", "n"} & self.parameters.keys()):
            raise ValueError(f"parameters.{taken[0]} is set by the judge itself: remove it")
        if self.endpoint is None:
            require_no_lora(self.engine)
            if unknown := sorted(self.parameters.keys() - EMBEDDED_PARAMETERS):
                raise ValueError(f"parameters.{unknown[0]} has no effect without endpoint")
            if not isinstance(self.parameters.get("max_tokens"), int):
                raise ValueError("parameters.max_tokens is needed without endpoint")
        return self
