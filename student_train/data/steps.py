"""Steps of chains as examples: the question and the steps so far are context, the next step is learned.

In: a selection, and where steps begin. Out: `Examples`, kept in the run's folder: spans of completion tokens, found
once. The planner orders them like chains of their own (`planned`); row groups are read, and tokens are named by chain
and place, as without steps. So every distribution stays with its token, and all that is attached by key.

A step begins at a token: where a boundary lies inside one, at the next. Steps of a chain cover its completion, each
token in exactly one of them.

    R chains, E examples, S steps of one chain
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stillroom.errors import ConfigError, CorruptError
from stillroom.schema.records import Int32, Int64, stable_hash
from stillroom.storage.paths import atomic_path
from student_train.config.data import DataConfig, StepsConfig
from student_train.data.completion_text import CompletionText, CompletionTexts
from student_train.data.selection import Selection

VERSION = 1
"""Version of the rules below; examples of another version are rebuilt."""
NUMERAL = r"[\d一二三四五六七八九十百]+"
RULES = {
    "paragraphs": r"\n[^\S\n]*\n\s*",
    "lines": r"\n\s*",
    # A look-ahead, so that the mark belongs to the step that it opens.
    "numbered": rf"^(?=[ \t]*(?:\#+[ \t]*|\*\*|[-*][ \t]+)?"
    rf"(?:step[ \t]*\d+|\(?\d{{1,3}}[.)]\s|第[ \t]*{NUMERAL}[ \t]*步|步骤[ \t]*{NUMERAL}))",
    "equations": r"(?:\$\$.+?\$\$|\\\[.+?\\\]|\\begin\{(?P<env>[a-z]+\*?)\}.+?\\end\{(?P=env)\})\s*"
    r"|^[^\n]*=[^\n]*(?:\n\s*|\Z)",
}
"""A step begins where one of these ends."""


@dataclass(frozen=True, slots=True)
class Examples:
    """int32 [E], ordered by chain and place. Example e of chain row_E[e] reads the prompt and completion tokens
    context_E[e]..start_E[e]-1 without a loss, then start_E[e]..stop_E[e]-1 with one.
    """

    row_E: Int32
    context_E: Int32
    start_E: Int32
    stop_E: Int32


def examples_path(folder: Path, stage: str, selection: Selection, data: DataConfig) -> Path:
    """Where the examples of a stage lie."""
    assert data.steps is not None
    # The limit is part of it: it decides how many earlier steps fit an example.
    identity = stable_hash("steps", VERSION, selection.header.hash, data.steps.model_dump(mode="json"), _limit(data))
    return folder / f"{stage}.steps-{identity[:16]}.npy"


def write_examples(path: Path, selection: Selection, data: DataConfig) -> None:
    """Finds the steps of every chain. Raises ConfigError where no chain has more than one, CorruptError."""
    assert data.steps is not None
    patterns = patterns_of(data.steps)
    parts = []
    for row, text in CompletionTexts(selection, "data.steps").read("find steps"):
        starts_S = step_starts(text, patterns, data.steps.min_tokens)
        contexts_S = _contexts(
            starts_S, len(text.byte_T) - 1, int(selection.num_prompt_R[row]), data.steps.context_steps, _limit(data)
        )
        stops_S = np.append(starts_S[1:], len(text.byte_T) - 1)
        parts.append(np.stack([np.full(len(starts_S), row), contexts_S, starts_S, stops_S]))
    found = np.concatenate(parts, axis=1).astype(np.int32)
    # Every chain has a step at least, so as many examples as chains means that none was split.
    if found.shape[1] == selection.num_chains:
        raise ConfigError(
            f"data.steps: none of the {selection.num_chains} selected chains has two steps of "
            f"{data.steps.min_tokens} tokens: change at or pattern, or lower min_tokens"
        )
    with atomic_path(path) as temp, temp.open("wb") as file:
        np.save(file, found)


def with_examples(path: Path, selection: Selection) -> Selection:
    """The selection with the examples kept at `path`. Raises CorruptError where they are not those of its chains."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptError(f"{path} cannot be read: {error}: delete it to rebuild it") from error
    if found.ndim != 2 or len(found) != 4 or not _covers(found, selection):
        raise CorruptError(f"{path} does not hold the steps of the selected chains: delete it to rebuild it")
    # A position in these packs means nothing in those of whole chains.
    header = selection.header.model_copy(update={"hash": stable_hash(selection.header.hash, path.stem)})
    return replace(selection, examples=Examples(*found), header=header)


def planned(selection: Selection) -> Selection:
    """What the planner orders: a row for each example, its prompt as long as all of its context. Without examples the
    selection itself.
    """
    examples = selection.examples
    if examples is None:
        return selection
    row_E = examples.row_E
    return replace(
        selection,
        group_R=selection.group_R[row_E],
        row_in_group_R=selection.row_in_group_R[row_E],
        key_R=selection.key_R[row_E],
        num_prompt_R=selection.num_prompt_R[row_E] + examples.start_E - examples.context_E,
        num_tokens_R=examples.stop_E - examples.start_E,
        weight_R=selection.weight_R[row_E],
        examples=None,
    )


def patterns_of(steps: StepsConfig) -> list[tuple[re.Pattern[str], bool]]:
    """Patterns, and whether a step begins where one ends rather than where it begins."""
    flags = re.MULTILINE | re.DOTALL | re.IGNORECASE
    rules = steps.at or ([] if steps.pattern is not None else ["paragraphs"])
    found = [(re.compile(RULES[name], flags), True) for name in rules]
    return [*found, *([(re.compile(steps.pattern, re.MULTILINE), False)] if steps.pattern is not None else [])]


def step_starts(text: CompletionText, patterns: Sequence[tuple[re.Pattern[str], bool]], min_tokens: int) -> Int64:
    """int64 [S]: the token that each step begins with, 0 first; every step has `min_tokens`, if the chain has."""
    chars = {
        found.end() if at_end else found.start()
        for pattern, at_end in patterns
        for found in pattern.finditer(text.text)
    }
    begins = np.unique(text.first_tokens_from(np.array(sorted(chars), np.int64)))
    # byte_T has one entry more than there are tokens.
    num_tokens, starts = len(text.byte_T) - 1, [0]
    for token in begins.tolist():
        # A short step joins the one before it, and so does a short end.
        if token - starts[-1] >= min_tokens and num_tokens - token >= min_tokens:
            starts.append(token)
    return np.array(starts, np.int64)


def _contexts(starts_S: Int64, num_tokens: int, num_prompt: int, context_steps: int | None, limit: int) -> Int64:
    """The completion token that each example begins to read at: as many whole steps as asked, and as fit."""
    number_S = np.arange(len(starts_S))
    first_S = np.zeros_like(number_S) if context_steps is None else np.maximum(number_S - context_steps, 0)
    # Prompt, context and step stay within the limit; the earliest steps give way, the question never does.
    stops_S = np.append(starts_S[1:], num_tokens)
    fitting_S = np.searchsorted(starts_S, stops_S + num_prompt - limit)
    return np.asarray(starts_S[np.minimum(np.maximum(first_S, fitting_S), number_S)], np.int64)


def _limit(data: DataConfig) -> int:
    return data.pack_tokens if data.max_tokens is None else data.max_tokens


def _covers(found: Int32, selection: Selection) -> bool:
    """Whether examples follow each other through all tokens of all chains."""
    row_E, context_E, start_E, stop_E = found
    if not np.array_equal(np.unique(row_E), np.arange(selection.num_chains)) or (np.diff(row_E) < 0).any():
        return False
    is_first_E = np.append(True, row_E[1:] != row_E[:-1])
    is_last_E = np.append(is_first_E[1:], True)
    before_E = np.where(is_first_E, 0, np.append(0, stop_E[:-1]))
    ends = (stop_E == selection.num_tokens_R[row_E])[is_last_E].all()
    in_order = (start_E < stop_E).all() and (context_E <= start_E).all() and (context_E >= 0).all()
    return bool((start_E == before_E).all() and in_order and ends)
