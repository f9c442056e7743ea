"""The JSON Schemas in schemas/ describe the documents that the programs write."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import ROOT
from tests.helpers.caches import make_cache
from tools.json_schemas import DOCUMENTS, path_of, schema_text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_file_is_what_the_model_says(name: str) -> None:
    assert path_of(name).read_text(encoding="utf-8") == schema_text(name), "run `python -m tools.json_schemas`"


def test_golden_headers_and_manifests_have_the_keys_of_their_schema(tmp_path: Path) -> None:
    header = pq.read_schema(ROOT / "schemas" / "golden" / "v2-topk-u8.parquet").metadata[b"stillroom"]
    (manifest,) = (make_cache(tmp_path / "cache", 4).root / "runs").glob("*.json")
    for name, text in (("shard-header", header), ("manifest", manifest.read_bytes())):
        schema = json.loads(path_of(name).read_text(encoding="utf-8"))
        assert set(json.loads(text)) == set(schema["properties"])
        assert set(schema["required"]) <= set(schema["properties"])


def test_the_format_page_links_every_schema() -> None:
    page = (ROOT / "schemas" / "FORMAT.md").read_text(encoding="utf-8")
    assert all(f"({path_of(name).name})" in page for name in DOCUMENTS)
