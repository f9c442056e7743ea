"""Writes folders, Hugging Face ones above all, that become visible whole: temporary name, flush, rename."""

import contextlib
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, StillroomError, one_line
from stillroom.log import warn
from stillroom.storage.paths import TEMP_SUFFIX, sync_file, sync_folder

SCALED_ROPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of scaling that transformers 4 knows. Other ones (Gemma 4: proportional) must not stand under its key, where
version 5 reads them too and misses its own settings."""


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill, then flushes and renames it to `path`; removes it on error.

    Raises ConfigError if `path` exists and is not empty, DataError if its folder cannot be written, StillroomError if
    weights cannot be (a full disk).
    """
    # Here, as torch is: other commands import this module for its folders alone.
    from safetensors import SafetensorError

    refuse_existing(path)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
    try:
        temp.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): use a folder you can write to") from error
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                sync_file(file)
        if path.exists():
            # Empty, as checked above; rename does not replace a folder everywhere.
            path.rmdir()
        temp.replace(path)
        # The rename is durable only once the folder above is flushed.
        sync_folder(path.parent)
    except SafetensorError as error:
        # Not an OSError, whatever the system refused.
        raise StillroomError(f"{path}: weights cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises ConfigError unless `path` is missing or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists: choose another folder or remove it first")


def save_model(model: Any, tokenizer: Any | None, folder: Path, *, with_embeddings: bool = False) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer with its chat template into `folder`.

    `with_embeddings` adds embeddings and head to an adapter, whose base model has too few rows in them.
    transformers 4 reads the folder too: without its names for them it would run the model with other rotary
    embeddings, in silence, and refuse the tokenizer.
    """
    model.config.use_cache = True
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    # Some configurations lack the attribute altogether (Inkling).
    if model.config.to_dict().get("tie_word_embeddings") and _weight(head) is not _weight(embeddings):
        # Otherwise loaders drop the head of its own that stands in the file.
        model.config.tie_word_embeddings = False
    _save_pretrained(model, folder, with_embeddings)
    _edit_json(folder / "config.json", _name_rope_as_before)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _edit_json(folder / "tokenizer_config.json", _name_tokenizer_as_before)
    # safetensors writes files readable by the owner only: give weights the permissions of the configuration.
    mode = next(folder.glob("*config.json")).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def _weight(layer: Any) -> Any:
    """The weight of a layer below a peft wrapper, if there is one."""
    peft = sys.modules.get("peft")
    is_wrapped = peft is not None and isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    return layer.get_base_layer().weight if is_wrapped else layer.weight


def _save_pretrained(model: Any, folder: Path, with_embeddings: bool) -> None:
    """Saves model or adapter; generation settings that transformers loads but refuses to save are written as is."""
    from transformers import GenerationConfig, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        # By itself peft adds both embeddings and head where the head has an adapter.
        model.save_pretrained(folder, save_embedding_layers=with_embeddings)
        return
    generation: Any = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError as error:
        warn(f"generation_config.json is copied unchanged, although transformers rejects it: {one_line(error)[:200]}")
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")


def _edit_json(path: Path, edit: Callable[[Json], None]) -> None:
    if not path.exists():
        return
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_rope_as_before(config: Json) -> None:
    """Adds `rope_theta` and what else transformers 4 reads beside the `rope_parameters` of version 5."""
    for part in (config, config.get("text_config") or {}):
        rope = part.get("rope_parameters")
        if not isinstance(rope, dict):
            continue
        # Gemma 3 has one set for each kind of layer.
        full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
        settings = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
        named = {
            "rope_theta": full.get("rope_theta"),
            "partial_rotary_factor": full.get("partial_rotary_factor"),
            "rope_local_base_freq": sliding.get("rope_theta"),
            "rope_scaling": settings if settings.get("rope_type") in SCALED_ROPES else None,
        }
        if part.get("model_type") == "gpt_neox":
            named |= {"rotary_emb_base": full.get("rope_theta"), "rotary_pct": full.get("partial_rotary_factor")}
        part |= {name: value for name, value in named.items() if value is not None}


def _name_tokenizer_as_before(config: Json) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
