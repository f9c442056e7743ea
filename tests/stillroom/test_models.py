"""Tokenizers: identity survives saving, pieces lose nothing, reasoning ends at its token, vocabularies compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillroom.errors import ConfigError, CorruptError, DataError
from stillroom.models import (
    BLOCK_BYTES,
    compare_vocab,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprint_weights,
    load_tokenizer,
    pieces_of,
    reasoning_ids,
    require_same_vocab,
    split_reasoning,
    vocab_size_of,
    write_vocab,
)
from stillroom.schema.tables import VOCAB_SCHEMA
from tests.helpers.tiny_tokenizer import byte_level, metaspace, save

TEXT = "hello world, what is € 你好 🎉 today"
START, END = 98, 99


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def test_a_saved_copy_has_the_same_fingerprint(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    copy = load_tokenizer(str(tmp_path))
    assert fingerprint_tokenizer(copy) == fingerprint_tokenizer(tokenizer)
    assert fingerprint_template(copy) == fingerprint_template(tokenizer)


def test_truncation_does_not_count_but_tokens_and_templates_do(folder: Path, tmp_path: Path) -> None:
    first, other = load_tokenizer(str(folder)), load_tokenizer(str(folder))
    other("hello", truncation=True, max_length=2)
    other.chat_template += " "
    assert fingerprint_tokenizer(other) == fingerprint_tokenizer(first)
    assert fingerprint_template(other) != fingerprint_template(first)
    other.add_tokens(["<tool>"])
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(first)


def test_merges_count_whichever_way_they_are_written(folder: Path, tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    path.write_text(json.dumps(data))
    original = fingerprint_tokenizer(load_tokenizer(str(folder)))
    assert fingerprint_tokenizer(load_tokenizer(str(tmp_path))) == original
    data["model"]["merges"].pop()
    path.write_text(json.dumps(data))
    assert fingerprint_tokenizer(load_tokenizer(str(tmp_path))) != original


def test_pieces_of_bytes_join_to_the_text(tokenizer: Any) -> None:
    pieces = pieces_of(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    joined = "".join(pieces[token_id] for token_id in ids)
    assert unescape(joined) == TEXT
    assert any(piece.startswith("<0x") for piece in pieces.values())
    assert pieces[reasoning_ids(tokenizer, "<think>", "</think>")[0] or -1] == "<think>"


def test_pieces_of_sentencepiece_keep_their_leading_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save(metaspace(), tmp_path)))
    pieces = pieces_of(tokenizer)
    ids = tokenizer.encode(" what is 你", add_special_tokens=False)
    assert [pieces[token_id] for token_id in ids][:1] == [" wh"]
    assert "".join(pieces[token_id] for token_id in ids) == " what is <0xE4><0xBD><0xA0>"
    assert pieces[tokenizer.convert_tokens_to_ids("<0xE2>")] == "<0xE2>"


def test_vocab_file_has_every_token_and_marks_markers(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "vocab" / "v.parquet"
    write_vocab(path, tokenizer)
    table = pq.read_table(path)
    assert table.schema.equals(VOCAB_SCHEMA)
    assert table.column("token_id").to_pylist() == list(range(len(tokenizer)))
    special = {row["piece"] for row in table.to_pylist() if row["is_special"]}
    assert special == {"<|im_start|>", "<|im_end|>", "<think>", "</think>"}


def test_missing_markers_have_no_id(tokenizer: Any) -> None:
    assert reasoning_ids(tokenizer, "<think>", "<no such token>")[1] is None


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        ([1, 2, END, 3], [7, START], 3),
        ([1, 2], [7, START], None),
        ([START, 1, END, 3], [7], 3),
        ([START, 1], [7], None),
        ([1, 2], [7], 0),
        ([1, 2], [7, START, 5, END], 0),
        ([1, END], [7], 2),
        ([1, END, 2, START, 3, END], [7, START], 2),
        ([1, 2], [START, 5, END, START], None),
    ],
)
def test_reasoning_ends_just_after_its_token(completion: list[int], prompt: list[int], expected: int | None) -> None:
    assert split_reasoning(np.array(completion), prompt, START, END) == expected


def test_a_tokenizer_without_the_closing_token_does_not_reason_aloud() -> None:
    assert split_reasoning([1, 2], [START], START, None) == 0


def test_special_tokens_may_differ_and_ordinary_ones_may_not(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    write_vocab(path, tokenizer)
    assert compare_vocab(path, tokenizer).ordinary == []

    relative = load_tokenizer(str(save(byte_level(), tmp_path / "relative", ("<tool>", "</think>", "<extra>"))))
    difference = compare_vocab(path, relative)
    assert difference.agree
    think_id = tokenizer.convert_tokens_to_ids("<think>")
    assert difference.special == [(think_id, "<think>", "<tool>"), (think_id + 2, None, "<extra>")]

    stranger = load_tokenizer(str(save(byte_level(["entirely other words stand here"] * 9), tmp_path / "stranger")))
    difference = compare_vocab(path, stranger)
    assert not difference.agree
    token_id, mine, other = difference.ordinary[0]
    with pytest.raises(ConfigError, match=rf"{token_id} is {mine!r} in the cache and {other!r}"):
        require_same_vocab(difference, "stranger")


def test_a_damaged_vocabulary_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(CorruptError, match=r"v\.parquet"):
        compare_vocab(path, tokenizer)


def test_unusable_folders_are_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    for load in (load_tokenizer, fingerprint_weights):
        with pytest.raises(DataError, match="is not a folder"):
            load(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"config\.json"):
        vocab_size_of(str(folder))


def make_model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "_name_or_path": "x"}))
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(12 * BLOCK_BYTES))
    return folder


def test_weights_fingerprint_follows_contents_not_place(tmp_path: Path) -> None:
    first, second = make_model_folder(tmp_path / "a"), make_model_folder(tmp_path / "b")
    (second / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "_name_or_path": "y"}))
    assert fingerprint_weights(str(first)) == fingerprint_weights(str(second))
    data = bytearray((second / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint_weights(str(first)) != fingerprint_weights(str(second))
    assert vocab_size_of(str(first)) == 300


def test_weights_fingerprint_needs_weights(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="holds no weights"):
        fingerprint_weights(str(folder))


def test_tokenizers_work_without_torch(folder: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from stillroom.models import load_tokenizer; import stillroom.models;"
        f"t = load_tokenizer({str(folder)!r}); print(len(t.apply_chat_template([{{'role': 'user', 'content': 'x'}}])))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(result.stdout) > 0
    assert result.stderr == ""


def unescape(text: str) -> str:
    """Turns <0xE2> back into its byte."""
    data = b""
    while text:
        if text.startswith("<0x"):
            data, text = data + bytes([int(text[3:5], 16)]), text[6:]
        else:
            data, text = data + text[0].encode(), text[1:]
    return data.decode()
