"""Rows of a cache as aligned chains: what the student reads as a prompt, and what it learns to say after it.

In: rows of a shard, both vocabularies. Out: each chain's prompt and completion in the student's tokens, aligned with
the teacher's where both spell the same bytes, as text otherwise.

T teacher tokens, S student tokens of one chain
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.pieces import Vocabulary
from stillroom.schema.records import Int32, Int64
from student_train.data.text import HuggingFaceText, Markers, completion_text, has_ended, with_last_id
from student_train.data.vocabulary.alignment import Alignment, Speller, align
from student_train.data.vocabulary.pieces import END, MARK, lengths_of, pair_of

CHANGED, RESPELLED = "changed", "respelled"
"""Why a chain cannot be aligned: the student's tokenizer cannot spell its bytes; its tokens do not spell its text."""


@dataclass(frozen=True)
class AlignedChain:
    """One chain for the student; `alignment` is None, and `problem` says why, where only its text can be learnt."""

    sample_id: str
    prompt_ids: list[int]
    teacher_ids_T: Int32
    student_ids_S: Int32
    alignment: Alignment | None
    problem: str = ""


class Aligner:
    """Aligns the chains of one teacher with a student's tokenizer."""

    def __init__(
        self,
        teacher: Vocabulary,
        num_ids: int,
        ends: set[int],
        student: Vocabulary,
        tokenizer: HuggingFaceText,
        markers: Mapping[str, Markers],
    ) -> None:
        """`num_ids`: the teacher's ids are below it, `ends` those that end its chains, `markers` those of its runs."""
        pair = pair_of(teacher, ends, student, tokenizer.end_id)
        # Logits are often wider than the vocabulary, and a candidate may be one of the rows that no token has.
        padding = [b""] * (num_ids - len(pair.teacher_bytes))
        self.pair = replace(pair, teacher_bytes=pair.teacher_bytes + padding)
        self._teacher, self._tokenizer, self._markers = teacher, tokenizer, markers
        self._id_of = {text: token_id for token_id, text in teacher.pieces.items()}
        self._special = np.array(sorted(teacher.special), np.int32)
        self._lengths_V = lengths_of(self.pair.teacher_bytes)
        self._speller = Speller(self.pair, tokenizer.encode_completions)

    def align(self, table: pa.Table) -> list[AlignedChain]:
        """Chains of `table` (TEXT_COLUMNS), in its order."""
        ids_R = _lists(table)
        rows = with_last_id(table)
        prompts = [self._tokenizer.render(row["messages"]) for row in rows]
        prompt_ids = self._tokenizer.encode_prompts(prompts)
        said = [self._said(row, prompt, ids) for row, prompt, ids in zip(rows, prompts, ids_R, strict=True)]
        spelled = self._speller.spell([data if data is not None else b"" for data, _ in said])
        chains = []
        for row, prompt, mine, ids, (data, start), spelling in zip(
            rows, prompts, prompt_ids, ids_R, said, spelled, strict=True
        ):
            if data is not None and spelling is not None:
                alignment = align(self._lengths_V[ids], start, spelling)
                chains.append(AlignedChain(row["sample_id"], mine, ids, alignment.student_ids_S, alignment))
                continue
            problem = RESPELLED if data is None else CHANGED
            chains.append(AlignedChain(row["sample_id"], mine, ids, self._as_text(row, prompt), None, problem))
        return chains

    def _as_text(self, row: Mapping[str, Any], prompt: str) -> Int32:
        markers = self._markers[row["run_id"]]
        (ids,) = self._tokenizer.encode_completions([completion_text(row, prompt, markers)])
        return np.array([*ids, *([self._tokenizer.end_id] if has_ended(row, markers) else [])], np.int32)

    def _said(self, row: Mapping[str, Any], prompt: str, ids_T: Int32) -> tuple[bytes | None, int]:
        """The bytes that the student learns to say, and where among them the teacher's first token begins.

        None where the tokens do not spell the row's text.
        """
        of_id, markers = self.pair.teacher_bytes, self._markers[row["run_id"]]
        data = b"".join([of_id[token_id] for token_id in ids_T.tolist()])
        if not self._is_spelled(row["text"], data, ids_T):
            return None, 0
        if has_ended(row, markers) and not data.endswith(END):
            data += END
        if row["reasoning"] is None or markers.start is None:
            return data, 0
        return self._opened_once(data, prompt, markers.start)

    def _opened_once(self, data: bytes, prompt: str, start: str) -> tuple[bytes, int]:
        """As `completion_text`: the reasoning is opened in the prompt or in the completion, and not in both."""
        token_id = self._id_of.get(start)
        mark = start.encode() if token_id is None else self.pair.teacher_bytes[token_id]
        opened, begins = prompt.rstrip().endswith(start), data.lstrip().startswith(mark)
        if opened and begins:
            rest = data.lstrip().removeprefix(mark).lstrip(b"\n")
            # Below 0: the teacher's first tokens are the mark that is left out.
            return rest, len(rest) - len(data)
        if opened or begins:
            return data, 0
        return mark + b"\n" + data, len(mark) + 1

    def _is_spelled(self, text: str, data: bytes, ids_T: Int32) -> bool:
        """Whether the bytes are those of `text`, special tokens and space at both ends aside.

        Decoders leave out special tokens or not; a stop string is in the tokens and not in the text.
        """
        spelled = MARK.sub(b"", data).decode(errors="replace")
        for token_id in np.unique(ids_T[np.isin(ids_T, self._special)]).tolist():
            piece = self._teacher.pieces[token_id]
            spelled, text = spelled.replace(piece, ""), text.replace(piece, "")
        # A chain that was cut off may end within a character.
        spelled, text = spelled.strip().rstrip("\ufffd"), text.strip().rstrip("\ufffd")
        return spelled.startswith(text) or text.startswith(spelled)


def _lists(table: pa.Table) -> list[Int32]:
    ids = table.column("token_ids").combine_chunks()
    ends: Int64 = np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.split(ids.flatten().to_numpy(zero_copy_only=False), ends[:-1])
