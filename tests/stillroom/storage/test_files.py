"""Files become visible whole or not at all."""

from pathlib import Path

import pytest

from stillroom.storage.paths import atomic_path, sha256_of, write_text_atomic


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")

    def fail_half_way() -> None:
        with atomic_path(path) as temp:
            temp.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_a_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_text_atomic(path, "old")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"
    assert sha256_of(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
