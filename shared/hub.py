"""The Hugging Face hub's own messages: its client says of every attempt that it failed, and we say it once."""

import logging

from shared.errors import one_line
from shared.log import note

_CLIENT = logging.getLogger("huggingface_hub.utils._http")


def hush_hub() -> None:
    """Lets a hub that does not answer be told by one line instead of two for every attempt. May be called again."""
    _CLIENT.addFilter(_once)


def unreachable(model: str, error: Exception) -> str:
    """What is said of a name that is no folder and that the hub did not give, with the first sentence of its reason."""
    reason = one_line(error).split(". ")[0].rstrip(".")
    return f"{model} is neither a folder nor a hub id that can be reached: {reason}"


_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """Keeps what is no failed attempt; of those the first is told in our words."""
    text = record.getMessage()
    if not ("thrown while requesting" in text or text.startswith("Retrying in ")):
        return True
    if not _said:
        _said.add(text)
        note("the Hugging Face hub does not answer: trying for about half a minute (HF_HUB_OFFLINE=1 asks it nothing)")
    return False
