"""Judges pairs of reference and answer without a cache: what people try on their own data before a build.

In: JSON Lines with `judge`, `reference` and `answer`; optional are `id`, `metadata`, `truncated`, `question` (for a
language model) and `right` (true, false, or null where nobody knows). Of an answer, only what follows `</think>` is
judged. Out: a verdict for each, in their order, and how often judges agree with `right`.
"""

import json
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.errors import DataError
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import KINDS, check_kind, require_judge
from stillroom.judging.process import JudgeProcess

REASONING_START, REASONING_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Pair:
    """One answer and what it is judged by."""

    judge: str
    answer: str | None
    reference: str | None
    metadata: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    right: bool | None = None
    id: str | None = None
    question: str = ""


@dataclass(slots=True)
class Agreement:
    """How many of `num_right` right answers were judged right, and of `num_wrong` wrong ones not judged right."""

    num_pairs: int = 0
    num_undecided: int = 0
    num_right: int = 0
    num_right_judged_right: int = 0
    num_wrong: int = 0
    num_wrong_not_judged_right: int = 0

    def add(self, pair: Pair, verdict: Verdict) -> None:
        """Counts one verdict."""
        self.num_pairs += 1
        self.num_undecided += verdict.correct is None
        if pair.right is True:
            self.num_right += 1
            self.num_right_judged_right += verdict.correct is True
        elif pair.right is False:
            self.num_wrong += 1
            self.num_wrong_not_judged_right += verdict.correct is not True


def read_pairs(path: Path, judge: str | None = None, *, is_model: bool = False) -> list[Pair]:
    """The pairs of a file; `judge` takes the place of the judge that they name, and is a language model's (`is_model`)
    or one of KINDS.

    Raises DataError with file and line for a line that is not a pair, ConfigError for an unknown judge.
    """
    try:
        # Not splitlines: JSON strings may hold other line breaks, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    pairs = [_pair(line, f"{path}:{number}", judge) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise DataError(f"{path} holds no pairs: one JSON object per line, with judge, reference and answer")
    for kind in () if is_model else sorted({pair.judge for pair in pairs}):
        check_kind(kind)
        require_judge(kind)
    return pairs


def judge_pairs(pairs: Sequence[Pair], num_processes: int = 1) -> Iterator[tuple[Pair, Verdict]]:
    """Verdicts in the order of the pairs, `num_processes` checks at a time."""
    judges = [JudgeProcess() for _ in range(num_processes)]
    free: queue.SimpleQueue[JudgeProcess] = queue.SimpleQueue()
    for judge in judges:
        free.put(judge)

    def check(pair: Pair) -> tuple[Pair, Verdict]:
        judge = free.get()
        try:
            return pair, judge.judge(pair.judge, pair.answer, pair.reference, pair.metadata, pair.truncated)
        finally:
            free.put(judge)

    with ThreadPoolExecutor(num_processes) as pool:
        try:
            yield from pool.map(check, pairs)
        finally:
            # Before the pool is left, which waits for checks that run.
            for judge in judges:
                judge.kill()
                judge.close()


def verdict_line(pair: Pair, verdict: Verdict) -> str:
    """One line of output: the pair's id, judge and label, and the verdict with its rule."""
    row: dict[str, Any] = {} if pair.id is None else {"id": pair.id}
    row |= {"judge": pair.judge, "correct": verdict.correct, "score": verdict.score}
    row |= {"rule": verdict.rule, "compared": verdict.compared}
    return json.dumps(row if pair.right is None else {**row, "right": pair.right}, ensure_ascii=False)


def agreement_lines(agreements: Iterable[tuple[str, Agreement]]) -> list[str]:
    """A line per judge: how many were judged, and how many agree with their labels."""
    lines = []
    for kind, one in agreements:
        line = f"{kind}: {one.num_pairs} judged, {one.num_undecided} undecided"
        if one.num_right:
            share = one.num_right_judged_right / one.num_right
            line += f"; of {one.num_right} right answers {one.num_right_judged_right} judged right ({share:.1%})"
        if one.num_wrong:
            share = one.num_wrong_not_judged_right / one.num_wrong
            line += (
                f"; of {one.num_wrong} wrong answers {one.num_wrong_not_judged_right} not judged right ({share:.1%})"
            )
        lines.append(line)
    return lines


def _without_reasoning(text: str) -> str | None:
    """What follows the reasoning, as a build judges it; None if the reasoning never ended."""
    _, end, answer = text.rpartition(REASONING_END)
    if end:
        return answer
    return None if text.lstrip().startswith(REASONING_START) else text


def _pair(line: str, where: str, judge: str | None) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}: a pair is a JSON object")
    kind = judge or row.get("judge")
    if not isinstance(kind, str):
        raise DataError(f"{where} names no judge: add the field judge ({', '.join(KINDS)}), or use --judge")
    if "answer" not in row:
        raise DataError(f"{where} has no field answer: a pair needs judge, reference and answer")
    reference, metadata, right = row.get("reference"), row.get("metadata") or {}, row.get("right")
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: metadata is a {type(metadata).__name__}, not an object")
    if right is not None and not isinstance(right, bool):
        raise DataError(f"{where}: right is {right!r}, but must be true, false or null")
    # As a build keeps references: what is not text becomes JSON.
    text = reference if reference is None or isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
    answer = None if row["answer"] is None else _without_reasoning(str(row["answer"]))
    identity = None if row.get("id") is None else str(row["id"])
    return Pair(
        kind, answer, text, metadata, bool(row.get("truncated")), right, identity, str(row.get("question") or "")
    )
