"""A chain's teacher tokens and student tokens, aligned by the bytes of the text that both spell.

In: the bytes of a chain (pieces.py), the student's encoder. Out: the student's ids and where the boundaries of both
sides fall. Boundaries are byte offsets, so a character that either side splits needs no special case. A text that comes
back from the student's tokenizer with other bytes (lower case, another Unicode form, an unknown character) cannot be
aligned.

T teacher tokens, S student tokens of one chain
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.schema.records import Float32, Int32, Int64
from student_train.data.vocabulary.pieces import MARK, VocabularyPair, lengths_of

Bool = npt.NDArray[np.bool_]
Encode = Callable[[Sequence[str]], list[list[int]]]
"""Texts to the student's ids, in which no text becomes a special token."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A chain as the student writes it: ids_S int32 and the bytes that each stands for, lengths_S int64.

    A SentencePiece tokenizer begins a text with a space of its own, which stands for no byte of the chain; has_space_S
    are the tokens that it is part of.
    """

    ids_S: Int32
    lengths_S: Int64
    has_space_S: Bool


@dataclass(frozen=True, slots=True)
class Alignment:
    """Both sides of one chain. Bytes are counted from the beginning of what the student reads.

    Attributes:
        student_ids_S: int32, the completion in the student's tokens.
        teacher_ends_T, student_ends_S: int64, byte offset after each token.
        teacher_place_S: int64, the teacher token that the student's begins in, or -1. Only student tokens that have one
            may carry a distribution.
        skipped_S: int64, the bytes of that teacher token before the student's; 0 without one.
    """

    student_ids_S: Int32
    teacher_ends_T: Int64
    student_ends_S: Int64
    teacher_place_S: Int64
    skipped_S: Int64

    @property
    def is_common_S(self) -> Bool:
        """Which student tokens begin where a teacher token does."""
        is_common_S: Bool = (self.teacher_place_S >= 0) & (self.skipped_S == 0)
        return is_common_S


class Speller:
    """Writes chains, as the bytes of pieces.py, in the student's tokens."""

    def __init__(self, pair: VocabularyPair, encode: Encode) -> None:
        self._pair, self._encode = pair, encode
        self._lengths_V = lengths_of(pair.student_bytes)

    def spell(self, chains: Sequence[bytes]) -> list[Spelling | None]:
        """Spellings of the chains; None for one whose bytes are not text, or not those that the student's tokens have.

        A chain that was cut inside a character loses the part of it.
        """
        # "a FF </think> FE b" splits into a, the mark, b.
        parts = [MARK.split(chain) for chain in chains]
        texts = [_texts_of(one) for one in parts]
        ids = iter(self._encode([text for mine in texts if mine is not None for text in mine if text]))
        return [
            None if mine is None else self._joined(part, mine, [next(ids) if text else [] for text in mine])
            for part, mine in zip(parts, texts, strict=True)
        ]

    def _joined(self, parts: Sequence[bytes], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Spelling | None:
        """`parts` are texts and marks in turn, `ids` those of `texts`."""
        of_id, found_S, lengths_S, has_space_S = self._pair.student_bytes, [], [], []
        for number, (text, one) in enumerate(zip(texts, ids, strict=True)):
            mine = np.array(one, np.int32)
            lengths = self._lengths_V[mine]
            data, spelled = text.encode(), b"".join([of_id[token_id] for token_id in one])
            has_space = np.zeros(len(mine), np.bool_)
            if spelled == b" " + data:
                lengths[0] -= 1
                has_space[0] = True
            elif spelled != data:
                return None
            found_S.append(mine)
            lengths_S.append(lengths)
            has_space_S.append(has_space)
            if 2 * number + 1 < len(parts):
                mark = parts[2 * number + 1]
                found_S.append(np.array([self._pair.student_id_of[mark]], np.int32))
                lengths_S.append(np.array([len(mark)], np.int64))
                has_space_S.append(np.zeros(1, np.bool_))
        return Spelling(np.concatenate(found_S), np.concatenate(lengths_S), np.concatenate(has_space_S))


def align(teacher_lengths_T: Int64, start: int, spelling: Spelling) -> Alignment:
    """`start` is the byte at which the first teacher token begins: above 0 after text that the teacher did not write,
    below 0 where the student does not write the teacher's first bytes.

    With "ab|c" of the teacher and "a|b|c" of the student, places are 0, 0, 1, and 0, 1, 0 bytes are skipped.
    """
    teacher_ends_T = start + np.cumsum(teacher_lengths_T)
    student_ends_S = np.cumsum(spelling.lengths_S)
    starts_T, starts_S = teacher_ends_T - teacher_lengths_T, student_ends_S - spelling.lengths_S
    # The last of the tokens that begin here: those before it stand for no byte.
    place_S = np.searchsorted(starts_T, starts_S, side="right") - 1
    # A token with a space of its own competes with others of that kind, which no candidate of the teacher spells.
    is_placed_S = (place_S >= 0) & (spelling.lengths_S > 0) & ~spelling.has_space_S
    is_placed_S[is_placed_S] = starts_S[is_placed_S] < teacher_ends_T[place_S[is_placed_S]]
    place_S = np.where(is_placed_S, place_S, -1)
    skipped_S = np.where(is_placed_S, starts_S - starts_T[place_S], 0)
    return Alignment(spelling.ids_S, teacher_ends_T, student_ends_S, place_S, skipped_S)


def chunk_logprobs(alignment: Alignment, sampled_logprob_T: Float32) -> Float32:
    """float32 [S]: on the last student token of each chunk, the teacher's log probability of the chunk; elsewhere nan.

    A chunk is what lies between two neighbouring common boundaries. The last one has a value where both sides end
    together.
    """
    found_S = np.full(len(alignment.student_ids_S), np.nan, np.float32)
    starts = np.flatnonzero(alignment.is_common_S)
    if not len(starts):
        return found_S
    total_T = np.concatenate([[0.0], np.cumsum(sampled_logprob_T, dtype=np.float64)])
    first = alignment.teacher_place_S[starts]
    last = np.append(first[1:], len(sampled_logprob_T))
    found_S[np.append(starts[1:], len(found_S)) - 1] = total_T[last] - total_T[first]
    if alignment.student_ends_S[-1] != alignment.teacher_ends_T[-1]:
        found_S[-1] = np.nan
    return found_S


def first_tokens_with(pair: VocabularyPair, encode: Encode) -> Callable[[list[bytes]], list[tuple[int, int]]]:
    """A function from byte strings, as they stand in the middle of a text, to the student's first token of each and
    that token's bytes; (-1, 0) where it has none.

    Of a string that ends inside a character the whole ones are encoded. Half a character alone is the token of just
    these bytes, if there is one.
    """
    # Of several tokens with the same bytes the smallest id wins: reversed, it is written last.
    id_of = {data: token_id for token_id, data in reversed(list(enumerate(pair.student_bytes))) if data}
    lead, skipped = _lead_of(pair, encode)

    def first_of(data: bytes, ids: Sequence[int]) -> tuple[int, int]:
        place = 0
        for token_id in ids:
            mine = pair.student_bytes[token_id]
            # The first token behind the lead; one that joins lead and text says nothing about the text.
            if place == skipped and mine:
                return token_id, len(mine)
            place += len(mine)
        token_id = id_of.get(data, -1)
        return token_id, len(data) if token_id >= 0 else 0

    def first_tokens(strings: list[bytes]) -> list[tuple[int, int]]:
        texts = [(_texts_of([one]) or [""])[0] for one in strings]
        ids = iter(encode([lead + text for text in texts if text]))
        return [first_of(data, next(ids) if text else []) for data, text in zip(strings, texts, strict=True)]

    return first_tokens


def is_written_with(pair: VocabularyPair, encode: Encode) -> Callable[[list[tuple[int, int]]], list[bool]]:
    """A function from pairs of the student's ids to whether its tokenizer makes just these two of the bytes that they
    spell in the middle of a text; True where those are not whole characters, so that nothing is known about them.
    """
    lead, skipped = _lead_of(pair, encode)

    def is_pair(wanted: tuple[int, int], ids: Sequence[int]) -> bool:
        place = 0
        for number, token_id in enumerate(ids):
            if place == skipped:
                return tuple(ids[number:]) == wanted
            place += len(pair.student_bytes[token_id])
        # The text joined with what was put before it, which says nothing.
        return True

    def is_written(pairs: list[tuple[int, int]]) -> list[bool]:
        spelled = [pair.student_bytes[before] + pair.student_bytes[after] for before, after in pairs]
        texts = [_whole_text(data) for data in spelled]
        ids = iter(encode([lead + text for text in texts if text]))
        return [not text or is_pair(wanted, next(ids)) for wanted, text in zip(pairs, texts, strict=True)]

    return is_written


def _lead_of(pair: VocabularyPair, encode: Encode) -> tuple[str, int]:
    """What to put before a text so that it is encoded as in the middle of one, and the bytes that this comes to."""
    (letter,) = encode(["a"])
    # SentencePiece writes a space in front of a text, and none after a line break.
    has_space = b"".join(pair.student_bytes[one] for one in letter).startswith(b" ")
    return ("\n", 2) if has_space else ("", 0)


def _whole_text(data: bytes) -> str:
    """The bytes as text; empty where they are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _texts_of(parts: Sequence[bytes]) -> list[str] | None:
    """The texts among texts and marks; None where one is not UTF-8. Only the last may end inside a character."""
    texts = []
    for number in range(0, len(parts), 2):
        decoder, is_last = codecs.getincrementaldecoder("utf-8")(), number == len(parts) - 1
        try:
            texts.append(decoder.decode(parts[number], final=not is_last))
        except UnicodeDecodeError:
            return None
    return texts
