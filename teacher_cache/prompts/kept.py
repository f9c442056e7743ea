"""A prompt that a build uses, with the row that it was made of."""

from dataclasses import dataclass

from stillroom.schema.records import Message, Prompt, prompt_id_of, stable_hash
from teacher_cache.prompts.config import Source
from teacher_cache.prompts.sources import Draft


@dataclass(slots=True)
class KeptPrompt:
    """A distinct prompt, the row that it was made of, and where that is."""

    prompt: Prompt
    where: str
    draft: Draft
    source: Source


def prompt_of(draft: Draft, source: str, system: str | None, instruction: str | None, heldout_frac: float) -> Prompt:
    """The draft with its system message and instruction, and the split that its hash decides."""
    messages = list(draft.messages)
    if system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system))
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if instruction is not None and last_user is not None:
        messages[last_user] = Message("user", f"{messages[last_user].content}\n\n{instruction}")
    prompt_id = prompt_id_of(messages)
    # By hash, a prompt's split never depends on what else is in the configuration.
    split = "heldout" if uniform_64("split", prompt_id) < heldout_frac * 2.0**64 else "train"
    return Prompt(prompt_id, tuple(messages), source, split, draft.reference, draft.metadata)


def uniform_64(*parts: object) -> int:
    """A hash of the parts as a number below 2^64."""
    return int(stable_hash(*parts)[:16], 16)
