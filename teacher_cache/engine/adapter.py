"""A teacher's LoRA adapter: a folder by peft whose matrices are added to the model's. Read without torch or peft.

In: the adapter's folder, the model's, and the tokenizer. Out: a fingerprint, or one line that says why the model with
this adapter cannot be the teacher.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.cache.tensors import read_header
from stillroom.errors import CorruptError, DataError, first_line, naming
from stillroom.log import format_plural, warn
from stillroom.models import fingerprint_adapter, fingerprint_template, fingerprints_from_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = (
    "merge the adapter into the model's folder (peft: merge_and_unload, save_pretrained) and name that in teacher.model"
)
PREFIX = "base_model.model."
LAYER = re.compile(r"^.*?\.\d+(?=\.)")
MATRIX = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>A|B)\.weight$")
"""Adapters of embeddings have other names, `lora_embedding_A`, and adapters of whole experts other shapes."""


@naming("teacher.adapter")
def identify_adapter(path: str, model: str, tokenizer: Any) -> str:
    """The adapter's fingerprint. Raises DataError for a folder that is not a LoRA adapter by peft, adds tokens, has
    more than LoRA matrices, or does not belong to the model in folder `model`. Without weights there, as for hub ids,
    the last is not checked.
    """
    folder = Path(path)
    _require_lora(folder)
    try:
        shapes = {name: entry["shape"] for name, entry in read_header(folder / WEIGHTS).items()}
    except CorruptError as error:
        raise DataError(str(error)) from error
    if other := sorted(name for name in shapes if ".lora_" not in name or "lora_magnitude" in name):
        raise DataError(f"{path} holds more than LoRA matrices ({other[0]}), which vLLM cannot apply: {MERGE}")
    _require_same_tokens(folder, tokenizer)
    if Path(model).is_dir():
        _require_modules(path, shapes, Path(model))
    return fingerprint_adapter(folder)


def _require_lora(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no {CONFIG}: use the folder of a LoRA adapter by peft") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / CONFIG} cannot be read: {first_line(error)}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise DataError(f"{folder} holds an adapter of another kind (peft_type {kind}) than LORA: {MERGE}")
    if not (folder / WEIGHTS).is_file():
        raise DataError(f"{folder} holds no {WEIGHTS}: save the adapter with save_pretrained of a current peft")


def _require_same_tokens(folder: Path, tokenizer: Any) -> None:
    """Trainers save the tokenizer beside the adapter. Distributions and prompts are by the model's own."""
    found = folder / "tokenizer.json"
    if found.is_file():
        from tokenizers import Tokenizer

        try:
            theirs = Tokenizer.from_file(str(found)).get_vocab(with_added_tokens=True)
        except Exception as error:
            raise DataError(f"{found} cannot be read: {first_line(error)}") from error
        ours = tokenizer.get_vocab()
        if other := sorted(token for token, token_id in theirs.items() if ours.get(token) != token_id):
            tokens = format_plural(len(other), "token")
            raise DataError(f"{folder} adds {tokens} to the model's vocabulary, such as {other[0]!r}: {MERGE}")
    files = fingerprints_from_files(str(folder))
    if files is not None and files[1] != fingerprint_template(tokenizer):
        warn(f"the chat template in {folder} differs from that of teacher.model, which is used")


def _require_modules(path: str, shapes: Mapping[str, Sequence[int]], model: Path) -> None:
    """vLLM ignores matrices of layers that the model does not have: without a word it would be another teacher."""
    try:
        weights = {name: entry for file in model.glob("*.safetensors") for name, entry in read_header(file).items()}
    except CorruptError:
        # Whoever loads the model says so.
        return
    matrices = {name: match for name in shapes if (match := MATRIX.match(name)) is not None}
    if flat := sorted(name for name in matrices if len(shapes[name]) != 2):
        raise DataError(f"{path} is damaged: {flat[0]} is not a matrix: save the adapter again")
    known = {name for name, match in matrices.items() if f"{match['module']}.weight" in weights}
    if not known:
        # The names in the files differ, as those of quantised models do.
        return
    layers = {match[0] for name in weights if (match := LAYER.match(name)) is not None}
    for name in sorted(matrices.keys() - known):
        # Only whole layers: files may store a layer's own weights under other names.
        if (layer := LAYER.match(name.removeprefix(PREFIX))) is not None and layer[0] not in layers:
            raise DataError(f"{path} belongs to another model: {model} has no {layer[0]}")
    for name in sorted(known):
        entry = weights[f"{matrices[name]['module']}.weight"]
        # Packed integers have other shapes; A is [r, inputs] and B [outputs, r], and some layers are stored transposed.
        width = shapes[name][1 if matrices[name]["side"] == "A" else 0]
        if entry["dtype"].startswith(("F", "BF")) and width not in entry["shape"]:
            raise DataError(
                f"{path} belongs to another model: {name} has {width} channels, and the weights in {model} have "
                f"{' × '.join(map(str, entry['shape']))}"
            )
