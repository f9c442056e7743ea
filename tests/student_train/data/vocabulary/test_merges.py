"""The merges as arrays against the tokenizer itself, over strings that its patterns split in every way."""

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from student_train.data.vocabulary.alignment import first_tokens_with, is_written_with
from student_train.data.vocabulary.merges import MAX_BYTES, UNKNOWN, Merges, Table, append, merges_of, pack
from student_train.data.vocabulary.pieces import lengths_of
from student_train.data.vocabulary.transport import Strings, joins_of
from tests.helpers.tiny_tokenizer import byte_level, metaspace
from tests.helpers.vocabularies import byte_bpe
from tests.student_train.data.vocabulary.test_alignment import fast, speller_of

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PARTS = [
    "hello",
    " world",
    "Wor",
    " is",
    "?",
    "  ",
    " ",
    "\n",
    "2",
    "345",
    "+",
    "'s",
    "!",
    "\u00c4rger",
    "<b>",
    "er",
    "l",
]
STRINGS = sorted({"".join(some) for size in (1, 2, 3) for some in itertools.product(PARTS, repeat=size)})


def split_by(pattern: str) -> Tokenizer:
    """Digits by three, and words that begin after a line break alone."""
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer


def with_added() -> Tokenizer:
    tokenizer = byte_bpe(360, ["<|im_end|>"], digits=True)
    tokenizer.add_tokens(["<b>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, lambda: split_by(CONTRACTIONS + WORDS), with_added])
def test_merges_give_what_the_tokenizer_gives(make: Any) -> None:
    text = fast(make())
    _, pair = speller_of(text)
    merges = merges_of(text.tokenizer, pair.student_bytes)
    assert merges is not None
    strings = [one.encode() for one in STRINGS]
    expected = np.array(first_tokens_with(pair, text.encode_completions)(strings))
    ids_N, lengths_N = merges.first_tokens(pack(strings), lengths_of(strings))
    is_known_N = ids_N != UNKNOWN
    np.testing.assert_array_equal(ids_N[is_known_N], expected[is_known_N, 0])
    np.testing.assert_array_equal(lengths_N[is_known_N], expected[is_known_N, 1])
    asked = [one for one, is_known in zip(strings, is_known_N.tolist(), strict=True) if not is_known]
    assert all(len(one) > MAX_BYTES or not one.isascii() or b"'" in one or b"<" in one for one in asked)
    assert is_known_N.mean() > 0.5
    ids = range(len(pair.student_bytes))
    pairs = [(before, after) for before, after in itertools.product(ids, ids) if (before + after) % 7 == 0]
    written = np.array(is_written_with(pair, text.encode_completions)(pairs))
    before_P, after_P = np.array(pairs).T
    found_P = merges.is_written(before_P, after_P)
    is_known_P = found_P != UNKNOWN
    np.testing.assert_array_equal(found_P[is_known_P] > 0, written[is_known_P])
    assert is_known_P.mean() > 0.1
    assert 0 < written[is_known_P].mean() < 1


@pytest.mark.parametrize("pattern", [r"foo|\s+", r"[a-f]+", r"\bx", "a"])
def test_a_tokenizer_that_looks_at_single_letters_is_asked(pattern: str) -> None:
    assert _merges(split_by(pattern)) is None
    assert _merges(byte_bpe(360, ["<|im_end|>"], lowercase=True)) is None
    assert _merges(metaspace()) is None


def test_strings_ahead_are_those_that_are_kept() -> None:
    teacher = [b"he", b"llo", b" world", b", what is this, then", b"l", b"", b"2", b"+3"]
    text = fast(byte_level())
    _, pair = speller_of(text)
    joins, first_tokens = joins_of(pair.student_bytes), first_tokens_with(pair, text.encode_completions)
    strings_V, tokens_V = (
        np.repeat(np.arange(len(teacher)), len(teacher)),
        np.tile(np.arange(len(teacher)), len(teacher)),
    )
    has_bytes = strings_V != 5
    strings_V, tokens_V = strings_V[has_bytes], tokens_V[has_bytes]
    expected = None
    for merges in (None, merges_of(text.tokenizer, pair.student_bytes)):
        strings = Strings(teacher, {5: 1}, first_tokens, joins, merges)
        begun = strings.begin(np.arange(len(teacher)), np.zeros(len(teacher), np.int64))
        counted = strings.extend(begun[strings_V[::3]], tokens_V[::3])
        strings.settle()
        for _ in range(2):
            numbers_N, first_N, is_settled_N = strings.look_ahead(begun[strings_V], tokens_V)
            kept = strings.extend(begun[strings_V], tokens_V)
            np.testing.assert_array_equal(first_N, strings.first[kept])
            np.testing.assert_array_equal(is_settled_N, strings.is_settled[kept] > 0)
            is_counted_N = np.isin(kept, counted) & (tokens_V != 5)
            np.testing.assert_array_equal(numbers_N[is_counted_N], kept[is_counted_N])
            strings.forget_from(int(counted.max()) + 1)
        expected = first_N if expected is None else expected
        np.testing.assert_array_equal(first_N, expected)


def test_a_table_finds_what_was_put_in() -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 1 << 40, 5000))
    values = np.arange(len(keys))
    table = Table(10)
    for part in np.array_split(np.arange(len(keys)), 7):
        table.add(keys[part], values[part])
    np.testing.assert_array_equal(table.get(keys, -1), values)
    np.testing.assert_array_equal(table.get(keys + 1, -1) >= 0, np.isin(keys + 1, keys))
    table.keep_below(100)
    assert len(table) == 100
    np.testing.assert_array_equal(table.get(keys, -1), np.where(values < 100, values, -1))


def test_packed_strings_are_appended() -> None:
    for size, more in itertools.product(range(20), range(18)):
        one, other = bytes(range(1, size + 1)), bytes(range(101, more + 101))
        found = append(pack([one]), np.array([size]), pack([other]))
        np.testing.assert_array_equal(found, pack([one + other]))


def _merges(tokenizer: Tokenizer) -> Merges | None:
    text = fast(tokenizer)
    return merges_of(text.tokenizer, speller_of(text)[1].student_bytes)
