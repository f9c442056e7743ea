"""Completions as text in which the place of every token is known exactly.

In: a selection's vocabulary, token ids. Out: the text that the tokens spell together, and which token holds which
character. Nothing is tokenised or searched again: places are sums of the tokens' own bytes, so that they stay right
inside a character that several tokens share, and in text that no tokenizer would cut like this.

    T tokens of a completion, C characters of its text
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.cache.columns import offsets_of
from stillroom.errors import ConfigError
from stillroom.log import Progress
from stillroom.models import cached_pieces
from stillroom.pieces import Vocabulary
from stillroom.schema.records import Int64
from student_train.data.kept_ids import ids_of
from student_train.data.retokenised import vocab_path_of
from student_train.data.rows import read_rows
from student_train.data.selection import Selection


@dataclass(frozen=True, slots=True)
class CompletionText:
    """`text`, in which each byte that is not part of a character is one lone surrogate.

    byte_C int64 [C+1]: the byte that each character begins at; byte_T int64 [T+1]: the same of tokens.
    """

    text: str
    byte_C: Int64
    byte_T: Int64

    def tokens_of(self, start: int, stop: int) -> slice:
        """The tokens that hold any byte of characters start..stop-1."""
        first, last = int(self.byte_C[start]), int(self.byte_C[stop])
        return slice(
            int(np.searchsorted(self.byte_T, first, side="right")) - 1, int(np.searchsorted(self.byte_T, last))
        )

    def first_tokens_from(self, chars: Int64) -> Int64:
        """The first token that begins at each character or after it; T where none does."""
        return np.searchsorted(self.byte_T, self.byte_C[chars]).astype(np.int64)


def spell(parts: Sequence[bytes]) -> CompletionText:
    """The text of tokens that stand for these bytes."""
    byte_T = offsets_of(np.array([len(part) for part in parts], np.int64))
    data = b"".join(parts)
    text = data.decode("utf-8", errors="surrogateescape")
    if len(text) == len(data):
        return CompletionText(text, np.arange(len(data) + 1), byte_T)
    code_C = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    width_C = 1 + (code_C > 0x7F) + (code_C > 0x7FF) + (code_C > 0xFFFF)
    # Only bytes without a character become surrogates, one each.
    width_C[(code_C >= 0xD800) & (code_C < 0xE000)] = 1
    return CompletionText(text, offsets_of(width_C), byte_T)


class CompletionTexts:
    """The completions of a selection."""

    def __init__(self, selection: Selection, key: str) -> None:
        """Reads the vocabulary file. Raises ConfigError, in the name of the setting `key`, where there is none."""
        paths = [vocab_path_of(selection, folder) for folder in dict.fromkeys(selection.folders)]
        path = next((one for one in paths if one.exists()), None)
        if path is None:
            raise ConfigError(f"{key}: {paths[0]}, which has the text of each token, is missing: copy the whole cache")
        self._selection = selection
        self._bytes_V = Vocabulary(*cached_pieces(path)).bytes_by_id()
        if selection.header.kept_ids is not None:
            self._bytes_V = [self._bytes_V[one] for one in ids_of(selection.header.kept_ids).tolist()]

    def read(self, verb: str) -> Iterator[tuple[int, CompletionText]]:
        """Every row of the selection in order, with its text. Raises CorruptError."""
        selection, table, done, num_tokens = self._selection, self._bytes_V, 0, 0
        with Progress(verb, selection.num_chains, "chains") as progress:
            for group in range(len(selection.file_G)):
                rows = np.flatnonzero(selection.group_R == group)
                block = read_rows(selection, group, rows, with_signals=False)
                for index, row in enumerate(rows.tolist()):
                    ids = block.tokens_of(index).tolist()
                    # Padded logits have ids that no token has.
                    yield row, spell([table[one] if one < len(table) else b"" for one in ids])
                done, num_tokens = done + len(rows), num_tokens + len(block.token_ids_T)
                progress.update(done, num_tokens)
