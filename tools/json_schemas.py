"""Writes the JSON Schemas in schemas/ from the models that read and write them: `python -m tools.json_schemas`.

In: pydantic models. Out: one JSON Schema for each document of FORMAT.md. tests/repository/test_json_schemas.py fails if
a file differs from what this writes.
"""

import json
from pathlib import Path

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from stillroom.schema.features import FeatureHeader, SetManifest
from stillroom.schema.manifest import RunManifest, ShardHeader
from student_train.data.selection import SelectionHeader
from student_train.runtime.checkpoint import CheckpointState

FOLDER = Path(__file__).resolve().parent.parent / "schemas"
DOCUMENTS: dict[str, tuple[type[BaseModel], str]] = {
    "manifest": (RunManifest, "runs/<run_id>.json of a cache"),
    "shard-header": (ShardHeader, "value of `stillroom` in the key-value metadata of a shard"),
    "feature-set": (SetManifest, "feature_sets/<set_id>/manifest.json of a cache"),
    "feature-header": (FeatureHeader, "value of `stillroom-features` in the key-value metadata of a file of features"),
    "selection": (SelectionHeader, "value of `stillroom-selection` in the key-value metadata of selection.parquet"),
    "checkpoint": (CheckpointState, "state.json of a checkpoint, and latest.json beside the checkpoints"),
}


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def main() -> None:
    """Writes every schema."""
    for name in DOCUMENTS:
        path_of(name).write_text(schema_text(name), encoding="utf-8")


def path_of(name: str) -> Path:
    """Where the schema of a document lies."""
    return FOLDER / f"{name}.schema.json"


def schema_text(name: str) -> str:
    """The schema of a document (a key of DOCUMENTS) as indented JSON."""
    model, where = DOCUMENTS[name]
    # As written, not as read: every key is there, also those with a default for older files.
    schema = model.model_json_schema(mode="serialization", schema_generator=_Untitled)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": f"Document: {where}."}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
