"""Turns the values of one row into messages: conversations in the forms of public data sets, and plain texts.

Whatever a prompt cannot hold (tool calls, reasoning beside the content, pictures, columns that belong to the question)
raises ValueError that names it, unless the configuration lists it in `ignored_fields`.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from stillroom.config import nearest_name
from stillroom.schema.records import Message
from teacher_cache.prompts.config import CompletionFields, RowFields

Json = dict[str, Any]

MISSING = object()
"""Stands for a field that a row lacks, which null does not."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""Roles of chat templates by the names that data sets give them, in any case (ShareGPT: human, gpt)."""
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
UNHELD_KEYS = (
    *("reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "function_call", "tools"),
    *("functions", "images", "image", "videos", "audio", "documents", "name"),
)
"""Keys of messages that templates may show to the model. Messages are stored as role and content."""
UNHELD_COLUMNS = ("tools", "functions", "images", "image", "documents")
SYSTEM_COLUMNS = ("system", "system_prompt")
BESIDE_TEXT = ("context", "choices", "options", "starter_code")
BESIDE_INSTRUCTION = ("input", "history")
"""Columns that complete the question of another column: SQuAD, MMLU, LiveCodeBench; Alpaca, Dolly."""


def guarded_columns(source: RowFields) -> list[str]:
    """Columns that are read where they exist, because a prompt without them might not be what the row asks."""
    if isinstance(source, CompletionFields) and source.are_ids:
        return []
    field = source.prompt_field or ""
    beside = (*BESIDE_TEXT, *(BESIDE_INSTRUCTION if field == "instruction" else ())) if field else ()
    known = {*source.fields, *source.ignored_fields}
    return [one for one in (*SYSTEM_COLUMNS, *UNHELD_COLUMNS, *beside) if one not in known]


def messages_of(source: RowFields, row: Json, *, drop_final_answer: bool = False) -> list[Message]:
    """The row's messages, at least one. Raises ValueError for a row that cannot become a prompt as a whole."""
    for column in guarded_columns(source):
        if not _is_empty(row.get(column)) and not _stands_in_prompt(source, row, column):
            raise ValueError(_unused_column(column))
    if source.prompt_field is not None:
        messages = _of_text_field(source, row)
    else:
        field = str(source.messages_field)
        messages = conversation_of(row, field, source.ignored_fields, drop_final_answer=drop_final_answer)
    system = None if source.system_field is None else find(row, source.system_field)
    if _is_empty(system):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"field {source.system_field!r} is not a text")
    if any(message.role == "system" for message in messages):
        raise ValueError(f"field {source.system_field!r} is a second system message beside that of the conversation")
    return [Message("system", system), *messages]


def conversation_of(
    row: Json, field: str, ignored: Collection[str] = (), *, drop_final_answer: bool = False
) -> list[Message]:
    """The field's messages, with roles as chat templates know them. Raises ValueError for anything but a conversation.

    `drop_final_answer` leaves out assistant messages at the end, whatever they hold.
    """
    value = value_of(row, field)
    if isinstance(value, str):
        value = _decoded(value, field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is not a list of messages, or it is empty")
    num_kept = len(value)
    while drop_final_answer and num_kept and _role_of(value[num_kept - 1]) == "assistant":
        num_kept -= 1
    return [_message(item, f"field {field!r}, message {index}", ignored) for index, item in enumerate(value[:num_kept])]


def find(row: Json, field: str, default: Any = None) -> Any:
    """The field's value; `a.b` is field b of the struct a, unless the row has a field of that very name."""
    if field in row:
        return row[field]
    outer, dot, inner = field.partition(".")
    while dot:
        if isinstance(value := row.get(outer), dict):
            return find(value, inner, default)
        step, dot, inner = inner.partition(".")
        outer += f".{step}"
    return default


def names_of(row: Json, prefix: str = "") -> list[str]:
    """Every name under which `find` gives a value."""
    names = []
    for name, value in row.items():
        names += [f"{prefix}{name}", *(names_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [])]
    return names


def value_of(row: Json, field: str) -> Any:
    """The field's value. Raises ValueError if it is missing or null."""
    value = find(row, field, MISSING)
    if value is MISSING:
        raise ValueError(f"field {field!r} is missing{nearest_name(field, names_of(row))}")
    if value is None:
        raise ValueError(f"field {field!r} is null")
    return value


def text_of(row: Json, field: str) -> str:
    """The field's text. Raises ValueError if it is not text or blank."""
    value = value_of(row, field)
    if isinstance(value, list):
        raise ValueError(f"field {field!r} holds a list of {len(value)}, not a text: write one row per item")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} is not a text, or it is blank")
    return value


def _of_text_field(source: RowFields, row: Json) -> list[Message]:
    field = str(source.prompt_field)
    value = value_of(row, field)
    if isinstance(value, dict):
        value = [value]
    is_texts = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    if not is_texts and (isinstance(value, list) or (isinstance(value, str) and _holds_messages(value))):
        return conversation_of({field: value}, field, source.ignored_fields)
    return [Message("user", text_of(row, field))]


def _stands_in_prompt(source: RowFields, row: Json, column: str) -> bool:
    """Whether the prompt's text already holds the column's, as in data sets that keep the parts beside the whole."""
    text = None if source.prompt_field is None else find(row, source.prompt_field)
    part = row[column]
    return isinstance(text, str) and isinstance(part, str) and part.strip() in text


def _holds_messages(text: str) -> bool:
    """Whether a text is a JSON list of messages, as CSV files and some Parquet files hold them."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # A thousand opening brackets are a text, not messages.
        return False
    return isinstance(value, list) and bool(value) and all(_role_of(one) for one in value)


def _decoded(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ": write it with json.dumps" if text.lstrip().startswith("[{'") else f": {error}"
        raise ValueError(f"field {field!r} is not a list of messages, and its text is not JSON{hint}") from error


def _message(item: Any, where: str, ignored: Collection[str]) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not {{role: text, content: text}}")
    for key in UNHELD_KEYS:
        if key not in ignored and not _is_empty(item.get(key)):
            raise ValueError(
                f"{where} has {key!r}, which a prompt cannot hold: write it into the content as the teacher reads it, "
                f"or leave it out with ignored_fields: [{key}]"
            )
    role = _role_of(item)
    contents = [item[key] for key in CONTENT_KEYS if item.get(key) is not None]
    if role is None or len(contents) != 1:
        raise ValueError(f"{where} is not {{role: text, content: text}} or {{from: text, value: text}}")
    content = _joined(contents[0], where) if isinstance(contents[0], list) else contents[0]
    if not isinstance(content, str):
        raise ValueError(f"{where} is not {{role: text, content: text}}: its content is not text")
    # An empty system message means something: templates then leave out their own.
    if not content.strip() and role != "system":
        raise ValueError(f"{where} is empty (role {role})")
    return Message(role, content)


def _role_of(item: Any) -> str | None:
    """The role as chat templates know it; another one as it is, for templates that mention it; None without one."""
    if not isinstance(item, dict):
        return None
    role = next((item[key] for key in ROLE_KEYS if isinstance(item.get(key), str)), None)
    return ROLES.get(role.strip().lower(), role) if role else None


def _joined(parts: Sequence[Any], where: str) -> str:
    """Content given as parts, with a line break between texts as vLLM joins them."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ValueError(f"{where}, part {index} is {kind!r}: only text is supported")
        texts.append(text)
    return "\n".join(texts)


def _is_empty(value: Any) -> bool:
    # Columns of tools are often JSON texts.
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")) or value in ([], {})


def _unused_column(column: str) -> str:
    if column in SYSTEM_COLUMNS:
        use = f"set system_field: {column}"
    elif column in UNHELD_COLUMNS:
        use = "a prompt cannot hold it, so write it into the text"
    else:
        use = "write it into the text"
    return f"field {column!r} is not part of the prompt: {use}, or leave it out with ignored_fields: [{column}]"
