"""safetensors headers that were forged or damaged: one line, and no tensor is made of other bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.tensors import read_header, read_tensors
from stillroom.errors import CorruptError

WHOLE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path: Path, header: Any) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return path


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", {"__metadata__": {"format": "pt"}, "a": WHOLE})
    assert read_header(path) == {"a": WHOLE}
    assert read_tensors(path)["a"].shape == (2, 2)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "data_offsets": [0, 16]},
        {**WHOLE, "dtype": "F31"},
        {**WHOLE, "dtype": 7},
        {**WHOLE, "shape": [2, 3]},
        {**WHOLE, "shape": [-2, -2]},
        {**WHOLE, "shape": 4},
        {**WHOLE, "data_offsets": [8, 24]},
        {**WHOLE, "data_offsets": [-16, 0]},
        {**WHOLE, "data_offsets": [16, 0]},
        {**WHOLE, "data_offsets": [16]},
        [],
    ],
)
def test_an_entry_that_describes_no_tensor_is_one_line(tmp_path: Path, entry: Any) -> None:
    path = write(tmp_path / "one.safetensors", {"a": WHOLE, "b": entry})
    for read in (read_header, read_tensors):
        with pytest.raises(CorruptError, match=r"one\.safetensors is not a readable .* offsets of 'b' do not describe"):
            read(path)


@pytest.mark.parametrize("header", [[WHOLE], b"[" * 100_000, b"{", b"\xff{}"])
def test_a_header_that_is_not_an_object_is_one_line(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "one.safetensors", header)
    for read in (read_header, read_tensors):
        with pytest.raises(CorruptError, match="is not a readable safetensors file"):
            read(path)
    path.write_bytes(path.read_bytes()[:6])
    with pytest.raises(CorruptError, match="has no safetensors header"):
        read_header(path)
