"""Terms of a domain, marked in completions: their tokens count more, or less, in the losses.

In: terms from the configuration, from a file, or of each chain by SQL. Out: a mark for each completion token, by key,
in the run's folder, and beside it what was found: counts by term, with an example. A term is searched for in the text
that the tokens spell, and marks every token that holds a part of it. Cost: one byte a token.

    R chains, T completion tokens of all chains
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.errors import ConfigError, CorruptError, one_line
from stillroom.schema.records import Float32, stable_hash
from stillroom.sql.conditions import in_brackets, run_with
from stillroom.sql.session import open_session
from stillroom.storage.paths import atomic_path, location, write_text_atomic
from student_train.config.data import TermsConfig
from student_train.data.completion_text import CompletionText, CompletionTexts
from student_train.data.pack import Pack
from student_train.data.selection import Selection, keys_of
from student_train.data.token_numbers import TokenNumbers, new_numbers, token_offsets

VERSION = 1
"""Version of the rules below; marks of another version are rebuilt."""
MAX_CHARS = 200
SHOWN_AROUND = 30
"""Characters of an example on either side of a term."""
UNSPACED = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts that put no spaces between words."""
LETTER = rf"[^\W{UNSPACED}]"
EDGE = rf"(?:(?<!{LETTER})|(?!{LETTER}))"
"""Not inside a word."""
_Trie = dict[str, "_Trie"]


class MarkedTerms:
    """The marks at `path` and what was found."""

    def __init__(self, path: Path, selection: Selection, config: TermsConfig) -> None:
        """Raises CorruptError where the files are not those of the selection, ConfigError where the list of terms has
        changed since.
        """
        self._marks, self.weight = TokenNumbers(path, selection), config.weight
        try:
            self.found: Json = json.loads(_found_path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptError(f"{_found_path(path)} cannot be read: {error}: delete {path} to rebuild both") from error
        # A missing file does not count as changed: runs resume on other machines.
        if config.file is not None and config.file.exists() and self.found["hash"] != _hash(config):
            raise ConfigError(
                f"data.terms.file: {config.file} has changed since the run marked its terms: restore it, or choose "
                "another run folder"
            )

    def factors_of(self, pack: Pack) -> Float32:
        """float32 [N]: what the weights of the pack's loss tokens are multiplied by."""
        marks_N = self._marks.of(pack.row_N, pack.token_N)
        return np.where(marks_N > 0, np.float32(self.weight), np.float32(1.0))


def terms_path(folder: Path, stage: str, selection: Selection, config: TermsConfig) -> Path:
    """Where the marks of a stage's tokens lie."""
    # Not the weight, which is applied when marks are read: another one marks nothing again.
    settings = config.model_dump(mode="json", exclude={"weight"})
    return folder / f"{stage}.terms-{stable_hash('terms', VERSION, selection.header.hash, settings)[:16]}.npy"


def write_terms(path: Path, selection: Selection, config: TermsConfig) -> None:
    """Marks the terms in all completions.

    Raises ConfigError for a file, SQL or term that cannot be used, and where no chain holds a term; CorruptError.
    """
    common = tuple(_common_terms(config))
    # As they were written, for whoever reads the counts.
    spelled = {_plain(term, config.match_case): term for term in reversed(common)}
    known = set(spelled)
    own = {
        key: tuple(term for term in terms if _plain(term, config.match_case) not in known)
        for key, terms in (_own_terms(selection, config.sql) if config.sql is not None else {}).items()
    }
    offsets_R = token_offsets(selection)
    found = _Found()
    with atomic_path(path) as temp:
        marks_T = new_numbers(temp, np.uint8, int(offsets_R[-1]))
        for row, text in CompletionTexts(selection, "data.terms").read("mark terms"):
            mine_T = marks_T[offsets_R[row] : offsets_R[row + 1]]
            # Apart: joined to a chain's own terms, a list of thousands would be compiled again for each chain.
            for terms in filter(None, (common, own.get(int(selection.key_R[row]), ()))):
                for match in _pattern_of(terms, config.match_case, config.whole_words).finditer(text.text):
                    mine_T[text.tokens_of(*match.span())] = 1
                    found.add(_plain(match[0], config.match_case), row, text, match)
        marks_T.flush()
        asked = {_plain(term, config.match_case): term for terms in own.values() for term in terms} | spelled
        if not found.counts:
            raise ConfigError(
                f"data.terms: none of {len(asked)} terms occurs in the {selection.num_chains} selected chains: check "
                "the list, match_case and whole_words"
            )
        # Before the marks become visible: both are there, or neither.
        summary = {**found.summary(asked), "num_tokens": int(marks_T.sum()), "hash": _hash(config)}
        write_text_atomic(_found_path(path), json.dumps(summary, ensure_ascii=False, indent=1) + "\n")


def read_found(folder: Path, stage: str) -> Json | None:
    """What `write_terms` found for a stage of the run in `folder`; None without terms."""
    paths = sorted(folder.glob(f"{stage}.terms-*.json"))
    return json.loads(paths[0].read_text(encoding="utf-8")) if paths else None


class _Found:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._rows: dict[str, set[int]] = {}
        self._examples: dict[str, str] = {}

    def add(self, term: str, row: int, text: CompletionText, match: re.Match[str]) -> None:
        self.counts[term] += 1
        self._rows.setdefault(term, set()).add(row)
        if term not in self._examples:
            around = text.text[max(match.start() - SHOWN_AROUND, 0) : match.end() + SHOWN_AROUND]
            # Bytes that are not a character are not JSON.
            self._examples[term] = " ".join(around.encode("utf-8", "replace").decode().split())

    def summary(self, asked: Mapping[str, str]) -> Json:
        """Counts by term, the commonest first. `asked` are the terms as they were written, by how they are counted."""
        return {
            "num_chains": len(set().union(*self._rows.values())),
            "terms": [
                {
                    # Ignoring case, re finds an s in a long s too, which lower() keeps.
                    "term": asked.get(term, term),
                    "count": count,
                    "num_chains": len(self._rows[term]),
                    "example": self._examples[term],
                }
                for term, count in sorted(self.counts.items(), key=lambda one: (-one[1], one[0]))
            ],
            "unmatched": sorted(written for term, written in asked.items() if term not in self.counts),
        }


def _found_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _hash(config: TermsConfig) -> str:
    return stable_hash("terms", sorted(_common_terms(config)))


def _common_terms(config: TermsConfig) -> list[str]:
    """Terms of all chains."""
    lines: list[str] = []
    if config.file is not None:
        try:
            # Editors on Windows begin UTF-8 with a byte order mark, which would belong to the first term.
            lines = config.file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise ConfigError(f"data.terms.file: {config.file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.terms.file: {config.file} is not UTF-8 text: {one_line(error)}") from error
        lines = [line for line in lines if not line.lstrip().startswith("#")]
    return _checked([*config.words, *lines])


def _checked(terms: Iterable[str]) -> list[str]:
    # In the order given, each once; blank ones are dropped.
    kept = list(dict.fromkeys(term for term in (" ".join(one.split()) for one in terms) if term))
    for term in kept:
        if len(term) > MAX_CHARS:
            raise ConfigError(f"data.terms: {term[:40]!r}... has {len(term)} characters, above {MAX_CHARS}: shorten it")
    return kept


def _own_terms(selection: Selection, sql: str) -> dict[int, tuple[str, ...]]:
    """Terms of single chains, by the key of their sample id."""
    own = {}
    for cache in selection.header.caches:
        catalog = Catalog(location(cache.root), cache.chains_version, cache.verdicts_version)
        with open_session(catalog) as session:
            query = f"SELECT sample_id, CAST({in_brackets(sql)} AS VARCHAR[]) AS terms FROM chains"
            table = run_with(session, "data.terms.sql", sql, query)
        # By key: selections hold no sample ids.
        keys = keys_of(table.column("sample_id"), str(catalog.root)).tolist()
        for key, terms in zip(keys, table.column("terms").to_pylist(), strict=True):
            if terms:
                own[key] = tuple(_checked(one for one in terms if one is not None))
    # SQL answers for the whole cache; only selected chains are kept in memory.
    chosen = set(selection.key_R.tolist())
    return {key: terms for key, terms in own.items() if key in chosen}


def _plain(term: str, match_case: bool) -> str:
    """A term as it is counted."""
    words = " ".join(term.split())
    return words if match_case else words.lower()


@functools.lru_cache(maxsize=256)
def _pattern_of(terms: tuple[str, ...], match_case: bool, whole_words: bool) -> re.Pattern[str]:
    """The longest of `terms` at each place."""
    trie: _Trie = {}
    for term in terms:
        node = trie
        for char in _plain(term, match_case):
            node = node.setdefault(char, {})
        # Marks the end of a term, which may go on as a longer one.
        node[""] = {}
    edge = EDGE if whole_words else ""
    return re.compile(f"{edge}{_alternatives(trie)}{edge}", 0 if match_case else re.IGNORECASE)


def _alternatives(node: Mapping[str, "_Trie"]) -> str:
    """A pattern that shares beginnings: of plain alternatives `re` would try thousands at every character."""
    branches = [
        (r"\s+" if char == " " else re.escape(char)) + _alternatives(after) for char, after in node.items() if char
    ]
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    # Greedy, so that of two terms with one beginning the longer one is found.
    return f"{body}?" if "" in node else body
