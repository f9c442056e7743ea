"""`teacher-cache augment`: collects what variants of prompts need from the teacher, in a separate cache.

In: a build's configuration with `prompts.augment`. Each turn collects the questions that are open, generates their
answers as an ordinary build does (resumable, each sample once), and looks again: a translation is followed by the way
back, a new question by its solutions. `build` then reads the variants from that cache.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import format_plural, note
from stillroom.schema.records import Prompt, prompt_id_of
from teacher_cache.building.commands import build_loaded
from teacher_cache.building.result import BuildResult
from teacher_cache.config import BuildConfig
from teacher_cache.engine.shared import SharedEngine
from teacher_cache.prompts.answers import read_answers
from teacher_cache.prompts.config import JsonlSource
from teacher_cache.prompts.prompts import WHOLE, LoadedPrompts, prompts_to_vary
from teacher_cache.prompts.variants import NoVariant, Question, Variant, variants
from teacher_cache.scrub.rows import Scrubber
from teacher_cache.scrub.settings import scrubber_of, warn_of_unscrubbed

MAX_TURNS = 4
"""Out, back, solve, and the look that finds nothing open."""


@dataclass(slots=True)
class Augmented:
    """What `augment` did. `without_variant` counts by kind and reason."""

    variants: Counter[str] = field(default_factory=Counter)
    without_variant: Counter[str] = field(default_factory=Counter)
    num_unanswered: int = 0
    num_new_chains: int = 0
    num_new_tokens: int = 0
    stopped: str | None = None

    def as_json(self) -> Json:
        """For programs."""
        return {
            "variants": dict(self.variants),
            "without_variant": dict(self.without_variant),
            "num_unanswered": self.num_unanswered,
            "num_new_chains": self.num_new_chains,
            "num_new_tokens": self.num_new_tokens,
            "stopped": self.stopped,
        }

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"new       {format_plural(self.num_new_chains, 'answer')}, {self.num_new_tokens:,} tokens",
            *(f"variants  {kind}: {num:,}" for kind, num in sorted(self.variants.items())),
            *(f"dropped   {reason}: {num:,}" for reason, num in self.without_variant.most_common()),
        ]


def augment(config: BuildConfig, *, retry_failures: bool = False) -> Augmented:
    """Asks until nothing is open. Raises ConfigError if no variant needs the teacher, and the errors of `build`."""
    # A start takes minutes, and every turn asks the same teacher.
    with SharedEngine() as shared:
        return _take_turns(config, shared, retry_failures=retry_failures)


def _take_turns(config: BuildConfig, shared: SharedEngine, *, retry_failures: bool) -> Augmented:
    found = config.prompts.augment
    if found is None or found.cache is None:
        raise ConfigError(
            "no edit of prompts.augment needs the teacher: run teacher-cache build directly, or add paraphrase, "
            "back_translation or solve, and prompts.augment.cache"
        )
    several = [one.kind for one in found.edits if one.solve is not None or (one.asks_teacher and one.variants > 1)]
    if several and config.sampling.temperature == 0:
        raise ConfigError(
            f"prompts.augment: {several[0]} needs answers that differ, and sampling.temperature is 0: raise it for "
            "this command (--set sampling.temperature=0.6)"
        )
    scrubber = scrubber_of(config)
    prompts = prompts_to_vary(config.prompts, scrubber)
    # Once a text: every turn makes all variants again.
    is_personal = None if scrubber is None else functools.cache(scrubber.is_personal)
    warn_of_unscrubbed(_asking(config, {}))
    done = Augmented()
    for turn in range(MAX_TURNS):
        # What fails again is not asked a third time.
        retry = retry_failures and turn == 0
        answers = read_answers(found.cache, config.sampling.max_tokens, retry=retry)
        made = [*variants(found, prompts, answers, is_personal)]
        questions = [one for one in made if isinstance(one, Question)]
        done.num_unanswered = len(questions)
        if not questions:
            done.variants = Counter(one.kind for one in made if isinstance(one, Variant))
            done.without_variant = Counter(f"{one.kind}: {one.reason}" for one in made if isinstance(one, NoVariant))
            break
        result = _ask(config, questions, scrubber, shared, retry_failures=retry)
        done.num_new_chains += result.recorded.num_chains
        done.num_new_tokens += result.recorded.num_tokens
        if result.stopped is not None:
            done.stopped = result.stopped
            break
    return done


def _ask(
    config: BuildConfig,
    questions: list[Question],
    scrubber: Scrubber | None,
    shared: SharedEngine,
    *,
    retry_failures: bool,
) -> BuildResult:
    asked = {(one.step, prompt_id_of(one.messages)): one for one in questions}
    wanted: Counter[str] = Counter()
    for one in asked.values():
        wanted[_purpose(one.step)] += one.samples
    counts = ", ".join(format_plural(num, purpose) for purpose, num in sorted(wanted.items()))
    note(f"asking the teacher for {counts}")
    prompts = [Prompt(prompt_id, one.messages, step, "train") for (step, prompt_id), one in asked.items()]
    loaded = LoadedPrompts(prompts, [], [], [])
    build = _asking(config, {one.step: one.samples for one in questions})
    return build_loaded(build, loaded, WHOLE, scrubber, retry_failures=retry_failures, shared=shared)


def _asking(config: BuildConfig, steps: Mapping[str, int]) -> BuildConfig:
    """The build that asks questions, `steps` samples of each."""
    assert config.prompts.augment is not None
    # The rows are at hand: the sources only say how many samples each step takes.
    sources = [
        JsonlSource(kind="jsonl", name=step, path=config.cache, prompt_field="question", samples=samples)
        for step, samples in sorted(steps.items())
    ]
    return config.updated(
        cache=config.prompts.augment.cache,
        run=f"{config.run}_augment",
        prompts=config.prompts.updated(
            sources=sources or config.prompts.sources, augment=None, decontaminate=None, dedupe=None
        ),
        sampling=config.sampling.updated(until=None, samples=1),
    )


def _purpose(step: str) -> str:
    """In a word. Example: back_translation-out → translation."""
    kind, _, _ = step.partition("-")
    last = step.rpartition("-")[2]
    return {"out": "translation", "back": "back translation", "solutions": "solution"}.get(last, kind)
