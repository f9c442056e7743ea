"""Placeholders and counts of replacements, for display. Loads no recogniser."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from teacher_cache.scrub.config import Kind

PLACEHOLDER = re.compile(r"<(PERSON|EMAIL|PHONE|ID|BANK|ADDRESS)_(\d{1,4})>")
"""No longer number: "<PHONE_4155552671>" is not one of ours."""
METADATA_KEY = "scrubbed"
"""Key in a row's metadata: replacements in its prompt, {kind: times}."""
SAMPLE_CHARS = 40


def counted(counts: Mapping[Kind, int] | Mapping[str, int]) -> str:
    """`2 person, 1 phone`."""
    return ", ".join(f"{num:,} {kind}" for kind, num in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def total_of(metadata: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Replacements by kind in rows with this metadata."""
    counts: Counter[str] = Counter()
    for one in metadata:
        found = one.get(METADATA_KEY)
        # A row may have a field of this name itself.
        if isinstance(found, dict):
            counts.update({kind: num for kind, num in found.items() if isinstance(num, int)})
    return counts


def is_made_up(metadata: Mapping[str, Any]) -> bool:
    """Whether a program generated the task: its persons do not exist, and its checker needs them as they are."""
    return metadata.get("judge") == "reasoning_gym"


def sample_of(texts: Iterable[str]) -> str | None:
    """The words around the first placeholder."""
    for text in texts:
        if (one := PLACEHOLDER.search(text)) is not None:
            begin, stop = max(0, one.start() - SAMPLE_CHARS), one.end() + SAMPLE_CHARS
            return f"{'...' if begin else ''}{text[begin:stop]}{'...' if stop < len(text) else ''}"
    return None
