"""What training took away: a second held-out set, measured with the student from before the run and after it.

In: a text file and a model (evaluating.py measures caches). Out: mean cross-entropy in nats per token and in bits per
byte of text, and the change. Each model reads the text by its own tokenizer: where their tokens differ, only bits per
byte can be compared. Costs two forward passes over at most MAX_BYTES.

    L tokens of a window
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError
from stillroom.log import Progress, note
from stillroom.storage.paths import Location, location

MAX_BYTES = 2**20
"""About 250,000 tokens of English."""
WINDOW_TOKENS = 1024
"""Logits of a whole window are in memory: 600 MB for 150,000 ids."""
MEASURES = ("cross_entropy", "bits_per_byte", "forward_kl", "js", "retention", "top1_agreement")


def second_set(given: str) -> Location | Path:
    """A cache's folder or address, or a text file. Raises ConfigError for neither."""
    path = Path(given)
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        return path
    place = location(given)
    if (place / "chains" / "_delta_log").exists():
        return place
    raise ConfigError(f"--forgetting {given} is neither a cache nor a .txt or .jsonl file: check the path")


def documents(path: Path) -> Iterator[str]:
    """A whole .txt file, or the `text` of each line of a .jsonl file. Raises DataError."""
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            return
        # By the file, which may be far longer than what is read. splitlines() would also cut at a U+2028 inside a text.
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line) if line.strip() else {"text": ""}
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise DataError(f'{path}: line {number} has no "text": write {{"text": "..."}}, one per line')
                yield row["text"]
    except ValueError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text or JSON Lines: {error}") from error


@dataclass(frozen=True)
class Windows:
    """A text as a model reads it: pieces of token ids, each with the token before its first scored one; `num_bytes` of
    text are scored.
    """

    pieces: list[list[int]]
    num_bytes: int


def texts_of(path: Path) -> list[str]:
    """The documents up to MAX_BYTES. Raises DataError."""
    found, left = [], MAX_BYTES
    for text in documents(path):
        data = text.encode()
        found.append(data[:left].decode(errors="ignore"))
        left -= len(data)
        if left <= 0:
            note(f"--forgetting {path}: reading its first {MAX_BYTES:,} bytes")
            break
    return found


def windows(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> Windows:
    """Every token of a text is scored once; without a token that begins texts, all but the first."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces, num_bytes = [], 0
    for text in texts:
        read = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = [*first, *read["input_ids"]]
        # Consecutive windows share a token: scored at the end of one, context in the next.
        pieces += [ids[start : start + max_tokens] for start in range(0, len(ids) - 1, max_tokens - 1)]
        if len(ids) > 1:
            unscored = 0 if first else read["offset_mapping"][0][1]
            num_bytes += len(text[unscored:].encode())
    return Windows(pieces, num_bytes)


@torch.no_grad()
def text_loss(model: Any, text: Windows, label: str) -> Json:
    """Mean cross-entropy over all tokens that have one before them in their piece."""
    total, num = 0.0, 0
    with Progress(label, len(text.pieces), "windows") as progress:
        for number, ids in enumerate(text.pieces):
            ids_1L = torch.tensor([ids], device=model.device)
            logits_LV = model(input_ids=ids_1L).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits_LV, ids_1L[0, 1:], reduction="sum"))
            num += len(ids) - 1
            progress.update(number + 1, num)
    return {
        "num_tokens": num,
        "num_bytes": text.num_bytes,
        "cross_entropy": total / num,
        "bits_per_byte": total / math.log(2.0) / text.num_bytes,
    }


def window_size(longest: int | None, pack_tokens: int) -> int:
    """Tokens of a window, within a context of `longest`."""
    return min(pack_tokens, longest or WINDOW_TOKENS, WINDOW_TOKENS)


def change(kind: str, path: str, before_model: str, before: Json, after: Json, *, same_tokens: bool = True) -> Json:
    """Both measurements and their differences; above 0 a loss or a divergence has grown."""
    measures = MEASURES if same_tokens else ("bits_per_byte",)
    known = [name for name in measures if before.get(name) is not None and after.get(name) is not None]
    return {
        "kind": kind,
        "path": path,
        "before_model": before_model,
        "same_tokens": same_tokens,
        "before": before,
        "after": after,
        "change": {name: after[name] - before[name] for name in known},
    }
