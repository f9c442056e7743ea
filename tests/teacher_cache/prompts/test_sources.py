"""Files and datasets that break while they are read: one line that names source and place, never a traceback."""

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.config import validate_config
from stillroom.errors import DataError
from teacher_cache.prompts.config import HuggingFaceDataset, PromptsConfig
from teacher_cache.prompts.files import count_json_rows, json_rows, parquet_rows
from teacher_cache.prompts.sources import Draft, huggingface_rows, read_source


def test_a_folder_that_is_named_like_a_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"source s: the folder .* holds no \.jsonl file"):
        list(json_rows(tmp_path, None, "s"))
    (tmp_path / "a.jsonl" / "b.jsonl").write_text('{"q": 1}\n')
    assert [row.values for row in json_rows(tmp_path, None, "s")] == [{"q": 1}]


def counted(path: Path) -> list[int]:
    return [count_json_rows(path, None, "s")]


@pytest.mark.parametrize(
    "reader", [lambda path: json_rows(path, None, "s"), lambda path: parquet_rows(path, None, ["q"], [], "s"), counted]
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
    rows = huggingface_rows(HuggingFaceDataset(kind="huggingface", dataset="hub/set"), 5, ["q"], [], "s")
    assert [next(rows).values, next(rows).values] == [{"q": "1"}, {"q": "2"}]
    with pytest.raises(DataError, match="dataset hub/set ends unexpectedly after 2 rows: Server disconnected without"):
        next(rows)


VERL_ROW = {
    "prompt": [{"role": "user", "content": "2+3?"}],
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 7, "more": {"answer": "five"}},
    "extra_info.split": "train",
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_a_dotted_name_is_a_field_of_a_struct(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist([VERL_ROW])
    place = {"path": str(tmp_path / "a")}
    if kind == "jsonl":
        (tmp_path / "a").write_text(json.dumps(VERL_ROW))
    elif kind == "parquet":
        pq.write_table(table, tmp_path / "a")
    else:
        import datasets

        datasets.Dataset(table).save_to_disk(tmp_path / "a")
        place = {"dataset": str(tmp_path / "a")}
    fields = {
        "messages_field": "prompt",
        "reference_field": "reward_model.ground_truth",
        "metadata_fields": ["extra_info.more.answer", "extra_info.index", "extra_info.split"],
    }

    def drafts(**changed: Any) -> list[Any]:
        source = {"kind": kind, "name": "s", **place, **fields, **changed}
        return list(read_source(validate_config({"sources": [source]}, PromptsConfig, "test").sources[0]))

    (draft,) = drafts()
    assert isinstance(draft, Draft)
    found = {name: draft.metadata[name] for name in fields["metadata_fields"]}
    assert (draft.reference, found) == (
        "5",
        {"extra_info.more.answer": "five", "extra_info.index": 7, "extra_info.split": "train"},
    )
    with pytest.raises(DataError, match=r"'reward_model.ground_thruth'.*reward_model\.ground_truth"):
        drafts(reference_field="reward_model.ground_thruth")
