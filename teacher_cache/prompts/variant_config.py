"""Configuration of `prompts.augment`: how variants of prompts are made. Part of teacher_cache.config."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stillroom.config import StrictModel
from stillroom.storage.paths import CacheRoot

PARAPHRASE = (
    "Rewrite the following question in other words. Keep every number, name and condition, and what is asked for. "
    "Reply with the rewritten question only.\n\n{question}"
)
TRANSLATE = (
    "Translate the following text from {source} into {target}. Keep numbers and formulas as they are. Reply with the "
    "translation only.\n\n{question}"
)


class SolveConfig(StrictModel):
    """The teacher answers each variant several times, and the answer that enough samples agree on becomes the
    reference. Variants without one are dropped."""

    samples: int = Field(default=4, ge=2)
    """Answers per variant."""
    agree: int = Field(default=3, ge=2)
    """Answers that must agree."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.agree > self.samples:
            raise ValueError(f"agree={self.agree} exceeds samples={self.samples}")
        return self


class Edit(StrictModel):
    """Settings of every kind of edit."""

    sources: list[str] | None = None
    """Sources whose prompts get variants. None: all files and datasets."""
    variants: int = Field(default=1, ge=1)
    """Variants per prompt."""
    solve: SolveConfig | None = None
    """Derive the reference again from the teacher's answers."""

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher must say something before there is a variant."""
        return self.solve is not None


class WordEdit(Edit):
    """Edits of words, which may change what a question means."""

    frac: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the words that are edited, at least one."""
    reference: Literal["drop", "keep"] = "drop"
    """`drop`: variants have no reference. `keep` trusts that the answer is still right."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.reference == "keep" and self.solve is not None:
            raise ValueError("reference: keep has no effect with solve, which derives the reference again: remove one")
        return self


class SynonymEdit(WordEdit):
    """Replaces English words with WordNet synonyms, except in formulas and code, and words with several common
    meanings."""

    kind: Literal["synonyms"]


class InsertionEdit(WordEdit):
    """Inserts synonyms of the question's words at random places, as noise (EDA, arXiv 1901.11196)."""

    kind: Literal["insertions"]


class NumberEdit(Edit):
    """Changes the numbers of a word problem, equal ones alike, and has the teacher solve it again."""

    kind: Literal["numbers"]
    spread: float = Field(default=0.5, gt=0, lt=1)
    """A number n becomes one between n (1 - spread) and n (1 + spread); 0 and 1 stay."""
    solve: SolveConfig = SolveConfig()
    """Derive the reference from the teacher's answers."""


class ParaphraseEdit(Edit):
    """Has the teacher rephrase the question. Paraphrases that change a number or are cut off are dropped."""

    kind: Literal["paraphrase"]
    prompt: str = PARAPHRASE
    """Instruction to the teacher; must contain {question}."""

    @property
    def asks_teacher(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _has_question(self) -> Self:
        if "{question}" not in self.prompt:
            raise ValueError("prompt lacks {question}")
        return self


class BackTranslationEdit(Edit):
    """Has the teacher translate the question to another language and back. Results that change a number are dropped."""

    kind: Literal["back_translation"]
    language: str = "English"
    """Language of the questions."""
    through: str = "German"
    """Intermediate language."""

    @property
    def asks_teacher(self) -> bool:
        """Always."""
        return True


AnyEdit = Annotated[
    SynonymEdit | InsertionEdit | NumberEdit | ParaphraseEdit | BackTranslationEdit, Field(discriminator="kind")
]


class AugmentConfig(StrictModel):
    """Variants of prompts of the train split, decontaminated like all others. Prompts with several user messages get
    none. `metadata.augment` records how each variant was made."""

    edits: list[AnyEdit] = Field(min_length=1)
    """The edits that make variants."""
    seed: int = 0
    """Seed of the edits, each derived from it and the prompt."""
    lexicon: Path | None = None
    """Folder with WordNet's database files, for synonyms and insertions. None: where a package installed them."""
    cache: CacheRoot | None = None
    """Cache of the teacher's answers for variants, filled by `teacher-cache augment`: paraphrases, translations and
    solutions."""

    @model_validator(mode="after")
    def _cache_has_use(self) -> Self:
        asking = [one.kind for one in self.edits if one.asks_teacher]
        if asking and self.cache is None:
            raise ValueError(f"{asking[0]} needs the teacher: set cache to a folder for its answers")
        if self.cache is not None and not asking:
            raise ValueError("cache has no effect: no edit needs the teacher")
        if self.lexicon is not None and not any(isinstance(one, WordEdit) for one in self.edits):
            raise ValueError("lexicon has no effect without synonyms or insertions")
        return self
