"""Identity of a model's weights without reading all of them: a 600 GB model is known in seconds.

A folder's fingerprint covers config.json, the names and sizes of its weight files and NUM_BLOCKS blocks of each, the
first of which holds the safetensors header (names, shapes, dtypes and offsets of all tensors). Training changes nearly
every weight, so it changes sampled blocks; a hand edit of a few tensors between the blocks keeps the fingerprint. A
hub id is identified by the commit that its revision resolves to, which covers every byte.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from schemas.records import stable_hash
from shared.errors import DataError
from shared.hub import hush_hub, unreachable

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
NUM_BLOCKS = 8
BLOCK_BYTES = 1 << 20
VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path")
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def fingerprint_weights(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Fingerprint and resolved revision (the commit of a hub id, None for a folder).

    Raises DataError where a folder holds no weights or config.json, or where a hub id cannot be resolved.
    """
    if Path(model).is_dir():
        return fingerprint_folder(Path(model)), None
    commit = resolve_revision(model, revision)
    return stable_hash("hub", model, commit), commit


def fingerprint_folder(folder: Path) -> str:
    """Fingerprint of a Hugging Face folder; the same wherever the folder lies."""
    kept = _settings(folder)
    weights = _weight_files(folder)
    if not weights:
        raise DataError(f"{folder} holds no weights: name a Hugging Face model folder")
    return stable_hash("folder", kept, [[path.name, path.stat().st_size, _sampled_hash(path)] for path in weights])


def fingerprint_served(folder: Path, served_name: str) -> str:
    """Fingerprint of a model whose config.json alone is here: other weights served under the same name look equal."""
    return stable_hash("served", _settings(folder), served_name)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weight files."""
    return bool(_weight_files(folder))


def resolve_revision(model: str, revision: str | None) -> str:
    """The commit of a hub id: asked of the hub, or of the local download where the hub cannot be reached."""
    if revision is not None and COMMIT.match(revision):
        return revision
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise DataError(f"{model} is not a folder: name a Hugging Face model folder or a hub id")
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"{model} is no folder, and hub ids need: pip install huggingface_hub") from error
    hush_hub()
    try:
        # The path in the local store names the commit: .../snapshots/<commit>/config.json
        path = huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        raise DataError(unreachable(model, error)) from error
    return Path(path).parent.name


def _settings(folder: Path) -> dict[str, Any]:
    """config.json without what says nothing of the model."""
    config = folder / "config.json"
    if not config.exists():
        raise DataError(f"{folder} holds no config.json: name a Hugging Face model folder")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    return {key: value for key, value in settings.items() if key not in VOLATILE_CONFIG_KEYS}


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.stem != "training_args")
    # Where a folder has both, safetensors are what is loaded.
    return [path for path in files if path.suffix == ".safetensors"] or files


def _sampled_hash(path: Path) -> str:
    """SHA-256 of NUM_BLOCKS blocks spread evenly over the file, ends included; of all bytes of a small file."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if size_bytes <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for block in range(NUM_BLOCKS):
                stream.seek(block * (size_bytes - BLOCK_BYTES) // (NUM_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
