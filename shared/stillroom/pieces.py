"""The bytes that each token of a vocabulary stands for. In: pieces of a tokenizer. Out: bytes by id.

UTF-8 contains neither OPEN nor CLOSE, which mark special tokens in comparisons of two vocabularies; tokens that are
such a byte by themselves become NO_TEXT, which is as invalid.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from stillroom.models import pieces_of

OPEN, CLOSE, NO_TEXT = b"\xff", b"\xfe", b"\xfd"
ESCAPE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """Texts of all tokens by id, as a cache's vocabulary file has them, and which of them are special."""

    pieces: Mapping[int, str]
    special: Set[int]

    def bytes_by_id(self) -> list[bytes]:
        """The text of every token as bytes, from id 0 to the highest; b"" for ids without a token."""
        # SentencePiece has a token <0x41> for each byte. In byte-level vocabularies only bytes that are not characters
        # by themselves are shown like this, so there <0x41> is text.
        texts = set(self.pieces.values())
        has_byte_tokens = all(f"<0x{byte:02X}>" in texts for byte in range(0x20))
        found = [b""] * (max(self.pieces, default=-1) + 1)
        for token_id, piece in self.pieces.items():
            if "<0x" not in piece or token_id in self.special:
                found[token_id] = piece.encode()
            else:
                data = _unescaped(piece, has_byte_tokens)
                found[token_id] = data.replace(OPEN, NO_TEXT).replace(CLOSE, NO_TEXT)
        return found


def vocabulary_of(tokenizer: Any, pieces: Mapping[int, str] | None = None) -> Vocabulary:
    """The vocabulary of a transformers tokenizer; `pieces` are its pieces_of() where these are known.

    Special are the tokens that it never writes for plain text: an added token such as <think> that is not marked so
    stands in the text like any word.
    """
    marked = {one for one, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Vocabulary(pieces or pieces_of(tokenizer), marked | set(tokenizer.all_special_ids))


def _unescaped(piece: str, has_byte_tokens: bool) -> bytes:
    if has_byte_tokens:
        found = ESCAPE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece.encode()
    parts = ESCAPE.split(piece)
    data = parts[0].encode()
    for digits, text in zip(parts[1::2], parts[2::2], strict=True):
        byte = int(digits, 16)
        data += (bytes([byte]) if byte >= 0x80 else f"<0x{digits}>".encode()) + text.encode()
    return data
