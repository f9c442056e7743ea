"""Writes folders, Hugging Face ones above all, that become visible whole: temporary name, flush, rename."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError
from stillroom.storage.paths import TEMP_SUFFIX, sync_file, sync_folder


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill, then flushes and renames it to `path`; removes it on error.

    Raises ConfigError if `path` exists and is not empty.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    temp.mkdir()
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                sync_file(file)
        if path.exists():
            path.rmdir()
        temp.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises ConfigError unless `path` is missing or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists: choose another folder or remove it first")


def save_model(model: Any, tokenizer: Any | None, folder: Path) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer with its chat template into `folder`."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # safetensors writes files readable by the owner only: give weights the permissions of the configuration.
    mode = next(folder.glob("*config.json")).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)
