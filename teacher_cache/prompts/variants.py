"""Variants of prompts by `prompts.augment`.

In: prompts with their rows, and what the teacher has said so far. Out, per variant: the variant, the question that the
teacher must answer first, or why there is none. Whoever asks the teacher (teacher_cache.augmenting) calls this again
with its answers until no question is left; a translation, for example, is followed by the question for the way back.

A variant has the reference of its prompt only where `reference: keep` says so. Otherwise it has none, or the answer
that the teacher's samples agree on.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random

from stillroom.judging.marked import find_answer, plain
from stillroom.schema.records import Message, Prompt, prompt_id_of, stable_hash
from teacher_cache.prompts.config import FileSource, ReasoningGymSource, TemplateSource
from teacher_cache.prompts.conversations import Json
from teacher_cache.prompts.edits import change_numbers, insert_synonyms, numbers_in, replace_synonyms
from teacher_cache.prompts.kept import KeptPrompt, prompt_of
from teacher_cache.prompts.lexicon import Lexicon
from teacher_cache.prompts.sources import Draft
from teacher_cache.prompts.variant_config import (
    TRANSLATE,
    AnyEdit,
    AugmentConfig,
    BackTranslationEdit,
    InsertionEdit,
    NumberEdit,
    ParaphraseEdit,
    SolveConfig,
    SynonymEdit,
    WordEdit,
)
from teacher_cache.scrub.counts import METADATA_KEY, PLACEHOLDER

Answers = Mapping[str, Mapping[int, str | None]]
"""By prompt and sample what the teacher answered; None where it was cut off or failed."""

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.4, 2.5
"""A rewritten question that is much shorter or longer is another question, or has remarks around it."""
ASKS = re.compile("[?？؟]")
NUMERIC = re.compile(r"-?\d+(?:/\d+)?%?")
QUANTITY = re.compile(r"[$€£¥]?\s?(-?)[$€£¥]?\s?(\d[\d,]*(?:\.\d+)?)(?:\s?/\s?(\d+))?\s?(%|[A-Za-z]+)?")


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of a prompt."""

    prompt: Prompt
    draft: Draft
    source: FileSource
    where: str
    kind: str


@dataclass(frozen=True, slots=True)
class Question:
    """What the teacher must answer `samples` times. `step` names edit and purpose, such as paraphrase or
    numbers-solutions; the answers are chains of a source of this name.
    """

    step: str
    messages: tuple[Message, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class NoVariant:
    """Why a variant does not exist."""

    kind: str
    reason: str


class _Unanswered(Exception):
    def __init__(self, question: Question) -> None:
        super().__init__(question.step)
        self.question = question


class _Unusable(Exception):
    """Why there is no variant."""


def variants(
    config: AugmentConfig,
    prompts: Sequence[KeptPrompt],
    answers: Answers,
    is_personal: Callable[[Sequence[str]], bool] | None = None,
) -> Iterator[Variant | Question | NoVariant]:
    """All variants of all prompts; none of texts that are `is_personal`, which are not sent either. Raises ConfigError
    where WordNet is needed and missing.
    """
    needs_words = any(isinstance(one, WordEdit) for one in config.edits)
    maker = _Maker(config, answers, Lexicon(config.lexicon) if needs_words else None, is_personal)
    for edit, step in zip(config.edits, _steps(config.edits), strict=True):
        for one in prompts:
            if _is_used(edit, one):
                for variant in range(edit.variants):
                    yield maker.make(step, edit, one, variant)


def _steps(edits: Sequence[AnyEdit]) -> list[str]:
    """A name for each edit: its kind, with a number where there are several of the kind."""
    num, seen = Counter(one.kind for one in edits), Counter[str]()
    steps = []
    for one in edits:
        seen[one.kind] += 1
        steps.append(one.kind if num[one.kind] == 1 else f"{one.kind}-{seen[one.kind]}")
    return steps


def _is_used(edit: AnyEdit, one: KeptPrompt) -> bool:
    if isinstance(one.source, ReasoningGymSource | TemplateSource) or one.prompt.split != "train":
        return False
    roles = [message.role for message in one.draft.messages]
    # Of a conversation, the last message alone cannot be understood.
    return roles in (["user"], ["system", "user"]) and (edit.sources is None or one.source.name in edit.sources)


class _Maker:
    def __init__(
        self,
        config: AugmentConfig,
        answers: Answers,
        lexicon: Lexicon | None,
        is_personal: Callable[[Sequence[str]], bool] | None,
    ) -> None:
        self._config, self._answers, self._lexicon, self._is_personal = config, answers, lexicon, is_personal

    def make(self, step: str, edit: AnyEdit, one: KeptPrompt, variant: int) -> Variant | Question | NoVariant:
        try:
            return self._made(step, edit, one, variant)
        except _Unanswered as error:
            return error.question
        except _Unusable as error:
            return NoVariant(edit.kind, str(error))

    def _made(self, step: str, edit: AnyEdit, one: KeptPrompt, variant: int) -> Variant:
        assert not isinstance(one.source, ReasoningGymSource | TemplateSource)
        question = one.draft.messages[-1].content
        text, how = self._edited(step, edit, question, one, variant)
        self._require_clean(text)
        messages = (*one.draft.messages[:-1], Message("user", text))
        # What was scrubbed counts once, in the prompt itself.
        left_out = {"judge", METADATA_KEY}
        reference, judge = None, {}
        if isinstance(edit, WordEdit) and edit.reference == "keep":
            # Those of the prompt: another row with the same question may have given them.
            reference, judge = one.prompt.reference, {"judge": one.prompt.metadata.get("judge")}
        elif one.source.reference_field is not None:
            left_out.add(one.source.reference_field)
        metadata = {key: value for key, value in one.prompt.metadata.items() if key not in left_out}
        draft = Draft(one.draft.where, messages, reference, metadata, is_variant=True)
        finished = prompt_of(draft, one.source.name, one.source.system, one.source.instruction, 0.0)
        if edit.solve is not None:
            reference, votes = self._solved(f"{step}-solutions", edit.solve, finished.messages)
            self._require_clean(reference)
            judge = {"judge": "math" if NUMERIC.fullmatch(reference) else "exact"}
            how |= {"agreed": votes, "samples": edit.solve.samples}
        source = {"kind": edit.kind, "of": one.prompt.prompt_id, "variant": variant, "seed": self._config.seed, **how}
        metadata |= {**{key: value for key, value in judge.items() if value is not None}, "augment": source}
        draft = replace(draft, reference=reference, metadata=metadata)
        prompt = replace(finished, reference=reference, metadata=metadata)
        return Variant(prompt, draft, one.source, f"{one.where}, {edit.kind} {variant}", edit.kind)

    def _edited(self, step: str, edit: AnyEdit, question: str, one: KeptPrompt, variant: int) -> tuple[str, Json]:
        """The variant's text and how it was made."""
        rng = Random(stable_hash("augment", self._config.seed, edit.kind, one.prompt.prompt_id, variant))
        match edit:
            case SynonymEdit() | InsertionEdit():
                assert self._lexicon is not None
                apply = replace_synonyms if isinstance(edit, SynonymEdit) else insert_synonyms
                edited = apply(question, edit.frac, self._lexicon, rng)
            case NumberEdit():
                edited = change_numbers(question, edit.spread, rng)
            case ParaphraseEdit():
                asked = edit.prompt.replace("{question}", question)
                return _accepted(question, self._said(step, asked, edit.variants)[variant]), {}
            case BackTranslationEdit():
                return self._translated(step, edit, question, variant), {"through": edit.through}
        if edited is None:
            raise _Unusable("nothing to change")
        return edited[0], {"changes": edited[1]}

    def _translated(self, step: str, edit: BackTranslationEdit, question: str, variant: int) -> str:
        def asked(text: str, source: str, target: str) -> str:
            return TRANSLATE.replace("{source}", source).replace("{target}", target).replace("{question}", text)

        there = self._said(f"{step}-out", asked(question, edit.language, edit.through), edit.variants)[variant]
        if there is None or not there.strip():
            raise _Unusable("no complete answer")
        self._require_clean(there)
        back = self._said(f"{step}-back", asked(there.strip(), edit.through, edit.language), 1)[0]
        return _accepted(question, back)

    def _require_clean(self, *texts: str) -> None:
        # A teacher may name persons, and its answers may be older than `scrub`.
        if self._is_personal is not None and self._is_personal(texts):
            raise _Unusable("personal data")

    def _said(self, step: str, text: str, samples: int) -> Mapping[int, str | None]:
        return self._asked(step, (Message("user", text),), samples)

    def _asked(self, step: str, messages: tuple[Message, ...], samples: int) -> Mapping[int, str | None]:
        found = self._answers.get(prompt_id_of(messages), {})
        if any(sample not in found for sample in range(samples)):
            raise _Unanswered(Question(step, messages, samples))
        return found

    def _solved(self, step: str, solve: SolveConfig, messages: tuple[Message, ...]) -> tuple[str, int]:
        found = self._asked(step, messages, solve.samples)
        results = [_result(found[sample]) for sample in range(solve.samples)]
        (result, votes), (_, others), *_ = *Counter(filter(None, results)).most_common(2), ("", 0), ("", 0)
        if votes < solve.agree:
            raise _Unusable(f"fewer than {solve.agree} of {solve.samples} answers agree")
        if votes == others:
            raise _Unusable("as many answers agree on another result")
        return result, votes


def _accepted(question: str, answer: str | None) -> str:
    """The rewritten question. Raises _Unusable for one that asks something else, or was not finished."""
    text = (answer or "").strip().strip('"“”').strip()
    if not text:
        raise _Unusable("no complete answer")
    if sorted(PLACEHOLDER.findall(text)) != sorted(PLACEHOLDER.findall(question)):
        raise _Unusable("other placeholders")
    if numbers_in(text) != numbers_in(question):
        raise _Unusable("other numbers")
    # Small teachers reply with what they make of the question: "A farm has 29 animals, and 7 of them are cows."
    if ASKS.search(question) is not None and ASKS.search(text) is None:
        raise _Unusable("no question")
    if text.count("\n\n") > question.count("\n\n"):
        raise _Unusable("remarks around it")
    if not MIN_LENGTH_RATIO <= len(text) / len(question) <= MAX_LENGTH_RATIO:
        raise _Unusable("much shorter or longer")
    if text.split() == question.split():
        raise _Unusable("the same text")
    return text


def _result(answer: str | None) -> str | None:
    """The marked answer in a form in which equal answers are equal: 1,200 and $1200.00 and 1200 dollars."""
    candidates = find_answer(answer).candidates if answer else ()
    if not candidates:
        return None
    text = plain(candidates[0].text).strip().removesuffix(".")
    found = QUANTITY.fullmatch(text)
    if found is None or (found[3] is not None and int(found[3]) == 0):
        # An unmarked text is not a result, only something the teacher said on the way.
        return " ".join(text.casefold().split()) or None if candidates[0].mark != "whole" else None
    value = Fraction(found[2].replace(",", "")) / int(found[3] or 1)
    return f"{found[1]}{value}{'%' if found[4] == '%' else ''}"
