"""What training took away: a second held-out set, measured with the student from before the run and after it.

In: a text file and a model (evaluation.py measures caches). Out: mean cross-entropy of its tokens, in nats, and the
change. Both models read the same ids. Costs two forward passes over at most MAX_TOKENS tokens.

    L tokens of a window
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError
from stillroom.log import Progress, note
from stillroom.storage.paths import Location, location

MAX_TOKENS = 2**18
WINDOW_TOKENS = 1024
"""Logits of a whole window are in memory: 600 MB for 150,000 ids."""
MEASURES = ("cross_entropy", "forward_kl", "js", "retention", "top1_agreement")


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


def windows(path: Path, tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """The documents' token ids in pieces of at most `max_tokens`, each with the token that begins a text if there is
    one. Raises DataError for a file without two tokens in a row.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size, found, num = max_tokens - len(first), [], 0
    for text in documents(path):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for start in range(0, len(ids), size):
            piece = [*first, *ids[start : start + size]]
            if len(piece) > 1:
                found.append(piece)
                num += len(piece) - 1
            if num >= MAX_TOKENS:
                note(f"--forgetting {path}: reading its first {num:,} tokens")
                return found
    if not found:
        raise DataError(f"{path} contains no text")
    return found


@torch.no_grad()
def text_loss(model: Any, pieces: list[list[int]], label: str) -> Json:
    """Mean cross-entropy over all tokens that have one before them in their piece."""
    total, num = 0.0, 0
    with Progress(label, len(pieces), "windows") as progress:
        for number, ids in enumerate(pieces):
            ids_1L = torch.tensor([ids], device=model.device)
            logits_LV = model(input_ids=ids_1L).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits_LV, ids_1L[0, 1:], reduction="sum"))
            num += len(ids) - 1
            progress.update(number + 1, num)
    return {"num_tokens": num, "cross_entropy": total / num}


def window_size(model: Any, pack_tokens: int) -> int:
    """Tokens of a window, within the model's context."""
    longest = model.config.to_dict().get("max_position_embeddings") or WINDOW_TOKENS
    return int(min(pack_tokens, longest, WINDOW_TOKENS))


def change(kind: str, path: str, before_model: str, before: Json, after: Json) -> Json:
    """Both measurements and their differences; above 0 a loss or a divergence has grown."""
    known = [name for name in MEASURES if before.get(name) is not None and after.get(name) is not None]
    return {
        "kind": kind,
        "path": path,
        "before_model": before_model,
        "before": before,
        "after": after,
        "change": {name: after[name] - before[name] for name in known},
    }
