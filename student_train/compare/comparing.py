"""`student-train compare`: the same held-out prompts to two or more students, judged as the cache judges, in pairs.

In: sides (sides.py), prompts of a cache that name a judge. Out: for every side accuracy, latency, tokens and cost; for
every pair the difference on the same prompts: of each side to one that they are measured against, or of all to all.
Sides are asked one after the other, so that they do not share a machine. A failed request is reported, and its prompt
leaves the pairs of that side.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.errors import ConfigError, StillroomError
from stillroom.judging.answers import Verdict
from stillroom.judging.process import JudgeProcess
from stillroom.log import Progress, warn
from stillroom.storage.paths import location
from student_train.answers import AskedPrompt, GenerateConfig, heldout_prompts
from student_train.compare.sides import Reply, Side
from student_train.compare.statistics import DIFFERENCE, SHARE, holm, mean_interval, quantiles, sign_test
from student_train.data.selection import PinnedCache

BEST, ALL = "best", "all"
"""What sides may be measured against besides one of them."""


@dataclass(frozen=True)
class Price:
    """In any currency: of a million tokens, and of an hour of the machine that answers."""

    prompt: float = 0.0
    completion: float = 0.0
    hour: float = 0.0


@dataclass(frozen=True)
class Answered:
    """A side with its replies and verdicts, one for each prompt in order; a failed request has no verdict.

    `wall_s` is from the first request to the last answer.
    """

    side: Side
    replies: list[Reply]
    verdicts: list[Verdict | None]
    wall_s: float

    def score(self, number: int) -> float | None:
        """1 right, 0 wrong, None undecided or failed."""
        verdict = self.verdicts[number]
        return None if verdict is None or verdict.correct is None else float(verdict.correct)

    def scores(self) -> list[float]:
        """The verdicts, without prompts that have none."""
        return [score for number in range(len(self.replies)) if (score := self.score(number)) is not None]


def prompts_of(caches: Sequence[Path], where: str, num_prompts: int) -> list[AskedPrompt]:
    """Raises ConfigError if no prompt names a judge, StillroomError if a judge cannot run here."""
    pinned = []
    for cache in caches:
        catalog = Catalog(location(str(cache)))
        pinned.append(
            PinnedCache(
                root=str(cache),
                weight=1.0,
                chains_version=catalog.chains.version,
                verdicts_version=catalog.verdicts.version,
            )
        )
    return heldout_prompts(pinned, where, num_prompts, None)


def compare(
    sides: Sequence[Side],
    prompts: Sequence[AskedPrompt],
    config: GenerateConfig,
    concurrency: int,
    prices: Mapping[str, Price],
    against: str | None = None,
) -> tuple[Json, list[Answered]]:
    """The result as JSON, and everything that was answered.

    `against` is the side that the others are measured against: a name, BEST (the most accurate), or ALL for every pair;
    None is the first side. Raises ConfigError, and StillroomError if all requests of a side fail.
    """
    names = [side.name for side in sides]
    if len(sides) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"got the sides {', '.join(names)}: at least two with different names are needed (NAME=URL)")
    unknown = [name for name in prices if name not in names]
    if unknown:
        raise ConfigError(f"--price {unknown[0]}: no side has this name: choose one of {', '.join(names)}")
    if against not in (None, BEST, ALL, *names):
        raise ConfigError(f"--against {against}: choose one of {', '.join(names)}, {BEST} or {ALL}")
    answered = [_answered(side, prompts, config, concurrency) for side in sides]
    pairs = [_pair(one, other, prompts) for one, other in _paired(answered, against)]
    # Adjusted together: of many pairs some differ by chance.
    for pair, p_value in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_adjusted"] = p_value
    result = {
        "num_prompts": len(prompts),
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "concurrency": concurrency,
        "against": against or names[0],
        "teacher_accuracy": _mean([one.teacher_accuracy for one in prompts if one.teacher_accuracy is not None]),
        "sides": [_summary(one, prompts, prices.get(one.side.name)) for one in answered],
        "pairs": pairs,
        "answers": [_answer(number, prompt, answered) for number, prompt in enumerate(prompts)],
    }
    return result, answered


def _paired(answered: Sequence[Answered], against: str | None) -> list[tuple[Answered, Answered]]:
    if against == ALL:
        return list(itertools.combinations(answered, 2))
    if against == BEST:
        # Of equals the first.
        base = max(answered, key=lambda one: _mean(one.scores()) or 0.0)
    else:
        base = next((one for one in answered if one.side.name == against), answered[0])
    return [(base, one) for one in answered if one is not base]


def _answered(side: Side, prompts: Sequence[AskedPrompt], config: GenerateConfig, concurrency: int) -> Answered:
    done: list[Reply] = []
    with Progress(f"ask {side.name}", len(prompts), "prompts") as progress:

        def note_one(reply: Reply) -> None:
            done.append(reply)
            num_failed = sum(one.error is not None for one in done)
            num_tokens = sum(one.num_tokens or 0 for one in done)
            progress.update(len(done), num_tokens, {"failed": str(num_failed)} if num_failed else None)

        started_s = time.perf_counter()
        replies = side.answer(prompts, config, concurrency, note_one)
        wall_s = time.perf_counter() - started_s
    failures = Counter(one.error for one in replies if one.error is not None)
    if failures:
        reason, count = failures.most_common(1)[0]
        if sum(failures.values()) == len(replies):
            raise StillroomError(f"{side.name} ({side.address}) answered none of {len(replies)} requests: {reason}")
        warn(f"{side.name}: {sum(failures.values())} of {len(replies)} requests failed, {count} with: {reason}")
    # After the clock: judging is not part of the side's time.
    with JudgeProcess() as judge:
        judge.prepare(sorted({prompt.judge for prompt in prompts}))
        verdicts = [
            None
            if reply.error is not None
            else judge.judge(prompt.judge, answer_text(prompt, reply), prompt.reference, prompt.metadata, reply.is_cut)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
    return Answered(side, replies, verdicts, wall_s)


def answer_text(prompt: AskedPrompt, reply: Reply) -> str | None:
    """What follows the reasoning; None if the reasoning never ended."""
    if prompt.reasoning is None or reply.reasoning is not None:
        return reply.text
    start, end = prompt.reasoning
    if end in reply.text:
        return reply.text.rpartition(end)[2]
    # A reply cut before its reasoning ends holds no answer.
    return None if reply.is_cut or start in reply.text else reply.text


def _summary(one: Answered, prompts: Sequence[AskedPrompt], price: Price | None) -> Json:
    replies = [reply for reply in one.replies if reply.error is None]
    scores = one.scores()
    firsts = [reply.first_token_s for reply in replies if reply.first_token_s is not None]
    num_tokens = sum(reply.num_tokens or 0 for reply in replies)
    num_prompt_tokens = sum(reply.num_prompt_tokens or 0 for reply in replies)
    has_counts = all(reply.num_tokens is not None and reply.num_prompt_tokens is not None for reply in replies)
    cost = None
    if price is not None and (has_counts or not (price.prompt or price.completion)):
        cost = (num_prompt_tokens * price.prompt + num_tokens * price.completion) / 1e6
        cost += one.wall_s / 3600 * price.hour
    interval, num_correct = mean_interval(scores, SHARE), math.fsum(scores)
    return {
        "name": one.side.name,
        "model": one.side.model,
        "address": one.side.address,
        "num_answered": len(replies),
        "num_failed": len(one.replies) - len(replies),
        "failures": dict(Counter(reply.error for reply in one.replies if reply.error is not None)),
        "num_correct": int(num_correct),
        "num_undecided": len(replies) - len(scores),
        "num_cut": sum(reply.is_cut for reply in replies),
        "accuracy": None if interval is None else interval.model_dump(),
        "by_source": _by_source(one, prompts),
        "device": one.side.device,
        "wall_s": one.wall_s,
        "latency_s": quantiles([reply.latency_s for reply in replies]),
        "first_token_s": quantiles(firsts),
        "prompt_tokens": num_prompt_tokens if has_counts else None,
        "completion_tokens": num_tokens if has_counts else None,
        "tokens_per_answer": num_tokens / len(replies) if has_counts else None,
        "cost": cost,
        "cost_per_correct": cost / num_correct if cost is not None and num_correct else None,
    }


def _pair(a: Answered, b: Answered, prompts: Sequence[AskedPrompt]) -> Json:
    """Differences are b minus a."""
    both = [number for number in range(len(prompts)) if a.score(number) is not None and b.score(number) is not None]
    scored = [(prompts[number].source, a.score(number) or 0.0, b.score(number) or 0.0) for number in both]
    timed = [
        (one, other)
        for one, other in zip(a.replies, b.replies, strict=True)
        if one.error is None and other.error is None
    ]
    sources = [
        _wins(source, [one for one in scored if one[0] == source]) for source in sorted({one[0] for one in scored})
    ]
    whole = _wins("all", scored)
    accuracy = mean_interval([other - one for _, one, other in scored], DIFFERENCE)
    latency = mean_interval([other.latency_s - one.latency_s for one, other in timed])
    counted = [(one.num_tokens, other.num_tokens) for one, other in timed]
    tokens = mean_interval([other - one for one, other in counted if one is not None and other is not None])
    return {
        "a": a.side.name,
        "b": b.side.name,
        "num_pairs": len(scored),
        "accuracy_difference": None if accuracy is None else accuracy.model_dump(),
        **{key: whole[key] for key in ("wins_a", "wins_b", "ties", "p_value")},
        "by_source": sources,
        "latency_difference_s": None if latency is None else latency.model_dump(),
        "tokens_difference": None if tokens is None else tokens.model_dump(),
    }


def _by_source(one: Answered, prompts: Sequence[AskedPrompt]) -> list[Json]:
    """Right answers of one side on each source."""
    scores: dict[str, list[float]] = {}
    for number, prompt in enumerate(prompts):
        if (score := one.score(number)) is not None:
            scores.setdefault(prompt.source, []).append(score)
    return [
        {"source": source, "num_judged": len(found), "accuracy": _mean(found)}
        for source, found in sorted(scores.items())
    ]


def _answer(number: int, prompt: AskedPrompt, answered: Sequence[Answered]) -> Json:
    """What each side made of one prompt."""
    replies = {one.side.name: one.replies[number] for one in answered}
    return {
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "reference": prompt.reference,
        "correct": {one.side.name: one.score(number) for one in answered},
        "text": {name: reply.error or reply.text for name, reply in replies.items()},
        "latency_s": {name: reply.latency_s for name, reply in replies.items()},
        "num_tokens": {name: reply.num_tokens for name, reply in replies.items()},
    }


def _wins(source: str, scored: Sequence[tuple[str, float, float]]) -> Json:
    wins_a, wins_b = (sum(one > other for _, one, other in scored), sum(other > one for _, one, other in scored))
    return {
        "source": source,
        "num_pairs": len(scored),
        "accuracy_a": _mean([one for _, one, _ in scored]),
        "accuracy_b": _mean([other for _, _, other in scored]),
        "wins_a": wins_a,
        "wins_b": wins_b,
        "ties": len(scored) - wins_a - wins_b,
        "p_value": sign_test(wins_a, wins_b),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
