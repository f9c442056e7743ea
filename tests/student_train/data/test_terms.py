"""Terms of a domain: found in text, marked on tokens, weighted by key."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.errors import ConfigError
from student_train.config.data import TermsConfig
from student_train.data import terms
from student_train.data.attached import Attached
from student_train.data.completion_text import spell
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.selection import Selection
from student_train.data.terms import MarkedTerms, read_found, terms_path, write_terms
from tests.helpers.vocabularies import WORDS, make_text_cache, teacher_tokenizer
from tests.student_train.data.test_stream import read


@pytest.mark.parametrize(
    ("words", "options", "said", "found"),
    [
        (["ion", "Na"], {}, "An ION, a nation, na.", ["ION", "na"]),
        (["ion"], {"whole_words": False, "match_case": True}, "ION nation", ["ion"]),
        (["ATP", "ATP synthase", "ATPase"], {}, "ATP\n synthase makes ATP; atpases do not", ["ATP\n synthase", "ATP"]),
        (["质数", "+"], {}, "求质数之和: 2+3", ["质数", "+"]),
    ],
)
def test_terms_are_found_in_text(words: list[str], options: Any, said: str, found: list[str]) -> None:
    config = TermsConfig(words=words, **options)
    pattern = terms._pattern_of(tuple(words), config.match_case, config.whole_words)
    assert [one[0] for one in pattern.finditer(said)] == found


def test_every_token_that_holds_a_part_is_marked() -> None:
    text = spell([b"a ", b"pr", b"ime", b" \xe8", b"\xb4\xa8", b"."])
    assert text.tokens_of(2, 7) == slice(1, 3)
    # The token of a space and half a character, and that of its other half.
    assert text.tokens_of(8, 9) == slice(3, 5)


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    root = tmp_path_factory.mktemp("terms")
    make_text_cache(root / "cache", teacher_tokenizer(root / "teacher"), num_chains=20)
    return freeze(root / "selection.parquet", SelectionRequest([CacheSource(root / "cache")]))


def marked(folder: Path, selection: Selection, **given: Any) -> MarkedTerms:
    config = TermsConfig.model_validate(given)
    path = terms_path(folder, "distill", selection, config)
    write_terms(path, selection, config)
    return MarkedTerms(path, selection, config)


def test_terms_weigh_the_tokens_that_say_them(selection: Selection, tmp_path: Path) -> None:
    """By key, through packs: weights are 3 exactly where the text of a chain's tokens says one of its terms."""
    words = {word for word in WORDS if word.isascii() and word.isalpha()}
    common, own = sorted(words, key=lambda word: (-len(word), word))[:2]
    (tmp_path / "list.txt").write_text(f"# comment\n{common.upper()}\nNever said\n")
    marks = marked(tmp_path, selection, file=str(tmp_path / "list.txt"), sql=f"if(sample_id < '8', ['{own}'], [])")
    tokenizer = teacher_tokenizer(tmp_path / "again")
    weights: dict[tuple[int, int], float] = {}
    ids: dict[tuple[int, int], int] = {}
    for pack in read(selection, PlanSpec(256, max_tokens=64, long_chains="split"))[0]:
        keys = list(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True))
        weights |= zip(keys, Attached(terms=marks).to(pack).weights_N.tolist(), strict=True)
        ids |= zip(keys, pack.sampled_ids_N.tolist(), strict=True)
    num_said = 0
    for row, length in enumerate(selection.num_tokens_R.tolist()):
        parts = [tokenizer.decode([ids[row, token]]) for token in range(length)]
        starts = np.cumsum([0, *map(len, parts)])
        terms_here = [common, own] if selection.key_R[row] < 8 << 60 else [common]
        places = [one.span() for one in re.finditer(rf"\b(?:{'|'.join(terms_here)})\b", "".join(parts))]
        num_said += len(places)
        expected = [any(a < stop and start < b for start, stop in places) for a, b in itertools.pairwise(starts)]
        assert [weights[row, token] == 3 for token in range(length)] == expected
    found = read_found(tmp_path, "distill")
    assert found is not None
    assert sum(one["count"] for one in found["terms"]) == num_said > 10
    assert found["terms"][0]["term"].lower() in found["terms"][0]["example"].lower()
    assert found["unmatched"] == ["Never said"]
    assert found["num_tokens"] == sum(weight == 3 for weight in weights.values())
    (tmp_path / "list.txt").write_text(common)
    with pytest.raises(ConfigError, match=r"list\.txt has changed since the run marked its terms"):
        MarkedTerms(next(tmp_path.glob("*.npy")), selection, TermsConfig(file=tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"words": ["zzz"]}, "none of 1 terms occurs in the 20 selected chains"),
        ({"file": "/nowhere/list.txt"}, "/nowhere/list.txt cannot be read: No such file"),
        ({"sql": "nothing"}, "data.terms.sql 'nothing': there is no column nothing"),
        ({"words": ["a" * 300]}, "has 300 characters, above 200"),
    ],
)
def test_terms_that_cannot_be_used_are_refused(selection: Selection, tmp_path: Path, given: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        marked(tmp_path, selection, **given)
    assert not list(tmp_path.iterdir())
