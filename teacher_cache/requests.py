"""One chain to be generated: what the prompts side hands to an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.records import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, tokenised, with everything that decides which chain comes back.

    `sampling` holds temperature, top_p, top_k (None is off), min_p, repetition_penalty and max_tokens; what is missing
    takes its neutral value. `max_tokens` is the limit of completion tokens. `sample_id` names the row to be.
    """

    prompt: Prompt
    prompt_token_ids: Sequence[int]
    sample_index: int
    seed: int
    sampling: Mapping[str, Any]
    max_tokens: int
    sample_id: str
