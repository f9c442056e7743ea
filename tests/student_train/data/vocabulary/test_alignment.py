"""Bytes of tokens and alignment on them, compared with every offset looked up one by one."""

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillroom.pieces import Vocabulary, vocabulary_of
from student_train.data.text import HuggingFaceText
from student_train.data.vocabulary.alignment import (
    Alignment,
    Speller,
    align,
    chunk_logprobs,
    first_tokens_with,
    is_written_with,
)
from student_train.data.vocabulary.pieces import END, VocabularyPair, lengths_of, pair_of
from tests.helpers.tiny_tokenizer import byte_level, metaspace
from tests.helpers.vocabularies import byte_bpe

TEXTS = ["hello world, what is 2+3?", "Ärger über € und 你好 🎉 today", " 🎉🎉 \n\n  5", "<0x41> x"]


def with_prefix_space() -> Tokenizer:
    """Llama-like: writes a space in front of every text."""
    tokenizer = metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def words() -> Tokenizer:
    """Knows few words, and <unk> for all others."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def fast(tokenizer: Tokenizer) -> HuggingFaceText:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = "{{ messages }}"
    return HuggingFaceText(made, len(made))


def speller_of(text: HuggingFaceText) -> tuple[Speller, VocabularyPair]:
    student = vocabulary_of(text.tokenizer)
    # A teacher of single bytes: which it is plays no part in spelling.
    pair = pair_of(Vocabulary({0: "<|end|>", 1: "</think>"}, {0, 1}), {0}, student, text.end_id)
    return Speller(pair, text.encode_completions), pair


@pytest.mark.parametrize("make", [byte_level, metaspace, with_prefix_space])
def test_tokens_spell_their_text(make: Any) -> None:
    text = fast(make())
    speller, pair = speller_of(text)
    for data, spelling in zip(TEXTS, speller.spell([one.encode() + END for one in TEXTS]), strict=True):
        assert spelling is not None
        *ids, end = spelling.ids_S.tolist()
        assert end == text.end_id
        assert [ids] == text.encode_completions([data])
        spelled = b"".join(pair.student_bytes[one] for one in ids)
        assert spelled == (b" " if make is with_prefix_space else b"") + data.encode()
        assert spelling.lengths_S.sum() == len(data.encode()) + len(END)


@pytest.mark.parametrize("tokenizer", [byte_bpe(300, ["<|im_end|>"], lowercase=True), words()])
def test_a_text_that_is_changed_is_not_aligned(tokenizer: Tokenizer) -> None:
    speller, _ = speller_of(fast(tokenizer))
    assert speller.spell([b"hello", b"Hello you"])[1] is None


def test_half_a_character_at_the_end_is_lost_and_in_the_middle_refused() -> None:
    speller, _ = speller_of(fast(byte_level()))
    cut, broken, ended = speller.spell([b"a\xe4\xbd", b"a\xe4\xbd b", b"a\xe4\xbd" + END])
    assert cut is not None
    assert cut.lengths_S.sum() == 1
    assert broken is None
    assert ended is None


def test_special_tokens_are_marks_where_both_sides_have_them() -> None:
    student = Vocabulary({0: "a", 1: "</think>", 2: "<|im_end|>", 3: "<|tool|>"}, {1, 2, 3})
    teacher = Vocabulary({0: "</think>", 1: "<eos>", 2: "<|user|>", 3: "<0xFF>", 4: "a"}, {0, 1, 2})
    pair = pair_of(teacher, {1}, student, end_id=2)
    assert pair.teacher_bytes == [b"\xff</think>\xfe", END, b"<|user|>", b"\xfd", b"a"]
    assert pair.student_bytes == [b"a", b"\xff</think>\xfe", END, b"\xff\xff<|tool|>\xfe"]
    assert pair.student_id_of == {END: 2, b"\xff</think>\xfe": 1}
    (spelling,) = Speller(pair, lambda texts: [[0] * len(one) for one in texts]).spell([b"aa\xff</think>\xfea" + END])
    assert spelling is not None
    assert spelling.ids_S.tolist() == [0, 0, 1, 0, 2]


@pytest.mark.parametrize("make", [metaspace, with_prefix_space, lambda: byte_bpe(360, ["<|im_end|>"], digits=True)])
@pytest.mark.parametrize("start", [0, 3, -2])
def test_boundaries_are_those_found_one_by_one(make: Any, start: int) -> None:
    """`start` bytes of the teacher's are not the student's, or the reverse."""
    teacher = fast(byte_bpe(300, ["<|im_end|>"]))
    of_id = vocabulary_of(teacher.tokenizer).bytes_by_id()
    speller, _ = speller_of(fast(make()))
    for data in TEXTS:
        (ids_T,) = teacher.encode_completions([data])
        said = b"xyz" + data.encode() if start > 0 else data.encode()[max(-start, 0) :]
        (spelling,) = speller.spell([said])
        if spelling is None:
            # Two bytes less may be half a character.
            continue
        alignment = align(lengths_of(of_id)[ids_T], start, spelling)
        covers = [(place, byte) for place, one in enumerate(ids_T) for byte in range(len(of_id[one]))]
        expected, at = [], 0
        for number, length in enumerate(spelling.lengths_S.tolist()):
            # The space in front of a text is the student's alone.
            is_led = make is with_prefix_space and number == 0
            is_covered = length and not is_led and 0 <= at - start < len(covers)
            expected.append(covers[at - start] if is_covered else (-1, 0))
            at += length
        assert list(zip(alignment.teacher_place_S, alignment.skipped_S, strict=True)) == expected
        logprobs_T = -np.arange(1, len(ids_T) + 1).astype(np.float32)
        assert_chunks(alignment, logprobs_T, chunk_logprobs(alignment, logprobs_T))


def assert_chunks(alignment: Alignment, logprobs_T: Any, found_S: Any) -> None:
    common = np.flatnonzero((alignment.teacher_place_S >= 0) & (alignment.skipped_S == 0)).tolist()
    expected = np.full(len(found_S), np.nan)
    for first, after in zip(common, [*common[1:], None], strict=True):
        places = alignment.teacher_place_S
        stop = len(logprobs_T) if after is None else places[after]
        expected[(len(found_S) if after is None else after) - 1] = logprobs_T[places[first] : stop].sum()
    np.testing.assert_allclose(found_S, expected)


def test_a_chunk_that_the_teacher_does_not_finish_has_no_value() -> None:
    ends = np.array([1, 2, 4])
    alignment = Alignment(np.zeros(2, np.int32), ends, np.array([1, 3]), np.array([0, 1]), np.zeros(2, int))
    found_S = chunk_logprobs(alignment, np.array([-1.0, -2.0, -3.0], np.float32))
    np.testing.assert_array_equal(found_S, [-1.0, np.nan])


@pytest.mark.parametrize("make", [byte_level, metaspace, with_prefix_space])
def test_first_tokens_are_those_in_the_middle_of_a_text(make: Any) -> None:
    text = fast(make())
    _, pair = speller_of(text)
    first_tokens = first_tokens_with(pair, text.encode_completions)
    strings = [b"hello", b" what", b"2+3", "€ und".encode(), b"he\xe4\xbd", b"\xe4", b"\xbd\xbd", b""]
    spelled = [pair.student_bytes[one] if one >= 0 else b"" for one, _ in first_tokens(strings)]
    for data, found, (_, length) in zip(strings, spelled, first_tokens(strings), strict=True):
        assert data.startswith(found)
        assert len(found) == length
    assert all(spelled[:5])
    # A single byte is a token on its own, two halves of a character are not one.
    assert spelled[5:] == [b"\xe4", b"", b""]


@pytest.mark.parametrize("make", [byte_level, metaspace, with_prefix_space])
def test_neighbours_in_a_text_are_written_and_what_would_be_joined_is_not(make: Any) -> None:
    text = fast(make())
    _, pair = speller_of(text)
    is_written = is_written_with(pair, text.encode_completions)
    neighbours = [two for ids in text.encode_completions(TEXTS) for two in itertools.pairwise(ids[1:])]
    assert all(is_written(neighbours))
    # The two halves of a merged token.
    id_of = {data: token_id for token_id, data in enumerate(pair.student_bytes)}
    assert is_written([(id_of[b"h"], id_of[b"e"]), (id_of[b"e"], id_of[b"h"])]) == [False, True]
