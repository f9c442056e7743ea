"""One chain to be generated, what comes of it, and what the build asks of any engine.

Prompts become Requests; an engine takes them one by one and answers each with a Finished or a Failed, in the order in
which they end. EmbeddedEngine (vllm_engine.engine) is vLLM in this program, ServerEngine (http_engine.server) vLLM over
HTTP; FakeEngine (fake) invents the chains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stillroom.schema.records import Capture, Prompt, stable_hash


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, tokenised, with everything that decides which chain comes back.

    `sampling` holds temperature, top_p, top_k (None is off), min_p, repetition_penalty and max_tokens; what is missing
    takes its neutral value. `max_tokens` is the limit of completion tokens. `sample_id` names the row to be.

    Where `completion_token_ids` is not None nothing is generated: these tokens are scored, and have no seed.
    """

    prompt: Prompt
    prompt_token_ids: Sequence[int]
    sample_index: int
    seed: int | None
    sampling: Mapping[str, Any]
    max_tokens: int
    sample_id: str
    completion_token_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion and the teacher's view of it. `finish_reason` is `stop`, `length` or `scored`."""

    request: Request
    capture: Capture
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that came to nothing. `reason` is a short name to count by, `message` one line for a person.

    Reasons: empty_prompt, empty_completion, too_long, vocabulary, refused (by the engine, before it starts),
    engine_error (while it generates), not_finite (the model's log probabilities hold NaN).
    """

    request: Request
    reason: str
    message: str


Outcome = Finished | Failed


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be. `entropy` is `exact` or `support`, as in the shard's header.

    `vocab_size` is the width of the logits; `max_model_len` counts prompt and completion tokens; `software` maps
    package names to versions, `settings` holds what was resolved while starting, for the run's manifest.
    """

    vocab_size: int
    max_model_len: int
    entropy: str
    software: Mapping[str, str]
    settings: Mapping[str, Any]


class Engine(Protocol):
    """Generates chains. Not thread-safe: one thread submits and steps."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""

    @property
    def num_tokens(self) -> int:
        """Completion tokens generated so far, those of unfinished chains included."""

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet answered by `step`."""

    def has_room(self) -> bool:
        """Whether another request should be submitted before the next step, so that the engine never idles."""

    def submit(self, request: Request) -> None:
        """Takes a request. One that cannot be generated is answered by `step` with Failed; nothing is raised."""

    def step(self) -> list[Outcome]:
        """Generates a little and returns what ended. Raises StillroomError when the engine itself has died."""

    def close(self) -> None:
        """Stops the engine and its processes; unfinished requests are dropped. May be called twice."""


def seed_of_draws(request: Request) -> int:
    """Of the draws from the tails of tokens that are given, and so have no seed: the same chain has the same ones."""
    return int(stable_hash("draws", request.sample_id)[:15], 16)


def refusal(request: Request, info: EngineInfo) -> Failed | None:
    """Why no engine could generate or score this request, or None."""
    ids, completion = request.prompt_token_ids, request.completion_token_ids
    if not ids:
        return Failed(request, "empty_prompt", "the prompt has no tokens")
    if completion is not None:
        return _unscorable(request, [*ids, *completion], info)
    if len(ids) >= info.max_model_len:
        limit = f"engine.max_model_len={info.max_model_len} leaves no room for a completion"
        return Failed(request, "too_long", f"the prompt has {len(ids)} tokens: {limit}")
    return _outside(request, ids, info.vocab_size)


def _unscorable(request: Request, ids: Sequence[int], info: EngineInfo) -> Failed | None:
    if not request.completion_token_ids:
        return Failed(request, "empty_completion", "the completion has no tokens")
    if len(ids) > info.max_model_len:
        limit = f"more than engine.max_model_len={info.max_model_len}"
        return Failed(request, "too_long", f"prompt and completion have {len(ids)} tokens, {limit}")
    return _outside(request, ids, info.vocab_size)


def _outside(request: Request, ids: Sequence[int], vocab_size: int) -> Failed | None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        return Failed(request, "vocabulary", f"token {bad} is outside the vocabulary of {vocab_size}")
    return None
