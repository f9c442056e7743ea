"""The bytes that each token of a vocabulary stands for, in a form that two vocabularies share.

In: pieces of two tokenizers. Out: bytes by id. An ordinary token is the bytes of its piece, half a character included.
A special token that both sides have is the same mark on both, which no text contains; so is what ends a chain, whatever
each side calls it. A special token that only the teacher has is its text, because the student has to spell it; one that
only the student has equals nothing.

    mark of a special token:  FF content FE
    end of sequence:          FF FE

UTF-8 contains neither byte. Tokens that are such a byte by themselves become FD, which is as invalid.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from stillroom.pieces import CLOSE, OPEN, Vocabulary
from stillroom.schema.records import Int64

END = OPEN + CLOSE
"""The mark that ends a chain."""
MARK = re.compile(rb"(\xff[^\xfe]*\xfe)")


@dataclass(frozen=True)
class VocabularyPair:
    """A teacher's and a student's vocabulary made comparable: equal bytes mean the same.

    Attributes:
        teacher_bytes, student_bytes: by id; b"" for ids without a token.
        student_id_of: the student's special ids by their marks, the one that ends an answer included.
    """

    teacher_bytes: list[bytes]
    student_bytes: list[bytes]
    student_id_of: Mapping[bytes, int]

    @property
    def end_id(self) -> int:
        """The student's id that ends an answer."""
        return self.student_id_of[END]


def pair_of(teacher: Vocabulary, ends: Set[int], student: Vocabulary, end_id: int) -> VocabularyPair:
    """`ends` are the teacher's tokens that end a chain, `end_id` is the student's."""
    # Reversed, so that of two ids with one text the smaller stays.
    own = {student.pieces[one]: one for one in sorted(student.special, reverse=True)}
    teacher_bytes, student_bytes = teacher.bytes_by_id(), student.bytes_by_id()
    for token_id in teacher.special:
        text = teacher.pieces[token_id]
        is_end = token_id in ends or own.get(text) == end_id
        teacher_bytes[token_id] = END if is_end else mark_of(text) if text in own else text.encode()
    marks = set(teacher_bytes)
    student_id_of = {}
    for token_id in student.special:
        text = student.pieces[token_id]
        is_shared = own[text] == token_id and mark_of(text) in marks
        # OPEN twice: nothing of the teacher's begins so, and the token equals nothing.
        student_bytes[token_id] = mark_of(text) if is_shared else OPEN + mark_of(text)
        if is_shared:
            student_id_of[mark_of(text)] = token_id
    # Last, in place of what the loop gave it.
    student_bytes[end_id] = END
    return VocabularyPair(teacher_bytes, student_bytes, {**student_id_of, END: end_id})


def mark_of(text: str) -> bytes:
    """What a special token of this text is on both sides."""
    return OPEN + text.encode() + CLOSE


def lengths_of(table: list[bytes]) -> Int64:
    """Bytes of each token, int64."""
    return np.fromiter(map(len, table), np.int64, len(table))
