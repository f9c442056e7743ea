"""What a build and an engine exchange: requests go in, finished chains and failures come out.

An engine answers every Request with a Finished or a Failure, in the order in which chains end. EmbeddedEngine (vllm)
runs vLLM in this process, ServerEngine (http/server) talks to vLLM over HTTP, FakeEngine (fake) makes chains up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stillroom.schema.records import Capture, Prompt, stable_hash

FINISH_REASONS = ("stop", "length", "repetition")
"""How a generated chain that is kept may end. vLLM ends one that loops with `repetition`, where it was asked to."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that gets no chain: one row of the failures table. `message` is one line for a person.

    Reasons: malformed, chat_template (before there is a request); empty_prompt, empty_completion, too_long, vocabulary,
    refused (by the engine, before it starts); engine_error (while it generates); not_finite (the model's logprobs hold
    NaN); personal_data (found in a finished chain, or in token ids to score).
    """

    sample_id: str
    prompt_id: str
    source: str
    sample_index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """A tokenised prompt with everything that determines its chain.

    `sampling` holds temperature, top_p, top_k (None is off), min_p, repetition_penalty and max_tokens; missing keys
    take their neutral value. `max_tokens` limits the completion. `sample_id` identifies the row to be written.

    If `completion_token_ids` is given, those tokens are scored, nothing is generated, and `seed` is None.
    """

    prompt: Prompt
    prompt_token_ids: Sequence[int]
    sample_index: int
    seed: int | None
    sampling: Mapping[str, Any]
    max_tokens: int
    sample_id: str
    completion_token_ids: Sequence[int] | None = None

    def failure(self, reason: str, message: str) -> Failure:
        """The failure that this request ends in."""
        return Failure(self.sample_id, self.prompt.prompt_id, self.prompt.source, self.sample_index, reason, message)


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion and the teacher's distributions. `finish_reason` is one of FINISH_REASONS, or `scored`."""

    request: Request
    capture: Capture
    finish_reason: str

    @property
    def sample_id(self) -> str:
        """The request's; a Failure has one too."""
        return self.request.sample_id


Outcome = Finished | Failure


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a started engine. `entropy` is `exact` or `support`, as in the shard header.

    `vocab_size` is the width of the logits; `max_model_len` counts prompt and completion tokens; `software` maps
    package names to versions; `settings` holds what was resolved at startup, for the run manifest.
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
        """Completion tokens generated so far, including those of unfinished chains."""

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet answered by `step`."""

    def has_room(self) -> bool:
        """Whether to submit another request before the next step, so that the engine never idles."""

    def submit(self, request: Request) -> None:
        """Accepts a request and raises nothing: an impossible request comes back from `step` as a Failure."""

    def step(self) -> list[Outcome]:
        """Advances generation and returns what ended. Raises StillroomError if the engine itself died."""

    def close(self) -> None:
        """Stops the engine and its processes and drops unfinished requests. May be called twice."""


def seed_of_draws(request: Request) -> int:
    """Seed for the tail draws of a scored chain, which has no seed of its own: equal chains get equal draws."""
    return int(stable_hash("draws", request.sample_id)[:15], 16)


def refusal(request: Request, info: EngineInfo) -> Failure | None:
    """The failure of a request that no engine with this vocabulary and length could serve, else None."""
    ids, completion = request.prompt_token_ids, request.completion_token_ids
    if not ids:
        return request.failure("empty_prompt", "the prompt has no tokens")
    if completion is not None:
        return _unscorable(request, [*ids, *completion], info)
    if len(ids) >= info.max_model_len:
        limit = f"engine.max_model_len={info.max_model_len} leaves no room for a completion"
        return request.failure("too_long", f"the prompt has {len(ids)} tokens: {limit}")
    return _outside(request, ids, info.vocab_size)


def _unscorable(request: Request, ids: Sequence[int], info: EngineInfo) -> Failure | None:
    if not request.completion_token_ids:
        return request.failure("empty_completion", "the completion has no tokens")
    if len(ids) > info.max_model_len:
        limit = f"more than engine.max_model_len={info.max_model_len}"
        return request.failure("too_long", f"prompt and completion have {len(ids)} tokens, {limit}")
    return _outside(request, ids, info.vocab_size)


def _outside(request: Request, ids: Sequence[int], vocab_size: int) -> Failure | None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        return request.failure("vocabulary", f"token {bad} is outside the vocabulary of {vocab_size}")
    return None
