"""Prompts to token ids by the teacher's chat template, and what the template leaves out.

Templates drop what they do not know in silence: unknown roles, system messages, tool results. Every message must stand
in the rendered prompt, or the teacher would run for days on questions that it cannot see.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from stillroom.errors import one_line
from stillroom.schema.records import Message, Prompt

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What chat templates raise for a conversation that they do not accept."""

ROLES = ("system", "user", "assistant", "tool")
REASONING_END = "</think>"
"""Templates leave out the reasoning of earlier turns on purpose, as the model was trained."""
SHORT_CHARS = 40
"""Texts up to this length may stand in a prompt by accident, so their occurrences are counted."""
SHOWN_CHARS = 60

Chat = list[dict[str, str]]


def tokenize(tokenizer: Any, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any]) -> list[list[int] | str]:
    """Token ids of each prompt with the assistant's turn opened, or why it cannot be rendered as a whole."""
    chats = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]
    try:
        rendered: list[tuple[str, list[int]] | str] = [*_rendered(tokenizer, chats, template_kwargs)]
    except TEMPLATE_ERRORS:
        # One refused prompt fails the whole batch: find it.
        rendered = [_render_one(tokenizer, chat, template_kwargs) for chat in chats]
    template = str(tokenizer.chat_template)
    found: list[list[int] | str] = []
    for prompt, one in zip(prompts, rendered, strict=True):
        problem = one if isinstance(one, str) else _left_out(prompt.messages, one[0], template)
        found.append(problem if problem is not None else one[1])
    return found


def _rendered(tokenizer: Any, chats: Sequence[Chat], template_kwargs: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """Text and ids. Rendered twice: only some tokenizers read their own rendered text as the same ids."""
    options = {"add_generation_prompt": True, **template_kwargs}
    texts = tokenizer.apply_chat_template(list(chats), tokenize=False, **options)
    encoded = tokenizer.apply_chat_template(list(chats), tokenize=True, return_dict=True, **options)
    return list(zip(texts, encoded["input_ids"], strict=True))


def _render_one(tokenizer: Any, chat: Chat, template_kwargs: Mapping[str, Any]) -> tuple[str, list[int]] | str:
    try:
        return _rendered(tokenizer, [chat], template_kwargs)[0]
    except TEMPLATE_ERRORS as error:
        return f"the chat template rejects the prompt: {one_line(error)}"


def _left_out(messages: Sequence[Message], rendered: str, template: str) -> str | None:
    """The first message that the rendered prompt does not hold, for a person; None if it holds all."""
    texts = [_expected(message) for message in messages]
    for index, (message, text) in enumerate(zip(messages, texts, strict=True)):
        if message.role not in ROLES and not any(f"{sign}{message.role}{sign}" in template for sign in "'\""):
            return (
                f"message {index} has the role {message.role!r}, which the chat template does not mention: use user, "
                "assistant, system or tool"
            )
        num_wanted = sum(other.count(text) for other in texts) if 0 < len(text) <= SHORT_CHARS else 1
        if not _holds(rendered, text, num_wanted):
            shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
            return (
                f"the chat template leaves out message {index} of the {message.role}: {one_line(ValueError(shown))!r}: "
                "move it into the user's message, or remove it from the row"
            )
    return None


def _expected(message: Message) -> str:
    text = message.content if message.role != "assistant" else message.content.rpartition(REASONING_END)[2]
    return text.strip()


def _holds(rendered: str, text: str, num_wanted: int) -> bool:
    if rendered.count(text) >= num_wanted:
        return True
    # Some templates change white space, and some write tool results as JSON.
    squeezed, wanted = ("".join(one.split()) for one in (rendered, text))
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return squeezed.count(wanted) >= num_wanted or (escaped != text and escaped in rendered)
