"""Files and datasets that break while they are read: one line that names source and place, never a traceback."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import DataError
from teacher_cache.config import HuggingFaceDataset
from teacher_cache.prompts.sources import count_jsonl_rows, huggingface_rows, jsonl_rows, parquet_rows


def test_a_folder_that_is_named_like_a_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"source s: the folder .* holds no \.jsonl file"):
        list(jsonl_rows(tmp_path, "s"))
    (tmp_path / "a.jsonl" / "b.jsonl").write_text('{"q": 1}\n')
    assert [row.values for row in jsonl_rows(tmp_path, "s")] == [{"q": 1}]


def counted(path: Path) -> list[int]:
    return [count_jsonl_rows(path, "s")]


@pytest.mark.parametrize(
    "reader", [lambda path: jsonl_rows(path, "s"), lambda path: parquet_rows(path, ["q"], "s"), counted]
)
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_text("{}\n")
    if os.geteuid() == 0:

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refused)
        monkeypatch.setattr("pyarrow.parquet.ParquetFile", refused)
    else:
        for path in tmp_path.iterdir():
            path.chmod(0)
    with pytest.raises(DataError, match=r"source s: .*Permission denied") as failure:
        list(reader(tmp_path))
    assert "\n" not in str(failure.value)


def test_a_stream_that_breaks_off_says_after_how_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        column_names = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield from [{"q": "1"}, {"q": "2"}]
            raise RuntimeError("Server disconnected\nwithout a response")

    hub = types.ModuleType("datasets")
    hub.exceptions = types.SimpleNamespace(DatasetsError=OSError)  # type: ignore[attr-defined]
    hub.load_dataset = lambda *_, **__: Rows()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    rows = huggingface_rows(HuggingFaceDataset(kind="huggingface", dataset="hub/set"), 5, ["q"], "s")
    assert [next(rows).values, next(rows).values] == [{"q": "1"}, {"q": "2"}]
    with pytest.raises(DataError, match="dataset hub/set breaks off after 2 rows: Server disconnected without"):
        next(rows)
