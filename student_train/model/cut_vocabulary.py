"""Cuts the embeddings, head and tokenizer of a student to the ids that its caches use.

In: a model and a BPE tokenizer, caches. Out: both with fewer ids, renumbered in their order, and the record that
maps a cache's ids (data/kept_ids.py). Kept are special and added tokens, single characters or bytes, so that any text
can be written, and for every kept token those that its merges pass through. So the cut tokenizer splits the text of
the caches as the whole one did: every merge made there ends in a token that was kept, and merges keep their order.
"""

import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.log import Progress
from stillroom.models import fingerprint_tokenizer, load_tokenizer
from stillroom.schema.records import Int32
from student_train.config.data import DataConfig
from student_train.data.freezing import SelectionRequest, open_selection
from student_train.data.kept_ids import KeptIds
from student_train.data.open import sources_of
from student_train.data.rows import read_rows
from student_train.data.selection import Selection


def cut_vocabulary(model: Any, tokenizer: Any, data: DataConfig, keep: str) -> tuple[Any, KeptIds]:
    """Cuts the model in place; returns its tokenizer and what was kept of the cache's ids.

    Raises ConfigError where the tokenizer is not the caches', or not BPE.
    """
    with tempfile.TemporaryDirectory(prefix="student-train-init-") as temp:
        request = SelectionRequest(sources_of(data), None, None, None, key="student.init.vocabulary")
        selection = open_selection(Path(temp) / "all.selection.parquet", request)
        fingerprint = fingerprint_tokenizer(tokenizer)
        if selection.header.tokenizer_fingerprints != [fingerprint]:
            raise ConfigError(
                "student.init.vocabulary: the teacher's tokenizer is not the caches': cut the model that filled them"
            )
        written, stored = _used_ids(selection)
    backend: Json = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _closed(backend, written if keep == "written" else np.union1d(written, stored))
    cut = _cut_tokenizer(tokenizer, backend, kept)
    _cut_model(model, kept)
    ids_K = np.array(kept, np.int32)
    has_all_stored = bool(np.isin(stored, ids_K).all())
    return cut, KeptIds.of(ids_K, fingerprint, has_all_stored=has_all_stored)


def _used_ids(selection: Selection) -> tuple[Int32, Int32]:
    """(ids in text, or the likeliest of a token; ids that distributions store), ascending."""
    written: list[Int32] = []
    stored: list[Int32] = []
    num_groups = len(selection.row_group_G)
    with Progress("used ids", num_groups, "row groups") as progress:
        for group in range(num_groups):
            rows_R = np.flatnonzero(selection.group_R == group)
            block = read_rows(selection, group, rows_R, with_signals=True)
            assert block.signals is not None
            assert block.entry_offsets_T is not None
            # Entries stand in rank order, so the first of each token is its likeliest.
            likeliest_T = block.signals.topk_ids_N[block.entry_offsets_T[:-1]]
            written.append(np.unique(np.concatenate([block.prompt_ids, block.token_ids_T, likeliest_T])))
            draws = [] if block.signals.draws is None else [block.signals.draws.ids_D]
            stored.append(np.unique(np.concatenate([block.signals.topk_ids_N, *draws])))
            progress.update(group + 1, int(selection.num_tokens_R[rows_R].sum()))
    return np.unique(np.concatenate(written)), np.unique(np.concatenate(stored))


def _closed(backend: Json, used: Iterable[int]) -> list[int]:
    """Ids to keep, ascending. Raises ConfigError for a tokenizer that is not plain BPE."""
    model = backend["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConfigError(
            f"student.init.vocabulary: the tokenizer is a {model['type']}, and only BPE without affixes can be cut"
        )
    vocab: dict[str, int] = model["vocab"]
    text_of = {number: token for token, number in vocab.items()}
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    kept = {one["id"] for one in backend["added_tokens"]}
    if model.get("unk_token") in vocab:
        kept.add(vocab[model["unk_token"]])
    has_bytes = bool(model.get("byte_fallback"))
    # With bytes to fall back on, a character can go: SentencePiece models know thousands.
    kept |= {
        number
        for token, number in vocab.items()
        # SentencePiece writes byte tokens like <0x0A>.
        if (len(token) == 6 and token.startswith("<0x") if has_bytes else len(token) == 1)
    }
    for number in map(int, used):
        token = text_of.get(number)
        if token is not None:
            kept |= {vocab[part] for part in _passed_through(token, ranks) if part in vocab}
    return sorted(kept)


def _merges(model: Json) -> list[tuple[str, str]]:
    # Older files write a merge as one text: "h e".
    pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"])
    return [(first, second) for first, second in pairs]


def _passed_through(token: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The token and those that BPE makes on the way to it: hell by h, e, l, he, ll. Itself where BPE gets elsewhere."""
    parts, passed = list(token), [*token]
    while len(parts) > 1:
        ranked = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not ranked:
            return [token]
        # BPE merges the pair of the lowest rank first, and of equal ones the leftmost.
        _, at = min(ranked)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        passed.append(parts[at])
    return [*passed, token]


def _cut_tokenizer(tokenizer: Any, backend: Json, kept: list[int]) -> Any:
    new = {old: number for number, old in enumerate(kept)}
    model = backend["model"]
    model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    model["merges"] = [
        list(pair) for pair in _merges(model) if all(one in model["vocab"] for one in (*pair, "".join(pair)))
    ]
    for one in backend["added_tokens"]:
        one["id"] = new[one["id"]]
    _renumber(backend.get("post_processor"), new)
    with tempfile.TemporaryDirectory(prefix="student-train-init-") as temp:
        tokenizer.save_pretrained(temp)
        # What would be read beside tokenizer.json has the old ids.
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            (Path(temp) / name).unlink(missing_ok=True)
        (Path(temp) / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        path = Path(temp) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings.get("added_tokens_decoder")
        if known is not None:
            settings["added_tokens_decoder"] = {str(new[int(old)]): one for old, one in known.items()}
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(temp)


def _renumber(node: Any, new: dict[int, int]) -> None:
    """Ids of special tokens in post-processors: {"ids": [1]}, and ["</s>", 2] of RoBERTa's."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "ids" and isinstance(value, list):
                node[key] = [new[one] for one in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                node[key] = [value[0], new[value[1]]]
            else:
                _renumber(value, new)
    elif isinstance(node, list):
        for one in node:
            _renumber(one, new)


def _cut_model(model: Any, kept: list[int]) -> None:
    import torch

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    new = {old: number for number, old in enumerate(kept)}
    rows = torch.tensor(kept)
    is_tied = head.weight is embeddings.weight
    with torch.no_grad():
        embeddings.weight = torch.nn.Parameter(embeddings.weight.detach()[rows].clone())
        head.weight = embeddings.weight if is_tied else torch.nn.Parameter(head.weight.detach()[rows].clone())
        if head.bias is not None:
            head.bias = torch.nn.Parameter(head.bias.detach()[rows].clone())
    embeddings.num_embeddings = head.out_features = model.config.vocab_size = len(kept)
    embeddings.padding_idx = new.get(embeddings.padding_idx)
    for config in (model.config, model.generation_config):
        for key, value in config.to_dict().items():
            if key.endswith("_token_id") and value is not None:
                many = [new[one] for one in value if one in new] if isinstance(value, list) else None
                setattr(config, key, new.get(value) if many is None else many)
