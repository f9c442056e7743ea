"""Tokenizers and identities of models, without torch.

Fingerprints are 32 hex characters (stillroom.schema.records.stable_hash). A folder's covers config.json, the names and
sizes of its weight files and NUM_BLOCKS blocks of each, so that a 600 GB model is identified in seconds. The first
block holds the safetensors header: names, shapes, dtypes and offsets of all tensors. Training changes nearly every
weight, hence sampled blocks; editing a few tensors between the blocks by hand keeps the fingerprint. A hub id is
identified by the commit that its revision resolves to, which covers every byte.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.errors import ConfigError, CorruptError, DataError, first_line, one_line
from stillroom.log import note
from stillroom.schema.records import stable_hash
from stillroom.schema.tables import VOCAB_SCHEMA
from stillroom.storage.paths import Location, atomic_path, local_copy

_CLIENT = logging.getLogger("huggingface_hub.utils._http")
_said: set[str] = set()
VOLATILE_KEYS = ("version", "truncation", "padding", "post_processor")
"""Keys of tokenizer.json that may differ in a saved copy. The post-processor wraps plain text only, never templates."""
MARKER = re.compile(r"^(<[^<>\s]+>|\[[^\[\]\s]+\])$")
"""Added tokens such as <think> count as special even if their tokenizer does not mark them so."""
MARK = "4c2f81"
"""An answer that no template writes by itself."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
NUM_BLOCKS = 8
BLOCK_BYTES = 1 << 20
VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path")
VOLATILE_ADAPTER_KEYS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")
NO_ADVICE = ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
"""transformers advises to install torch, which is not needed here."""
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a folder or hub id. Raises DataError if it cannot be loaded."""
    os.environ.setdefault(*NO_ADVICE)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError("tokenizers need the package transformers: pip install transformers") from error
    require_folder_or_id(model)
    hush_hub()
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(_unusable(model, "tokenizer that can be loaded", error)) from error


def vocab_size_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Width of the model's logits, from its config.json. Raises DataError if that does not say."""
    os.environ.setdefault(*NO_ADVICE)
    from transformers import AutoConfig

    require_model_folder_or_id(model)
    hush_hub()
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise DataError(_unusable(model, "usable config.json", error)) from error


def fingerprints_from_files(model: str) -> tuple[str, str] | None:
    """Fingerprints of tokenizer and chat template of a local folder, without importing transformers.

    None for what needs transformers: hub ids, tokenizers in Python code, several templates.
    """
    folder = Path(model)
    tokenizer, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (tokenizer.is_file() and settings.is_file()) or (folder / "additional_chat_templates").exists():
        return None
    from tokenizers import Tokenizer

    try:
        # Through the library, which writes old and new files in one form.
        backend = json.loads(Tokenizer.from_file(str(tokenizer)).to_str())
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        jinja = folder / "chat_template.jinja"
        if jinja.exists():
            template = jinja.read_text(encoding="utf-8")
    except Exception:  # noqa: BLE001 - tokenizers raises plain Exceptions; transformers then says what is wrong
        return None
    if not (template is None or isinstance(template, str)):
        return None
    return _fingerprint_backend(backend), stable_hash("template", template)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Identity of everything that turns text into ids: vocabulary, merges, normaliser, decoder, added tokens, ...

    A copy saved by transformers has the same fingerprint. Truncation, padding and special tokens around plain text
    do not count. A tokenizer in Python code is identified by class name, vocabulary and added tokens.
    """
    backend = _backend(tokenizer)
    if backend is None:
        added = {str(token_id): token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        return stable_hash("tokenizer", type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added)
    return _fingerprint_backend(backend)


def fingerprint_template(tokenizer: Any) -> str:
    """Identity of the chat template's text, None included."""
    return stable_hash("template", tokenizer.chat_template)


def write_vocab(path: Location, tokenizer: Any, pieces: Mapping[int, str] | None = None) -> None:
    """Writes every token of the tokenizer in stillroom.schema.tables.VOCAB_SCHEMA, ordered by id.

    `pieces` are its pieces_of() where these are known.
    """
    pieces = pieces or pieces_of(tokenizer)
    special = _special_ids(tokenizer)
    ids = sorted(pieces)
    columns = [
        pa.array(ids, pa.int32()),
        pa.array([pieces[i] for i in ids], pa.string()),
        pa.array([i in special for i in ids], pa.bool_()),
    ]
    with atomic_path(path) as temp:
        pq.write_table(pa.Table.from_arrays(columns, schema=VOCAB_SCHEMA), temp, compression="zstd")


def pieces_of(tokenizer: Any) -> dict[int, str]:
    """Text of each token by id. Bytes that are not valid UTF-8 by themselves are shown as <0xE2>."""
    # All of tokenizer.json takes a second to parse, most of it the merges.
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    kinds = set() if decoder is None else _decoder_kinds(json.loads(decoder.__getstate__()))
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    pieces: dict[int, str] = dict(added)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            continue
        if "ByteLevel" in kinds and byte_of.keys() >= set(token):
            pieces[token_id] = _show_bytes(bytes([byte_of[char] for char in token]))
        elif kinds & {"Metaspace", "Replace"}:
            # SentencePiece writes a space as U+2581; decode would drop the one before a first token.
            pieces[token_id] = token.replace("▁", " ")
        else:
            # Slow, a call per token, but right for any other tokenizer.
            pieces[token_id] = tokenizer.decode([token_id])
    return pieces


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the others are U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def cached_pieces(vocab: Location) -> tuple[dict[int, str], set[int]]:
    """Texts of all tokens in a cache's vocabulary file by id, and the ids of the special ones; empty without a file.

    Raises CorruptError if the file cannot be read.
    """
    if not vocab.exists():
        return {}, set()
    table = _read_vocab(vocab)
    ids, pieces, special = (table.column(name).to_pylist() for name in ("token_id", "piece", "is_special"))
    chosen = {token_id for token_id, is_special in zip(ids, special, strict=True) if is_special}
    return dict(zip(ids, pieces, strict=True)), chosen


def special_pieces(vocab: Location) -> dict[int, str]:
    """Texts of the special tokens in a cache's vocabulary file by id; empty if there is no file.

    Raises CorruptError if the file cannot be read.
    """
    pieces, special = cached_pieces(vocab)
    return {token_id: pieces[token_id] for token_id in special}


def came_to_its_end(finish_reason: str, text: str, last_piece: str | None) -> bool:
    """Whether a chain ended by itself; `last_piece` is the text of its last token if that is special, else None.

    For a scored chain only that token tells: what ends a turn is special and, unlike <think>, not part of the text.
    """
    if finish_reason != "scored":
        return finish_reason == "stop"
    return last_piece is not None and not text.endswith(last_piece)


def end_id_of(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> int | None:
    """The special token that the chat template writes behind an answer: Gemma's <end_of_turn>, whose end of sequence is
    another token. The tokenizer's end of sequence where the template writes none, or cannot render one question.
    """
    special = {*tokenizer.all_special_ids, *(one for one, t in tokenizer.added_tokens_decoder.items() if t.special)}
    behind = _behind_answer(tokenizer, template_kwargs) if tokenizer.chat_template else ""
    # Templates end a turn with a token and a line break, some with a line break before it.
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"] if behind else []
    found: int | None = ids[0] if ids and ids[0] in special else tokenizer.eos_token_id
    return found


def reasoning_ids(tokenizer: Any, start: str, end: str) -> tuple[int | None, int | None]:
    """Ids of the tokens that open and close reasoning; None if that is not a single token of the tokenizer."""
    vocab = tokenizer.get_vocab()
    return vocab.get(start), vocab.get(end)


def split_reasoning(
    token_ids: npt.ArrayLike, prompt_token_ids: npt.ArrayLike, start_id: int | None, end_id: int | None
) -> int | None:
    """Offset in `token_ids` just after the token that ends the reasoning.

    None if reasoning began (in the completion, or in a prompt whose template opens it) and never ended; 0 if there is
    none. Prompt [.. <think>], completion [a b </think> c] gives 3; [a b] gives None; a prompt that ends
    with <think></think> (thinking turned off) and completion [a b] gives 0.
    """
    if end_id is None:
        return 0
    completion, prompt = np.asarray(token_ids), np.asarray(prompt_token_ids)
    ends = np.flatnonzero(completion == end_id)
    if len(ends):
        return int(ends[0]) + 1
    began = start_id is not None and (
        # The last mark of the prompt decides: few-shot examples hold whole pairs.
        bool((completion == start_id).any()) or _last(prompt, start_id) > _last(prompt, end_id)
    )
    return None if began else 0


@dataclass(frozen=True, slots=True)
class VocabDifference:
    """Differences of two vocabularies: (id, piece in the cache or None, piece in the other tokenizer or None)."""

    ordinary: list[tuple[int, str | None, str | None]]
    special: list[tuple[int, str | None, str | None]]

    @property
    def agree(self) -> bool:
        """Whether distributions over the cache's ids mean the same to the other tokenizer, special tokens aside."""
        return not self.ordinary


def compare_vocab(cached: Location, tokenizer: Any, pieces: Mapping[int, str] | None = None) -> VocabDifference:
    """Compares a cache's vocabulary file with a tokenizer, id by id; `pieces` are its pieces_of() where known.

    A difference is special if the id is special or missing on both sides: control tokens and markers such as <think>
    may be renamed within a model family. Rows of an embedding past both vocabularies are padding and appear in neither.
    Raises CorruptError if the file cannot be read.
    """
    table = _read_vocab(cached)
    rows = zip(*(table.column(name).to_pylist() for name in ("token_id", "piece", "is_special")), strict=True)
    mine: dict[int, tuple[str, bool]] = {token_id: (piece, special) for token_id, piece, special in rows}
    special_ids = _special_ids(tokenizer)
    theirs = {
        token_id: (piece, token_id in special_ids) for token_id, piece in (pieces or pieces_of(tokenizer)).items()
    }
    ordinary: list[tuple[int, str | None, str | None]] = []
    special: list[tuple[int, str | None, str | None]] = []
    for token_id in sorted(mine.keys() | theirs.keys()):
        # An id that one side lacks counts as special there, so the other side decides.
        one, other = mine.get(token_id, (None, True)), theirs.get(token_id, (None, True))
        if one[0] != other[0]:
            (special if one[1] and other[1] else ordinary).append((token_id, one[0], other[0]))
    return VocabDifference(ordinary, special)


def require_same_vocab(difference: VocabDifference, student: str) -> None:
    """Raises ConfigError naming ids and pieces if ordinary tokens differ: distributions would teach wrong words."""
    if difference.agree:
        return
    shown = ", ".join(
        f"{i} is {mine!r} in the cache and {other!r} in the student" for i, mine, other in difference.ordinary[:3]
    )
    raise ConfigError(
        f"the vocabulary of {student} differs from the cache's in {len(difference.ordinary)} ordinary tokens "
        f"({shown}): project the distributions into the student's vocabulary (data.kind: projected), or choose a "
        "student of the teacher's family"
    )


def fingerprint_weights(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Fingerprint and resolved revision (the commit of a hub id, None for a folder).

    Raises DataError if a folder has no weights or config.json, or if a hub id cannot be resolved.
    """
    if Path(model).is_dir():
        return fingerprint_folder(Path(model)), None
    commit = resolve_revision(model, revision)
    return stable_hash("hub", model, commit), commit


def fingerprint_folder(folder: Path) -> str:
    """Fingerprint of a Hugging Face folder, independent of its path."""
    kept = model_settings(folder)
    weights = _weight_files(folder)
    if not weights:
        raise DataError(f"{folder} holds no weights: use a Hugging Face model folder")
    # Names count: two shards of a model that were swapped are another model.
    return stable_hash("folder", kept, [[path.name, path.stat().st_size, _sampled_hash(path)] for path in weights])


def fingerprint_adapter(folder: Path) -> str:
    """Fingerprint of a peft adapter's folder, independent of its path and of where its base model was."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # peft writes sets of names in any order.
    settings = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value
        for key, value in config.items()
        if key not in VOLATILE_ADAPTER_KEYS
    }
    weights = folder / "adapter_model.safetensors"
    return stable_hash("adapter", settings, weights.stat().st_size, _sampled_hash(weights))


def fingerprint_served(folder: Path, served_name: str) -> str:
    """Fingerprint of a model with only its config.json: other weights served under the same name look equal."""
    return stable_hash("served", model_settings(folder), served_name)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weight files."""
    return bool(_weight_files(folder))


def resolve_revision(model: str, revision: str | None) -> str:
    """The commit of a hub id, from the hub or, if that cannot be reached, from the local download."""
    if revision is not None and COMMIT.match(revision):
        return revision
    require_folder_or_id(model)
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"{model} is not a folder, and hub ids need: pip install huggingface_hub") from error
    hush_hub()
    try:
        # The path in the local store names the commit: .../snapshots/<commit>/config.json
        path = huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        raise DataError(unreachable(model, error)) from error
    return Path(path).parent.name


def hush_hub() -> None:
    """Reports a hub that does not answer in one line, instead of two per attempt. May be called repeatedly."""
    _CLIENT.addFilter(_once)


def unreachable(model: str, error: Exception) -> str:
    """The message for a name that is not a folder and that the hub did not provide."""
    reason = one_line(error).split(". ")[0].rstrip(".")
    return f"{model} is neither a folder nor a hub id that can be reached: {reason}"


def _once(record: logging.LogRecord) -> bool:
    """Drops log records of failed attempts; the first is replaced by our own line."""
    text = record.getMessage()
    if not ("thrown while requesting" in text or text.startswith("Retrying in ")):
        return True
    if not _said:
        _said.add(text)
        note("the Hugging Face hub does not answer: retrying for half a minute (HF_HUB_OFFLINE=1 skips it)")
    return False


def require_folder_or_id(model: str) -> None:
    """Raises DataError for a path without a folder, which the hub would report less clearly."""
    if not Path(model).is_dir() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise DataError(f"{model} is not a folder: use a Hugging Face model folder or a hub id")


def require_model_folder_or_id(model: str) -> None:
    """Raises DataError for a folder that is not a model's, which transformers would report less clearly."""
    require_folder_or_id(model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise DataError(f"{model} has no config.json: use a Hugging Face model folder")


def model_settings(folder: Path) -> dict[str, Any]:
    """config.json without keys that do not describe the model. Raises DataError if the folder has none to read."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: use a Hugging Face model folder")
    require_model_folder_or_id(str(folder))
    config = folder / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    return {key: value for key, value in settings.items() if key not in VOLATILE_CONFIG_KEYS}


def public_name(model: str) -> str:
    """A hub id as it is, a folder by its last name: what is published should name no path of this machine."""
    is_id = not (Path(model).is_dir() or model.startswith(("/", ".", "~")) or model.count("/") > 1)
    return model if is_id else Path(model).resolve().name


def _unusable(model: str, what: str, error: Exception) -> str:
    if isinstance(error, OSError) and not Path(model).is_dir():
        return unreachable(model, error)
    return f"{model} has no {what}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The error in one line; for a model that ships code, what that means."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "custom code" in text:
        return "it ships Python code of its own, which runs only with trust_remote_code: true; trust it like a program"
    return text[:300]


def _fingerprint_backend(backend: dict[str, Any]) -> str:
    canonical = {key: value for key, value in backend.items() if key not in VOLATILE_KEYS}
    model = dict(canonical["model"])
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    if "merges" in model:
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    return stable_hash("tokenizer", {**canonical, "model": model})


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """tokenizer.json of a fast tokenizer, None for one in Python code."""
    if not tokenizer.is_fast:
        return None
    loaded: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return loaded


def _read_vocab(cached: Location) -> pa.Table:
    try:
        with local_copy(cached) as path:
            return pq.read_table(path, schema=VOCAB_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise CorruptError(f"{cached} is not a readable vocabulary: {first_line(error)}") from error


def _behind_answer(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    """`<end_of_turn>\\n`; empty if the template refuses one question, or does not keep the answer."""
    from jinja2 import TemplateError

    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **template_kwargs)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return ""
    _, mark, rest = str(text).rpartition(MARK)
    return rest if mark else ""


def _special_ids(tokenizer: Any) -> set[int]:
    # all_special_ids holds those with a role, such as bos and eos; markers such as <think> have none.
    special = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special or MARKER.match(token.content):
            special.add(token_id)
    return special


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoder_kinds(part)}
    return {decoder["type"]}


def _show_bytes(data: bytes) -> str:
    """UTF-8 text; bytes that do not form a whole character as <0xE2>."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        # surrogateescape turns a lone byte 0xE2 into U+DCE2, which is written out below.
        text = data.decode(errors="surrogateescape")
    return "".join(f"<0x{ord(char) - 0xDC00:02X}>" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text)


def _last(ids: npt.NDArray[Any], token_id: int | None) -> int:
    places = np.flatnonzero(ids == token_id)
    return int(places[-1]) if len(places) else -1


def _weight_files(folder: Path) -> list[Path]:
    # training_args.bin holds a Trainer's settings, no weights.
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.stem != "training_args")
    # If a folder has both, transformers loads safetensors.
    return [path for path in files if path.suffix == ".safetensors"] or files


def _sampled_hash(path: Path) -> str:
    """SHA-256 of NUM_BLOCKS blocks spread evenly over the file, both ends included; of all bytes of a small file."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if size_bytes <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
        else:
            # All bytes of 600 GB would take SHA-256 an hour before every build.
            for block in range(NUM_BLOCKS):
                stream.seek(block * (size_bytes - BLOCK_BYTES) // (NUM_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
